"""fp8_gemm and fp8_gemm_quantize in Triton: forwardpass.triton_gemm."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.epilogue import fake_gemm
from ..common.triton_gemm import gemm
from ..quantize.triton_kernel import quantize
from . import FP8_GEMM_QUANTIZE
from .reference import BLOCK


def fp8_gemm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    residual: Tensor | None = None,
    ada_gate: Tensor | None = None,
) -> Tensor:
    out = fake_gemm(a, b, a_scale, b_scale, bias, activation, out_dtype)
    return gemm(a, b, a_scale, b_scale, bias, activation, out, out_scale, residual=residual, ada_gate=ada_gate)


def fp8_gemm_quantize(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    group_size: int | None,
) -> tuple[Tensor, Tensor]:
    q, scale = FP8_GEMM_QUANTIZE.fake(a, b, a_scale, b_scale, bias, activation, group_size)
    if group_size is None and q.shape[-1] > BLOCK:  # several tiles have a row
        y = fp8_gemm(a, b, a_scale, b_scale, bias, activation, torch.float32, None)
        return quantize(y, q.dtype, None, None, None, True, None)[:2]
    group_scale = scale.unsqueeze(-1) if group_size is None else scale
    return gemm(a, b, a_scale, b_scale, bias, activation, q, group_scale=group_scale), scale


torch.library.impl("forwardpass::fp8_gemm_triton", ("cuda", "cpu"))(fp8_gemm)
torch.library.impl("forwardpass::fp8_gemm_quantize_triton", ("cuda", "cpu"))(fp8_gemm_quantize)
