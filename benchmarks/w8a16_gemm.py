"""w8a16_gemm beside torch's linear on weights that are widened first."""

import torch.nn.functional as F
from torch import Tensor

from benchmarks import bench, eager
from forwardpass.ops.w8a16_gemm import OPERATION


def baseline(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None = None,
) -> Tensor:
    scale = (
        weight_scale.repeat_interleave(128, -1)[:, : weight.shape[1]]
        if weight_scale.dim() == 2
        else weight_scale.reshape(-1, 1)
    )
    weight = (weight.to(scale.dtype) * scale).to(x.dtype)
    bias = bias if bias is None else bias.to(x.dtype)
    y = eager.activate(F.linear(x, weight, bias), activation, "interleaved8")
    return y if residual is None else y + residual


BASELINES = {OPERATION: baseline}

if __name__ == "__main__":
    bench.main(BASELINES, __doc__)
