"""Tensor memory against numpy: which thread's register holds which cell, what products leave where, what is refused."""

import itertools
import re

import numpy as np
import pytest
import tensor_cores as tc
from ptx import assert_refused, finding, run
from rows import row, seed_of
from tensor_memory_kernels import (
    COMMIT,
    COMMIT_PAIR,
    LANES,
    Operand,
    braces,
    d_places,
    instruction_descriptor,
    launch,
    packed,
    scaled_descriptor,
    values_of,
)

pytestmark = pytest.mark.interpreted

SHAPES = "32x32b|16x64b|16x128b|16x256b|16x32bx2"
NUMBER = "x1|x2|x4|x8|x16|x32|x64|x128"
GROUP = "cta_group::1|cta_group::2"
KIND = "kind::f16|kind::tf32|kind::f8f6f4|kind::i8"
SCALED = "kind::mxf8f6f4|kind::mxf4|kind::mxf4nvf4"
SCALES = "scale_vec::1X|scale_vec::2X|scale_vec::4X|block16|block32"
COLLECTOR = "collector::a::fill|collector::a::use|collector::a::lastuse|collector::a::discard"
MULTICAST = "warpx4|warpx2::02_13|warpx2::01_23"
COPIES = "128x256b|128x128b|64x128b|32x128b"

# ---- tcgen05.ld and .st ----

#: registers of a thread in one repetition
REGISTERS = {"32x32b": 1, "16x64b": 1, "16x128b": 2, "16x256b": 4, "16x32bx2": 1}
SPLIT = 72


def places(shape, registers):
    """The lane (from the first one on) and the word that each thread's registers hold, as the ISA's figures and CuTe's layouts
    (Copy_Traits of SM100_TMEM_LOAD_*) have them, and how many columns further the word lies."""
    t, j = np.arange(32)[None, :], np.arange(registers)[:, None]
    zero = 0 * (t + j)
    if shape == "32x32b":
        return t + zero, j + zero, zero
    if shape == "16x64b":
        return t // 4 + t % 2 * 8 + zero, t // 2 % 2 + 2 * j, zero
    if shape == "16x128b":
        return t // 4 + j % 2 * 8, t % 4 + j // 2 * 4, zero
    if shape == "16x256b":
        return t // 4 + j // 2 % 2 * 8, t % 4 * 2 + j % 2 + j // 4 * 8, zero
    return t % 16 + zero, j + zero, (t >= 16) * SPLIT + zero


def spelling(name, shape, number, pack):
    return f"tcgen05.{name}.sync.aligned.{shape}.{number}{pack}.b32"


LOADS = [(s, n, p) for s, n, p in itertools.product(SHAPES.split("|"), NUMBER.split("|"), ("", "16b"))
         if REGISTERS[s] * int(n[1:]) <= 32]  # fmt: skip


@row(f"tcgen05.ld.sync.aligned.{SHAPES}.{NUMBER}.pack::16b?.b32", "tcgen05.wait::ld.sync.aligned")
@pytest.mark.parametrize(("shape", "number", "pack"), LOADS)
def test_loads(shape, number, pack):
    """Every warp loads from its lanes; its registers go to a column of their own each, which is read back."""
    registers, columns = REGISTERS[shape] * int(number[1:]), 160
    cells = np.random.default_rng(0).integers(0, 1 << 32, (columns, LANES), dtype=np.uint32)
    half = 16 if shape != "32x32b" else 0  # lanes
    split = f", {SPLIT}" if shape == "16x32bx2" else ""
    op = spelling("ld", shape, number, ".pack::16b" if pack else "")
    body = f"{op} {braces(60, registers)}, [%mine + {half << 16 | 3}]{split};\ntcgen05.wait::ld.sync.aligned;\n"
    body += f"bar.sync 0;\ntcgen05.st.sync.aligned.32x32b.x{registers}.b32 [%mine], {braces(60, registers)};\n"
    got = launch(body + "tcgen05.wait::st.sync.aligned;", np.zeros(16, np.uint8), cells)
    lane, word, more = places(shape, registers)
    for warp in range(4):
        at = warp * 32 + half + lane
        if pack:
            low, high = (cells[3 + more + 2 * word + k, at] & 0xFFFF for k in (0, 1))
            expected = low | high << 16
        else:
            expected = cells[3 + more + word, at]
        assert np.array_equal(got[:registers, warp * 32 : warp * 32 + 32], expected)


@row(f"tcgen05.st.sync.aligned.{SHAPES}.{NUMBER}.unpack::16b?.b32", "tcgen05.wait::st.sync.aligned")
@pytest.mark.parametrize(("shape", "number", "pack"), LOADS)
def test_stores(shape, number, pack):
    registers, columns = REGISTERS[shape] * int(number[1:]), 160
    cells = np.random.default_rng(1).integers(0, 1 << 32, (columns, LANES), dtype=np.uint32)
    half, split = 16 if shape != "32x32b" else 0, f" {SPLIT}," if shape == "16x32bx2" else ""
    op = spelling("st", shape, number, ".unpack::16b" if pack else "")
    body = f"tcgen05.ld.sync.aligned.32x32b.x{registers}.b32 {braces(60, registers)}, [%mine];\ntcgen05.wait::ld.sync.aligned;\n"
    body += f"{op} [%mine + {half << 16 | 3}],{split} {braces(60, registers)};\ntcgen05.wait::st.sync.aligned;"
    got = launch(body, np.zeros(16, np.uint8), cells)
    lane, word, more = places(shape, registers)
    expected = cells.copy()
    for warp in range(4):
        at, values = warp * 32 + half + lane, cells[:registers, warp * 32 : warp * 32 + 32]
        if pack:
            for k in (0, 1):
                expected[3 + more + 2 * word + k, at] = values >> 16 * k & 0xFFFF
        else:
            expected[3 + more + word, at] = values
    assert np.array_equal(got, expected)


# ---- tcgen05.mma ----

TYPES = {"f16": ("f16", "bf16"), "tf32": ("tf32",), "f8f6f4": ("e4m3", "e5m2"), "i8": ("s8", "u8")}
D_COLUMN = 24


def layouts(size):
    """(swizzle, M- or N-major, by 32 bytes)"""
    yield from ((s, mn, False) for s in (0, 32, 64, 128) for mn in (False, True))
    if size == 4:
        yield 128, True, True


def images(group, *operands):
    """One for each CTA, what no operand covers being NaN."""
    end = -(-max(o.end for o in operands) // 16) * 16
    image = np.full((group, end), 0xFF, np.uint8)
    return image


def multiply(kind, types, m, n, layout, group=1, accumulate=True, d_type=None, a_in_tensor=False, seed=0, column=D_COLUMN,
             negate=0, saturate=0, exact=True, stationary="", more=""):  # fmt: skip
    rng = np.random.default_rng(seed_of(str((kind, types, m, n, layout, group))))
    d_type = d_type or ("s32" if kind == "i8" else "f32")
    k = 32 // tc.BYTES[types[0]]
    a, b = (tc.encode(tc.random_matrix(rng, (x, k), t, exact), t) for x, t in zip((m, n), types))
    c = tc.encode(tc.random_matrix(rng, (m, n), d_type, exact), d_type).astype(np.uint32)
    (a_layout, b_layout) = layout
    parts = [(a[p * m // group : (p + 1) * m // group], b[p * n // group : (p + 1) * n // group]) for p in range(group)]
    operands = []
    for x, y in parts:
        first = Operand(y, 0, *b_layout)
        operands.append((Operand(x, -(-first.end // 1024) * 1024, *a_layout), first))
    image = images(group, *(o for pair in operands for o in pair))
    for p, pair in enumerate(operands):
        for o in pair:
            o.place(image[p])
    cells = rng.integers(0, 1 << 32, (group, column + n + 16, LANES), dtype=np.uint32)
    cta, lane, at = d_places(m, n, group, bool(stationary))
    cells[cta, column + at, lane] = c
    a_operand = f"{operands[0][0].descriptor}"
    if a_in_tensor:
        words = np.ascontiguousarray(a).view(np.uint32)
        cta8, lane8, _ = d_places(m, 8, group)
        cells[cta8, np.arange(8)[None, :] + 0 * lane8, lane8] = words
        a_operand = "[%tm]"
    descriptor = instruction_descriptor(m, n, *types, d_type, a_layout[1], b_layout[1], negate, saturate)
    body = f"add.u32 %r40, %tm, {column}; setp.ne.u32 %p2, {int(accumulate)}, 0;\n"
    if not a_in_tensor:
        body += f"mov.b64 %d8, {a_operand};\n"
        a_operand = "%d8"
    who = "%lead" if group == 2 else "%one"
    body += f"mov.b64 %d9, {operands[0][1].descriptor}; mov.b32 %r41, {descriptor};\n"
    body += (
        f"@{who} tcgen05.mma{stationary}.cta_group::{group}.kind::{kind}{more} [%r40], {a_operand}, %d9, %r41, %p2;\n"
    )
    got = launch(
        body + (COMMIT_PAIR if group == 2 else COMMIT),
        image.ravel(),
        cells if group == 2 else cells[0],
        group,
        seed=seed,
    )
    got = got.reshape(cells.shape)
    x, y, z = (
        tc.decode(a, types[0]),
        tc.decode(b, types[1]).T,
        tc.decode(c.astype(np.uint16) if d_type == "f16" else c, d_type),
    )
    x, z = x * (-1 if negate else 1), z * accumulate
    result = got[cta, column + at, lane]
    untouched = cells.copy()
    untouched[cta, column + at, lane] = result
    assert np.array_equal(got, untouched)  # and nothing else has changed
    if d_type == "f16":
        result = result.astype(np.uint16)
    if exact:
        assert np.array_equal(result, tc.product(x, y, z, d_type, bool(saturate)))
    else:
        assert (np.abs(tc.decode(result, d_type) - (x @ y + z)) <= tc.error_bound(x, y, z, d_type)).all()


def cases():
    for kind, types in TYPES.items():
        size = tc.BYTES[types[0]]
        for i, layout in enumerate(itertools.product(layouts(size), layouts(size))):
            a, b = types[i % len(types)], types[i // len(types) % len(types)]
            if kind == "f16":
                b = a
            m, n = ((128, 32), (64, 64), (128, 256), (64, 16), (128, 16), (64, 256))[i % 6]
            if any(mn and n % (max(s, 16) // size) for s, mn, _ in layout):
                n = 128
            yield pytest.param(kind, (a, b), m, n, layout, id=f"{kind}-{i}")


@row(f"tcgen05.mma.{GROUP}.{KIND}.{COLLECTOR}?", f"tcgen05.alloc.{GROUP}.sync.aligned.shared::cta?.b32",
     f"tcgen05.dealloc.{GROUP}.sync.aligned.b32", f"tcgen05.relinquish_alloc_permit.{GROUP}.sync.aligned",
     f"tcgen05.commit.{GROUP}.mbarrier::arrive::one.shared::cluster?.multicast::cluster?.b64",
     "tcgen05.fence::before_thread_sync|fence::after_thread_sync")  # fmt: skip
@pytest.mark.parametrize(("kind", "types", "m", "n", "layout"), list(cases()))
def test_products(kind, types, m, n, layout):
    multiply(kind, types, m, n, layout)


K_MAJOR = ((128, False, False), (64, False, False))


@pytest.mark.parametrize(("m", "n"), [(256, 32), (256, 256), (128, 64), (128, 256)])
@pytest.mark.parametrize("kind", TYPES)
def test_products_of_a_pair(kind, m, n):
    multiply(kind, (TYPES[kind][0],) * 2, m, n, K_MAJOR, group=2, seed=m + n)


@pytest.mark.parametrize("m", [64, 128])
@pytest.mark.parametrize("kind", TYPES)
def test_a_in_tensor_memory(kind, m):
    multiply(kind, (TYPES[kind][-1],) * 2, m, 48, K_MAJOR, a_in_tensor=True)


COLLECTOR_B = "|".join(f"collector::b{n}::{how}" for n in range(4) for how in ("fill", "use", "lastuse", "discard"))


@row(f"tcgen05.mma.ws.cta_group::1.{KIND}.{COLLECTOR_B}?")
@pytest.mark.parametrize("n", [64, 128, 256])
@pytest.mark.parametrize("m", [32, 64, 128])
@pytest.mark.parametrize("kind", TYPES)
def test_weight_stationary_products(kind, m, n):
    multiply(kind, (TYPES[kind][-1],) * 2, m, n, K_MAJOR, stationary=".ws")
    multiply(
        kind, (TYPES[kind][0],) * 2, m, n, K_MAJOR, stationary=".ws", accumulate=False, more=".collector::b1::fill"
    )
    if m == 128:
        multiply(kind, (TYPES[kind][0],) * 2, m, n, K_MAJOR, stationary=".ws", a_in_tensor=True)


def test_products_otherwise():
    multiply("f16", ("f16", "f16"), 128, 64, K_MAJOR, accumulate=False)
    multiply("f16", ("f16", "f16"), 128, 64, K_MAJOR, d_type="f16")
    multiply("f16", ("f16", "f16"), 64, 64, K_MAJOR, d_type="f16", accumulate=False)
    multiply("f8f6f4", ("e4m3", "e5m2"), 128, 64, K_MAJOR, negate=1)
    multiply("i8", ("s8", "u8"), 128, 64, K_MAJOR, saturate=1)
    multiply("f16", ("bf16", "bf16"), 128, 64, K_MAJOR, column=13)  # no multiple of 8
    multiply("f16", ("f16", "f16"), 128, 64, K_MAJOR, exact=False)
    multiply("tf32", ("tf32", "tf32"), 128, 64, K_MAJOR, exact=False)


# ---- scales, elements of 4 and 6 bits, tcgen05.cp ----


def scale_values(bits, scale):
    return np.exp2(bits.astype(np.float64) - 127) if scale == "ue8m0" else tc.decode(bits.astype(np.uint8), "e4m3")


def multiply_scaled(kind, suffix, types, block, scale, m=128, n=64, byte=0, group=1, seed=0):
    """Scales through tcgen05.cp, 32 lanes copied four times: a byte for each block along K, a column for 32 rows."""
    rng = np.random.default_rng(seed)
    k = 32 if kind in ("mxf8f6f4", "f8f6f4") else 64
    rows = {"a": m, "b": n}
    bits, raw = {}, {}
    for (name, r), t in zip(rows.items(), types):
        if t in ("e4m3", "e5m2"):
            bits[name] = raw[name] = tc.encode(tc.random_matrix(rng, (r, k), t, True), t)
            continue
        width = 4 if t == "e2m1" else 6
        bits[name] = rng.integers(0, 1 << width, (r, k))
        raw[name] = (
            packed(bits[name], width) if k == 32 else (bits[name][:, ::2] | bits[name][:, 1::2] << 4).astype(np.uint8)
        )
    blocks = k // block if block else 1
    low, high = (120, 135) if scale == "ue8m0" else (0x20, 0x58)
    scales = {x: rng.integers(low, high, (r, blocks)) for x, r in rows.items()}
    halves = {x: [raw[x][p * r // group : (p + 1) * r // group] for p in range(group)] for x, r in rows.items()}
    image, operands = [], []
    for p in range(group):
        b = Operand(halves["b"][p], 0, 128)
        a = Operand(halves["a"][p], -(-b.end // 1024) * 1024, 128)
        first = -(-a.end // 1024) * 1024
        one = np.zeros(first + 512 * (m // 128 // group + n // 32) + 512, np.uint8)
        a.place(one)
        b.place(one)
        operands.append((a, b))
        tiles = {
            "a": scales["a"][p * m // group : (p + 1) * m // group],
            "b": scales["b"],
        }  # B's of all columns in both
        for x, at in (("a", first), ("b", first + 512)):
            for r, of_row in enumerate(tiles[x]):
                place = at + r // 128 * 512 + r % 32 * 16 + r % 128 // 32 * 4 + byte
                one[place : place + blocks] = of_row
        image.append(one)
    image = np.stack([np.resize(x, -(-len(x) // 16) * 16) for x in image])
    cells = np.zeros((group, n + 32, LANES), np.uint32)
    numbers = {t: i for i, t in enumerate(("e4m3", "e5m2", "", "e2m3", "e3m2", "e2m1"))}
    codes = [1 if k == 64 else numbers[t] for t in types]
    descriptor = (scaled_descriptor(m, n, *codes, scale, byte, byte) if block
                  else instruction_descriptor(m, n, *types, "f32"))  # fmt: skip
    who = "%lead" if group == 2 else "%one"
    body = f"mov.b64 %d8, {operands[0][0].descriptor}; mov.b64 %d9, {operands[0][1].descriptor};\n"
    for x, column, at, tile_rows in (("a", 0, first, m // group), ("b", 8, first + 512, n)):
        for tile in range(-(-tile_rows // 128)):
            copied = Operand(np.zeros((32, 16), np.uint8), at + 512 * tile)
            body += f"mov.b64 %d10, {copied.descriptor}; add.u32 %r42, %tm, {column + 4 * tile};\n"
            shape = "32x128b.warpx4" if x == "a" else "warpx4.32x128b"
            body += f"@{who} tcgen05.cp.cta_group::{group}.{shape} [%r42], %d10;\n"
    body += f"add.u32 %r40, %tm, 32; add.u32 %r43, %tm, 8; mov.b32 %r41, {descriptor}; setp.ne.u32 %p2, 0, 0;\n"
    more = "[%tm], [%r43], " if block else ""
    body += f"@{who} tcgen05.mma.cta_group::{group}.kind::{kind}{suffix} [%r40], %d8, %d9, %r41, {more}%p2;\n"
    got = launch(
        body + (COMMIT_PAIR if group == 2 else COMMIT),
        image.ravel(),
        cells if group == 2 else cells[0],
        group,
        seed=seed,
    )
    got = got.reshape(cells.shape)
    cta, lane, at = d_places(m, n, group)
    result = got[cta, 32 + at, lane].view(np.float32).astype(np.float64)
    x, y = (values_of(bits[name], t) for name, t in zip("ab", types))
    if block:
        x, y = (v * np.repeat(scale_values(scales[name], scale), block, 1) for name, v in (("a", x), ("b", y)))
    expected = x @ y.T
    bound = 2.0**-20 * (np.abs(x) @ np.abs(y.T))
    assert (np.abs(result - expected) <= bound).all() and np.abs(expected).max() > 0


ALL8 = ("e4m3", "e5m2", "e2m3", "e3m2", "e2m1")


@row(f"tcgen05.mma.{GROUP}.{SCALED}.block_scale.{SCALES}?.{COLLECTOR}?", f"tcgen05.cp.{GROUP}.{COPIES}.{MULTICAST}?",
     f"tcgen05.cp.{GROUP}.{MULTICAST}.{COPIES}")  # fmt: skip
@pytest.mark.parametrize("types", list(itertools.product(ALL8, ALL8)), ids="-".join)
def test_elements_with_scales(types):
    i = ALL8.index(types[0]) + ALL8.index(types[1])
    multiply_scaled(
        "mxf8f6f4", (".block_scale", ".block_scale.scale_vec::1X")[i % 2], types, 32, "ue8m0", byte=i % 4, seed=i
    )
    multiply_scaled("f8f6f4", "", types, 0, "ue8m0", seed=i)


@pytest.mark.parametrize("n", [32, 256])
@pytest.mark.parametrize("group", [1, 2])
def test_elements_of_4_bits_close_together(n, group):
    e = ("e2m1", "e2m1")
    for byte in (0, 2):
        multiply_scaled("mxf4", ".block_scale.scale_vec::2X", e, 32, "ue8m0", 128 * group, n, byte, group)
    multiply_scaled("mxf4", ".block_scale", e, 32, "ue8m0", 128 * group, n, 0, group)
    multiply_scaled("mxf4nvf4", ".block_scale.block32", e, 32, "ue8m0", 128 * group, n, 2, group)
    multiply_scaled("mxf4nvf4", ".block_scale.scale_vec::4X", e, 16, "ue4m3", 128 * group, n, 0, group)
    multiply_scaled("mxf4nvf4", ".block_scale.block16", e, 16, "ue8m0", 128 * group, n, 0, group)


@pytest.mark.parametrize(("shape", "rows", "words", "quarters"), [
    ("128x256b", 128, 8, (0, 1, 2, 3)), ("128x128b", 128, 4, (0, 1, 2, 3)), ("32x128b.warpx4", 32, 4, (0, 0, 0, 0)),
    ("64x128b.warpx2::02_13", 64, 4, (0, 1, 0, 1)), ("64x128b.warpx2::01_23", 64, 4, (0, 0, 1, 1)),
])  # fmt: skip
@pytest.mark.parametrize("swizzle", [0, 128])
def test_copies(shape, rows, words, quarters, swizzle):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, (rows, words), dtype=np.uint32)
    source = Operand(bits, 0, swizzle)
    image = np.full(-(-source.end // 16) * 16, 0xFF, np.uint8)
    source.place(image)
    cells = rng.integers(0, 1 << 32, (24, LANES), dtype=np.uint32)
    got = launch(
        f"mov.b64 %d8, {source.descriptor};\n@%one tcgen05.cp.cta_group::1.{shape} [%tm + 5], %d8;\n" + COMMIT,
        image,
        cells,
    )
    expected = cells.copy()
    for lane in range(LANES):
        expected[5 : 5 + words, lane] = bits[quarters[lane // 32] * 32 + lane % 32]
    assert np.array_equal(got, expected)


# ---- what is wrong ----

SETUP = """setp.lt.u32 %p1, %t, 32; setp.eq.u32 %p0, %t, 0;
@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%s], 64;
bar.sync 0; ld.shared.b32 %r1, [%s]; shr.u32 %r2, %t, 5; shl.b32 %r2, %r2, 21; add.u32 %r2, %r2, %r1;
"""
FREE = "bar.sync 0;\n@%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r1, 64;\n"


@pytest.mark.parametrize(("body", "kind", "words"), [
    (SETUP, "illegal", "these 64 columns of tensor memory still allocated"),
    (SETUP + FREE + FREE, "illegal", "nothing is allocated there"),
    (SETUP + "@%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r1, 32;", "illegal", "allocated are 64 from 0 on"),
    (SETUP + "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r3}, [%r2 + 64];", "out_of_bounds", "columns 64 to 64.*not allocated"),
    (SETUP + "tcgen05.ld.sync.aligned.32x32b.x8.b32 {%r3, %r4, %r5, %r6, %r7, %r8, %r9, %r10}, [%r2 + 60];", "out_of_bounds",
     "columns 60 to 67 of tensor memory, beyond its allocation of columns 0 to 63"),
    (SETUP + "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r3}, [%r2];", "uninitialised", "tensor memory, column 0, lanes"),
    (SETUP + "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r3}, [%r1];", "illegal", "reaches lanes 32 to 63|reaches lanes"),
    (SETUP + "tcgen05.st.sync.aligned.32x32b.x1.b32 [%t], {%r3};", "illegal", "differs between the lanes"),
    (SETUP + "@%p0 tcgen05.st.sync.aligned.32x32b.x1.b32 [%r2], {%r3};", "barrier", "needs all 32 lanes"),
    ("tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r3}, [0];", "unsupported", ""),
    ("mov.b32 %r2, 0;\ntcgen05.dealloc.cta_group::1.sync.aligned.b32 %r2, 64;", "out_of_bounds", "none allocated"),
    (SETUP.replace("64;", "48;"), "illegal", "32, 64, 128, 256 or 512, not 48"),
    ("@%p1 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;\n" + SETUP, "illegal", "after the CTA's"),
    (SETUP + SETUP.replace("64;", "512;"), "deadlock", "tcgen05.alloc"),
    (SETUP + "mov.b64 %rd1, 0; mov.b64 %rd2, 0; mov.b32 %r3, 0x8100490;\n"
     "@%p0 tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd1, %rd2, %r3, %p0;", "illegal", "bits 46 to 48, its version"),
    (SETUP + "mov.b64 %rd1, 0x400000000000; mov.b64 %rd2, %rd1; mov.b32 %r3, 0x8100910;\n"
     "@%p0 tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd1, %rd2, %r3, %p0;", "illegal", "A and B are f16"),
    (SETUP + "mov.b64 %rd1, 0x400000000000; mov.b64 %rd2, %rd1; mov.b32 %r3, 0x8180490;\n"
     "@%p0 tcgen05.mma.cta_group::1.kind::f16 [%r1 + 32], %rd1, %rd2, %r3, %p0;", "out_of_bounds", "D of tcgen05.mma has columns"),
    (SETUP + "mov.b64 %rd1, 0x400000000000; mov.b64 %rd2, %rd1; mov.b32 %r3, 0x6100490;\n"
     "@%p0 tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd1, %rd2, %r3, %p0;", "illegal", "M is 64 or 128, not 96"),
    *((SETUP + f"mov.b64 %rd1, 0x400000000000; mov.b64 %rd2, %rd1; mov.b32 %r3, {bits}; mov.b64 %rd3, {zeros};\n"
       f"@%p0 tcgen05.mma.ws.cta_group::1.kind::f16 [%r1], {a}, %rd2, %r3, %p0, %rd3;", kind, why)
      for bits, zeros, a, kind, why in (
          (0x6100490, 0, "%rd1", "illegal", "M is 32, 64 or 128 with .ws, not 96"),
          (0x8040490, 0, "%rd1", "illegal", "N is 64, 128 or 256 with .ws, not 16"),
          (0x48100490, 0, "%rd1", "unsupported", "a shift of B"),
          (0x8100490, 1, "%rd1", "unsupported", "zero-column-mask-desc names columns"),
          (0x2100490, 0, "[%r1]", "unsupported", "A in tensor memory with 32 rows"))),
    (SETUP + "mov.b64 %rd1, 0x400000000000; mov.b64 %rd2, %rd1; mov.b32 %r3, 0x8100494;\n"
     "@%p0 tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd1, %rd2, %r3, %p0;", "unsupported", "sparse"),
    (SETUP + "mov.b64 %rd1, 0x400000000000; mov.b32 %r3, 0x8100490;\n"
     "@%p0 tcgen05.mma.cta_group::2.kind::f16 [%r1], %rd1, %rd1, %r3, %p0;", "illegal", "needs a pair of CTAs"),
])  # fmt: skip
def test_what_is_wrong(body, kind, words):
    f = finding(body, arch="sm_100a", block=128)
    assert f.kind == kind and re.search(words, f.message), f


@row(f"tcgen05.mma.sp.{GROUP}.{KIND}|{SCALED}.block_scale?.{SCALES}?.{COLLECTOR}?",
     f"tcgen05.mma.ws.sp.cta_group::1.{KIND}.{COLLECTOR_B}?",
     f"tcgen05.cp.{GROUP}.4x256b", f"tcgen05.cp.{GROUP}.{COPIES}|4x256b.{MULTICAST}?.b8x16.b4x16_p64|b6x16_p32",
     f"tcgen05.shift.{GROUP}.down")  # fmt: skip
def test_what_is_refused():
    for body, words in {
        "tcgen05.mma.sp.cta_group::1.kind::f16 [%r1], %rd1, %rd2, [%r2], %r3, %p0;": "sparse",
        "tcgen05.mma.ws.sp.cta_group::1.kind::f16 [%r1], %rd1, %rd2, [%r2], %r3, %p0;": "sparse",
        "tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd1, %rd2, %r3, %p0, 3;": "scale-input-d",
        "tcgen05.mma.cta_group::1.kind::mxf4.block_scale.scale_vec::4X [%r1], %rd1, %rd2, %r3, [%r1], [%r1], %p0;": "2X",
        "tcgen05.cp.cta_group::1.4x256b [%r1], %rd1;": "4x256b",
        "tcgen05.cp.cta_group::1.32x128b [%r1], %rd1;": "warpx4",
        "tcgen05.cp.cta_group::1.128x128b.b8x16.b4x16_p64 [%r1], %rd1;": "decompress",
        "tcgen05.shift.cta_group::1.down [%r1];": "shift",
    }.items():
        assert words in assert_refused(body, arch="sm_100a")
    assert "needs sm_100a" in assert_refused("tcgen05.wait::ld.sync.aligned;", arch="sm_90a")


def test_a_load_is_over_where_it_is_waited_for_or_read():
    """ptxas has instructions wait for registers that they read; to move on without either is a finding."""
    body = SETUP + "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r2], {%t};\ntcgen05.wait::st.sync.aligned;\n"
    load = "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r3}, [%r2];\n"
    use = "setp.ne.u32 %p2, %r3, %t;\n@%p2 trap;\n"
    second = load.replace("%r3", "%r4")
    for right in (
        "tcgen05.wait::ld.sync.aligned;\n",
        use,
        "mov.b64 %rd1, {%t, %r3};\n",
        second + "add.u32 %r5, %r4, %r3;\n",
    ):
        run(body + load + right + FREE, arch="sm_100a", block=128)
    for wrong in ("", "mov.u32 %r3, 7;\n" + use.replace("%t", "7"), second + "add.u32 %r5, %r4, 1;\n"):
        f = finding(body + load + wrong + FREE + "setp.eq.u32 %p3, %r3, %t;", arch="sm_100a", block=128)
        assert f.kind == "in_flight" and "nothing has waited for the first" in f.message
