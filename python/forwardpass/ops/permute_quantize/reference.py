"""permute_quantize in plain torch: the specification. Every backend gives these bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.experts import rows_of_choices
from ..common.quantized_rows import pad_rows, quantize_values, scales_layout


def permute_quantize(
    x: Tensor, index: Tensor, num_experts: int, dtype: torch.dtype, group_size: int | None, channel_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    token, offs, position = rows_of_choices(index, num_experts)
    q, scale, _ = quantize_values(x.float(), dtype, group_size=group_size, channel_scale=channel_scale)
    scale = scale[:, None] if group_size is None else scale
    used = (torch.arange(len(token), device=x.device) < offs[-1])[:, None]
    rows = torch.where(used, q.view(torch.uint8)[token], 0).to(torch.uint8)
    scales = torch.where(used, scale[token], 0.0)
    return pad_rows(rows.view(dtype)), scales_layout(scales, group_size), offs, position
