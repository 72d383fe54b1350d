"""Triton kernels on mxfp4, as others write them: numbers of 4 bits with a scale for 32, made and multiplied."""

import triton
import triton.language as tl


@triton.jit
def downcast(x, codes, scales, PACKED: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """A program for ROWS rows of 32 * BLOCKS numbers. The scale is the least power of two with which nothing is above 6."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block, number = tl.arange(0, BLOCKS), tl.arange(0, 32)
    index = row[:, None, None] * (BLOCKS * 32) + block[None, :, None] * 32 + number[None, None, :]
    values = tl.load(x + index).to(tl.float32)
    bits = (tl.max(tl.abs(values), axis=2) * (1 / 6)).to(tl.uint32, bitcast=True)
    exponents = (bits + 0x7FFFFF) >> 23
    tl.store(scales + row[:, None] * BLOCKS + block[None, :], exponents.to(tl.uint8))
    scaled = values * (((254 - exponents) << 23).to(tl.float32, bitcast=True))[:, :, None]
    even, odd = tl.split(scaled.reshape(ROWS, BLOCKS * 16, 2))
    if PACKED:
        packed = tl.inline_asm_elementwise(
            """{
            .reg .b8 c0, c1, c2, c3;
            cvt.rn.satfinite.e2m1x2.f32 c0, $5, $1;
            cvt.rn.satfinite.e2m1x2.f32 c1, $6, $2;
            cvt.rn.satfinite.e2m1x2.f32 c2, $7, $3;
            cvt.rn.satfinite.e2m1x2.f32 c3, $8, $4;
            mov.b32 $0, {c0, c1, c2, c3};
            }""",
            "=r,f,f,f,f,f,f,f,f", [even, odd], dtype=tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        packed = code(even) | code(odd) << 4
    tl.store(codes + row[:, None] * (BLOCKS * 16) + tl.arange(0, BLOCKS * 16)[None, :], packed)


@triton.jit
def code(x):
    """Of e2m1, by integers: to nearest, ties to even."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude + 0x1FFFFF + (magnitude >> 22 & 1)) >> 22
    small = tl.where(magnitude <= 0x3E800000, 0, tl.where(magnitude < 0x3F400000, 1, 2))  # up to 0.25, below 0.75
    result = tl.where(magnitude < 0x3F800000, small, tl.minimum(normal - 252, 7))
    return (result | bits >> 28 & 8).to(tl.uint8)


@triton.jit
def product(
    a, a_scales, b, b_scales, c, N, K, A_PER_BYTE: tl.constexpr, A: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """C = A B^T with fp4 B, and A of the format: without scales where it is bf16."""
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    of_a, of_b, block = tl.arange(0, BK // A_PER_BYTE), tl.arange(0, BK // 2), tl.arange(0, BK // 32)
    sums = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        x = tl.load(a + m[:, None] * (K // A_PER_BYTE) + start // A_PER_BYTE + of_a[None, :])
        y = tl.load(b + n[:, None] * (K // 2) + start // 2 + of_b[None, :])
        y_scales = tl.load(b_scales + n[:, None] * (K // 32) + start // 32 + block[None, :])
        x_scales = None if A == "bf16" else tl.load(a_scales + m[:, None] * (K // 32) + start // 32 + block[None, :])
        sums = tl.dot_scaled(x, x_scales, A, y.T, y_scales, "e2m1", sums)
    tl.store(c + m[:, None] * N + n[None, :], sums)
