"""int8_linear in plain torch: the specification, which is that of quantize followed by that of int8_gemm."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..int8_gemm.reference import int8_gemm
from ..quantize.reference import quantize


def quantized_input(
    x: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    symmetric: bool,
    channel_scale: Tensor | None,
    quantize: Callable[..., tuple[Tensor, Tensor, Tensor]] = quantize,
    rotate: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(a, a_scale, a_zero_point) of the product, by this or by a backend's `quantize`."""
    args = (x, torch.int8, scale, zero_point, None, symmetric, channel_scale)
    q, s, z = quantize(*args) if rotate is None else quantize(*args, rotate)
    return q, s if scale is None else scale, None if symmetric else z if zero_point is None else zero_point


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
    a, a_scale, a_zero_point = quantized_input(x, scale, zero_point, symmetric, channel_scale, rotate=rotate)
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
