"""unpermute in plain torch: the specification. Every backend gives these bits."""

from __future__ import annotations

import torch
from torch import Tensor


def unpermute(y: Tensor, position: Tensor, weights: Tensor) -> Tensor:
    rows = y.reshape(-1, y.shape[-1])
    total = torch.zeros(len(position), y.shape[-1], device=y.device)
    for choice in range(position.shape[1]):
        row, weight = position[:, choice].long(), weights[:, choice].float()
        valid = (row >= 0) & (row < len(rows))
        if len(rows):
            product = weight[:, None] * rows[torch.where(valid, row, 0)].float()
            total = torch.where(valid[:, None], total + product, total)
    return total.to(y.dtype)
