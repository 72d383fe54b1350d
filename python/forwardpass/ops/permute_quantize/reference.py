"""permute_quantize in plain torch: the specification. Every backend gives these bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.quantized_rows import pad_rows, quantize_values


def permute_quantize(
    x: Tensor, index: Tensor, num_experts: int, dtype: torch.dtype, channel_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    choices = index.shape[1]
    expert = index.reshape(-1).long()
    valid = (expert >= 0) & (expert < num_experts)
    expert = torch.where(valid, expert, num_experts)  # behind all that are experts
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=x.device)
    offs = counts.scatter_add(0, expert, torch.ones_like(expert))[:num_experts].cumsum(0).int()
    order = torch.sort(expert, stable=True).indices  # the choice that each row is of
    row = torch.empty_like(order)
    row[order] = torch.arange(len(order), device=x.device)

    q, scale, _ = quantize_values(x.float(), dtype, channel_scale=channel_scale)
    used = torch.arange(len(order), device=x.device) < offs[-1]
    token = torch.div(order, max(choices, 1), rounding_mode="floor")
    rows = torch.where(used[:, None], q.view(torch.uint8)[token], 0).to(torch.uint8)
    position = torch.where(valid, row, -1).int().reshape(index.shape)
    return pad_rows(rows.view(dtype)), torch.where(used, scale[token], 0.0), offs, position
