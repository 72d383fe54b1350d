"""encoder_layer in plain torch: the specification, of those of int8_linear, attention and norm_quantize."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..attention.reference import attend, known_sequences
from ..int8_linear.reference import int8_linear
from ..norm_quantize.reference import normalize

#: How many tensors the schema has of a linear layer (weight, scale, bias, sum, channel_scale, packed), how many linear layers a
#: layer has, and how many tensors.
LINEAR, LINEARS = 6, 6
LAYER = LINEAR * LINEARS + 4
#: What the schema has for a layer without a window.
NO_WINDOW = -1


def is_fused(layer: Sequence[Tensor | None]) -> bool:
    """Whether one weight of a layer, q's, is that of q, k and v."""
    return all(t is None for t in layer[LINEAR : 3 * LINEAR])


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
    cos: Sequence[Tensor] = (),
    sin: Sequence[Tensor] = (),
    windows: Sequence[int] = (),
    first_norm: bool = True,
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

    for n in range(len(weights) // LAYER):
        layer = weights[n * LAYER : (n + 1) * LAYER]
        projected = norm(0, x) if pre_norm and (first_norm or n > 0) else x
        parts = linear(0, projected).chunk(3, 1) if is_fused(layer) else [linear(i, projected) for i in range(3)]
        qkv = torch.stack(parts, 1).to(attention_dtype).unflatten(2, (heads, -1))
        if cos:
            qkv = torch.cat([rotated(qkv[:, :2], cos[n], sin[n]), qkv[:, 2:]], 1)
        window = windows[n] if windows and windows[n] != NO_WINDOW else None
        attended = attention(qkv, cu_seqlens, key_lens, scale, score_bias, window)
        y = linear(3, attended.to(attention_dtype).flatten(1), x.float())
        if pre_norm:
            y = linear(5, linear(4, norm(1, y), activation=activation), y)
        else:
            y = norm(0, y)
            y = norm(1, linear(5, linear(4, y, activation=activation), y))
        x = y.to(dtype)
    return x.contiguous()


def rotated(qk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first columns of each head of q and k, [T, 2, heads, head_dim], by those of their rows."""
    columns = cos.shape[1]
    x, (c, s) = qk[..., :columns].float(), (t.float()[:, None, None] for t in (cos, sin))
    low, high = x.chunk(2, -1)
    return torch.cat([(x * c + torch.cat([-high, low], -1) * s).to(qk.dtype), qk[..., columns:]], -1)


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    key_lens: Tensor | None,
    scale: float | None,
    score_bias: Tensor | None,
    window: int | None = None,
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
        bias = None if score_bias is None else score_bias[..., :count, : parts[1].shape[1]].double()
        if window is not None:
            distance = torch.arange(count)[:, None] - torch.arange(parts[1].shape[1])
            outside = torch.zeros_like(distance, dtype=torch.float64).masked_fill(distance.abs() > window, -torch.inf)
            bias = outside if bias is None else bias + outside
        o[rows] = attend(*parts, scale, None, None, 0.0, bias, None, None)[0][0]
    return o
