"""Triton kernels as people write them, for test_witnesses.py: the witnesses are what its compiler makes of them."""

import triton
import triton.language as tl


@triton.jit
def matmul(
    A, B, C, M, N, K, stride_am, stride_bk, stride_bn, stride_cm,
    ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """C [M, N] = A [M, K] · B [K, N], of which either stride may be 1."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), ACC)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(A + rows[:, None] * stride_am + k[None, :], (rows[:, None] < M) & (k[None, :] < K), other=0.0)
        b = tl.load(
            B + k[:, None] * stride_bk + columns[None, :] * stride_bn,
            (k[:, None] < K) & (columns[None, :] < N),
            other=0.0,
        )
        acc = tl.dot(a, b, acc, out_dtype=ACC)
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(C + rows[:, None] * stride_cm + columns[None, :], acc.to(C.dtype.element_ty), inside)


@triton.jit
def transposed_matmul(A, B, C, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """C [M, N] = A [K, M]ᵀ · B [K, N]: both operands lie along M and N in shared memory. Whole tiles."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(A + k[None, :] * M + rows[:, None])
        acc = tl.dot(a, tl.load(B + k[:, None] * N + columns[None, :]), acc)
    tl.store(C + rows[:, None] * N + columns[None, :], acc)


@triton.jit
def tile_of_5d(descriptor, OUT, a, b, c, d, e, BLOCK: tl.constexpr):
    """The tile of a tensor that begins there, as it lies in memory."""
    tl.store(OUT + tl.arange(0, BLOCK), tl.reshape(descriptor.load([a, b, c, d, e]), [BLOCK]))


autotuned_matmul = triton.autotune(
    [
        triton.Config({"BM": 64, "BN": 64, "BK": 32}, num_warps=4, num_stages=3),
        triton.Config({"BM": 128, "BN": 64, "BK": 64}, num_warps=8, num_stages=2),
        triton.Config({"BM": 32, "BN": 32, "BK": 64}, num_warps=2, num_stages=1),
    ],
    key=["M", "N", "K"],
)(matmul)


@triton.jit
def descriptor_matmul(a_desc, b_desc, c_desc, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c [M, N] = a [M, K] · b [N, K] transposed; loads and the store are TMA's."""
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(a_desc.load([row, k]), b_desc.load([column, k]).T, acc)
    c_desc.store([row, column], acc.to(c_desc.dtype))


@triton.jit
def attention(
    Q, K, V, OUT, scale, N, stride_head, stride_row, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Causal, one layout [heads, N, D] for all four."""
    first = tl.program_id(0) * BM
    head = tl.program_id(1) * stride_head
    rows, keys, d = first + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    q = tl.load(Q + head + rows[:, None] * stride_row + d[None, :], rows[:, None] < N, other=0)
    peak = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    for start in range(0, tl.minimum(first + BM, N), BN):
        key = start + keys
        k = tl.load(K + head + key[None, :] * stride_row + d[:, None], key[None, :] < N, other=0)
        v = tl.load(V + head + key[:, None] * stride_row + d[None, :], key[:, None] < N, other=0)
        s = tl.dot(q, k) * (scale * 1.4426950408889634)
        s = tl.where((rows[:, None] >= key[None, :]) & (key[None, :] < N), s, float("-inf"))
        new = tl.maximum(peak, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        rescale = tl.exp2(peak - new)
        total = total * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None])
        peak = new
    o = acc / total[:, None]
    tl.store(OUT + head + rows[:, None] * stride_row + d[None, :], o.to(OUT.dtype.element_ty), rows[:, None] < N)


@triton.jit
def softmax(X, Y, n, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0) * stride
    i = tl.arange(0, BLOCK)
    x = tl.load(X + row + i, i < n, other=float("-inf"))
    e = tl.exp(x - tl.max(x, 0))
    tl.store(Y + row + i, e / tl.sum(e, 0), i < n)


@triton.jit
def layer_norm(X, Y, WEIGHT, BIAS, n, stride, eps, BLOCK: tl.constexpr):
    """The row in pieces, so that the reductions are over a loop too."""
    row = tl.program_id(0) * stride
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(X + row + i, i < n, other=0)
    mean = tl.sum(total, 0) / n
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        difference = tl.where(i < n, tl.load(X + row + i, i < n, other=0) - mean, 0)
        total += difference * difference
    scale = tl.rsqrt(tl.sum(total, 0) / n + eps)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(X + row + i, i < n, other=0)
        y = (x - mean) * scale * tl.load(WEIGHT + i, i < n) + tl.load(BIAS + i, i < n)
        tl.store(Y + row + i, y, i < n)


@triton.jit
def histogram(X, COUNTS, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(COUNTS + tl.load(X + i, i < n, other=0), 1, i < n)


@triton.jit
def split_k_matmul(A, B, C, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """C [M, N] += A [M, K] · B [K, N] of 16-bit, a program for each BK of K."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.program_id(2) * BK + tl.arange(0, BK)
    a = tl.load(A + rows[:, None] * K + k[None, :])
    b = tl.load(B + k[:, None] * N + columns[None, :])
    tl.atomic_add(C + rows[:, None] * N + columns[None, :], tl.dot(a, b))


@triton.jit
def sum_by_the_last(X, PARTIAL, FINISHED, Y, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr):
    """Y [BLOCK] = sum of X [PROGRAMS, 4, BLOCK]: the last program to finish adds up what all have written."""
    program = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(4):
        total += tl.load(X + (program * 4 + row) * BLOCK + i)
    tl.store(PARTIAL + program * BLOCK + i, total)
    tl.debug_barrier()
    if tl.atomic_add(FINISHED, 1) == PROGRAMS - 1:
        total = tl.zeros((BLOCK,), tl.float32)
        for other in range(PROGRAMS):
            total += tl.load(PARTIAL + other * BLOCK + i)
        tl.store(Y + i, total)
