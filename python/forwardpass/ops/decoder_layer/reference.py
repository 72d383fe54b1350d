"""decoder_layer in plain torch: the specification, made of those of int8_linear, w8a16_gemm, append_kv and attention_decode."""

from __future__ import annotations

import torch
from torch import Tensor

from ..append_kv.reference import append_kv
from ..attention_decode.reference import attention_decode
from ..encoder_layer.reference import LINEAR
from ..int8_linear.reference import int8_linear
from ..norm_quantize.reference import normalize
from ..w8a16_gemm.reference import w8a16_gemm

#: How many linear layers a layer has (q, k and v in one, out, up, down), and how many tensors the schema has of it: those of its
#: linear layers, and the weights of two norms.
LINEARS = 4
LAYER = LINEAR * LINEARS + 2


def decoder_layer(
    x: Tensor,
    k_caches: list[Tensor],
    v_caches: list[Tensor],
    seq_lens: Tensor,
    weights: list[Tensor | None],
    heads: int,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    activation: str | None,
    scale: float | None,
    leftpad: Tensor | None,
    weight_only: bool = False,
) -> Tensor:
    """Products in exact integers or float64, norms and attention in float64, each step's result rounded to float32."""
    dtype = x.dtype

    def linear(i: int, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        weight, w_scale, bias, total, channel_scale, _ = layer[i * LINEAR : (i + 1) * LINEAR]
        assert weight is not None and w_scale is not None
        x, residual = x.flatten(0, 1), residual if residual is None else residual.flatten(0, 1)
        if weight_only:
            return w8a16_gemm(x.float(), weight, w_scale, bias, activation, residual).unflatten(0, shape)
        y = int8_linear(
            x, weight, w_scale, bias, activation, torch.float32, None, None, total is None, channel_scale, total, None, residual
        )  # fmt: skip
        return y.unflatten(0, shape)

    def norm(i: int, x: Tensor) -> Tensor:
        return normalize(x, layer[LINEARS * LINEAR + i], eps, "rms", None).float()

    shape = x.shape[:2]
    for i, (k_cache, v_cache) in enumerate(zip(k_caches, v_caches)):
        layer = weights[i * LAYER : (i + 1) * LAYER]
        kv_heads = k_cache.shape[2]
        qkv = linear(0, norm(0, x.float())).to(dtype).unflatten(2, (heads + 2 * kv_heads, -1))
        q, k, v = qkv.split((heads, kv_heads, kv_heads), 2)
        rotated = torch.empty_like(q)
        append_kv(
            k, v, k_cache, v_cache, seq_lens, None, None, None, cos, sin, q, rotated, None, None, 0.0, False
        )  # fmt: skip
        attended = attention_decode(
            rotated, k_cache, v_cache, seq_lens, None, None, None, scale, None, None, 0.0, None, False, leftpad, None,
            dtype=torch.float64,
        )  # fmt: skip
        y = linear(1, attended.flatten(2), x.float())
        x = linear(3, linear(2, norm(1, y), activation=activation), y).to(dtype)
    return x.contiguous()
