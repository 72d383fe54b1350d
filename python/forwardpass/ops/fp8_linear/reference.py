"""fp8_linear in plain torch: the specification, which is that of quantize followed by that of fp8_gemm."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..common.quantized_rows import E4M3
from ..fp8_gemm.reference import BLOCK, fp8_gemm
from ..quantize.reference import quantize


def quantized_input(
    x: Tensor,
    weight_scale: Tensor,
    scale: Tensor | None,
    channel_scale: Tensor | None,
    quantize: Callable[..., tuple[Tensor, Tensor, Tensor]] = quantize,
    rotate: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(a, a_scale) of the product, by this or by a backend's `quantize`: groups of 128 for a weight scaled by blocks, else
    rows, or the static scale."""
    args = (x, E4M3, scale, None, BLOCK if weight_scale.dim() >= 2 else None, True, channel_scale)
    q, s, _ = quantize(*args) if rotate is None else quantize(*args, rotate)
    return q, s if scale is None else scale


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
    a, a_scale = quantized_input(x, weight_scale, scale, channel_scale, rotate=rotate)
    return fp8_gemm(a, weight, a_scale, weight_scale, bias, activation, out_dtype, None, residual, ada_gate)
