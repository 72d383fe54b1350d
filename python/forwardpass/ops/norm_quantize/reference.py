"""norm_quantize in plain torch: the specification.

The norm is taken in fp64; the other backends sum in fp32, so their values are within the bound of cases.py of these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.quantized_rows import quantize_values


def normalize(x: Tensor, weight: Tensor | None, eps: float, kind: str, bias: Tensor | None) -> Tensor:
    """The normalised x [..., K], fp64."""
    v = x.double()
    if kind == "layer":
        v = v - v.mean(-1, keepdim=True)
    squares = v.square().sum(-1, keepdim=True)
    squares = torch.where(squares.float().isfinite(), squares, torch.nan)  # as where the sum is one of fp32
    v = v / (squares / x.shape[-1] + eps).sqrt()
    if weight is not None:
        v = v * weight
    return v if bias is None else v + bias


def norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    kind: str,
    bias: Tensor | None,
    symmetric: bool,
    channel_scale: Tensor | None,
    rotate: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    v = normalize(x, weight, eps, kind, bias).float()
    return quantize_values(v, dtype, symmetric=symmetric, channel_scale=channel_scale, rotate=rotate)


def add_norm_quantize(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    kind: str,
    bias: Tensor | None,
    symmetric: bool,
    channel_scale: Tensor | None,
    rotate: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    residual_out = (x + residual).contiguous()
    return *norm_quantize(residual_out, weight, eps, dtype, kind, bias, symmetric, channel_scale, rotate), residual_out
