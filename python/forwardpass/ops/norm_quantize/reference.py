"""norm_quantize in plain torch: the specification.

The norm is taken in fp64; the other backends sum in fp32, so their values are within the bound of cases.py of these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.quantized_rows import quantize_values


def normalize(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    kind: str,
    bias: Tensor | None,
    ada_scale: Tensor | None = None,
    ada_shift: Tensor | None = None,
) -> Tensor:
    """The normalised x [..., K], fp64."""
    v = x.double()
    if kind == "layer":
        v = v - v.mean(-1, keepdim=True)
    squares = v.square().sum(-1, keepdim=True)
    squares = torch.where(squares.float().isfinite(), squares, torch.nan)  # as where the sum is one of fp32
    v = v / (squares / x.shape[-1] + eps).sqrt()
    if weight is not None:
        v = v * weight
    if bias is not None:
        v = v + bias
    if ada_scale is not None:
        v = v * (1 + of_samples(ada_scale, x))
    return v if ada_shift is None else v + of_samples(ada_shift, x)


def of_samples(v: Tensor, x: Tensor) -> Tensor:
    """v [B, K] in fp64 as it is broadcast over an x [B, ..., K]."""
    return v.double().reshape(v.shape[0], *(1,) * (x.dim() - 2), v.shape[1])


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
    ada_scale: Tensor | None = None,
    ada_shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    v = normalize(x, weight, eps, kind, bias, ada_scale, ada_shift).float()
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
