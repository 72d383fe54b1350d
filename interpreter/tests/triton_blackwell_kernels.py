"""Kernels of test_triton_blackwell.py: what Triton makes tcgen05 of."""

import triton
import triton.language as tl


@triton.jit
def product(a_ptr, b_ptr, c_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """By pointers: cp.async."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    sums = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        a = tl.load(a_ptr + m[:, None] * K + start + k[None, :], (m[:, None] < M) & (start + k[None, :] < K), 0.0)
        b = tl.load(b_ptr + (start + k[:, None]) * N + n[None, :], (start + k[:, None] < K) & (n[None, :] < N), 0.0)
        sums = tl.dot(a, b, sums)
    c = sums.to(c_ptr.dtype.element_ty)
    tl.store(c_ptr + m[:, None] * N + n[None, :], c, (m[:, None] < M) & (n[None, :] < N))


@triton.jit
def product_by_descriptors(
    a_desc, b_desc, c_desc, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPECIALISED: tl.constexpr
):
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    sums = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, K, BK, warp_specialize=SPECIALISED):
        sums = tl.dot(a_desc.load([m, start]), b_desc.load([n, start]).T, sums)
    c_desc.store([m, n], sums.to(tl.float16))


@triton.jit
def persistent_product(
    a_desc, b_desc, c_desc, M, N, K, PROGRAMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPECIALISED: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(N, BN)
    stored = tl.program_id(0) - PROGRAMS
    for tile in tl.range(
        tl.program_id(0), tl.cdiv(M, BM) * across, PROGRAMS, flatten=not SPECIALISED, warp_specialize=SPECIALISED
    ):
        m, n = tile // across * BM, tile % across * BN
        sums = tl.zeros((BM, BN), tl.float32)
        for start in range(0, K, BK):
            sums = tl.dot(a_desc.load([m, start]), b_desc.load([n, start]).T, sums)
        stored += PROGRAMS
        m, n = stored // across * BM, stored % across * BN
        if HALVES:
            left, right = tl.split(tl.permute(tl.reshape(sums, (BM, 2, BN // 2)), (0, 2, 1)))
            c_desc.store([m, n], left.to(tl.float16))
            c_desc.store([m, n + BN // 2], right.to(tl.float16))
        else:
            c_desc.store([m, n], sums.to(tl.float16))


@triton.jit
def attention(
    q_desc, k_desc, v_desc, o_desc, scale, N, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    SPECIALISED: tl.constexpr,
):  # fmt: skip
    first, head = tl.program_id(0) * BM, tl.program_id(1) * N
    rows = first + tl.arange(0, BM)
    highest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, D], tl.float32)
    q = q_desc.load([head + first, 0])
    for start in tl.range(0, first + BM if CAUSAL else N, BN, warp_specialize=SPECIALISED):
        scores = tl.dot(q, k_desc.load([head + start, 0]).T) * scale
        if CAUSAL:
            scores += tl.where(rows[:, None] >= start + tl.arange(0, BN)[None, :], 0, -1e6)
        higher = tl.maximum(highest, tl.max(scores, 1))
        p = tl.math.exp2(scores - higher[:, None])
        shrink = tl.math.exp2(highest - higher)
        total = total * shrink + tl.sum(p, 1)
        out = tl.dot(p.to(tl.float16), v_desc.load([head + start, 0]), out * shrink[:, None])
        highest = higher
    o_desc.store([head + first, 0], (out / total[:, None]).to(tl.float16))


@triton.jit
def scaled_product(
    a_desc, a_scales, b_desc, b_scales, c_desc, K, A_PER_BYTE: tl.constexpr, B_PER_BYTE: tl.constexpr, BLOCK: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Scales as the tensor cores take them: 512 bytes for 128 rows by 4 blocks of K."""
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    FOURS: tl.constexpr = BK // BLOCK // 4
    within = tl.arange(0, FOURS * 512)
    a_scales += (m // 128 + tl.arange(0, BM // 128))[:, None] * (K // BLOCK * 128) + within[None, :]
    b_scales += (n // 128 + tl.arange(0, BN // 128))[:, None] * (K // BLOCK * 128) + within[None, :]
    sums = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, b_desc.shape[1] * B_PER_BYTE, BK, num_stages=3):
        a, b = a_desc.load([m, start // A_PER_BYTE]), b_desc.load([n, start // B_PER_BYTE])
        of_a = tl.load(a_scales).reshape(BM // 128, FOURS, 32, 4, 4).trans(0, 3, 2, 1, 4).reshape(BM, BK // BLOCK)
        of_b = tl.load(b_scales).reshape(BN // 128, FOURS, 32, 4, 4).trans(0, 3, 2, 1, 4).reshape(BN, BK // BLOCK)
        sums = tl.dot_scaled(a, of_a, A, b.T, of_b, B, sums)
        a_scales += FOURS * 512
        b_scales += FOURS * 512
    c_desc.store([m, n], sums.to(tl.float16))
