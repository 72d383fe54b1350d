"""Products of halves: `right_...` are right, `wrong_...` are what verify has to refuse."""

import torch
import triton
import triton.language as tl


@triton.jit
def product(
    a, b, c, m, n, k, am, ak, bk, bn,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr, MASK_K: tl.constexpr, SKIP_LAST: tl.constexpr, MASK_STORE: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    depth = tl.arange(0, DEPTH)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    last = k - DEPTH if SKIP_LAST else k
    for first in range(0, last, DEPTH):
        of_k = first + depth
        inside = of_k < k if MASK_K else of_k < first + DEPTH
        x = tl.load(a + rows[:, None] * am + of_k[None, :] * ak, mask=(rows < m)[:, None] & inside[None, :], other=0.0)
        y = tl.load(b + of_k[:, None] * bk + cols[None, :] * bn, mask=inside[:, None] & (cols < n)[None, :], other=0.0)
        total = tl.dot(x, y, total)
    inside = (rows < m)[:, None] & (cols < n)[None, :]
    if MASK_STORE:
        tl.store(c + rows[:, None] * n + cols[None, :], total.to(c.dtype.element_ty), mask=inside)
    else:
        tl.store(c + rows[:, None] * n + cols[None, :], total.to(c.dtype.element_ty))


def _launch(a, b, block=32, depth=32, mask_k=True, skip_last=False, mask_store=True, dtype=None, strides=None):
    m, k, n = a.shape[0], a.shape[1], b.shape[1]
    c = torch.empty(m, n, dtype=dtype or a.dtype, device=a.device)
    grid = (triton.cdiv(m, block), triton.cdiv(n, block))
    product[grid](
        a, b, c, m, n, k, *(strides or (*a.stride(), *b.stride())),
        BLOCK=block, DEPTH=depth, MASK_K=mask_k, SKIP_LAST=skip_last, MASK_STORE=mask_store,
    )  # fmt: skip
    return c


def right_blocks_of_32(a, b):
    return _launch(a, b)


def right_blocks_of_64(a, b):
    return _launch(a, b, block=64)


def right_depth_of_64(a, b):
    return _launch(a.contiguous(), b.contiguous(), depth=64)


def wrong_unmasked_depth(a, b):
    return _launch(a, b, mask_k=False)


def wrong_last_depth(a, b):
    return _launch(a, b, skip_last=True)


def wrong_unmasked_store(a, b):
    return _launch(a, b, mask_store=False)


def wrong_strides(a, b):
    return _launch(a, b, strides=(a.shape[1], 1, b.shape[1], 1))


def wrong_transposed(a, b):
    return _launch(a, b).t()


def wrong_dtype(a, b):
    return _launch(a, b, dtype=torch.float32)


def wrong_order(a, b):
    return torch.stack([_launch(a, b)])


def wrong_only_the_first_block(a, b):
    c = torch.zeros(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
    small = _launch(a[:32], b[:, :32])
    c[:32, :32].copy_(small)
    return c


def wrong_torch(a, b):
    _launch(a, b)
    return a @ b
