"""Cumulative sums of rows: `right_...` are right, `wrong_...` are what verify has to refuse."""

import torch
import triton
import triton.language as tl


@triton.jit
def scan(x, y, stride, of_cols, cols, BLOCK: tl.constexpr, CARRY: tl.constexpr):
    total = tl.zeros([], tl.float32)
    for first in range(0, cols, BLOCK):
        i = first + tl.arange(0, BLOCK)
        part = tl.load(x + tl.program_id(0) * stride + i * of_cols, mask=i < cols, other=0.0)
        tl.store(y + tl.program_id(0) * cols + i, total + tl.cumsum(part, 0), mask=i < cols)
        if CARRY:
            total += tl.sum(part, 0)


def _launch(x, block, carry=True, columns=0):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scan[(len(x),)](x, y, *x.stride(), columns or x.shape[1], BLOCK=block, CARRY=carry)
    return y


def right_at_once(x):
    return _launch(x, 256)


def right_in_blocks(x):
    return _launch(x, 64)


def wrong_no_carry(x):
    return _launch(x, 64, carry=False)


def wrong_exclusive(x):
    """Without the element itself."""
    y = torch.zeros_like(x, memory_format=torch.contiguous_format)
    y[:, 1:].copy_(_launch(x, 256)[:, :-1])
    return y
