"""int8_gemm and int8_gemm_quantize in plain torch: the specification. Sums of int8 products are exact in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.epilogue import apply_epilogue
from ..common.quantized_rows import quantize_values


def int8_gemm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    a_zero_point: Tensor | None,
    b_sum: Tensor | None,
    residual: Tensor | None = None,
    ada_gate: Tensor | None = None,
) -> Tensor:
    acc = a.double() @ b.double().t()
    return apply_epilogue(acc, a_scale, b_scale, bias, activation, out_dtype, out_scale, a_zero_point, b_sum, residual,
                          ada_gate=ada_gate)  # fmt: skip


def int8_gemm_quantize(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    a_zero_point: Tensor | None,
    b_sum: Tensor | None,
) -> tuple[Tensor, Tensor]:
    y = int8_gemm(a, b, a_scale, b_scale, bias, activation, torch.float32, None, a_zero_point, b_sum)
    return quantize_values(y, torch.int8)[:2]
