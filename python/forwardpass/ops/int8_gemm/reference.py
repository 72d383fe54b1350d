"""int8_gemm in plain torch: the specification. Sums of int8 products are exact in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.epilogue import apply_epilogue


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
    acc = a.double() @ b.double().t()
    return apply_epilogue(acc, a_scale, b_scale, bias, activation, out_dtype, out_scale, a_zero_point, b_sum, residual)
