"""decoder_layer beside the same steps one by one, in plain torch code around torch._int_mm."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import bench
from benchmarks.int8_linear import baseline as int8_linear
from forwardpass.ops.decoder_layer import OPERATION
from forwardpass.ops.decoder_layer.reference import LAYER, LINEAR, LINEARS


def baseline(
    x: Tensor, k_caches: list[Tensor], v_caches: list[Tensor], seq_lens: Tensor, weights: list[Tensor | None], heads: int,
    cos: Tensor, sin: Tensor, eps: float, activation: str | None, **options: Any,
) -> Tensor:  # fmt: skip
    """Sequences have one length, and no padding."""
    (batch, tokens), length = x.shape[:2], int(seq_lens[0])

    def linear(i: int, x: Tensor, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
        weight, scale, bias, total, channel_scale, _ = layer[i * LINEAR : (i + 1) * LINEAR]
        assert weight is not None and scale is not None
        x, residual = x.flatten(0, 1), None if residual is None else residual.flatten(0, 1)
        y = int8_linear(
            x, weight, scale, bias, activation, torch.float32, total is None, channel_scale, total, residual
        )
        return y.unflatten(0, (batch, tokens))

    def norm(i: int, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], layer[LINEARS * LINEAR + i], eps)

    def rotate(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return x * cos.unsqueeze(2) + torch.cat((-high, low), -1) * sin.unsqueeze(2)

    for i, (k_cache, v_cache) in enumerate(zip(k_caches, v_caches)):
        layer = weights[i * LAYER : (i + 1) * LAYER]
        kv_heads = k_cache.shape[2]
        qkv = linear(0, norm(0, x)).unflatten(2, (heads + 2 * kv_heads, -1))
        q, k, v = qkv.split((heads, kv_heads, kv_heads), 2)
        k_cache[:, length - tokens : length], v_cache[:, length - tokens : length] = rotate(k), v
        parts = (t.transpose(1, 2) for t in (rotate(q), k_cache[:, :length], v_cache[:, :length]))
        attended = F.scaled_dot_product_attention(*parts, is_causal=tokens > 1, enable_gqa=True)
        y = linear(1, attended.transpose(1, 2).flatten(2), None, x)
        x = linear(3, linear(2, norm(1, y), activation), None, y)
    return x


BASELINES = {OPERATION: baseline}

if __name__ == "__main__":
    bench.main(BASELINES, __doc__)
