"""permute_quantize in plain torch: the specification. Every backend gives these bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.experts import rows_of_choices
from ..common.quantized_rows import pad_rows, quantize_values


def permute_quantize(
    x: Tensor, index: Tensor, num_experts: int, dtype: torch.dtype, channel_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    token, offs, position = rows_of_choices(index, num_experts)
    q, scale, _ = quantize_values(x.float(), dtype, channel_scale=channel_scale)
    used = torch.arange(len(token), device=x.device) < offs[-1]
    rows = torch.where(used[:, None], q.view(torch.uint8)[token], 0).to(torch.uint8)
    return pad_rows(rows.view(dtype)), torch.where(used, scale[token], 0.0), offs, position
