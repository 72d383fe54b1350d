"""quantize in Triton: one program a segment, read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import triton_rows
from ..common.quantized_rows import matrix_shape
from ..common.triton_rows import magnitudes, rotate_blocks, segment_scale, store_quantized


@triton.jit
def load_values(
    x_ptr, channel_ptr, start, length, BLOCK: tl.constexpr, CHANNEL_SCALE: tl.constexpr, ROTATE: tl.constexpr
):
    """fp32 values [BLOCK] of a segment from column `start` of it on, smoothed; 0 beyond its end."""
    c = start + tl.arange(0, BLOCK)
    v = tl.load(x_ptr + c, mask=c < length, other=0.0).to(tl.float32)
    if CHANNEL_SCALE:
        v = v * tl.load(channel_ptr + c, mask=c < length, other=0.0)
    if ROTATE:
        v = rotate_blocks(v, ROTATE)
    return v


@triton.jit
def quantize_segment(
    x_ptr, channel_ptr, q_ptr, length, row, group_index, scale_ptr, zero_ptr, scale_stride, CHANNEL_SCALE: tl.constexpr,
    ROTATE: tl.constexpr, E4M3: tl.constexpr, SYMMETRIC: tl.constexpr, STATIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The segment at x_ptr to q_ptr; its scale is that of row and group_index."""
    first = load_values(x_ptr, channel_ptr, 0, length, BLOCK, CHANNEL_SCALE, ROTATE)
    high, low = magnitudes(first)
    if not STATIC:
        for start in range(BLOCK, length, BLOCK):
            h, n = magnitudes(load_values(x_ptr, channel_ptr, start, length, BLOCK, CHANNEL_SCALE, ROTATE))
            high, low = tl.maximum(high, h), tl.maximum(low, n)
    inverse, zero_point = segment_scale(
        tl.max(high), tl.max(low), row, group_index, scale_ptr, zero_ptr, scale_stride, E4M3, SYMMETRIC, STATIC
    )
    c = tl.arange(0, BLOCK)
    store_quantized(first, q_ptr + c, c < length, inverse, zero_point, E4M3, SYMMETRIC)
    for start in range(BLOCK, length, BLOCK):
        v = load_values(x_ptr, channel_ptr, start, length, BLOCK, CHANNEL_SCALE, ROTATE)
        store_quantized(v, q_ptr + start + c, start + c < length, inverse, zero_point, E4M3, SYMMETRIC)


@triton.jit(do_not_specialize=["scale_stride"])
def quantize_kernel(
    x_ptr, x_stride, q_ptr, q_stride, scale_ptr, zero_ptr, scale_stride, channel_ptr, columns, group, groups,
    CHANNEL_SCALE: tl.constexpr, ROTATE: tl.constexpr, E4M3: tl.constexpr, SYMMETRIC: tl.constexpr, STATIC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0).to(tl.int64)
    row, group_index = segment // groups, segment % groups
    begin = group_index * group
    length = tl.minimum(columns - begin, group)
    quantize_segment(
        x_ptr + row * x_stride + begin, channel_ptr + begin, q_ptr + row * q_stride + begin, length, row, group_index, scale_ptr,
        zero_ptr, scale_stride, CHANNEL_SCALE, ROTATE, E4M3, SYMMETRIC, STATIC, BLOCK,
    )  # fmt: skip


def quantize(
    x: Tensor,
    dtype: torch.dtype,
    scale: Tensor | None,
    zero_point: Tensor | None,
    group_size: int | None,
    symmetric: bool,
    channel_scale: Tensor | None,
    rotate: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    result, arguments = triton_rows.allocate(
        x, tuple(x.shape), dtype, scale, zero_point, group_size, symmetric, channel_scale, rotate
    )
    rows, columns, stride = matrix_shape(x)
    if rows:
        with torch.cuda.device_of(x):
            quantize_kernel[(rows * arguments["groups"],)](
                x, stride, **arguments, **triton_rows.segments(columns, group_size), enable_fp_fusion=False
            )
    return result


torch.library.impl("forwardpass::quantize_triton", ("cuda", "cpu"))(quantize)
