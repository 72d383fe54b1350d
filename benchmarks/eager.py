"""The operations as plain torch code, the way a model's author writes them: what the benchmarks compare with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    None: lambda v: v,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "silu": F.silu,
    "relu6": F.relu6,
    "hard_swish": F.hardswish,
}


def activate(v: Tensor, activation: str | None, layout: str = "halves") -> Tensor:
    """activation(v), or activation(gate) * up: both are halves of each row, or alternate in blocks of 8 columns."""
    if activation is None or not activation.endswith("_mul"):
        return ACTIVATIONS[activation](v)
    if layout == "halves":
        gate, up = v.chunk(2, dim=-1)
    else:
        gate, up = (p.flatten(-2) for p in v.unflatten(-1, (-1, 2, 8)).unbind(-2))
    return ACTIVATIONS[activation.removesuffix("_mul")](gate) * up


def quantize_rows(v: Tensor, dtype: torch.dtype, symmetric: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """(q, scale, zero_point), scaled per row."""
    if not symmetric:
        low, high = v.amin(-1, keepdim=True).clamp(max=0), v.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / 255).clamp(min=1e-30)
        zero_point = -128 - (low / scale).round()
        q = ((v / scale).round() + zero_point).clamp(-128, 127).to(dtype)
        return q, scale.squeeze(-1), zero_point.to(torch.int32).squeeze(-1)
    limit = 127 if dtype == torch.int8 else 448
    scale = (v.abs().amax(-1, keepdim=True) / limit).clamp(min=1e-30)
    scaled = (v / scale).clamp(-limit, limit)
    q = scaled.round().to(dtype) if dtype == torch.int8 else scaled.to(dtype)
    return q, scale.squeeze(-1), torch.empty(0, dtype=torch.int32, device=v.device)


def quantize_groups(v: Tensor, dtype: torch.dtype, size: int) -> tuple[Tensor, Tensor]:
    """(q, scale [..., groups]), one scale for `size` columns of a row."""
    k = v.shape[-1]
    groups = F.pad(v, (0, -k % size)).unflatten(-1, (-1, size))
    q, scale, _ = quantize_rows(groups, dtype)
    return q.flatten(-2)[..., :k], scale


def dequantize(
    acc: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    a_zero_point: Tensor | None = None,
    b_sum: Tensor | None = None,
    out_scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """[..., N], int32 or float -> activation((acc - zero point * sum of b) * scales + bias), maybe plus a residual, or in steps
    of out_scale."""
    if a_zero_point is not None:
        assert b_sum is not None
        acc = acc - a_zero_point.unsqueeze(-1) * b_sum
    v = acc.float() * (a_scale.unsqueeze(-1) * b_scale)
    v = activate(v if bias is None else v + bias, activation, "interleaved8")
    if out_scale is None:
        return (v if residual is None else v + residual).to(out_dtype)
    limit = 127 if out_dtype == torch.int8 else 448
    v = (v / out_scale).clamp(-limit, limit)
    return v.round().to(out_dtype) if out_dtype == torch.int8 else v.to(out_dtype)
