"""int8_gemm and int8_gemm_quantize in Triton: forwardpass.triton_gemm; behind it, for the latter, quantize's kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.epilogue import fake_gemm
from ..common.triton_gemm import gemm
from ..quantize.triton_kernel import quantize


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
    out = fake_gemm(a, b, a_scale, b_scale, bias, activation, out_dtype)
    return gemm(
        a, b, a_scale, b_scale, bias, activation, out, out_scale, a_zero_point, b_sum, residual, ada_gate=ada_gate
    )


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
    return quantize(y, torch.int8, None, None, None, True, None)[:2]


torch.library.impl("forwardpass::int8_gemm_quantize_triton", ("cuda", "cpu"))(int8_gemm_quantize)
torch.library.impl("forwardpass::int8_gemm_triton", ("cuda", "cpu"))(int8_gemm)
