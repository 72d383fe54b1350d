"""int8_gemm in Triton: forwardpass.triton_gemm."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.epilogue import fake_gemm
from ..common.triton_gemm import gemm


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
) -> Tensor:
    out = fake_gemm(a, b, a_scale, b_scale, bias, activation, out_dtype)
    return gemm(a, b, a_scale, b_scale, bias, activation, out, out_scale, a_zero_point, b_sum, residual)


torch.library.impl("forwardpass::int8_gemm_triton", ("cuda", "cpu"))(int8_gemm)
