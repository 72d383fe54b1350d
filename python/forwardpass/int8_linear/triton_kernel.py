"""int8_linear in Triton: quantize's kernel, then int8_gemm's."""

from __future__ import annotations

import torch
from torch import Tensor

from ..int8_gemm.triton_kernel import int8_gemm
from ..quantize.triton_kernel import quantize


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
    q, dynamic_scale, dynamic_zero = quantize(x, torch.int8, scale, zero_point, None, symmetric, channel_scale)
    a_scale = dynamic_scale if scale is None else scale
    shift = None if symmetric else dynamic_zero if zero_point is None else zero_point
    return int8_gemm(q, weight, a_scale, w_scale, bias, activation, out_dtype, None, shift, w_sum)


torch.library.impl("forwardpass::int8_linear_triton", ("cuda", "cpu"))(int8_linear)
