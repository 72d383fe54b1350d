"""wmma against matrices in numpy: every shape, type and layout, from and to global and shared memory."""

import itertools

import numpy as np
import pytest
import tensor_cores as tc
import torch
from ptx import finding, run
from rows import row

pytestmark = pytest.mark.interpreted

SHAPES = "m16n16k16|m32n8k16|m8n32k16|m16n16k8|m8n8k4|m8n8k32|m8n8k128"
TYPES = "f16|bf16|tf32|f32|f64|s32|s8|u8|s4|u4|b1"
PATTERNS = (
    f"wmma.load.a|b|c.sync.aligned.row|col.{SHAPES}.global|shared|shared::cta?.{TYPES}",
    f"wmma.store.d.sync.aligned.row|col.{SHAPES}.global|shared|shared::cta?.{TYPES}",
    f"wmma.mma.xor|and?.popc?.sync.aligned.row|col.row|col.rn|rz|rm|rp?.{SHAPES}.{TYPES}.{TYPES}.{TYPES}?.{TYPES}?.satfinite?",
)
#: of A and B, of C and D, and what wmma.mma says of them
KINDS = [("f16", "f32", "f32.f32"), ("f16", "f16", "f16.f16"), ("bf16", "f32", "f32.bf16.bf16.f32"),
         ("tf32", "f32", "f32.tf32.tf32.f32"), ("s8", "s32", "s32.s8.s8.s32"), ("u8", "s32", "s32.u8.u8.s32")]  # fmt: skip
CASES = [
    (type, sums, spelled, shape)
    for type, sums, spelled in KINDS
    for shape in ([(16, 16, 8)] if type == "tf32" else [(16, 16, 16), (32, 8, 16), (8, 32, 16)])
]
REGISTERS = {"f16": (8, 8), "tf32": (4, 4)}


def counts(type, sums, shape):
    """Registers of A, B and C: what the ISA's table of fragments says."""
    m, n, k = shape
    a, b = REGISTERS.get(type) or (m * k * tc.BYTES[type] // 128, n * k * tc.BYTES[type] // 128)
    return a, b, 4 if sums == "f16" else 8


def registers(first, count, float32=False):
    return "{" + ", ".join(f"%{'f' if float32 else 'r'}{first + i}" for i in range(count)) + "}"


def multiply(type, sums, spelled, shape, layouts, space, extra=0, satfinite="", given=None, d_registers=None):
    """D of random matrices, and what it should be; the layout of A, B, C and D is "row" or "col", their stride has `extra`."""
    m, n, k = shape
    rng = np.random.default_rng(0)
    values = given or [tc.random_matrix(rng, s, t, True) for s, t in (((m, k), type), ((k, n), type), ((m, n), sums))]
    bits = [tc.encode(v, t) for v, t in zip(values, (type, type, sums))]
    memory, strides = [], []
    for x, layout in zip([*bits, np.zeros_like(bits[2])], layouts):
        lines = x if layout == "row" else x.T
        padded = np.full((lines.shape[0], lines.shape[1] + extra), 0x11, lines.dtype)
        padded[:, : lines.shape[1]] = lines
        memory.append(torch.from_numpy(padded.view(np.uint8).reshape(-1).copy()))
        strides.append(padded.shape[1])
    na, nb, nc = counts(type, sums, shape)
    name, float32 = "m{}n{}k{}".format(*shape), sums == "f32"
    a, b, c = registers(0, na), registers(8, nb), registers(16, nc, float32)
    d = d_registers or registers(24, nc, float32)
    parts, address = [], ["%a0", "%a1", "%a2", "%a3"]
    stride = [f", {s}" if extra else "" for s in strides]
    dot_space = f".{space}" if space else ""
    if space == "shared":  # byte by byte; one lane copies, and all take what it copied
        for i, x in enumerate(memory):
            address[i] = f"%s+{8192 * i}"
            parts.append(copy(f"%a{i}", address[i], len(x), f"in{i}"))
        parts.append("bar.warp.sync -1;")
    parts += [
        f"wmma.load.a.sync.aligned.{layouts[0]}.{name}{dot_space}.{type} {a}, [{address[0]}]{stride[0]};",
        f"wmma.load.b.sync.aligned.{layouts[1]}.{name}{dot_space}.{type} {b}, [{address[1]}]{stride[1]};",
        f"wmma.load.c.sync.aligned.{layouts[2]}.{name}{dot_space}.{sums} {c}, [{address[2]}]{stride[2]};",
        f"wmma.mma.sync.aligned.{layouts[0]}.{layouts[1]}.{name}.{spelled}{satfinite} {d}, {a}, {b}, {c};",
        f"wmma.store.d.sync.aligned.{layouts[3]}.{name}{dot_space}.{sums} [{address[3]}], {d}{stride[3]};",
    ]
    if space == "shared":
        parts += ["bar.warp.sync -1;", copy(address[3], "%a3", len(memory[3]), "out")]
    run("\n".join(parts), *memory, shared=32768, arch="sm_80")
    lines = memory[3].numpy().view(bits[2].dtype).reshape(-1, strides[3])
    untouched = lines[:, lines.shape[1] - extra :]
    assert (untouched == np.full_like(untouched, 0x11)).all() if extra else True
    got = lines[:, : lines.shape[1] - extra]
    decoded = [tc.decode(x, t) for x, t in zip(bits, (type, type, sums))]
    expected = tc.product(*decoded, sums, bool(satfinite))
    return got if layouts[3] == "row" else got.T, expected


def copy(source, target, size, label):
    load, store = ("shared", "global") if source.startswith("%s") else ("global", "shared")
    at = {"shared": "add.u32 %r38, {}, %r39;", "global": "cvt.u64.u32 %rd39, %r39;\nadd.u64 %rd38, {}, %rd39;"}
    where = {"shared": "%r38", "global": "%rd38"}
    more = {"shared": "", "global": ""}
    for space, text in ((load, source), (store, target)):
        more[space] = text.partition("+")[2] or "0"
    return f"""
    mov.u32 %r39, 0;
    {label}:
    {at[load].format(source.partition("+")[0])}
    {at[store].format(target.partition("+")[0])}
    setp.eq.u32 %p9, %t, 0;
    @%p9 ld.{load}.u8 %h9, [{where[load]}+{more[load]}];
    @%p9 st.{store}.u8 [{where[store]}+{more[store]}], %h9;
    add.u32 %r39, %r39, 1;
    setp.lt.u32 %p9, %r39, {size};
    @%p9 bra {label};"""


@row(*PATTERNS)
@pytest.mark.parametrize(("type", "sums", "spelled", "shape"), CASES)
def test_products(type, sums, spelled, shape):
    for n, layouts in enumerate(itertools.product(("row", "col"), repeat=4)):
        got, expected = multiply(type, sums, spelled, shape, layouts, ["global", ""][n % 2], extra=16 * (n % 3 == 0))
        assert np.array_equal(got, expected), layouts


@pytest.mark.parametrize(("type", "sums", "spelled", "shape"), [CASES[0], CASES[4], CASES[9], CASES[10]])
def test_in_shared_memory(type, sums, spelled, shape):
    got, expected = multiply(type, sums, spelled, shape, ("row", "col", "row", "row"), "shared")
    assert np.array_equal(got, expected)
    got, expected = multiply(type, sums, spelled, shape, ("col", "row", "col", "row"), "shared")
    assert np.array_equal(got, expected)


def test_saturated():
    a, b = np.full((16, 16), 127), np.full((16, 16), 127)
    c = np.full((16, 16), 2**31 - 1000)
    got, expected = multiply(
        "s8", "s32", "s32.s8.s8.s32", (16, 16, 16), ["row"] * 4, "global", 0, ".satfinite", [a, b, c]
    )
    assert (got.view(np.int32) == 2**31 - 1).all() and np.array_equal(got, expected)
    got, _ = multiply("s8", "s32", "s32.s8.s8.s32", (16, 16, 16), ["row"] * 4, "global", 0, "", [a, b, c])
    assert (got.view(np.int32) < 0).all()


def test_sums_in_place():
    """D is C."""
    got, expected = multiply(*CASES[0], ["row"] * 4, "global", d_registers=registers(16, 8, True))
    assert np.array_equal(got, expected)


def test_bounds():
    load = "wmma.load.a.sync.aligned.row.m16n16k16.global.f16 " + registers(0, 8) + ", [%a0];"
    run(load, torch.zeros(256, dtype=torch.float16))
    f = finding(load, torch.zeros(255, dtype=torch.float16))
    assert f.kind == "out_of_bounds" and f.lane == 31
    assert finding("setp.lt.u32 %p1, %t, 9;\n@%p1 " + load, torch.zeros(256, dtype=torch.float16)).kind == "barrier"


def test_race():
    """A row of the tile that one lane is still writing."""
    store = "shl.b32 %r30, %t, 4;\nadd.u32 %r30, %r30, %s;\nst.shared.v4.u32 [%r30], {%t, %t, %t, %t};\n"
    load = f"wmma.load.a.sync.aligned.row.m16n16k16.shared.f16 {registers(0, 8)}, [%s];"
    run(store + "bar.warp.sync -1;\n" + load)
    assert finding(store + load).kind == "race"


def test_refused():
    r8, f8, r4, b8 = registers(0, 8), registers(0, 8, True), registers(0, 4), registers(8, 8)
    c8 = registers(16, 8)
    for text, why in (
        ("wmma.load.a.sync.aligned.row.m8n8k4.global.f64 {%rd1}, [%a0];", "wmma of f64"),
        ("wmma.load.a.sync.aligned.row.m8n8k32.global.s4 {%r1}, [%a0];", "4 and 1 bits"),
        ("wmma.mma.xor.popc.sync.aligned.row.col.m8n8k128.s32.b1.b1.s32 {%r0, %r1}, {%r2}, {%r3}, {%r4, %r5};", "1 bits"),
        (f"wmma.load.a.sync.aligned.row.m16n16k8.global.f16 {r8}, [%a0];", "only one"),
        (f"wmma.mma.sync.aligned.row.col.m16n16k16.f32.f16 {f8}, {r8}, {r8}, {r4};", "two types"),
        (f"wmma.mma.sync.aligned.row.col.m16n16k16.f16.f16.satfinite {r4}, {b8}, {c8}, {r4};", "satfinite"),
        (f"wmma.mma.sync.aligned.row.col.m16n16k16.s32.s8.u8.s32 {r8}, {{%r8, %r9}}, {{%r10, %r11}}, {r8};", "one type"),
        (f"wmma.mma.sync.aligned.row.col.m16n16k16.f32.s8.s8.f32 {f8}, {{%r8, %r9}}, {{%r10, %r11}}, {f8};", "sums of this type"),
        (f"wmma.mma.sync.aligned.row.col.m16n16k16.f16.f16 {r4}, {r8}, {b8}, {r4};", "D in registers of A or B"),
        (f"wmma.load.b.sync.aligned.row.m16n16k16.global.bf16 {r8}, [%a0];", "has 8 registers"),
    ):  # fmt: skip
        f = finding(text, torch.zeros(256, dtype=torch.float16))
        assert f.kind == "unsupported" and why in f.message, f
