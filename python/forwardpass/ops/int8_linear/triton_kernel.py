"""int8_linear in Triton: quantize's kernel, then int8_gemm's."""

from __future__ import annotations

import torch
from torch import Tensor

from ..int8_gemm.triton_kernel import int8_gemm
from ..quantize.triton_kernel import quantize
from .reference import quantized_input


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    scale: Tensor | None,
    zero_point: Tensor | None,
    symmetric: bool,
    channel_scale: Tensor | None,
    weight_sum: Tensor | None,
    packed: Tensor | None = None,
    residual: Tensor | None = None,
    rotate: int | None = None,
    ada_gate: Tensor | None = None,
) -> Tensor:
    a, a_scale, a_zero_point = quantized_input(x, scale, zero_point, symmetric, channel_scale, quantize, rotate)
    return int8_gemm(
        a,
        weight,
        a_scale,
        weight_scale,
        bias,
        activation,
        out_dtype,
        None,
        a_zero_point,
        weight_sum,
        residual,
        ada_gate,
    )


torch.library.impl("forwardpass::int8_linear_triton", ("cuda", "cpu"))(int8_linear)
