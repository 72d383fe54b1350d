"""fp8_linear in Triton: quantize's kernel, then fp8_gemm's."""

from __future__ import annotations

import torch
from torch import Tensor

from ..fp8_gemm.triton_kernel import fp8_gemm
from ..quantize.triton_kernel import quantize
from .reference import quantized_input


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    scale: Tensor | None,
    channel_scale: Tensor | None,
    residual: Tensor | None = None,
    rotate: int | None = None,
    ada_gate: Tensor | None = None,
) -> Tensor:
    a, a_scale = quantized_input(x, weight_scale, scale, channel_scale, quantize, rotate)
    return fp8_gemm(a, weight, a_scale, weight_scale, bias, activation, out_dtype, None, residual, ada_gate)


torch.library.impl("forwardpass::fp8_linear_triton", ("cuda", "cpu"))(fp8_linear)
