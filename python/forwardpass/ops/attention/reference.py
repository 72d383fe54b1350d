"""attention in plain torch: the specification."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

#: More scores than these are computed a head at a time: several matrices of them are alive at once, and those of 32 heads of 8192
#: rows and keys are 17 GB each in float64.
MOST_SCORES = 2**27


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    batch_invariant: bool,
) -> Tensor:
    return attention_with_lse(
        q, k, v, scale, causal, window_left, window_right, softcap, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k,
        batch_invariant,
    )[0]  # fmt: skip


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    batch_invariant: bool,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """In `dtype`, by default float32, or q's where that is wider; results in q's dtype, and float32 or wider for the lse."""
    dtype = dtype or torch.promote_types(q.dtype, torch.float32)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    right = 0 if causal else window_right
    o, lse = outputs_of(q, v, torch.promote_types(dtype, torch.float32))
    # one at a time, where it matters that torch may add up another order in another batch
    operands = q, k, v, mask, alibi_slopes, cu_seqlens_q, cu_seqlens_k
    for part in in_parts(*operands, o, lse, one_by_one=batch_invariant):
        wide = part.q.to(dtype), part.k.to(dtype), part.v.to(dtype)
        o_part, lse_part = attend(*wide, scale, window_left, right, softcap, part.mask, part.alibi_slopes, sinks)
        part.o.copy_(o_part)
        part.lse.copy_(lse_part)
    return o, lse


class Part(NamedTuple):
    """Sequences of a call, which have a dimension of their own, first, also where the call's are packed; o and lse are views."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    alibi_slopes: Tensor | None
    o: Tensor
    lse: Tensor


def outputs_of(q: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """o, and the lse in this dtype, without values."""
    lse_shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(lse_shape, dtype=dtype)


def in_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    o: Tensor,
    lse: Tensor,
    one_by_one: bool,
) -> Iterator[Part]:
    """A batch as a whole, or each of its sequences; packed sequences always each. Rows of no sequence are NaN."""
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        o.fill_(torch.nan)
        lse.fill_(torch.nan)
        sequences = zip(known_sequences(cu_seqlens_q, len(q)), known_sequences(cu_seqlens_k, len(k)))
        parts = [(q[None, i], k[None, j], v[None, j], o[None, i], lse[None, :, i]) for i, j in sequences]
        shares = [slice(b, b + 1) for b in range(len(parts))]
    else:
        shares = [slice(b, b + 1) for b in range(q.shape[0])] if one_by_one else [slice(None)]
        parts = [(q[b], k[b], v[b], o[b], lse[b]) for b in shares]
    for b, (q_b, k_b, v_b, o_b, lse_b) in zip(shares, parts):
        mask_b = mask[b] if mask is not None and mask.dim() == 4 and mask.shape[0] > 1 else mask
        slopes_b = alibi_slopes[b] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        yield Part(q_b, k_b, v_b, mask_b, slopes_b, o_b, lse_b)


def known_sequences(cu_seqlens: Tensor, total: int) -> list[slice]:
    """The rows of each sequence, from the first one on, before cu_seqlens, of an operand of `total` rows, fall or lead beyond it.
    Of two numbers that fall either may be wrong: neither sequence that ends there is known."""
    offsets: list[int] = cu_seqlens.tolist()
    sequences = [slice(*pair) for pair in itertools.pairwise(offsets)]
    if offsets[0] != 0:
        return []
    for b, (begin, end) in enumerate(itertools.pairwise(offsets)):
        if end < begin:
            return sequences[: max(b - 1, 0)]
        if end > total:
            return sequences[:b]
    return sequences


def of_head(head: int, head_of_keys: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    keys = slice(head_of_keys, head_of_keys + 1)
    return q[:, :, head : head + 1], k[:, :, keys], v[:, :, keys]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """q [B, Sq, H, D], k [B, Sk, Hk, D], v [B, Sk, Hk, Dv] to o [B, Sq, H, Dv] of their dtype and lse [B, H, Sq]."""
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    if heads > 1 and q.shape[0] * heads * q.shape[1] * k.shape[1] > MOST_SCORES:
        parts = [attend(*of_head(h, h // group, q, k, v), scale, left, right, softcap,
                        mask if mask is None or mask.dim() < 3 or mask.shape[-3] == 1 else mask[..., h : h + 1, :, :],
                        None if alibi_slopes is None else alibi_slopes[..., h : h + 1],
                        None if sinks is None else sinks[h : h + 1]) for h in range(heads)]  # fmt: skip
        return torch.cat([o for o, _ in parts], 2), torch.cat([lse for _, lse in parts], 1)
    q = q.transpose(1, 2)
    k, v = (x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    s = q @ k.transpose(-1, -2) * scale  # [B, H, Sq, Sk]
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    rows, keys = s.shape[-2:]
    # where a key stands, seen from a row; rows end where keys end
    distance = torch.arange(keys, device=q.device) - torch.arange(keys - rows, keys, device=q.device).unsqueeze(1)
    if alibi_slopes is not None:
        s = s - (alibi_slopes.unsqueeze(-1).unsqueeze(-1) * distance.abs()).to(s.dtype)
    allowed = torch.ones_like(distance, dtype=torch.bool)
    if left is not None:
        allowed = allowed & (distance >= -left)
    if right is not None:
        allowed = allowed & (distance <= right)
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        s = s + mask.to(s.dtype)
        # -inf, and what is -inf in units of log2(e): kernels count in those, and the least values of float32 and of
        # bfloat16, which masks are filled with, mean the same
        allowed = allowed & ~(mask.float() / math.log(2)).isneginf()
    s = s.masked_fill(~allowed, -torch.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.to(s.dtype).reshape(-1, 1, 1).expand(*s.shape[:-1], 1)], -1)
    lse = torch.logsumexp(s.to(torch.promote_types(s.dtype, torch.float32)), -1)
    p = torch.softmax(s, -1)[..., :keys].masked_fill((lse == -torch.inf).unsqueeze(-1), 0)
    return (p @ v).transpose(1, 2).contiguous(), lse
