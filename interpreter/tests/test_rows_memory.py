"""Loads, stores and addresses: what they do against numpy or torch, and what is refused."""

import itertools

import numpy as np
import pytest
import torch
from memory_kernels import NUMPY, PLACES, REGISTER, SCOPE, STATE_SPACE, WIDTHS, aligned, randoms, run_numpy
from ptx import assert_refused, finding, integers, kernel, run
from rows import row

import gpuless

pytestmark = pytest.mark.interpreted

SPACES = f"{STATE_SPACE}|local|const|param|param::entry"
TYPES = "b8|b16|b32|b64|b128|u8|u16|u32|u64|s8|s16|s32|s64|f32|f64"
LEVEL1 = "L1::evict_normal|L1::evict_unchanged|L1::evict_first|L1::evict_last|L1::no_allocate"
HINTS = f"{LEVEL1}?.L2::cache_hint?.L2::64B|L2::128B|L2::256B?.v2|v4?.{TYPES}"
LOAD_ORDER, STORE_ORDER = "weak|volatile|relaxed|acquire", "weak|volatile|relaxed|release"
LD = (
    f"ld.{LOAD_ORDER}?.{SCOPE}?.{STATE_SPACE}|const|local|param|param::entry|param::func?"
    f".{LOAD_ORDER}?.{SCOPE}?.ca|cg|cs|lu|cv?.{HINTS}"
)
LD_MMIO, LD_NC = f"ld.mmio.relaxed.sys.global?.{TYPES}", f"ld.global.ca|cg|cs?.nc.{HINTS}"
LDU = f"ldu.global?.v2|v4?.{TYPES}"
ST = (
    f"st.{STORE_ORDER}?.{SCOPE}?.{STATE_SPACE}|local|param|param::func?.{STORE_ORDER}?.{SCOPE}?.wb|cg|cs|wt?"
    f".{LEVEL1}?.L2::cache_hint?.v2|v4?.{TYPES}"
)
ST_MMIO = f"st.mmio.relaxed.sys.global?.{TYPES}"
PRIMARY = "L2::evict_last|L2::evict_normal|L2::evict_first|L2::evict_unchanged"
SECONDARY = "L2::evict_first|L2::evict_unchanged?"


# ---- ld and st ----


@pytest.mark.parametrize(("kind", "width"), WIDTHS)
@row(LD)
def test_ld_extends_into_a_wider_register(kind, width):
    dtype = np.dtype(NUMPY[kind])
    x = randoms(32, dtype)
    wide = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{width // 8}")
    r = f"%{REGISTER[width]}5"
    body = f"""mul.wide.u32 %rd2, %t, {dtype.itemsize};
    add.u64 %rd0, %a0, %rd2;
    mul.wide.u32 %rd2, %t, {width // 8};
    add.u64 %rd1, %a1, %rd2;
    ld.global.{kind} {r}, [%rd0];
    st.global.b{width} [%rd1], {r};"""
    _, y = run_numpy(body, x, np.zeros(32, wide))
    np.testing.assert_array_equal(y, x.astype(wide))


@pytest.mark.parametrize(("kind", "width"), WIDTHS)
@row(ST)
def test_st_drops_the_rest_of_a_wider_register(kind, width):
    dtype = np.dtype(NUMPY[kind])
    x = randoms(32, f"u{width // 8}")
    r = f"%{REGISTER[width]}5"
    body = f"""mul.wide.u32 %rd2, %t, {width // 8};
    add.u64 %rd0, %a0, %rd2;
    mul.wide.u32 %rd2, %t, {dtype.itemsize};
    add.u64 %rd1, %a1, %rd2;
    ld.global.b{width} {r}, [%rd0];
    st.global.{kind} [%rd1], {r};"""
    _, y = run_numpy(body, x, np.zeros(32, dtype))
    np.testing.assert_array_equal(y, x.astype(dtype))


VECTORS = [(n, k) for n, k in itertools.product((2, 4), NUMPY) if n * np.dtype(NUMPY[k]).itemsize <= 16]


@pytest.mark.parametrize("space", ["global", "shared", "generic"])
@pytest.mark.parametrize(("count", "kind"), VECTORS)
def test_vectors(count, kind, space):
    size = np.dtype(NUMPY[kind]).itemsize
    x = randoms(32 * count, NUMPY[kind])
    r = REGISTER[max(16, size * 8)]
    registers = "{" + ", ".join(f"%{r}{5 + k}" for k in range(count)) + "}"
    other = "{" + ", ".join(f"%{r}{15 + k}" for k in range(count)) + "}"
    through = {"global": "", "shared": ".shared", "generic": ""}[space]
    at = {"global": "[%rd1]", "shared": "[%r0]", "generic": "[%rd4]"}[space]
    body = f"""{PLACES.format(bytes=count * size)}
    cvt.u64.u32 %rd3, %r0;
    cvta.shared.u64 %rd4, %rd3;
    ld.global.v{count}.{kind} {registers}, [%rd0];
    st{through}.v{count}.{kind} {at}, {registers};
    ld{through}.v{count}.{kind} {other}, {at};
    st.global.v{count}.{kind} [%rd1], {other};"""
    _, y = run_numpy(body, x, np.zeros_like(x))
    np.testing.assert_array_equal(y, x)


def test_a_sink_takes_the_place_of_an_element():
    x = integers(128)
    y = torch.zeros(32, dtype=torch.int32)
    run("""mul.wide.u32 %rd2, %t, 16;
    add.u64 %rd0, %a0, %rd2;
    mul.wide.u32 %rd2, %t, 4;
    add.u64 %rd1, %a1, %rd2;
    ld.global.v4.b32 {_, _, %r5, _}, [%rd0];
    st.global.b32 [%rd1], %r5;""", x, y)  # fmt: skip
    assert torch.equal(y, x.view(32, 4)[:, 2])


def test_128_bits():
    x, y = integers(128), torch.zeros(128, dtype=torch.int32)
    run(f""".reg .b128 %q<2>;
    {PLACES.format(bytes=16)}
    ld.global.b128 %q0, [%rd0];
    st.shared.b128 [%r0], %q0;
    ld.shared.b128 %q1, [%r0];
    st.global.b128 [%rd1], %q1;""", x, y)  # fmt: skip
    assert torch.equal(x, y)


LOADS = [
    *(f"ld{o}.global{c}" for o in ("", ".weak") for c in ("", ".ca", ".cg", ".cs", ".lu", ".cv")),
    *(f"ld.global{a}{b}{c}" for a in ("", ".L1::evict_normal", ".L1::evict_unchanged", ".L1::evict_first",
                                      ".L1::evict_last", ".L1::no_allocate")
      for b in ("", ".L2::cache_hint") for c in ("", ".L2::64B", ".L2::128B", ".L2::256B")),
    *(f"ld.{o}.{s}.global" for o in ("relaxed", "acquire") for s in ("cta", "cluster", "gpu", "sys")),
    *(f"ld.global{c}.nc{h}" for c in ("", ".ca", ".cg", ".cs") for h in ("", ".L2::128B")),
    "ld", "ld.volatile", "ld.volatile.global", "ld.mmio.relaxed.sys.global", "ldu", "ldu.global", "ld.const",
    "ld.global.nc.L1::no_allocate.L2::128B", "ld.global.acquire.gpu", "ld.acquire.global.gpu", "ld.global.volatile",
]  # fmt: skip


@pytest.mark.parametrize("opcode", LOADS)
@row(LD, LD_MMIO, LD_NC, LDU)
def test_every_spelling_of_ld(opcode):
    x, y = integers(32), torch.zeros(32, dtype=torch.int32)
    policy = ", %rd9" if "cache_hint" in opcode else ""
    run(f"""{PLACES.format(bytes=4)}
    createpolicy.fractional.L2::evict_first.b64 %rd9, 1.0;
    {opcode}.u32 %r5, [%rd0]{policy};
    st.global.u32 [%rd1], %r5;""", x, y)  # fmt: skip
    assert torch.equal(x, y)


STORES = [
    *(f"st{o}.global{c}" for o in ("", ".weak") for c in ("", ".wb", ".cg", ".cs", ".wt")),
    *(f"st.global{a}{b}" for a in ("", ".L1::evict_normal", ".L1::evict_unchanged", ".L1::evict_first",
                                   ".L1::evict_last", ".L1::no_allocate") for b in ("", ".L2::cache_hint")),
    *(f"st.{o}.{s}.global" for o in ("relaxed", "release") for s in ("cta", "cluster", "gpu", "sys")),
    "st", "st.volatile", "st.volatile.global", "st.mmio.relaxed.sys.global", "st.global.release.gpu", "st.global.volatile",
]  # fmt: skip


@pytest.mark.parametrize("opcode", STORES)
@row(ST, ST_MMIO)
def test_every_spelling_of_st(opcode):
    x, y = integers(32), torch.zeros(32, dtype=torch.int32)
    policy = ", %rd9" if "cache_hint" in opcode else ""
    run(f"""{PLACES.format(bytes=4)}
    createpolicy.fractional.L2::evict_last.L2::evict_unchanged.b64 %rd9;
    ld.global.u32 %r5, [%rd0];
    {opcode}.u32 [%rd1], %r5{policy};""", x, y)  # fmt: skip
    assert torch.equal(x, y)


@pytest.mark.parametrize(
    "instruction",
    [
        "ld.global.v4.b64 {%rd5, %rd6, %rd7, %rd8}, [%rd0];",  # sm_100
        "ld.global.v8.b32 {%r5, %r6, %r7, %r8, %r9, %r10, %r11, %r12}, [%rd0];",
        "ld.global.v2.b32 {%r5, %rd6}, [%rd0];",
        "ld.global.v2.b32 %r5, [%rd0];",
        "ld.global.b32 %h5, [%rd0];",
        "ld.global.gpu.b32 %r5, [%rd0];",
        "ld.global.cg.L1::no_allocate.b32 %r5, [%rd0];",
        "ld.relaxed.gpu.global.cg.b32 %r5, [%rd0];",
        "ld.relaxed.gpu.global.gpu.b32 %r5, [%rd0];",
        "ld.volatile.global.relaxed.b32 %r5, [%rd0];",
        "st.bulk.weak.shared::cta [%r0], 16, 0;",
        "st.global.acquire.gpu.b32 [%rd0], %r5;",
        "cvta.shared.u32 %r5, %r6;",
        "red.acquire.gpu.global.add.u32 [%rd0], 1;",
        "red.shared.add.v2.f32 [%r0], {%f1, %f2};",
        "atom.global.add.v2.f32 %f1, [%rd0], {%f1, %f2};",
        "discard.global.L2 [%rd0], 64;",
    ],
)
def test_refusals(instruction):
    assert_refused(instruction)


# ---- Address spaces ----


@row(f"cvta.{SPACES}.u32|u64", f"cvta.to.{SPACES}.u32|u64")
def test_local_memory_belongs_to_the_lane():
    y = torch.zeros(64, dtype=torch.int32)
    run(""".local .align 8 .b8 depot[16];
    mov.u64 %rd5, depot;
    cvta.local.u64 %rd6, %rd5;
    cvta.to.local.u64 %rd7, %rd6;
    st.local.u32 [%rd5+4], %t;
    add.u32 %r1, %t, 100;
    st.u32 [%rd6+8], %r1;
    ld.u32 %r2, [%rd6+4];
    ld.local.u32 %r3, [%rd7+8];
    mul.wide.u32 %rd1, %t, 8;
    add.u64 %rd1, %a0, %rd1;
    st.global.v2.u32 [%rd1], {%r2, %r3};""", y)  # fmt: skip
    assert torch.equal(y.view(32, 2), torch.stack([torch.arange(32), torch.arange(100, 132)], 1).int())


def test_lanes_of_one_instruction_in_different_spaces():
    x, y = integers(32), torch.zeros(32, dtype=torch.int32)
    run(f""".local .align 8 .b8 depot[16];
    {PLACES.format(bytes=4)}
    mov.u64 %rd5, depot;
    st.local.u32 [%rd5], 7;
    st.shared.u32 [%r0], %t;
    cvta.local.u64 %rd6, %rd5;
    cvt.u64.u32 %rd8, %r0;
    cvta.shared.u64 %rd8, %rd8;
    rem.u32 %r1, %t, 3;
    setp.eq.u32 %p1, %r1, 0;
    setp.eq.u32 %p2, %r1, 1;
    selp.b64 %rd9, %rd6, %rd8, %p2;
    selp.b64 %rd9, %rd0, %rd9, %p1;
    ld.u32 %r2, [%rd9];
    st.global.u32 [%rd1], %r2;""", x, y)  # fmt: skip
    t = torch.arange(32).int()
    assert torch.equal(y, torch.where(t % 3 == 0, x, torch.where(t % 3 == 1, 7, t)))


@pytest.mark.parametrize(
    "space", ["shared", "shared::cta", "shared::cluster", "local", "global", "const", "param", "param::entry"]
)
@row(f"isspacep.{SPACES}")
def test_isspacep(space):
    spaces = ["shared", "local", "global", "const", "param"]
    y = torch.zeros(len(spaces), dtype=torch.int32)
    tests = "\n".join(
        f"cvta.{name}.u64 %rd1, %rd{k};\nisspacep.{space} %p1, %rd1;\nselp.u32 %r1, 1, 0, %p1;\nst.global.u32 [%a0+{4 * i}], %r1;"
        for i, (name, k) in enumerate(zip(spaces, range(5, 10)))
    )
    body = f""".local .align 8 .b8 depot[16];
    setp.ne.u32 %p0, %t, 0;
    @%p0 ret;
    cvt.u64.u32 %rd5, %s;
    mov.u64 %rd6, depot;
    mov.u64 %rd7, %a0;
    mov.u64 %rd8, table;
    mov.u64 %rd9, a0;
    {tests}"""
    text = kernel(body, (y,)).replace(".visible", ".const .align 4 .b8 table[16];\n.visible")
    with gpuless.gpu("sm_90a"):
        gpuless.Module(text)["k"].launch(1, 32, (y,))
    assert y.tolist() == [int(space.split("::")[0] == name) for name in spaces]


@pytest.mark.parametrize(("width", "r", "a"), [("u32", "r", "%r0"), ("u64", "rd", "%rd3")])
def test_mapa_and_getctarank_in_a_cluster_of_one(width, r, a):
    y = torch.zeros(32, 2, dtype=torch.int32)
    run(f"""{PLACES.format(bytes=8).replace("%a1", "%a0")}
    cvt.u64.u32 %rd3, %r0;
    cvta.shared.u64 %rd3, %rd3;
    st.shared.u32 [%r0], %t;
    mapa{".shared::cluster" if width == "u32" else ""}.{width} %{r}7, {a}, 0;
    getctarank{".shared::cluster" if width == "u32" else ""}.{width} %r1, %{r}7;
    ld{".shared::cluster" if width == "u32" else ""}.u32 %r2, [%{r}7];
    st.global.v2.u32 [%rd1], {{%r1, %r2}};""", y)  # fmt: skip
    assert torch.equal(y, torch.stack([torch.zeros(32), torch.arange(32)], 1).int())
    assert finding("mapa.shared::cluster.u32 %r7, %s, 1;").kind == "illegal"


def test_a_kernels_parameters_have_generic_addresses():
    y = torch.zeros(1, dtype=torch.int64)
    run("""mov.u64 %rd5, a0;
    cvta.param.u64 %rd6, %rd5;
    ld.u64 %rd7, [%rd6];
    st.global.u64 [%a0], %rd7;""", y)  # fmt: skip
    assert y.item() == y.data_ptr()
    assert finding("mov.u64 %rd5, a0;\ncvta.param.u64 %rd6, %rd5;\nst.u64 [%rd6], %rd6;", y).kind == "illegal"


# ---- Hints ----


@pytest.mark.parametrize(
    "hint",
    [
        *(f"prefetch{s}.{level} [%a0+4096];" for s in ("", ".global") for level in ("L1", "L2")),
        "prefetch.local.L1 [%rd5];",
        "prefetch.global.L2::evict_last [%a0];",
        "prefetch.global.L2::evict_normal [%a0];",
        "prefetch.tensormap [%a0];",
        "prefetch.param.tensormap [%rd5];",
        "prefetch.const.tensormap [%rd5];",
        "prefetchu.L1 [%a0];",
        "applypriority.global.L2::evict_normal [%a0], 128;",
        "applypriority.L2::evict_normal [%a0], 128;",
        "createpolicy.fractional.L2::evict_unchanged.b64 %rd7, 0.5;",
        "createpolicy.fractional.L2::evict_first.L2::evict_first.b64 %rd7;",
        "createpolicy.range.L2::evict_last.L2::evict_unchanged.b64 %rd7, [%a0], 64, 128;",
        "createpolicy.range.global.L2::evict_normal.b64 %rd7, [%a0], 64, 128;",
        "createpolicy.cvt.L2.b64 %rd7, %rd5;",
    ],
)
@row(
    "prefetch.global|local?.L1|L2|L2::evict_last|L2::evict_normal",
    "prefetch.const|param?.tensormap",
    "prefetchu.L1",
    "applypriority.global?.L2::evict_normal",
    f"createpolicy.fractional.{PRIMARY}.{SECONDARY}.b64",
    f"createpolicy.range.global?.{PRIMARY}.{SECONDARY}.b64",
    "createpolicy.cvt.L2.b64",
)
def test_hints_change_nothing(hint):
    x = aligned(128)
    x.copy_(before := integers(32).view(torch.uint8))
    run(f"mov.u64 %rd5, 0;\n{hint}", x)
    assert torch.equal(x, before)


@row("discard.global?.L2")
def test_discard_leaves_nothing():
    x = aligned(256)
    x.fill_(1)
    run("discard.global.L2 [%a0], 128;", x)
    assert not (x[:128] == 1).any() and (x[128:] == 1).all()
    assert finding("discard.L2 [%a0+64], 128;", x).kind == "misaligned"


# ---- Bounds and alignment ----


def test_out_of_bounds_names_what_is_near():
    x = torch.zeros(32, dtype=torch.int32).clone()
    f = finding(
        "add.u32 %r1, %t, 1;\nmul.wide.u32 %rd1, %r1, 4;\nadd.u64 %rd1, %a0, %rd1;\nst.global.u32 [%rd1], %t;", x
    )
    assert f.kind == "out_of_bounds" and "past the end of argument 0 of k (128 bytes)" in f.message, f
    f = finding("ld.global.u32 %r1, [%a0+-4];", x)
    assert f.kind == "out_of_bounds" and "4 bytes before argument 0" in f.message, f
    assert f.address == x.data_ptr() - 4 and f.lane == 0
    f = finding("mov.u64 %rd1, 0;\nld.u32 %r1, [%rd1];", x)
    assert f.kind == "out_of_bounds" and f.address == 0


def test_the_lane_that_is_out_of_bounds():
    x = torch.zeros(32, dtype=torch.int32)
    f = finding("""mul.wide.u32 %rd1, %t, 4;
    setp.eq.u32 %p1, %t, 13;
    @%p1 add.u64 %rd1, %rd1, 0x1000;
    add.u64 %rd1, %a0, %rd1;
    ld.global.u32 %r1, [%rd1];""", x)  # fmt: skip
    assert f.kind == "out_of_bounds" and f.lane == 13 and f.address == x.data_ptr() + 13 * 4 + 0x1000


@pytest.mark.parametrize(
    "instruction", ["st.shared.u32 [%r1], 1;", "ld.shared.u32 %r2, [%r1];", "atom.shared.inc.u32 %r2, [%r1], 1;"]
)
def test_shared_memory_ends(instruction):
    f = finding(f"add.u32 %r1, %s, 4096;\n{instruction}")
    assert f.kind == "out_of_bounds" and "4096 bytes" in f.message


@pytest.mark.parametrize(
    ("opcode", "values"),
    [("st.shared.u16", "%h1"), ("st.shared.u32", "%r2"), ("st.shared.u64", "%rd2"), ("st.shared.v2.u32", "{%r2, %r3}"),
     ("st.shared.v4.u32", "{%r2, %r3, %r4, %r5}"), ("st.shared.v4.u8", "{%h1, %h1, %h1, %h1}")],
)  # fmt: skip
def test_misaligned(opcode, values):
    size = {"u8": 1, "u16": 2, "u32": 4, "u64": 8}[opcode.split(".")[-1]] * (
        int(opcode.split(".v")[1][0]) if ".v" in opcode else 1
    )
    place = f"mad.lo.u32 %r1, %t, {size}, %s;\nsetp.eq.u32 %p1, %t, 5;\n@%p1 add.u32 %r1, %r1, {size // 2};\n"
    f = finding(f"{place}{opcode} [%r1], {values};")
    assert f.kind == "misaligned" and f.lane == 5 and f"{size} bytes" in f.message


def test_variables_of_the_module_are_memory():
    y = torch.zeros(32, dtype=torch.int32)
    text = kernel(
        """mul.wide.u32 %rd1, %t, 4;
    add.u64 %rd2, %a0, %rd1;
    mov.u64 %rd3, numbers;
    add.u64 %rd3, %rd3, %rd1;
    mov.u64 %rd4, constants;
    ld.const.u32 %r1, [%rd4+4];
    ld.global.u32 %r2, [%rd3];
    add.u32 %r2, %r2, %r1;
    st.global.u32 [%rd3], %r2;
    st.global.u32 [%rd2], %r2;
    """,
        (y,),
    ).replace(
        ".visible", ".global .align 4 .b32 numbers[32];\n.const .align 4 .b32 constants[2] = {3, 5};\n.visible", 1
    )
    module = gpuless.Module(text, arch="sm_90a")
    for launches in (1, 2):
        module["k"].launch(1, 32, (y,))
        assert (y == 5 * launches).all()
    for change, kind, words in (
        ("ld.global.u32 %r2, [%rd3]", "out_of_bounds", "bytes"),
        ("ld.const.u32 %r1, [%rd4+4]", "illegal", "read-only: byte 4 of variable constants"),
    ):
        to = change.replace("%rd3]", "%rd3+16]") if kind == "out_of_bounds" else "st.global.u32 [%rd4+4], %t"
        with pytest.raises(gpuless.Finding, match=words) as caught:
            gpuless.Module(text.replace(change, to), arch="sm_90a")["k"].launch(1, 32, (y,))
        assert caught.value.kind == kind
