"""Operands of attention_8bit from a cache in int8: its sequences, packed, in operations of torch that every device has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..common.cache_layout import capacity, check_cache, check_new_rows, is_per_token
from ..quantize import quantize
from . import reference

#: of all packed keys, which are counted in int32
MOST_KEYS = 2**31 - 1


def operands(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    block_table: Tensor | None,
    k_scale: Tensor,
    v_scale: Tensor,
    dtype: str,
) -> tuple[Any, ...]:
    """The fields of AttentionOperands."""
    _check(q, k_cache, v_cache, seq_lens, block_table, k_scale, v_scale)
    (batch, rows), room = q.shape[:2], capacity(k_cache, block_table)
    known = (seq_lens >= 0) & (seq_lens <= room)
    # An unknown sequence has a key for each of its rows, whose scale is NaN.
    lengths = torch.where(known, seq_lens, rows)
    starts = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    place = torch.arange(batch * room, device=q.device, dtype=torch.int32)
    sequence = torch.searchsorted(starts[1:], place, right=True).clamp(max=max(batch - 1, 0))
    key = (place - starts[sequence]).clamp(0, room - 1)
    first, row, valid = _places(k_cache, sequence, key, block_table)
    valid = valid & known[sequence]

    k8_scale = (
        torch.where(valid[:, None], _scales(k_scale, first, row), torch.nan).expand(-1, k_cache.shape[2]).contiguous()
    )
    if dtype == "int8" and not is_per_token(v_scale):
        v8, of_channel = v_cache[first, row], v_scale[:, None].expand(batch, *v_cache.shape[2:]).contiguous()
        of_block = torch.ones_like(k8_scale)
    else:
        v8, of_channel, of_block = _rounded_again(
            v_cache, torch.where(known, seq_lens, 0), block_table, v_scale, room, dtype
        )
        v8, of_block = v8[sequence, key], of_block[sequence, key]
    q8, q_scale, _ = quantize(q, torch.int8)
    q_scale = q_scale.flatten(0, 1).contiguous()
    starts_q = torch.arange(batch + 1, device=q.device, dtype=torch.int32) * rows
    return (
        q8.flatten(0, 1).contiguous(), q_scale, torch.zeros_like(q_scale), k_cache[first, row], k8_scale, v8, of_channel,
        of_block if dtype == "int8" else None, dtype, False, q.dtype, starts_q, starts,
    )  # fmt: skip


def unpacked(x: Tensor, dim: int, batch: int) -> Tensor:
    """The rows of all sequences, of which each has as many, as [B, S]."""
    return x.unflatten(dim, (batch, x.shape[dim] // max(batch, 1)))


def _places(cache: Tensor, sequence: Tensor, key: Tensor, block_table: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Where each key is: [first, row] of the cache, and whether there is a page for it."""
    if block_table is None:
        return sequence, key, torch.ones_like(key, dtype=torch.bool)
    pages, page = cache.shape[:2]
    first = block_table[sequence, key // page]
    valid = (first >= 0) & (first < pages)
    return torch.where(valid, first, 0), key % page, valid


def _scales(scale: Tensor, first: Tensor, row: Tensor) -> Tensor:
    """[..., Hk or 1], of keys at these places of the cache."""
    return scale[first, row] if is_per_token(scale) else scale.expand(*first.shape, -1)


def _rounded_again(
    v_cache: Tensor, lengths: Tensor, block_table: Tensor | None, v_scale: Tensor, room: int, dtype: str
) -> tuple[Tensor, Tensor, Tensor]:
    """v [B, room, Hk, Dv] in 8 bits, the scales of sequences' channels, [B, Hk, Dv], and of their blocks, [B, room, Hk]: of keys
    that there are."""
    key = torch.arange(room, device=v_cache.device).expand(len(lengths), room)
    sequence = torch.arange(len(lengths), device=v_cache.device)[:, None].expand_as(key)
    first, row, valid = _places(v_cache, sequence, key, block_table)
    there = (valid & (key < lengths[:, None]))[..., None, None]
    values = torch.where(there, v_cache[first, row] * _scales(v_scale, first, row)[..., None], 0)
    v8, of_channel, of_block = reference.values_to_8bit(values.transpose(1, 2), dtype)
    v8 = v8.transpose(1, 2).to(torch.int8 if dtype == "int8" else torch.float8_e4m3fn)
    return v8, of_channel[:, :, 0], of_block[..., 0].transpose(1, 2)


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    block_table: Tensor | None,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    op = "AttentionOperands.of_cache"
    check_new_rows(op, "q", q)
    check_cache(op, "q", q, k_cache, v_cache, seq_lens, block_table, k_scale, v_scale, None)
    if k_cache.dtype != torch.int8:
        raise TypeError(f"{op}: the cache must be int8, as q k^T is of integers, not {k_cache.dtype}: use attention_decode, which "
                        "takes it")  # fmt: skip
    rows, room = q.shape[1], capacity(k_cache, block_table)
    if rows > room:
        raise ValueError(
            f"{op}: q has {rows} rows for each sequence, and the cache has room for {room} keys: their own come first"
        )
    if q.shape[0] * room > MOST_KEYS:
        raise ValueError(
            f"{op}: the cache has room for {q.shape[0]} x {room} keys, and at most {MOST_KEYS} are packed: divide the batch"
        )
