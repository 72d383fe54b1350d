"""permute_quantize beside plain torch: a sort of the choices, rows gathered, and then quantised."""

from typing import Any

import torch
from torch import Tensor

from benchmarks import bench, eager
from forwardpass.ops.permute_quantize import OPERATION


def baseline(
    x: Tensor, index: Tensor, num_experts: int, dtype: torch.dtype, group_size: int | None, channel_scale: Tensor | None
) -> Any:
    """Where each choice is an expert."""
    expert, order = index.flatten().sort(stable=True)
    offs = torch.bincount(expert, minlength=num_experts).cumsum(0).int()
    position = torch.empty_like(order, dtype=torch.int32)
    position[order] = torch.arange(len(order), dtype=torch.int32, device=x.device)
    rows = x[order // index.shape[1]].float()
    v = rows if channel_scale is None else rows * channel_scale
    q, scale = eager.quantize_groups(v, dtype, group_size) if group_size else eager.quantize_rows(v, dtype)[:2]
    return q, scale, offs, position.view_as(index)


BASELINES = {OPERATION: baseline}

if __name__ == "__main__":
    bench.main(BASELINES, __doc__)
