"""Triton kernels whose descriptors gather and scatter rows: TMA's gather4 and scatter4 on a B200."""

import triton
import triton.language as tl


@triton.jit
def rows_of(x, index, out, M, N, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """out = x[index], columns in boxes."""
    boxes = tl.make_tensor_descriptor(x, [M, N], [N, 1], [1, WIDTH])
    first, column = tl.program_id(0) * ROWS, tl.program_id(1) * WIDTH
    place = first + tl.arange(0, ROWS)
    rows = boxes.gather(tl.load(index + place), column)
    columns = column + tl.arange(0, WIDTH)
    tl.store(out + place[:, None] * N + columns[None, :], rows, (columns < N)[None, :])


@triton.jit
def to_rows(x, index, out, M, N, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """out[index] = 2 x."""
    boxes = tl.make_tensor_descriptor(out, [M, N], [N, 1], [1, WIDTH])
    first, column = tl.program_id(0) * ROWS, tl.program_id(1) * WIDTH
    place, columns = first + tl.arange(0, ROWS), column + tl.arange(0, WIDTH)
    rows = tl.load(x + place[:, None] * N + columns[None, :], (columns < N)[None, :], 0.0)
    boxes.scatter(rows * 2, tl.load(index + place), column)


@triton.jit
def product_of_rows(a_desc, index, b_desc, c, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """C = A[index] B^T: what an expert's tokens are multiplied by."""
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    rows = tl.load(index + m)
    sums = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K, BK, num_stages=3):
        sums = tl.dot(a_desc.gather(rows, k), b_desc.load([tl.program_id(1) * BN, k]).T, sums)
    tl.store(c + m[:, None] * N + n[None, :], sums)
