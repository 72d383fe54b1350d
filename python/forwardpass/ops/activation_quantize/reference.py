"""activation_quantize in plain torch: the specification. Activated in fp64, rounded to fp32, quantised by the rule."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.activations import activate, is_gated, separate_gate_up
from ..common.quantized_rows import quantize_values


def activation_quantize(
    x: Tensor,
    activation: str,
    dtype: torch.dtype,
    group_size: int | None,
    layout: str,
    symmetric: bool,
    channel_scale: Tensor | None,
    rotate: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = separate_gate_up(x, -1, layout) if is_gated(activation) else (x,)
    values = activate(activation, *(t.double() for t in inputs)).float()
    return quantize_values(values, dtype, None, None, group_size, symmetric, channel_scale, rotate)
