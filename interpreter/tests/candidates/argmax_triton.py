"""argmax of rows: `right_...` are right, `wrong_...` are what verify has to refuse."""

import torch
import triton
import triton.language as tl


@triton.jit
def find(x, y, stride, of_cols, cols, BLOCK: tl.constexpr, OTHER: tl.constexpr):
    i = tl.arange(0, BLOCK)
    other = 0.0 if OTHER == "zero" else -float("inf")
    row = tl.load(x + tl.program_id(0) * stride + i * of_cols, mask=i < cols, other=other)
    tl.store(y + tl.program_id(0), tl.argmax(row, 0))


@triton.jit
def scan(x, y, stride, of_cols, cols, BLOCK: tl.constexpr):
    best, place = tl.full([], -float("inf"), tl.float32), tl.zeros([], tl.int32)
    for k in range(cols):
        value = tl.load(x + tl.program_id(0) * stride + k * of_cols)
        place = tl.where(value > best, k, place)
        best = tl.maximum(value, best)
    tl.store(y + tl.program_id(0), place)


def _launch(x, kernel=find, dtype=torch.int64, block=None, **constants):
    y = torch.empty(len(x), dtype=dtype, device=x.device)
    kernel[(len(x),)](x, y, *x.stride(), x.shape[1], BLOCK=block or triton.next_power_of_2(x.shape[1]), **constants)
    return y


def right_at_once(x):
    return _launch(x, OTHER="infinity")


def right_one_by_one(x):
    return _launch(x, scan)


def wrong_dtype(x):
    return _launch(x, dtype=torch.int32, OTHER="infinity")


def wrong_other_is_zero(x):
    """Right unless a whole row is negative."""
    return _launch(x, OTHER="zero")


def wrong_half_of_the_row(x):
    return _launch(x, block=max(1, triton.next_power_of_2(x.shape[1]) // 2), OTHER="infinity")
