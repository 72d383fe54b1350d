"""attention_decode in plain torch: the specification."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..attention.reference import attend
from ..common.cache_layout import capacity, check_leftpad, check_lengths, has_room, locate


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    scale: float | None,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    sinks: Tensor | None,
    batch_invariant: bool,
    leftpad: Tensor | None,
    alibi_slopes: Tensor | None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return attention_decode_with_lse(
        q, k_cache, v_cache, seq_lens, block_table, k_scale, v_scale, scale, window_left, window_right, softcap, sinks,
        batch_invariant, leftpad, alibi_slopes,
        dtype=dtype,
    )[0]  # fmt: skip


def attention_decode_with_lse(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    scale: float | None,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    sinks: Tensor | None,
    batch_invariant: bool,
    leftpad: Tensor | None,
    alibi_slopes: Tensor | None,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """In `dtype`, by default float32, or q's where that is wider; o in q's dtype, the lse in float32 or wider. Row i stands at
    place seq_len - Sq + i and sees no key beyond, whatever window_right is, and none before leftpad. It is NaN if it sees a key
    without a page, or if its sequence's length or leftpad is out of range."""
    if leftpad is not None:
        check_leftpad("attention_decode", leftpad)
    check_lengths(
        "attention_decode", k_cache, seq_lens, block_table, first_key(seq_lens, q.shape[1], window_left, leftpad)
    )
    dtype = dtype or torch.promote_types(q.dtype, torch.float32)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    keys = torch.arange(capacity(k_cache, block_table), device=q.device).expand(q.shape[0], -1)
    first, row, has_row = locate(keys, k_cache, block_table)
    counts = keys < seq_lens[:, None]
    in_range = has_room(seq_lens, k_cache, block_table)
    if leftpad is not None:
        counts = counts & (keys >= leftpad[:, None])
        in_range = in_range & (leftpad >= 0)
    live = counts & has_row
    k, v = (read(cache, s, first, row, live, dtype) for cache, s in ((k_cache, k_scale), (v_cache, v_scale)))
    place = seq_lens[:, None, None] - q.shape[1] + torch.arange(q.shape[1], device=q.device)[:, None]  # [B, Sq, 1]
    seen = counts[:, None] & (keys[:, None] <= place)
    if window_left is not None:
        seen = seen & (keys[:, None] >= place - window_left)
    is_lost = (seen & ~has_row[:, None]).any(-1) | ~in_range[:, None]  # [B, Sq]
    seen = seen & has_row[:, None]
    shares = [slice(b, b + 1) for b in range(q.shape[0])] if batch_invariant else [slice(None)]
    mask = seen[:, None]  # [B, 1, Sq, T]
    if alibi_slopes is not None:
        bias = -alibi_slopes.to(dtype).unsqueeze(-1).unsqueeze(-1) * (place - keys[:, None]).abs().unsqueeze(1)
        mask = bias.masked_fill(~mask, -torch.inf)
    parts = [attend(q[b].to(dtype), k[b], v[b], scale, None, None, softcap, mask[b], None, sinks) for b in shares]
    if not parts:
        return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(0, q.shape[2], q.shape[1], dtype=torch.float32)
    o, lse = (torch.cat(x) for x in zip(*parts))
    o, lse = o.to(q.dtype), lse.to(torch.promote_types(dtype, torch.float32))
    return o.masked_fill(is_lost[:, :, None, None], torch.nan), lse.masked_fill(is_lost[:, None], torch.nan)


def first_key(seq_lens: Tensor, rows: int, window_left: int | None, leftpad: Tensor | None) -> Tensor | None:
    """The first key that any of a sequence's rows may see; None where it is the first of all."""
    first = None if window_left is None else seq_lens - rows - window_left
    return leftpad if first is None else first if leftpad is None else torch.maximum(first, leftpad)


def read(cache: Tensor, scale: Tensor | None, first: Tensor, row: Tensor, live: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a cache [B, T, Hk, D], dequantised, zeros where none is live."""
    # an indexed e4m3 tensor is not implemented everywhere
    x = cache.view(torch.uint8)[first, row].view(cache.dtype) if cache.element_size() == 1 else cache[first, row]
    wide = x.to(torch.promote_types(dtype, torch.float32))
    if scale is not None:
        wide = wide * (scale[first, row] if scale.dim() == 3 else scale).to(wide.dtype).unsqueeze(-1)
    return torch.where(live[:, :, None, None], wide, 0).to(dtype)
