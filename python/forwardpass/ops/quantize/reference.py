"""quantize in plain torch: the specification. Every backend gives these bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.quantized_rows import quantize_values


def quantize(
    x: Tensor,
    dtype: torch.dtype,
    scale: Tensor | None,
    zero_point: Tensor | None,
    group_size: int | None,
    symmetric: bool,
    channel_scale: Tensor | None,
    rotate: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return quantize_values(x.float(), dtype, scale, zero_point, group_size, symmetric, channel_scale, rotate)
