"""int8_linear in plain torch: the specification, which is that of quantize followed by that of int8_gemm."""

from __future__ import annotations

import torch
from torch import Tensor

from ..int8_gemm.reference import int8_gemm
from ..quantize.reference import quantize


def int8_linear(
    x: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    scale: Tensor | None,
    zero_point: Tensor | None,
    symmetric: bool,
    channel_scale: Tensor | None,
    w_sum: Tensor | None,
) -> Tensor:
    q, s, z = quantize(x, torch.int8, scale, zero_point, None, symmetric, channel_scale)
    a_zero_point = None if symmetric else z if zero_point is None else zero_point
    a_scale = s if scale is None else scale
    return int8_gemm(q, weight, a_scale, w_scale, bias, activation, out_dtype, None, a_zero_point, w_sum)
