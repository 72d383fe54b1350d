"""From accumulators to output in Triton: what dequant_activation and every GEMM share, as csrc/device/epilogue in CUDA.

Launched with enable_fp_fusion=False: the fma is where the formula (forwardpass.ops.common.epilogue) has one, and nowhere else.

Every option is a number, so that a kernel has it as a constant or at run time: dequant_activation is bound by memory, and
moves 16 bytes at a time only with constants; a GEMM compiles once for all of them. RESIDUAL is 0 without one, 1 behind the
activation, 2 before it, and 3 behind the activation and a gate of samples: a GEMM compiles once for each, so that the kernel
without one keeps its registers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .quantized_rows import E4M3, matrix_shape
from .triton_activations import activate, hard_swish, times_sigmoid
from .triton_rows import at_least_smallest, magnitudes, to_e4m3_bits, to_int

_TYPES = {None: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.int8: 4, E4M3: 5}
_ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4, "relu6": 5, "hard_swish": 6}


def options(
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    out: Tensor,
    out_scale: Tensor | None = None,
    a_zero_point: Tensor | None = None,
    b_sum: Tensor | None = None,
    residual: Tensor | None = None,
    scaled: bool = False,
    residual_first: bool = False,
    ada_gate: Tensor | None = None,
) -> dict[str, Any]:
    """The arguments of a kernel that ends in `activated` and `store_output`; `scaled`: its accumulators are already."""

    def step(v: Tensor | None) -> int:
        """The distance from one element's value to the next one's: 0 where all share one, -1 where there is none."""
        return -1 if v is None else int(v.numel() != 1)

    unread = torch.empty(1, device=out.device) if b_scale is None else b_scale  # stands for what is not there

    def integers(v: Tensor | None) -> Tensor:
        return unread.view(torch.int32) if v is None else v

    _, columns, out_stride = matrix_shape(out)
    out_bytes = out.view(torch.uint8)
    residual_bytes, residual_stride = out_bytes, 0
    if residual is not None:
        rows, columns, residual_stride = matrix_shape(residual)
        residual_bytes = residual.as_strided((rows, columns), (residual_stride, 1)).view(torch.uint8)
    gate_bytes, gate_stride, rows_per_sample = out_bytes, 0, 1
    if ada_gate is not None:
        samples, _, gate_stride = matrix_shape(ada_gate)
        gate_bytes = ada_gate.as_strided((samples, columns), (gate_stride, 1)).view(torch.uint8)
        rows_per_sample = rows // samples
    return {
        "a_scale_ptr": unread if a_scale is None else a_scale, "a_scale_step": -1 if scaled else step(a_scale),
        "b_scale_ptr": unread, "b_scale_step": -1 if scaled else step(b_scale),
        "zero_ptr": integers(a_zero_point), "zero_step": step(a_zero_point), "b_sum_ptr": integers(b_sum),
        "bias_ptr": out_bytes if bias is None else bias.view(torch.uint8),
        "bias_type": _TYPES[None if bias is None else bias.dtype],
        "activation": _ACTIVATIONS[activation and activation.removesuffix("_mul")],
        "out_scale_ptr": unread if out_scale is None else out_scale, "out_scale_step": step(out_scale),
        "residual_ptr": residual_bytes, "residual_stride": residual_stride,
        "ada_gate_ptr": gate_bytes, "ada_gate_stride": gate_stride, "rows_per_sample": rows_per_sample,
        "RESIDUAL": 0 if residual is None else 3 if ada_gate is not None else 1 + residual_first,
        "out_ptr": out_bytes, "out_type": _TYPES[out.dtype], "out_stride": out_stride, "out_columns": columns,
    }  # fmt: skip


@triton.jit
def load_each(ptr, offset, inside, step, other):
    """One value for each offset, `other` where there is none."""
    return tl.load(ptr + offset * step, mask=inside & (step >= 0), other=other)


@triton.jit
def load_bias(ptr, offset, inside, bias_type):
    """In fp32."""
    bias = tl.zeros(offset.shape, tl.float32)
    if bias_type == 1:
        bias = tl.load(ptr.to(tl.pointer_type(tl.float32)) + offset, mask=inside, other=0.0)
    elif bias_type == 2:
        bias = tl.load(ptr.to(tl.pointer_type(tl.float16)) + offset, mask=inside, other=0.0).to(tl.float32)
    elif bias_type == 3:
        bias = tl.load(ptr.to(tl.pointer_type(tl.bfloat16)) + offset, mask=inside, other=0.0).to(tl.float32)
    return bias


@triton.jit
def dequantized(
    acc, a_scale, zero_point, column, inside, b_scale_ptr, b_scale_step, zero_step, b_sum_ptr, bias_ptr, bias_type,
):  # fmt: skip
    """acc [M, N] to fp32; a_scale, zero_point [M]; column, inside [N]."""
    if acc.dtype == tl.int32:
        b_sum = tl.load(b_sum_ptr + column, mask=inside & (zero_step >= 0), other=0)
        acc -= zero_point[:, None] * b_sum[None, :]
    b_scale = load_each(b_scale_ptr, column, inside, b_scale_step, 1.0)
    bias = tl.broadcast_to(load_bias(bias_ptr, column, inside, bias_type)[None, :], acc.shape)
    return tl.fma(acc.to(tl.float32), a_scale[:, None] * b_scale[None, :], bias)


@triton.jit
def activate_numbered(y, activation):
    if activation == 1:
        y = activate(y, "relu")
    elif activation == 2:
        y = activate(y, "gelu")
    elif activation == 5:
        y = activate(y, "relu6")
    elif activation == 6:
        y = hard_swish(y)
    elif activation >= 3:
        # gelu_tanh and silu are one formula, of other constants: half the code. 1e30 * 0 is 0, infinity * 0 would be NaN.
        cubic, linear = 0.0, 1.0
        if activation == 3:
            cubic, linear = 0.07135481627260025, 1.5957691216057308
        y = times_sigmoid(y, y * (tl.minimum(y * y, 1e30) * cubic + linear))
    return y


@triton.jit
def activated(
    acc, up, row, rows, column, columns, a_scale_ptr, a_scale_step, b_scale_ptr, b_scale_step, zero_ptr, zero_step,
    b_sum_ptr, bias_ptr, bias_type, activation, residual_ptr, residual_stride, out_type, RESIDUAL: tl.constexpr,
    GATED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The fp32 outputs [M, N] at row [M], column [N] of `rows` x `columns`, but for a residual that follows the activation; acc
    is the gate's and `up` its factor's where GATED."""
    a_scale = load_each(a_scale_ptr, row, row < rows, a_scale_step, 1.0)
    zero_point = load_each(zero_ptr, row, row < rows, zero_step, 0)
    inside = column < columns
    if GATED:
        column += column // 8 * 8  # 8 of gate, then 8 of up
    y = dequantized(acc, a_scale, zero_point, column, inside, b_scale_ptr, b_scale_step, zero_step, b_sum_ptr,
                    bias_ptr, bias_type)  # fmt: skip
    if RESIDUAL == 2:
        y += load_residual(residual_ptr, out_type, row, rows, column, columns, residual_stride, ALIGNED)
    y = activate_numbered(y, activation)
    if GATED:
        y *= dequantized(up, a_scale, zero_point, column + 8, inside, b_scale_ptr, b_scale_step, zero_step, b_sum_ptr,
                         bias_ptr, bias_type)  # fmt: skip
    return y


@triton.jit
def store_masked(ptr, y, row, rows, column, columns, stride):
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(ptr + row.to(tl.int64)[:, None] * stride + column[None, :], y, mask=inside)


@triton.jit
def store_as(ptr, y, row, rows, column, columns, stride, ALIGNED: tl.constexpr):
    """[M, N] to the rows of `ptr`, `stride` elements apart. ALIGNED None: whether 16 bytes at a time is found at run time."""
    if ALIGNED is None:
        if columns % 16 == 0 and stride % 16 == 0:
            store_masked(ptr, y, row, rows, column, columns // 16 * 16, stride // 16 * 16)  # the same, and it shows
        else:
            store_masked(ptr, y, row, rows, column, columns, stride)
    else:
        store_masked(ptr, y, row, rows, column, columns, stride)


@triton.jit
def load_masked(ptr, row, rows, column, columns, stride):
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(ptr + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0)


@triton.jit
def load_as(ptr, row, rows, column, columns, stride, ALIGNED: tl.constexpr):
    """[M, N] of the rows of `ptr`, as `store_as`."""
    if ALIGNED is None:
        if columns % 16 == 0 and stride % 16 == 0:
            v = load_masked(ptr, row, rows, column, columns // 16 * 16, stride // 16 * 16)
        else:
            v = load_masked(ptr, row, rows, column, columns, stride)
    else:
        v = load_masked(ptr, row, rows, column, columns, stride)
    return v


@triton.jit
def load_residual(ptr, type_, row, rows, column, columns, stride, ALIGNED: tl.constexpr):
    """[M, N] of the output's type, in fp32."""
    if type_ == 1:
        residual = load_as(ptr.to(tl.pointer_type(tl.float32)), row, rows, column, columns, stride, ALIGNED)
    else:
        bits = load_as(ptr.to(tl.pointer_type(tl.int16)), row, rows, column, columns, stride, ALIGNED)
        residual = bits.to(tl.float16, bitcast=True).to(tl.float32)
        if type_ == 3:
            residual = bits.to(tl.bfloat16, bitcast=True).to(tl.float32)
    return residual


@triton.jit
def store_output(
    y, row, rows, column, columns, residual_ptr, residual_stride, ada_gate_ptr, ada_gate_stride, rows_per_sample, out_ptr, out_type,
    stride, out_scale_ptr, out_scale_step, RESIDUAL: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """fp32 [M, N], plus the residual where one follows the activation, to the output's type."""
    if RESIDUAL == 3:
        sample = tl.minimum(row, rows - 1) // rows_per_sample
        y *= load_residual(ada_gate_ptr, out_type, sample, rows, column, columns, ada_gate_stride, ALIGNED)
    if RESIDUAL == 1 or RESIDUAL == 3:
        y += load_residual(residual_ptr, out_type, row, rows, column, columns, residual_stride, ALIGNED)
    if out_type == 1:
        store_as(out_ptr.to(tl.pointer_type(tl.float32)), y, row, rows, column, columns, stride, ALIGNED)
    elif out_type <= 3:
        half = y.to(tl.float16).to(tl.int16, bitcast=True)
        if out_type == 3:
            half = y.to(tl.bfloat16).to(tl.int16, bitcast=True)
        store_as(out_ptr.to(tl.pointer_type(tl.int16)), half, row, rows, column, columns, stride, ALIGNED)
    else:
        out_scale = load_each(out_scale_ptr, column, column < columns, out_scale_step, 1.0)
        y = tl.math.div_rn(y, tl.broadcast_to(out_scale[None, :], y.shape))
        bits = to_e4m3_bits(y)
        if out_type == 4:
            bits = to_int(y, -127.0, 127.0).to(tl.uint8)
        store_as(out_ptr, bits, row, rows, column, columns, stride, ALIGNED)


@triton.jit
def store_group(y, row, rows, group, columns, q_ptr, stride, scale_ptr, scale_stride):
    """fp32 [M, 128], a group of each row, to e4m3 and its scale: the rule of `quantize` in groups of 128."""
    M: tl.constexpr = y.shape[0]
    column = group * 128 + tl.arange(0, 128)
    high, low = magnitudes(tl.where((column < columns)[None, :], y, 0.0))
    parts = tl.max(tl.reshape(tl.maximum(high, low), (M, 16, 8)), 2)
    largest = tl.max(parts, 1)[:, None]
    span = at_least_smallest(largest.to(tl.float32, bitcast=True))
    q = to_e4m3_bits(y * tl.math.div_rn(tl.full((M, 1), 448.0, tl.float32), span))
    store_as(q_ptr, q, row, rows, column, columns, stride, None)
    # The row's scale stands in the first of 16 columns. Were it alone, each warp would have it, and Triton have all of them
    # write it to the same shared memory before it is stored; of 8 columns two warps have each.
    is_first = (tl.arange(0, 16) == 0)[None, :]
    span = at_least_smallest(tl.where(is_first, largest, parts).to(tl.float32, bitcast=True))
    address = scale_ptr + row[:, None] + group.to(tl.int64) * scale_stride + tl.arange(0, 16)[None, :]
    tl.store(address, tl.math.div_rn(span, tl.full((M, 16), 448.0, tl.float32)), mask=is_first & (row < rows)[:, None])
