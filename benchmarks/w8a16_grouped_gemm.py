"""w8a16_grouped_gemm beside torch's linear, expert by expert, on weights that are widened first."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import bench, eager
from forwardpass.ops.w8a16_grouped_gemm import OPERATION


def baseline(
    x: Tensor, weight: Tensor, weight_scale: Tensor, offs: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    """Rows that are sorted by expert, each of which has one."""
    parts, begin = [], 0
    for e, end in enumerate(offs.tolist()):
        if begin < end:
            of_e = (weight[e].to(weight_scale.dtype) * weight_scale[e][:, None]).to(x.dtype)
            y = F.linear(x[begin:end], of_e, bias if bias is None else bias[e].to(x.dtype))
            parts.append(eager.activate(y, activation, "interleaved8"))
        begin = end
    return torch.cat(parts)


BASELINES = {OPERATION: baseline}

if __name__ == "__main__":
    bench.main(BASELINES, __doc__)
