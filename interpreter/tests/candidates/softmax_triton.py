"""Softmax of rows: `right_...` are right, `wrong_...` are what verify has to refuse."""

import torch
import triton
import triton.language as tl


@triton.jit
def rows_at_once(x, y, stride, stride_col, cols, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row = tl.load(x + tl.program_id(0) * stride + i * stride_col, mask=i < cols, other=-float("inf"))
    e = tl.exp(row - tl.max(row, 0))
    tl.store(y + tl.program_id(0) * cols + i, e / tl.sum(e, 0), mask=i < cols)


@triton.jit
def in_blocks(x, y, stride, stride_col, cols, BLOCK: tl.constexpr):
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    for first in range(0, cols, BLOCK):
        i = first + tl.arange(0, BLOCK)
        value = tl.load(x + tl.program_id(0) * stride + i * stride_col, mask=i < cols, other=-float("inf"))
        top = tl.where((value > top) | (value != value), value, top)
    highest = tl.max(top, 0)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, cols, BLOCK):
        i = first + tl.arange(0, BLOCK)
        value = tl.load(x + tl.program_id(0) * stride + i * stride_col, mask=i < cols, other=-float("inf"))
        total += tl.exp(value - highest)
    scale = 1 / tl.sum(total, 0)
    for first in range(0, cols, BLOCK):
        i = first + tl.arange(0, BLOCK)
        value = tl.load(x + tl.program_id(0) * stride + i * stride_col, mask=i < cols, other=-float("inf"))
        tl.store(y + tl.program_id(0) * cols + i, tl.exp(value - highest) * scale, mask=i < cols)


@triton.jit
def without_maximum(x, y, stride, cols, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    e = tl.exp(tl.load(x + tl.program_id(0) * stride + i, mask=i < cols, other=-float("inf")))
    tl.store(y + tl.program_id(0) * cols + i, e / tl.sum(e, 0), mask=i < cols)


@triton.jit
def other_is_zero(x, y, stride, cols, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row = tl.load(x + tl.program_id(0) * stride + i, mask=i < cols, other=0.0)
    e = tl.exp(row - tl.max(row, 0))
    tl.store(y + tl.program_id(0) * cols + i, e / tl.sum(e, 0), mask=i < cols)


@triton.jit
def unmasked_store(x, y, stride, cols, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row = tl.load(x + tl.program_id(0) * stride + i, mask=i < cols, other=-float("inf"))
    e = tl.exp(row - tl.max(row, 0))
    tl.store(y + tl.program_id(0) * cols + i, e / tl.sum(e, 0))


@triton.jit
def nothing(y):
    tl.store(y, 0.0)


def _block(x):
    return triton.next_power_of_2(x.shape[1])


def _launch(kernel, x, *strides):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    kernel[(len(x),)](x, y, *strides, x.shape[1], BLOCK=_block(x))
    return y


def right_at_once(x):
    return _launch(rows_at_once, x, x.stride(0), x.stride(1))


def right_in_blocks(x):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    in_blocks[(len(x),)](x, y, x.stride(0), x.stride(1), x.shape[1], BLOCK=128)
    return y


def right_contiguous(x):
    x = x.contiguous()
    return _launch(rows_at_once, x, x.shape[1], 1)


def right_larger_block(x):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows_at_once[(len(x),)](x, y, x.stride(0), x.stride(1), x.shape[1], BLOCK=1024)
    return y


def wrong_without_maximum(x):
    return _launch(without_maximum, x.contiguous(), x.shape[1])


def wrong_other_is_zero(x):
    return _launch(other_is_zero, x.contiguous(), x.shape[1])


def wrong_unmasked_store(x):
    return _launch(unmasked_store, x.contiguous(), x.shape[1])


def wrong_strides(x):
    """Takes rows for contiguous."""
    return _launch(rows_at_once, x, x.shape[1], 1)


def wrong_whole_blocks(x):
    """Columns beyond the last multiple of 64 are left as they are."""
    y = torch.zeros_like(x, memory_format=torch.contiguous_format)
    cols = max(64, x.shape[1] // 64 * 64) if x.shape[1] > 64 else x.shape[1]
    rows_at_once[(len(x),)](x, y, x.stride(0), x.stride(1), cols, BLOCK=triton.next_power_of_2(cols))
    return y


def wrong_zeros(x):
    y = torch.zeros_like(x, memory_format=torch.contiguous_format)
    nothing[(1,)](y)
    return y


def wrong_unwritten(x):
    y = torch.empty(x.shape, device=x.device)
    nothing[(1,)](y)
    return y


def wrong_torch(x):
    nothing[(1,)](torch.empty(1, device=x.device))
    return torch.softmax(x, -1)


def wrong_reference(x):
    """Finds the file beside it."""
    import softmax_reference

    nothing[(1,)](torch.empty(1, device=x.device))
    return softmax_reference.reference(x)


def wrong_no_launch(x):
    return torch.empty(x.shape, device=x.device)


def wrong_on_the_host(x):
    nothing[(1,)](torch.empty(1, device=x.device))
    host = x.cpu().numpy()
    import numpy

    e = numpy.exp(host - host.max(-1, keepdims=True))
    return torch.from_numpy(e / e.sum(-1, keepdims=True)).to(x.device)


def wrong_dtype(x):
    return _launch(rows_at_once, x, x.stride(0), x.stride(1)).to(torch.float16)


def wrong_shape(x):
    return right_at_once(x).view(-1)


def wrong_in_place(x):
    x = x.contiguous()
    rows_at_once[(len(x),)](x, x, x.shape[1], 1, x.shape[1], BLOCK=_block(x))
    return x


_results = {}


def wrong_remembered(x):
    """Once for each address and shape."""
    key = x.data_ptr(), x.shape, x.stride()
    nothing[(1,)](torch.empty(1, device=x.device))
    if key not in _results:
        _results[key] = right_at_once(x)
    return _results[key].clone()


_buffers = {}


def wrong_buffer(x):
    """All outputs are in one buffer."""
    y = _buffers.setdefault(x.shape, torch.empty(x.shape, device=x.device))
    rows_at_once[(len(x),)](x, y, x.stride(0), x.stride(1), x.shape[1], BLOCK=_block(x))
    return y
