"""atom and red against numpy and torch."""

import itertools

import numpy as np
import pytest
import torch
from memory_kernels import NUMPY, PLACES, REGISTER, SCOPE, STATE_SPACE, aligned, randoms, run_numpy, tensor
from ptx import assert_refused, kernel, run
from rows import row

import gpuless

pytestmark = pytest.mark.interpreted

MODIFIER = f"relaxed|acquire|release|acq_rel|{SCOPE}|{STATE_SPACE}?"
BEFORE = ".".join([MODIFIER] * 3)
AFTER = f"{BEFORE}.L2::cache_hint?"


def atomic_row(op, kinds, head="atom|red"):
    return f"{head}.{BEFORE}.{op}.{AFTER}.{kinds}"


# ---- atom and red ----

ORDERS = ["", ".relaxed.gpu", ".acquire.cta", ".release.sys", ".acq_rel.cluster"]
INTEGER = {
    "and": (["b32", "b64"], lambda o, b: o & b),
    "or": (["b32", "b64"], lambda o, b: o | b),
    "xor": (["b32", "b64"], lambda o, b: o ^ b),
    "exch": (["b32", "b64"], lambda o, b: b),
    "add": (["u32", "s32", "u64"], lambda o, b: o + b),
    "min": (["u32", "s32", "u64", "s64"], np.minimum),
    "max": (["u32", "s32", "u64", "s64"], np.maximum),
    "inc": (["u32"], lambda o, b: np.where(o >= b, 0, o + 1)),
    "dec": (["u32"], lambda o, b: np.where((o == 0) | (o > b), b, o - 1)),
}
CASES = [(op, kind) for op, (kinds, _) in INTEGER.items() for kind in kinds]


def atomic_body(opcode, size, r, space, returns=True, extra=""):
    """Memory starts as a0, the operand is a1, the result goes to a1 and what memory held to a0."""
    at = {"global": "[%rd0]", "shared": "[%r0]", "": "[%rd4]"}[space]
    result = f"%{r}7, " if returns else ""
    return f"""{PLACES.format(bytes=size)}
    cvt.u64.u32 %rd4, %r0;
    cvta.shared.u64 %rd4, %rd4;
    ld.global.b{size * 8} %{r}5, [%rd0];
    ld.global.b{size * 8} %{r}6, [%rd1];
    st.shared.b{size * 8} [%r0], %{r}5;
    mov.b{size * 8} %{r}7, 0;
    {opcode} {result}{at}, %{r}6{extra};
    {"" if space == "global" else f"ld.shared.b{size * 8} %{r}8, [%r0];"}
    {"" if space == "global" else f"st.global.b{size * 8} [%rd0], %{r}8;"}
    st.global.b{size * 8} [%rd1], %{r}7;"""


@pytest.mark.parametrize("space", ["global", "shared", ""])
@pytest.mark.parametrize(("op", "kind"), CASES)
@row(
    *(atomic_row(op, "|".join(kinds)) for op, (kinds, _) in INTEGER.items() if op not in ("exch", "add")),
    atomic_row("exch", "b32|b64|b128", "atom"),
    atomic_row("add", "u32|s32|u64|f32|f64"),
)
def test_integer_atomics(op, kind, space):
    dtype = np.dtype(NUMPY[kind])
    x, b = randoms(32, dtype, 1), randoms(32, dtype, 2)
    x[:4], b[:4] = [0, 5, 9, b[3]], [0, 9, 5, b[3]]
    dot = f".{space}" if space else ""
    with np.errstate(over="ignore"):
        wanted = INTEGER[op][1](x, b).astype(dtype)
    for order in ORDERS:
        opcode = f"atom{order}{dot}.{op}.{kind}"
        memory, result = run_numpy(atomic_body(opcode, dtype.itemsize, REGISTER[dtype.itemsize * 8], space), x, b)
        np.testing.assert_array_equal(result, x)
        np.testing.assert_array_equal(memory, wanted)
    if op != "exch":
        for order in ("", ".relaxed.gpu", ".release.sys"):
            opcode = f"red{order}{dot}.{op}.{kind}"
            body = atomic_body(opcode, dtype.itemsize, REGISTER[dtype.itemsize * 8], space, returns=False)
            memory, _ = run_numpy(body, x, b)
            np.testing.assert_array_equal(memory, wanted)


# every order that ptxas takes, with the operation at every place: Triton 3.9 writes atom.global.acq_rel.gpu.cas
OPCODES = [".".join(("atom", *words, "u32")) for words in itertools.permutations(["add", "global", "acq_rel", "gpu"])]


@pytest.mark.parametrize(
    "opcode", [*OPCODES, "atom.global.add.u32", "atom.add.release.gpu.u32", "atom.global.add.L2::cache_hint.u32"]
)
def test_orders_of_the_modifiers(opcode):
    x, b = randoms(32, np.uint32, 1), randoms(32, np.uint32, 2)
    extra = ", %rd4" if "hint" in opcode else ""
    memory, result = run_numpy(atomic_body(opcode, 4, "r", "global", extra=extra), x, b)
    np.testing.assert_array_equal(memory, x + b)
    np.testing.assert_array_equal(result, x)


def test_orders_of_red():
    for words in itertools.permutations(["add", "global", "release", "gpu"]):
        x, b = randoms(32, np.uint32, 1), randoms(32, np.uint32, 2)
        opcode = ".".join(("red", *words, "u32"))
        memory, _ = run_numpy(atomic_body(opcode, 4, "r", "global", returns=False), x, b)
        np.testing.assert_array_equal(memory, x + b)


@pytest.mark.parametrize(
    "opcode", ["atom.gpu.global.cta.add.u32", "atom.acq_rel.add.relaxed.u32", "atom.global.add.global.u32"]
)
def test_a_modifier_twice_is_refused(opcode):
    assert "twice" in assert_refused(f"{opcode} %r1, [%a0], %r2;", torch.zeros(1))


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(("kind", "r"), [("b16", "h"), ("b32", "r"), ("b64", "rd")])
@row(atomic_row("cas", "b16|b32|b64|b128", "atom"))
def test_cas(kind, r, space):
    dtype = np.dtype(NUMPY[kind])
    x, c = randoms(32, dtype, 1), randoms(32, dtype, 2)
    at = {"global": "[%rd0]", "shared": "[%r0]"}[space]
    # odd lanes compare with what is there, even ones with something else
    body = f"""{PLACES.format(bytes=dtype.itemsize)}
    ld.global.{kind} %{r}5, [%rd0];
    ld.global.{kind} %{r}6, [%rd1];
    st.shared.{kind} [%r0], %{r}5;
    and.b32 %r1, %t, 1;
    setp.eq.u32 %p1, %r1, 1;
    not.{kind} %{r}9, %{r}5;
    selp.{kind} %{r}8, %{r}5, %{r}9, %p1;
    atom.{space}.cas.{kind} %{r}7, {at}, %{r}8, %{r}6;
    {"" if space == "global" else f"ld.shared.{kind} %{r}5, [%r0]; st.global.{kind} [%rd0], %{r}5;"}
    st.global.{kind} [%rd1], %{r}7;"""
    memory, result = run_numpy(body, x, c)
    np.testing.assert_array_equal(result, x)
    np.testing.assert_array_equal(memory, np.where(np.arange(32) % 2, c, x))


@pytest.mark.parametrize("space", ["global", "shared"])
def test_128_bit_atomics(space):
    x, c = aligned(512, 16), aligned(512, 16)
    x.copy_(before := tensor(randoms(512, np.uint8, 1)))
    c.copy_(new := tensor(randoms(512, np.uint8, 2)))
    at = {"global": "[%rd0]", "shared": "[%r0]"}[space]
    back = "" if space == "global" else "ld.shared.b128 %q4, [%r0];\nst.global.b128 [%rd0], %q4;"
    head = f""".reg .b128 %q<8>;
    {PLACES.format(bytes=16)}
    ld.global.b128 %q0, [%rd0];
    ld.global.b128 %q1, [%rd1];
    st.shared.b128 [%r0], %q0;"""
    run(f"{head}\natom.{space}.exch.b128 %q3, {at}, %q1;\n{back}\nst.global.b128 [%rd1], %q3;", x, c)
    assert torch.equal(x, new) and torch.equal(c, before)
    run(f"{head}\natom.{space}.cas.b128 %q3, {at}, %q1, %q1;\n{back}\nst.global.b128 [%rd1], %q3;", x, c)
    assert torch.equal(x, new) and torch.equal(c, new)
    run(f"{head}\natom.{space}.cas.b128 %q3, {at}, %q0, %q1;\n{back}\nst.global.b128 [%rd1], %q3;", x, c)
    assert torch.equal(x, new)


SPECIAL = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1.0, -2.5, 65504.0]


def floats(dtype, n, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=g) * torch.exp2(torch.randint(-20, 15, (n,), generator=g).float())
    x[: len(SPECIAL)] = torch.tensor(SPECIAL if seed % 2 else SPECIAL[::-1])
    return x.to(dtype)


def same(a, b):
    """Bit by bit, but any NaN will do."""
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return bool(((a.view(ints) == b.view(ints)) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(("dtype", "r"), [(torch.float32, "f"), (torch.float64, "rd")])
@row(atomic_row("add", "u32|s32|u64|f32|f64"))
def test_float_add(dtype, r, space):
    x, b = floats(dtype, 32, 1), floats(dtype, 32, 2)
    if dtype == torch.float32:
        x[-1], b[-1] = 1e-40, 2e-40  # flushed in global memory, not in shared
    wanted, before, size = x + b, x.clone(), x.element_size()
    if dtype == torch.float32 and space == "global":
        wanted[-1] = 0
    run(atomic_body(f"atom.{space}.add.f{size * 8}", size, r, space), x, b)
    assert same(x, wanted)
    if space == "shared":
        assert same(b, before)


PACKED = [
    (op, kind, vector)
    for op in ("add", "min", "max")
    for kind in ("f16", "bf16", "f16x2", "bf16x2")
    for vector in (0, 2, 4, 8)
    if (vector or op == "add") and not (vector == 8 and "x2" in kind)
]


@pytest.mark.parametrize("head", ["atom", "red"])
@pytest.mark.parametrize(("op", "kind", "vector"), PACKED)
@row(
    atomic_row("add.noftz", "v2|v4|v8?.f16|bf16|f16x2|bf16x2"),
    *(
        atomic_row(f"{op}.noftz", kinds)
        for op in ("min", "max")
        for kinds in ("v2|v4|v8.f16|bf16", "v2|v4.f16x2|bf16x2")
    ),
)
def test_half_atomics(op, kind, vector, head):
    dtype = torch.bfloat16 if kind.startswith("b") else torch.float16
    packed, count = 2 if "x2" in kind else 1, max(vector, 1)
    n = 32 * packed * count
    x, b = floats(dtype, n, 1), floats(dtype, n, 2)
    before = x.clone()
    if op == "add":
        wanted = (x.double() + b.double()).to(dtype)
    else:
        f = torch.fmin if op == "min" else torch.fmax
        wanted = f(x.double(), b.double()).to(dtype)
        zeros = (x == 0) & (b == 0)
        sign = torch.signbit(x) | torch.signbit(b) if op == "min" else torch.signbit(x) & torch.signbit(b)
        wanted = torch.where(zeros, torch.where(sign, -0.0, 0.0).to(dtype), wanted)
    r, bits = ("r", 32) if packed == 2 else ("h", 16)
    size = bits // 8
    loads = "\n".join(f"ld.global.b{bits} %{r}{10 + k}, [%rd1+{k * size}];" for k in range(count))
    stores = "\n".join(f"st.global.b{bits} [%rd1+{k * size}], %{r}{20 + k};" for k in range(count))
    operand = "{" + ", ".join(f"%{r}{10 + k}" for k in range(count)) + "}" if vector else f"%{r}10"
    result = "{" + ", ".join(f"%{r}{20 + k}" for k in range(count)) + "}" if vector else f"%{r}20"
    dot = f".v{vector}" if vector else ""
    opcode = f"{head}.global.{op}.noftz{dot}.{kind}"
    body = f"{PLACES.format(bytes=size * count)}\n{loads}\n{opcode} {result + ', ' if head == 'atom' else ''}[%rd0], {operand};"
    run(body + ("\n" + stores if head == "atom" else ""), x, b)
    assert same(x, wanted)
    if head == "atom":
        assert same(b, before)


@pytest.mark.parametrize("vector", [2, 4])
@row(atomic_row("add", "v2|v4.f32"))
def test_vectors_of_float_add(vector):
    x, b = floats(torch.float32, 32 * vector, 1), floats(torch.float32, 32 * vector, 2)
    wanted = x + b
    registers = "{" + ", ".join(f"%f{k}" for k in range(vector)) + "}"
    body = f"""{PLACES.format(bytes=4 * vector)}
    ld.global.v{vector}.f32 {registers}, [%rd1];
    red.relaxed.gpu.global.add.v{vector}.f32 [%rd0], {registers};"""
    run(body, x, b)
    assert same(x, wanted)


def test_lanes_add_up_across_warps_and_blocks():
    """To one address, from several threads of the host: every lane sees a sum of its own."""
    x, y = torch.zeros(1, dtype=torch.int32), torch.zeros(8 * 128, dtype=torch.int32)
    text = kernel(
        """mov.u32 %r1, %ctaid.x;
    mad.lo.u32 %r1, %r1, 128, %t;
    mul.wide.u32 %rd1, %r1, 4;
    add.u64 %rd1, %a1, %rd1;
    atom.global.add.u32 %r2, [%a0], 1;
    st.global.u32 [%rd1], %r2;""",
        (x, y),
        block=128,
    )
    for seed in range(4):
        x.zero_()
        with gpuless.gpu("sm_90a", seed=seed):
            gpuless.Module(text)["k"].launch(8, 128, (x, y))
        assert x.item() == 8 * 128 and torch.equal(y.sort().values, torch.arange(8 * 128).int())


def test_the_seed_decides_the_order_of_lanes():
    x, y = torch.zeros(1, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    orders = []
    for seed in (0, 1, 2, 3, 0):
        body = "mul.wide.u32 %rd1, %t, 4;\nadd.u64 %rd1, %a1, %rd1;\natom.global.add.u32 %r2, [%a0], 1;\nst.global.u32 [%rd1], %r2;"
        run(body, x.zero_(), y, seed=seed)
        assert torch.equal(y.sort().values, torch.arange(32).int())
        orders.append(tuple(y.tolist()))
    assert len(set(orders)) > 1
