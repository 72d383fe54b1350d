"""norm_quantize and add_norm_quantize in Triton: one program a row, read once.

The compiler chooses the order of a sum. That both ops give the same bits for the same row was seen in the code for sm_80,
rows aligned or not, and is not the compiler's promise.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import triton_rows
from ..common.quantized_rows import matrix_shape
from ..common.triton_rows import magnitudes, rotate_blocks, segment_scale, store_quantized


@triton.jit
def load_rounded_sum(x_ptr, residual_ptr, offset, mask, RESIDUAL: tl.constexpr):
    """x, or x + residual, in x's dtype."""
    v = tl.load(x_ptr + offset, mask=mask, other=0.0)
    if RESIDUAL:
        r = tl.load(residual_ptr + offset, mask=mask, other=0.0)
        v = (v.to(tl.float32) + r.to(tl.float32)).to(x_ptr.dtype.element_ty)
    return v


@triton.jit
def load_values(
    x_ptr, residual_ptr, residual_out_ptr, pivot, start, columns, BLOCK: tl.constexpr, RESIDUAL: tl.constexpr,
    STORE: tl.constexpr,
):  # fmt: skip
    """fp32 values [BLOCK] from column `start` of a row on, less the pivot, 0 beyond its end; STORE keeps the sum."""
    c = start + tl.arange(0, BLOCK)
    v = load_rounded_sum(x_ptr, residual_ptr, c, c < columns, RESIDUAL)
    if STORE:
        tl.store(residual_out_ptr + c, v, mask=c < columns)
    return tl.where(c < columns, v.to(tl.float32) - pivot, 0.0)


@triton.jit
def centered_squares(v, mean, start, columns, BLOCK: tl.constexpr):
    d = tl.where(start + tl.arange(0, BLOCK) < columns, v - mean, 0.0)
    return d * d


@triton.jit
def normalize(
    v, mean, inverse, weight_ptr, bias_ptr, ada_scale_ptr, ada_shift_ptr, channel_ptr, start, columns, BLOCK: tl.constexpr,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, ADA_SCALE: tl.constexpr, ADA_SHIFT: tl.constexpr, CHANNEL_SCALE: tl.constexpr,
    ROTATE: tl.constexpr,
):  # fmt: skip
    c = start + tl.arange(0, BLOCK)
    mask = c < columns
    y = tl.where(mask, (v - mean) * inverse, 0.0)
    if WEIGHT:
        y = y * tl.load(weight_ptr + c, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        y = y + tl.load(bias_ptr + c, mask=mask, other=0.0).to(tl.float32)
    if ADA_SCALE:
        y = y * (1.0 + tl.load(ada_scale_ptr + c, mask=mask, other=0.0).to(tl.float32))
    if ADA_SHIFT:
        y = y + tl.load(ada_shift_ptr + c, mask=mask, other=0.0).to(tl.float32)
    if CHANNEL_SCALE:
        y = y * tl.load(channel_ptr + c, mask=mask, other=0.0)
    if ROTATE:
        y = rotate_blocks(y, ROTATE)
    return y


@triton.jit(do_not_specialize=["scale_stride"])
def norm_quantize_kernel(
    x_ptr, x_stride, residual_ptr, residual_stride, residual_out_ptr, weight_ptr, bias_ptr, ada_scale_ptr, ada_scale_stride,
    ada_shift_ptr, ada_shift_stride, rows_per_sample, eps, q_ptr, q_stride, scale_ptr, zero_ptr, scale_stride, channel_ptr, columns,
    LAYER: tl.constexpr, RESIDUAL: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, ADA_SCALE: tl.constexpr,
    ADA_SHIFT: tl.constexpr, CHANNEL_SCALE: tl.constexpr, ROTATE: tl.constexpr, E4M3: tl.constexpr, SYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample = row // rows_per_sample
    ada_scale_ptr += sample * ada_scale_stride
    ada_shift_ptr += sample * ada_shift_stride
    x_ptr += row * x_stride
    residual_ptr += row * residual_stride
    out_ptr = residual_out_ptr + row * columns
    q_ptr += row * q_stride
    count = columns * 1.0

    # A layer norm does not change when all of a row is shifted: taken from the row's first value on, a large common
    # offset costs no accuracy, and a constant row has variance 0 exactly.
    pivot, mean = 0.0, 0.0
    if LAYER:
        pivot = load_rounded_sum(x_ptr, residual_ptr, 0, True, RESIDUAL).to(tl.float32)
    first = load_values(x_ptr, residual_ptr, out_ptr, pivot, 0, columns, BLOCK, RESIDUAL, RESIDUAL)
    if LAYER:
        sums = first
        for start in range(BLOCK, columns, BLOCK):
            sums += load_values(x_ptr, residual_ptr, out_ptr, pivot, start, columns, BLOCK, RESIDUAL, False)
        mean = tl.math.div_rn(tl.sum(sums), count)
    squares = centered_squares(first, mean, 0, columns, BLOCK)  # E[x^2] - E[x]^2 cancels
    for start in range(BLOCK, columns, BLOCK):
        v = load_values(x_ptr, residual_ptr, out_ptr, pivot, start, columns, BLOCK, RESIDUAL, RESIDUAL)
        squares += centered_squares(v, mean, start, columns, BLOCK)
    total = tl.sum(squares)
    inverse = tl.math.div_rn(1.0, tl.math.sqrt_rn(tl.math.div_rn(total, count) + eps))
    inverse += total * 0.0  # squares that overflow show as NaN, not as values of 0

    first = normalize(
        first, mean, inverse, weight_ptr, bias_ptr, ada_scale_ptr, ada_shift_ptr, channel_ptr, 0, columns, BLOCK, WEIGHT, BIAS,
        ADA_SCALE, ADA_SHIFT, CHANNEL_SCALE, ROTATE,
    )  # fmt: skip
    high, low = magnitudes(first)
    for start in range(BLOCK, columns, BLOCK):
        v = load_values(x_ptr, residual_ptr, out_ptr, pivot, start, columns, BLOCK, RESIDUAL, False)
        v = normalize(
            v, mean, inverse, weight_ptr, bias_ptr, ada_scale_ptr, ada_shift_ptr, channel_ptr, start, columns, BLOCK, WEIGHT,
            BIAS, ADA_SCALE, ADA_SHIFT, CHANNEL_SCALE, ROTATE,
        )  # fmt: skip
        h, n = magnitudes(v)
        high, low = tl.maximum(high, h), tl.maximum(low, n)
    scale, zero_point = segment_scale(
        tl.max(high), tl.max(low), row, 0, scale_ptr, zero_ptr, scale_stride, E4M3, SYMMETRIC, False
    )
    c = tl.arange(0, BLOCK)
    store_quantized(first, q_ptr + c, c < columns, scale, zero_point, E4M3, SYMMETRIC)
    for start in range(BLOCK, columns, BLOCK):
        v = load_values(x_ptr, residual_ptr, out_ptr, pivot, start, columns, BLOCK, RESIDUAL, False)
        v = normalize(
            v, mean, inverse, weight_ptr, bias_ptr, ada_scale_ptr, ada_shift_ptr, channel_ptr, start, columns, BLOCK, WEIGHT,
            BIAS, ADA_SCALE, ADA_SHIFT, CHANNEL_SCALE, ROTATE,
        )  # fmt: skip
        store_quantized(v, q_ptr + start + c, start + c < columns, scale, zero_point, E4M3, SYMMETRIC)


def _run(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    kind: str,
    bias: Tensor | None,
    symmetric: bool,
    channel_scale: Tensor | None,
    rotate: int | None,
    residual_out: Tensor | None,
    ada_scale: Tensor | None = None,
    ada_shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    result, arguments = triton_rows.allocate(
        x, tuple(x.shape), dtype, None, None, None, symmetric, channel_scale, rotate
    )
    for name in ("group", "groups", "STATIC"):  # a row is one segment, and its scale dynamic
        del arguments[name]
    rows, columns, stride = matrix_shape(x)
    options: dict[str, Any] = {
        "residual_ptr": x if residual is None else residual,
        "residual_stride": stride if residual is None else matrix_shape(residual)[2],
        "residual_out_ptr": x if residual_out is None else residual_out,
        "weight_ptr": x if weight is None else weight,
        "bias_ptr": x if bias is None else bias,
        "ada_scale_ptr": x if ada_scale is None else ada_scale,
        "ada_scale_stride": 0 if ada_scale is None else matrix_shape(ada_scale)[2],
        "ada_shift_ptr": x if ada_shift is None else ada_shift,
        "ada_shift_stride": 0 if ada_shift is None else matrix_shape(ada_shift)[2],
        "rows_per_sample": rows // x.shape[0] if x.dim() > 1 and rows else 1,
        "LAYER": kind == "layer",
        "RESIDUAL": residual is not None,
        "WEIGHT": weight is not None,
        "BIAS": bias is not None,
        "ADA_SCALE": ada_scale is not None,
        "ADA_SHIFT": ada_shift is not None,
    }
    if rows:
        with torch.cuda.device_of(x):
            norm_quantize_kernel[(rows,)](
                x,
                stride,
                eps=eps,
                **options,
                **arguments,
                **triton_rows.segments(columns, None),
                enable_fp_fusion=False,
            )
    return result


def norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    kind: str,
    bias: Tensor | None,
    symmetric: bool,
    channel_scale: Tensor | None,
    rotate: int | None = None,
    ada_scale: Tensor | None = None,
    ada_shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _run(x, None, weight, eps, dtype, kind, bias, symmetric, channel_scale, rotate, None, ada_scale, ada_shift)


def add_norm_quantize(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    kind: str,
    bias: Tensor | None,
    symmetric: bool,
    channel_scale: Tensor | None,
    rotate: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    residual_out = x.new_empty(x.shape)
    return *_run(
        x, residual, weight, eps, dtype, kind, bias, symmetric, channel_scale, rotate, residual_out
    ), residual_out


torch.library.impl("forwardpass::norm_quantize_triton", ("cuda", "cpu"))(norm_quantize)
torch.library.impl("forwardpass::add_norm_quantize_triton", ("cuda", "cpu"))(add_norm_quantize)
