"""append_kv in plain torch: the specification. Every backend writes these bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.cache_layout import QUANTIZED, check_apart, check_lengths, has_room, is_per_token, locate
from ..common.quantized_rows import quantize_values


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    q: Tensor | None,
    q_out: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    norm_eps: float,
    interleaved: bool,
) -> None:
    check_memory(k_cache, v_cache, k_scale, v_scale)
    tokens = k.shape[1]
    check_lengths("append_kv", k_cache, seq_lens, block_table, seq_lens - tokens)
    positions = seq_lens[:, None] - tokens + torch.arange(tokens, device=k.device)
    first, row, has_row = locate(positions, k_cache, block_table)
    in_range = has_room(seq_lens, k_cache, block_table)[:, None]
    live = has_row & in_range
    is_lost = ~live & ~((positions < 0) & in_range)  # and not padding at the front
    slots = first[live], row[live]

    def prepare(x: Tensor, weight: Tensor | None) -> Tensor:
        x = x.float() if weight is None else norm(x.float(), weight.float(), norm_eps)
        return x if cos is None or sin is None else rotate(x, cos.float(), sin.float(), interleaved)

    if q is not None and q_out is not None:
        q_out.copy_(prepare(q, q_norm).masked_fill(is_lost[:, :, None, None], torch.nan))
    keys = prepare(k, k_norm)
    for x, cache, scale in ((keys, k_cache, k_scale), (v.float(), v_cache, v_scale)):
        if cache.dtype not in QUANTIZED:
            cache[slots] = x.to(cache.dtype)[live]
            continue
        q, dynamic = quantize(x, cache.dtype, None if is_per_token(scale) else scale)
        cache.view(torch.uint8)[slots] = q.view(torch.uint8)[live]
        if scale is not None and is_per_token(scale):
            scale[slots] = dynamic[live]


def check_memory(k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    check_apart("append_kv", "cache", k_cache, v_cache)
    if is_per_token(k_scale) and is_per_token(v_scale):
        check_apart("append_kv", "scale", k_scale, v_scale)


#: The sum of a norm's squares is made of so many, each of as manieth columns in their order, of which then halves are added up.
NORM_SUMS = 32


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] / sqrt(mean(x^2) + eps) * weight, fp32; NaN where the sum overflows."""
    columns = x.shape[-1]
    squares = torch.nn.functional.pad(x * x, (0, -columns % NORM_SUMS)).unflatten(-1, (-1, NORM_SUMS))
    sums = squares[..., 0, :]
    for part in squares.unbind(-2)[1:]:
        sums = sums + part
    while sums.shape[-1] > 1:
        low, high = sums.chunk(2, -1)
        sums = low + high
    mean = sums / torch.full_like(sums, columns) + eps
    inverse = 1 / mean.double().sqrt().float() + sums * 0  # torch's root of float32 is not always the nearest
    return x * inverse * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The first columns of x [B, S, heads, D], as many as cos and sin [B or 1, S, R] have.

    Column c of the first half is rotated with column c of the second, as GPT-NeoX has it (transformers' rotate_half); interleaved,
    an even column with the next, as GPT-J has it."""
    columns = cos.shape[-1]
    if interleaved:
        turned = torch.stack((-x[..., 1:columns:2], x[..., :columns:2]), -1).flatten(-2)
    else:
        turned = torch.cat((-x[..., columns // 2 : columns], x[..., : columns // 2]), -1)
    rotated = x[..., :columns] * cos.unsqueeze(2) + turned * sin.unsqueeze(2)
    return torch.cat((rotated, x[..., columns:]), -1)


def quantize(x: Tensor, dtype: torch.dtype, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """As fp.ops.quantize, symmetric: by a scale for each row, or by static ones, [1] or of each head."""
    if scale is None:
        return quantize_values(x, dtype)[:2]
    heads = [quantize_values(x[:, :, h], dtype, scale[h % len(scale)])[0] for h in range(x.shape[2])]
    return torch.stack([q.view(torch.uint8) for q in heads], 2).view(dtype), x.new_empty(0)
