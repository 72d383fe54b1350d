"""dequant_activation in Triton: one program a block of one row's outputs.

Launched with enable_fp_fusion=False: the fma is where the formula has one, and nowhere else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import is_gated
from ..epilogue import fake_output
from ..quantized_rows import E4M3, matrix_shape
from ..triton_activations import activate
from ..triton_rows import to_e4m3_bits, to_int


@triton.jit
def dequantize(
    acc_ptr, column, mask, a_scale, zero_point, b_scale_ptr, bias_ptr, b_sum_ptr,
    B_SCALE_PER_COLUMN: tl.constexpr, BIAS: tl.constexpr, ZERO_POINT: tl.constexpr,
):  # fmt: skip
    """y [BLOCK] in fp32 at `column` [BLOCK] of one row."""
    acc = tl.load(acc_ptr + column, mask=mask, other=0)
    if ZERO_POINT:
        acc -= zero_point * tl.load(b_sum_ptr + column, mask=mask, other=0)
    b_scale = tl.load(b_scale_ptr + column, mask=mask, other=0.0) if B_SCALE_PER_COLUMN else tl.load(b_scale_ptr)
    y = acc.to(tl.float32)
    bias = tl.zeros_like(y)
    if BIAS:
        bias = tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
    return tl.fma(y, tl.broadcast_to(a_scale * b_scale, y.shape), bias)


@triton.jit
def dequant_activation_kernel(
    acc_ptr, acc_stride, a_scale_ptr, b_scale_ptr, bias_ptr, zero_ptr, b_sum_ptr, out_scale_ptr, out_ptr, out_stride,
    columns, blocks, A_SCALE_PER_ROW: tl.constexpr, B_SCALE_PER_COLUMN: tl.constexpr, BIAS: tl.constexpr,
    ZERO_POINT: tl.constexpr, ZERO_PER_ROW: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    QUANTIZED: tl.constexpr, OUT_SCALE_PER_COLUMN: tl.constexpr, E4M3: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    out_column = (program % blocks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    mask = out_column < columns
    acc_ptr += row * acc_stride
    out_ptr += row * out_stride

    a_scale = tl.load(a_scale_ptr + row if A_SCALE_PER_ROW else a_scale_ptr)
    zero_point = 0
    if ZERO_POINT:
        zero_point = tl.load(zero_ptr + row if ZERO_PER_ROW else zero_ptr)
    column = out_column
    if GATED:
        column = out_column + out_column // 8 * 8  # 8 of gate, then 8 of up
    y = dequantize(acc_ptr, column, mask, a_scale, zero_point, b_scale_ptr, bias_ptr, b_sum_ptr,
                   B_SCALE_PER_COLUMN, BIAS, ZERO_POINT)  # fmt: skip
    y = activate(y, ACTIVATION)
    if GATED:
        y *= dequantize(acc_ptr, column + 8, mask, a_scale, zero_point, b_scale_ptr, bias_ptr, b_sum_ptr,
                        B_SCALE_PER_COLUMN, BIAS, ZERO_POINT)  # fmt: skip

    if QUANTIZED:
        if OUT_SCALE_PER_COLUMN:
            out_scale = tl.load(out_scale_ptr + out_column, mask=mask, other=1.0)
        else:
            out_scale = tl.broadcast_to(tl.load(out_scale_ptr), y.shape)
        y = tl.math.div_rn(y, out_scale)
        y = to_e4m3_bits(y) if E4M3 else to_int(y, -127.0, 127.0)
    tl.store(out_ptr + out_column, y.to(out_ptr.dtype.element_ty), mask=mask)


def dequant_activation(
    acc: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    a_zero_point: Tensor | None,
    b_sum: Tensor | None,
) -> Tensor:
    out = fake_output(acc, tuple(acc.shape), activation, out_dtype)
    rows, _, stride = matrix_shape(acc)
    _, columns, out_stride = matrix_shape(out)

    def many(v: Tensor | None) -> bool:
        return v is not None and v.numel() != 1

    block = min(1024, max(16, triton.next_power_of_2(columns)))
    blocks = triton.cdiv(columns, block)
    if rows:
        with torch.cuda.device_of(acc):
            dequant_activation_kernel[(rows * blocks,)](
                acc, stride, a_scale, b_scale, bias, a_zero_point, b_sum, out_scale,
                out.view(torch.uint8) if out_dtype is E4M3 else out, out_stride, columns, blocks,
                A_SCALE_PER_ROW=many(a_scale), B_SCALE_PER_COLUMN=many(b_scale), BIAS=bias is not None,
                ZERO_POINT=a_zero_point is not None, ZERO_PER_ROW=many(a_zero_point), ACTIVATION=activation,
                GATED=is_gated(activation), QUANTIZED=out_scale is not None, OUT_SCALE_PER_COLUMN=many(out_scale),
                E4M3=out_dtype is E4M3,
                BLOCK=block, num_warps=max(1, block // 256), enable_fp_fusion=False,
            )  # fmt: skip
    return out


torch.library.impl("forwardpass::dequant_activation_triton", ("cuda", "cpu"))(dequant_activation)
