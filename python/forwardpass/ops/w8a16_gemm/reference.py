"""w8a16_gemm in plain torch: the specification, in fp64."""

from __future__ import annotations

from torch import Tensor

from ..common.activations import activate, is_gated, separate_gate_up
from ..common.epilogue import of_samples


def dequantize_weight(weight: Tensor, weight_scale: Tensor) -> Tensor:
    """weight [N, K] times its scales [1], [N] or [N, ceil(K / 128)], in fp64."""
    if weight_scale.dim() == 2:
        return weight.double() * weight_scale.double().repeat_interleave(128, 1)[:, : weight.shape[1]]
    return weight.double() * weight_scale.double().reshape(-1, 1)


def w8a16_gemm(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None = None,
    ada_gate: Tensor | None = None,
) -> Tensor:
    y = x.double() @ dequantize_weight(weight, weight_scale).t()
    if bias is not None:
        y = y + bias.double()
    if is_gated(activation):
        gate, up = separate_gate_up(y, -1)
        y = activate(activation, gate, up)
    else:
        y = activate(activation, y)
    if ada_gate is not None:
        y = y * of_samples(ada_gate, y).double()
    return (y if residual is None else y + residual.double()).to(x.dtype)
