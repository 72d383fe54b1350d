"""encoder_layer in plain torch: the specification, of those of int8_linear, attention and norm_quantize."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from ..attention.reference import attend, known_sequences
from ..int8_linear.reference import int8_linear
from ..norm_quantize.reference import normalize

#: How many tensors the schema has of a linear layer (weight, scale, bias, sum, channel_scale, packed), how many linear layers a
#: layer has, and how many tensors.
LINEAR, LINEARS = 6, 6
LAYER = LINEAR * LINEARS + 4


def encoder_layer(
    x: Tensor,
    cu_seqlens: Tensor,
    weights: list[Tensor | None],
    heads: int,
    eps: float,
    activation: str | None,
    pre_norm: bool,
    scale: float | None,
    attention_dtype: torch.dtype,
    key_lens: Tensor | None,
    score_bias: Tensor | None = None,
) -> Tensor:
    """Products in exact integers, norms and attention in float64, each step's result rounded to float32."""
    dtype = x.dtype

    def linear(i: int, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        weight, w_scale, bias, total, channel_scale, _ = layer[i * LINEAR : (i + 1) * LINEAR]
        assert weight is not None and w_scale is not None
        return int8_linear(
            x,
            weight,
            w_scale,
            bias,
            activation,
            torch.float32,
            None,
            None,
            total is None,
            channel_scale,
            total,
            None,
            residual,
        )

    def norm(i: int, x: Tensor) -> Tensor:
        weight, bias = layer[LINEARS * LINEAR + 2 * i : LINEARS * LINEAR + 2 * i + 2]
        return normalize(x, weight, eps, "layer", bias).float()

    for first in range(0, len(weights), LAYER):
        layer = weights[first : first + LAYER]
        projected = norm(0, x) if pre_norm else x
        qkv = torch.stack([linear(i, projected).to(attention_dtype) for i in range(3)], 1)
        attended = attention(qkv.unflatten(2, (heads, -1)), cu_seqlens, key_lens, scale, score_bias)
        y = linear(3, attended.to(attention_dtype).flatten(1), x.float())
        if pre_norm:
            y = linear(5, linear(4, norm(1, y), activation=activation), y)
        else:
            y = norm(0, y)
            y = norm(1, linear(5, linear(4, y, activation=activation), y))
        x = y.to(dtype)
    return x.contiguous()


def attention(
    qkv: Tensor, cu_seqlens: Tensor, key_lens: Tensor | None, scale: float | None, score_bias: Tensor | None
) -> Tensor:
    """qkv [T, 3, heads, head_dim] to [T, heads, head_dim], in float64; NaN in the rows of no known sequence, and of one that is
    longer than score_bias."""
    q, k, v = qkv.double().unbind(1)
    o = torch.full_like(q, torch.nan)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    lens = itertools.repeat(None) if key_lens is None else key_lens.tolist()
    for rows, keys in zip(known_sequences(cu_seqlens, len(q)), lens):
        count = rows.stop - rows.start
        if not 0 <= (count if keys is None else keys) <= count:
            continue
        if score_bias is not None and count > score_bias.shape[-1]:
            continue
        of_keys = slice(rows.start, rows.stop if keys is None else rows.start + keys)
        parts = q[None, rows], k[None, of_keys], v[None, of_keys]
        bias = None if score_bias is None else score_bias[..., :count, : parts[1].shape[1]]
        o[rows] = attend(*parts, scale, None, None, 0.0, bias, None, None)[0][0]
    return o
