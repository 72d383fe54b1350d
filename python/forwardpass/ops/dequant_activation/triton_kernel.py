"""dequant_activation in Triton: one program a block of one row's outputs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.activations import is_gated
from ..common.epilogue import fake_output
from ..common.quantized_rows import matrix_shape
from ..common.triton_epilogue import activated, options, store_output


@triton.jit
def load_sum(acc_ptr, column, mask, parts, part_stride):
    """[1, BLOCK]: the sum of the parts, in their order."""
    acc = tl.load(acc_ptr + column, mask=mask, other=0)
    for part in range(1, parts):
        acc += tl.load(acc_ptr + part.to(tl.int64) * part_stride + column, mask=mask, other=0)
    return acc[None, :]


@triton.jit
def dequantize_block(
    acc_ptr, acc_stride, parts, part_stride, rows, blocks, a_scale_ptr, a_scale_step, b_scale_ptr, b_scale_step, zero_ptr,
    zero_step, b_sum_ptr, bias_ptr, bias_type, activation, out_scale_ptr, out_scale_step, residual_ptr, residual_stride,
    ada_gate_ptr, ada_gate_stride, rows_per_sample, out_ptr, out_type, out_stride, out_columns,
    RESIDUAL: tl.constexpr, GATED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The program's block of the outputs, of accumulators that are the sum of `parts`, `part_stride` elements apart."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    column = (program % blocks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    mask = column < out_columns
    acc_ptr += row * acc_stride
    row = row + tl.zeros((1,), tl.int64)
    if GATED:
        wide = column + column // 8 * 8
        acc = load_sum(acc_ptr, wide, mask, parts, part_stride)
        up = load_sum(acc_ptr, wide + 8, mask, parts, part_stride)
    else:
        acc = load_sum(acc_ptr, column, mask, parts, part_stride)
        up = acc
    y = activated(acc, up, row, rows, column, out_columns, a_scale_ptr, a_scale_step, b_scale_ptr, b_scale_step,
                  zero_ptr, zero_step, b_sum_ptr, bias_ptr, bias_type, activation, residual_ptr, residual_stride, out_type,
                  RESIDUAL, GATED, ALIGNED)  # fmt: skip
    store_output(
        y, row, rows, column, out_columns, residual_ptr, residual_stride, ada_gate_ptr, ada_gate_stride, rows_per_sample, out_ptr,
        out_type, out_stride, out_scale_ptr, out_scale_step, RESIDUAL, ALIGNED,
    )  # fmt: skip


@triton.jit
def dequant_activation_kernel(
    acc_ptr, acc_stride, rows, blocks, a_scale_ptr, b_scale_ptr, zero_ptr, b_sum_ptr, bias_ptr, out_scale_ptr,
    residual_ptr, residual_stride, ada_gate_ptr, ada_gate_stride, rows_per_sample, out_ptr, out_stride, out_columns,
    a_scale_step: tl.constexpr, b_scale_step: tl.constexpr, zero_step: tl.constexpr, bias_type: tl.constexpr,
    activation: tl.constexpr, out_scale_step: tl.constexpr, out_type: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    dequantize_block(
        acc_ptr, acc_stride, 1, 0, rows, blocks, a_scale_ptr, a_scale_step, b_scale_ptr, b_scale_step, zero_ptr, zero_step,
        b_sum_ptr, bias_ptr, bias_type, activation, out_scale_ptr, out_scale_step, residual_ptr, residual_stride,
        ada_gate_ptr, ada_gate_stride, rows_per_sample, out_ptr, out_type, out_stride, out_columns, RESIDUAL, GATED, True, BLOCK,
    )  # fmt: skip


def dequant_activation(
    acc: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    a_zero_point: Tensor | None,
    b_sum: Tensor | None,
    residual: Tensor | None = None,
    ada_gate: Tensor | None = None,
) -> Tensor:
    out = fake_output(acc, tuple(acc.shape), activation, out_dtype)
    if out.numel():
        rows, _, stride = matrix_shape(acc)
        block = min(1024, max(16, triton.next_power_of_2(out.shape[-1])))
        blocks = triton.cdiv(out.shape[-1], block)
        with torch.cuda.device_of(acc):
            dequant_activation_kernel[(rows * blocks,)](
                acc, stride, rows, blocks,
                **options(a_scale, b_scale, bias, activation, out, out_scale, a_zero_point, b_sum, residual, ada_gate=ada_gate),
                GATED=is_gated(activation), BLOCK=block, num_warps=max(1, block // 256), enable_fp_fusion=False,
            )  # fmt: skip
    return out


torch.library.impl("forwardpass::dequant_activation_triton", ("cuda", "cpu"))(dequant_activation)
