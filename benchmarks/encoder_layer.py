"""encoder_layer beside the same steps one by one, in plain torch code around torch._int_mm."""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import bench
from benchmarks.int8_linear import baseline as int8_linear
from forwardpass.ops.encoder_layer import OPERATION
from forwardpass.ops.encoder_layer.reference import LAYER, LINEAR, LINEARS


def baseline(
    x: Tensor, cu_seqlens: Tensor, weights: list[Tensor | None], heads: int, eps: float, activation: str | None,
    attention_dtype: torch.dtype, **options: Any,
) -> Tensor:  # fmt: skip
    """Post-norm, of sequences of one length."""
    ends = cu_seqlens.tolist()
    batch = len({b - a for a, b in itertools.pairwise(ends)}) == 1 and len(ends) - 1

    def linear(i: int, x: Tensor, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
        weight, scale, bias, total, channel_scale, _ = layer[i * LINEAR : (i + 1) * LINEAR]
        assert weight is not None and scale is not None
        return int8_linear(
            x, weight, scale, bias, activation, torch.float32, total is None, channel_scale, total, residual
        )

    def norm(i: int, x: Tensor) -> Tensor:
        weight, bias = layer[LINEARS * LINEAR + 2 * i : LINEARS * LINEAR + 2 * i + 2]
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    for first in range(0, len(weights), LAYER):
        layer = weights[first : first + LAYER]
        parts = (linear(i, x).to(attention_dtype) for i in range(3))
        q, k, v = (t.unflatten(1, (heads, -1)).unflatten(0, (int(batch), -1)).transpose(1, 2) for t in parts)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1).flatten(1)
        y = norm(0, linear(3, attended, None, x.float()))
        x = norm(1, linear(5, linear(4, y, activation), None, y)).to(x.dtype)
    return x


BASELINES = {OPERATION: baseline}

if __name__ == "__main__":
    bench.main(BASELINES, __doc__)
