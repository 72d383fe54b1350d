"""activation_quantize in Triton: one program a segment of the result, read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import triton_rows
from ..common.activations import is_gated
from ..common.quantized_rows import matrix_shape
from ..common.triton_activations import activate
from ..common.triton_rows import magnitudes, rotate_blocks, segment_scale, store_quantized


@triton.jit
def load_values(
    x_ptr, columns, channel_ptr, begin, start, length, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, CHANNEL_SCALE: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """fp32 values [BLOCK] of a segment from column `start` of it on, activated and smoothed; 0 beyond its end."""
    c = start + tl.arange(0, BLOCK)
    mask = c < length
    column = begin + c
    if INTERLEAVED:
        x_ptr += column // 8 * 8
    v = activate(tl.load(x_ptr + column, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    if GATED:
        v = v * tl.load(x_ptr + column + (8 if INTERLEAVED else columns), mask=mask, other=0.0).to(tl.float32)
    if CHANNEL_SCALE:
        v = v * tl.load(channel_ptr + column, mask=mask, other=0.0)
    if ROTATE:
        v = rotate_blocks(v, ROTATE)
    return v


@triton.jit(do_not_specialize=["scale_stride"])
def activation_quantize_kernel(
    x_ptr, x_stride, q_ptr, q_stride, scale_ptr, zero_ptr, scale_stride, channel_ptr, columns, group, groups,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    CHANNEL_SCALE: tl.constexpr, ROTATE: tl.constexpr, E4M3: tl.constexpr, SYMMETRIC: tl.constexpr, STATIC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0).to(tl.int64)
    row, group_index = segment // groups, segment % groups
    begin = group_index * group
    length = tl.minimum(columns - begin, group)
    x_ptr += row * x_stride
    q_ptr += row * q_stride + begin

    first = load_values(
        x_ptr, columns, channel_ptr, begin, 0, length, ACTIVATION, GATED, INTERLEAVED, BLOCK, CHANNEL_SCALE, ROTATE
    )
    high, low = magnitudes(first)
    for start in range(BLOCK, length, BLOCK):
        v = load_values(
            x_ptr, columns, channel_ptr, begin, start, length, ACTIVATION, GATED, INTERLEAVED, BLOCK, CHANNEL_SCALE,
            ROTATE,
        )  # fmt: skip
        h, n = magnitudes(v)
        high, low = tl.maximum(high, h), tl.maximum(low, n)
    inverse, zero_point = segment_scale(
        tl.max(high), tl.max(low), row, group_index, scale_ptr, zero_ptr, scale_stride, E4M3, SYMMETRIC, STATIC
    )
    c = tl.arange(0, BLOCK)
    store_quantized(first, q_ptr + c, c < length, inverse, zero_point, E4M3, SYMMETRIC)
    for start in range(BLOCK, length, BLOCK):
        v = load_values(
            x_ptr, columns, channel_ptr, begin, start, length, ACTIVATION, GATED, INTERLEAVED, BLOCK, CHANNEL_SCALE,
            ROTATE,
        )  # fmt: skip
        store_quantized(v, q_ptr + start + c, start + c < length, inverse, zero_point, E4M3, SYMMETRIC)


def activation_quantize(
    x: Tensor,
    activation: str,
    dtype: torch.dtype,
    group_size: int | None,
    layout: str,
    symmetric: bool,
    channel_scale: Tensor | None,
    rotate: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, wide, stride = matrix_shape(x)
    gated = is_gated(activation)
    columns = wide // 2 if gated else wide
    result, arguments = triton_rows.allocate(
        x, (*x.shape[:-1], columns), dtype, None, None, group_size, symmetric, channel_scale, rotate
    )
    if rows:
        with torch.cuda.device_of(x):
            activation_quantize_kernel[(rows * arguments["groups"],)](
                x, stride, **arguments,
                ACTIVATION=activation, GATED=gated, INTERLEAVED=layout == "interleaved8",
                **triton_rows.segments(columns, group_size), enable_fp_fusion=False,
            )  # fmt: skip
    return result


torch.library.impl("forwardpass::activation_quantize_triton", ("cuda", "cpu"))(activation_quantize)
