"""permute_quantize beside plain torch: a sort of the choices, rows gathered, and then quantised."""

from typing import Any

import torch
from torch import Tensor

from benchmarks import bench, eager
from forwardpass.ops.permute_quantize import OPERATION


def baseline(x: Tensor, index: Tensor, num_experts: int, dtype: torch.dtype, channel_scale: Tensor | None) -> Any:
    """Where each choice is an expert."""
    expert, order = index.flatten().sort(stable=True)
    offs = torch.bincount(expert, minlength=num_experts).cumsum(0).int()
    position = torch.empty_like(order, dtype=torch.int32)
    position[order] = torch.arange(len(order), dtype=torch.int32, device=x.device)
    rows = x[order // index.shape[1]].float()
    q, scale, _ = eager.quantize_rows(rows if channel_scale is None else rows * channel_scale, dtype)
    return q, scale, offs, position.view_as(index)


BASELINES = {OPERATION: baseline}

if __name__ == "__main__":
    bench.main(BASELINES, __doc__)
