"""fp8_grouped_gemm in Triton: forwardpass.triton_gemm, whose programs find their expert on the GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.experts import fake_grouped_gemm
from ..common.triton_gemm import gemm


def fp8_grouped_gemm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    offs: Tensor,
    bias: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
) -> Tensor:
    out = fake_grouped_gemm(a, b, a_scale, b_scale, offs, bias, activation, out_dtype)
    return gemm(a, b, a_scale, b_scale, bias, activation, out, out_scale, ends=offs)


torch.library.impl("forwardpass::fp8_grouped_gemm_triton", ("cuda", "cpu"))(fp8_grouped_gemm)
