"""mma.sp against dense products in numpy: every shape, type and selector, metadata that is wrong, and what is not multiplied."""

import re
import shutil
import subprocess

import numpy as np
import pytest
import tensor_cores as tc
import torch
from rows import kernel, module, row, run, seed_of, spellings

import gpuless

pytestmark = pytest.mark.interpreted

SPARSE = "mma.sp|sp::ordered_metadata.sync.aligned."
FLOATS = [
    f"{SPARSE}m16n8k16|m16n8k32.row.col.f32.f16.f16.f32", f"{SPARSE}m16n8k16|m16n8k32.row.col.f16.f16.f16.f16",
    f"{SPARSE}m16n8k16|m16n8k32.row.col.f32.bf16.bf16.f32", f"{SPARSE}m16n8k8|m16n8k16.row.col.f32.tf32.tf32.f32",
]  # fmt: skip
INTEGERS = [
    f"{SPARSE}m16n8k32|m16n8k64.row.col.satfinite?.s32.s8|u8.s8|u8.s32",
    f"{SPARSE}m16n8k64|m16n8k128.row.col.satfinite?.s32.s4|u4.s4|u4.s32",
    f"{SPARSE}m16n8k32|m16n8k64.row.col.s32.s8|u8.s8|u8.s32.satfinite",
    f"{SPARSE}m16n8k64|m16n8k128.row.col.s32.s4|u4.s4|u4.s32.satfinite",
]
REFUSED = f"{SPARSE}m16n8k64.row.col.f32|f16.e4m3|e5m2.e4m3|e5m2.f32|f16"
ORDERED = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
F16 = "mma.sp.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32"


def bits_of(type):
    return 4 if type in ("s4", "u4") else 8 * tc.BYTES[type]


def depth_of(op):
    return int(re.search(r"n8k(\d+)", op)[1])


def numbers(bits, type):
    if type not in ("s4", "u4"):
        return tc.decode(bits, type)
    return bits.astype(np.int64) - 16 * ((type == "s4") & (bits >= 8))


def selectors(op):
    """How many there are: as many as times the metadata of a product goes into the registers of four lanes."""
    type, k = tc.types_of(op)[1], depth_of(op)
    chunks = k // {32: 2, 4: 8}.get(bits_of(type), 4)
    return 4 * 32 * 8 // (16 * chunks * 4)


def sparse(op, rng, values):
    """A's elements that are there (16, K / 2), the whole A, and metadata by row and chunk: 4 bits each."""
    type, k = tc.types_of(op)[1], depth_of(op)
    group = 2 if bits_of(type) == 4 else 1
    packed, whole = np.zeros((16, k // 2), values.dtype), np.zeros((16, k), values.dtype)
    stored = values[:, : k // 2]
    packed[:] = stored
    chunk = 2 if type == "tf32" else 4 * group
    metadata = np.zeros((16, k // chunk), np.uint32)
    for r in range(16):
        for c in range(k // chunk):
            if type == "tf32":
                places = [rng.integers(2)]
                metadata[r, c] = (4, 14)[places[0]]
            else:
                places = list(ORDERED[rng.integers(6)])
                if "ordered" not in op and rng.random() < 0.5:
                    places.reverse()
                metadata[r, c] = places[0] | places[1] << 2
            for n, place in enumerate(places):
                for s in range(group):
                    whole[r, c * chunk + place * group + s] = stored[r, (c * len(places) + n) * group + s]
    return packed, whole, metadata


def words_of(op, metadata, selector, rng):
    """The registers of 32 lanes, ISA 9.7.14.6.2: 16 bits of row g below 16 of row g + 8 in one lane of each group, or two; of
    8 and 4 bits a lane for row g and the next for row g + 8. Other lanes hold anything."""
    words = rng.integers(0, 2**32, 32, dtype=np.uint32)
    bits = [sum(int(x) << 4 * c for c, x in enumerate(line)) for line in metadata]
    length = 4 * metadata.shape[1]
    for g in range(8):
        if bits_of(tc.types_of(op)[1]) >= 16:
            for n in range(length // 16):
                low, high = (bits[r] >> 16 * n & 0xFFFF for r in (g, g + 8))
                words[4 * g + selector * (length // 16) + n] = low | high << 16
        else:
            for n in range(length // 32):
                for upper in (0, 1):
                    words[4 * g + 2 * (selector + n) + upper] = bits[g + 8 * upper] >> 32 * n & 0xFFFFFFFF
    return words


def packed_bytes(bits, axis):
    """Two elements of 4 bits a byte."""
    even, odd = np.take(bits, range(0, bits.shape[axis], 2), axis), np.take(bits, range(1, bits.shape[axis], 2), axis)
    return (even | odd << 4).astype(np.uint8)


def registers(op, a, b, c):
    d_type, a_type, b_type, _ = tc.types_of(op)
    if bits_of(a_type) == 4:
        a, b, a_type, b_type = packed_bytes(a, 1), packed_bytes(b, 0), "u8", "u8"
    depth = a.shape[1]
    return {
        "a": tc.fragments(a, a_type, lambda g, t, i: tc.a_element(16, depth, a_type, g, t, i), a.size // 32),
        "b": tc.fragments(b, b_type, lambda g, t, i: tc.b_element(2 * depth, b_type, g, t, i), b.size // 32),
        "c": tc.fragments(c, d_type, tc.c_element, 4),
    }


def body(op, counts, selector):
    lists = {n: "{" + ", ".join(f"%{n}{r}" for r in range(count)) + "}" for n, count in counts.items()}
    return f"{op} {lists['c'].replace('c', 'd')}, {lists['a']}, {lists['b']}, {lists['c']}, %e, {selector};"


def multiply(op, a, b, c, metadata, selector, **options):
    """D's bits of one warp."""
    parts = registers(op, a, b, c)
    inputs = {f"{n}{r}": x for n, lines in parts.items() for r, x in enumerate(lines)} | {"e": metadata}
    outputs = {f"d{r}": np.dtype(np.uint32) for r in range(len(parts["c"]))}
    d = run(body(op, {n: len(x) for n, x in parts.items()}, selector), inputs, outputs, **options)
    return tc.matrix_of(np.stack(list(d.values())), tc.types_of(op)[0], tc.c_element, (16, 8))


def matrix(rng, shape, type, exact):
    if bits_of(type) == 4:
        return rng.integers(0, 16, shape, dtype=np.uint8)
    bits = tc.encode(tc.random_matrix(rng, shape, type, exact), type)
    return bits | rng.integers(0, 1 << 13, shape, dtype=np.uint32) if type == "tf32" else bits  # which must not matter


def operands(op, rng, exact=True):
    d_type, a_type, b_type, _ = tc.types_of(op)
    k = depth_of(op)
    a = sparse(op, rng, matrix(rng, (16, k // 2), a_type, exact))
    b = matrix(rng, (k, 8), b_type, exact)
    return a, b, tc.encode(tc.random_matrix(rng, (16, 8), d_type, exact), d_type)


@row(*FLOATS)
@pytest.mark.parametrize("op", [op for p in FLOATS for op in spellings(p)])
def test_floats(op):
    d_type, a_type, b_type, _ = tc.types_of(op)
    rng = np.random.default_rng(seed_of(op))
    for selector in range(selectors(op)):
        for exact in True, False:
            (packed, whole, metadata), b, c = operands(op, rng, exact)
            got = multiply(op, packed, b, c, words_of(op, metadata, selector, rng), selector, arch="sm_80")
            x, y, z = tc.decode(whole, a_type), tc.decode(b, b_type), tc.decode(c, d_type)
            if exact:
                assert np.array_equal(got, tc.product(x, y, z, d_type))
            else:
                error = np.abs(tc.decode(got, d_type) - (x @ y + z))
                assert (error <= tc.error_bound(x, y, z, d_type)).all()


@row(*INTEGERS)
@pytest.mark.parametrize("op", [op for p in INTEGERS for op in spellings(p)])
def test_integers(op):
    d_type, a_type, b_type, _ = tc.types_of(op)
    rng = np.random.default_rng(seed_of(op))
    extreme = {"s8": 0x80, "u8": 0xFF, "s4": 8, "u4": 15}
    for selector in range(selectors(op)):
        for n in range(3):
            (packed, whole, metadata), b, c = operands(op, rng)
            if n == 2:  # the largest and smallest sums that there are, on accumulators that they overflow
                packed, whole, metadata = sparse(op, rng, np.full_like(packed, extreme[a_type]))
                b, c = np.full_like(b, extreme[b_type]), np.full_like(c, 2**31 - 5 if a_type == b_type else 2**31 + 5)
            got = multiply(op, packed, b, c, words_of(op, metadata, selector, rng), selector, arch="sm_80")
            x, y, z = numbers(whole, a_type), numbers(b, b_type), tc.decode(c, "s32")
            assert np.array_equal(got, tc.product(x, y, z, d_type, "satfinite" in op))


def test_what_zeros_would_meet_is_not_multiplied():
    """No infinity and no NaN of B that only zeros of A would meet, which are not there, gets into D."""
    rng = np.random.default_rng(0)
    (packed, _, metadata), b, c = operands(F16, rng)
    metadata[:] = 0b0100  # the first two of each four
    b[2::4], b[3::4] = 0x7C00, 0x7E00
    c[:] = 0
    got = tc.decode(multiply(F16, packed, b, c, words_of(F16, metadata, 1, rng), 1), "f32")
    dense = np.zeros((16, 32))
    dense[:, 0::4], dense[:, 1::4] = tc.decode(packed, "f16")[:, 0::2], tc.decode(packed, "f16")[:, 1::2]
    b[2::4], b[3::4] = 0, 0
    assert np.array_equal(got, dense @ tc.decode(b, "f16"))
    b[0] = 0x7C00
    got = tc.decode(multiply(F16, np.full_like(packed, 0x3C00), b, c, words_of(F16, metadata, 0, rng), 0), "f32")
    assert (got == np.inf).all()


@pytest.mark.parametrize(("op", "wrong", "why"), [
    (F16, 0b0000, "two indices that differ"), (F16, 0b1111, "two indices that differ"), (F16, 0b0101, "0x5"),
    (F16.replace("sp.", "sp::ordered_metadata."), 0b0001, "the lower one in the lower bits"),
    ("mma.sp.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", 0b0001, "0x4 or 0xe"),
    ("mma.sp.sync.aligned.m16n8k64.row.col.s32.s8.u8.s32", 0b1010, "two indices that differ"),
])  # fmt: skip
def test_wrong_metadata(op, wrong, why):
    rng = np.random.default_rng(0)
    (packed, _, metadata), b, c = operands(op, rng)
    packed[11] = tc.encode([1], tc.types_of(op)[1])
    metadata[11, -1] = wrong
    with pytest.raises(gpuless.Finding) as caught:
        multiply(op, packed, b, c, words_of(op, metadata, 0, rng), 0)
    first = (metadata.shape[1] - 1) * (depth_of(op) // metadata.shape[1])
    assert caught.value.kind == "illegal" and why in caught.value.message
    assert f"row 11 and the elements of K from {first} is" in caught.value.message
    packed[11] = 0  # rows that a tile has too many: zeros, also of metadata
    multiply(op, packed, b, c, words_of(op, metadata, 0, rng), 0)


TEXT = """.version 8.7
.target sm_80
.address_size 64
.visible .entry k(.param .u64 p) {{
  .reg .b32 %r<30>; .reg .f32 %f<8>; .reg .b64 %d<4>; .reg .pred %p<3>; .shared .align 16 .b8 memory[128];
  mov.u32 %r28, %tid.x; shl.b32 %r29, %r28, 2; mov.u32 %r27, memory; add.u32 %r27, %r27, %r29;
  ld.param.u64 %d0, [p]; mad.wide.u32 %d0, %r28, 4, %d0;
  {body}
  ret;
}}
"""
REGISTERS = "{%f0, %f1, %f2, %f3}, {%r0, %r1, %r2, %r3}, {%r4, %r5, %r6, %r7}, {%f0, %f1, %f2, %f3}, %r8"


def outcome(body):
    with gpuless.gpu("sm_80"):
        try:
            gpuless.Module(TEXT.format(body=body))["k"].launch(1, 32, [torch.zeros(32)])
        except gpuless.Finding as f:
            return f
    return None


def test_misuse():
    for op, most in ((F16, 1), (F16.replace("k32", "k16"), 3)):
        registers = REGISTERS if most == 1 else REGISTERS.replace(", %r2, %r3}", "}", 1).replace(", %r6, %r7}", "}")
        for selector, refused in ((most, False), (most + 1, True), (-1, True)):
            over = "" if refused else "@%p2 bra done;"  # what does not run is not refused
            f = outcome(f"mov.u32 %r8, 0x44444444; {over} {op} {registers}, {selector}; done:")
            assert (f is not None) == refused
            if f:
                assert f.kind == "unsupported" and f"selector must be below {most + 1}, not {selector}" in f.message
    f = outcome(f"setp.lt.u32 %p0, %r28, 20; @%p0 {F16} {REGISTERS}, 0;")
    assert f.kind == "barrier" and "20 are here" in f.message
    f = outcome(f"{F16} {REGISTERS.replace(', %r3}', '}', 1)}, 0;")
    assert "has 3 registers" in f.message and "needs 4" in f.message


@pytest.mark.parametrize(("register", "matters"), [("r8", True), ("r1", True), ("r5", True), ("r9", False)])
@pytest.mark.parametrize("selector", [0, 1])
def test_undefined(register, matters, selector):
    """What nothing has written, loaded and multiplied, is reported where a store depends on it: also as metadata, of the
    lanes that the selector names. Lanes 0 and 1 here, whose rows are 0 and 8."""
    load = f"mov.u32 %r8, 0x44444444; setp.lt.u32 %p0, %r28, 2; @%p0 ld.shared.b32 %{register}, [%r27];"
    store = "setp.lt.u32 %p1, %r28, 4; add.f32 %f0, %f0, %f2; @%p1 st.global.f32 [%d0], %f0;"
    f = outcome(f"{load} {F16} {REGISTERS}, {selector}; {store}")
    assert (f is not None and f.kind == "uninitialised") == (matters and not (register == "r8" and selector == 1)), f


def test_half_of_the_products_are_counted():
    with gpuless.gpu("sm_80", counters=True) as device:
        text = TEXT.format(body=f"mov.u32 %r8, 0x44444444; {F16} {REGISTERS}, 0;")
        gpuless.Module(text)["k"].launch(1, 32, [torch.zeros(32)])
    assert device.kernels()[0].counts.macs == {"mma f16": 16 * 8 * 32 // 2}


@row(REFUSED)
@pytest.mark.parametrize("op", spellings(REFUSED)[:2])
def test_refused(op):
    f = outcome(f"{op} {REGISTERS}, 0;")
    assert f.kind == "unsupported" and "fp8" in f.message


@pytest.mark.skipif(not shutil.which("ptxas"), reason="needs ptxas")
def test_ptxas_takes_them(tmp_path):
    rng, kernels = np.random.default_rng(0), []
    for n, op in enumerate(op for p in FLOATS + INTEGERS for op in spellings(p)):
        (packed, _, _), b, c = operands(op, rng)
        parts = registers(op, packed, b, c)
        inputs = {f"{x}{r}": np.uint32 for x, lines in parts.items() for r in range(len(lines))} | {"e": np.uint32}
        outputs = {f"d{r}": np.uint32 for r in range(len(parts["c"]))}
        last = body(op, {x: len(lines) for x, lines in parts.items()}, selectors(op) - 1)
        kernels.append(kernel(last, inputs, outputs, f"k{n}"))
    (tmp_path / "all.ptx").write_text(module(*kernels, arch="sm_80"))
    made = subprocess.run(
        ["ptxas", "-O0", "-arch=sm_80", "-o", "/dev/null", tmp_path / "all.ptx"], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr[-3000:]
