"""attention_8bit in plain torch: the specification, of its integers and e4m3 bit for bit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..attention.reference import known_sequences, outputs_of

#: Keys that share the unit of their probabilities, and in int8 a scale of v. Sums of their products are exact in int8,
#: 64 x 255 x 127 < 2^21; of e4m3 they are what tensor cores add with fewer bits than float32 has, before float32 adds them up.
BLOCK = 64
#: Keys of a block that share a scale: those whose largest values are next to one another. On a GPU a thread has the scores of
#: such keys, and multiplies them by one factor.
GROUP = 8
#: Keys, evenly spaced over a sequence, whose mean is subtracted from each.
SAMPLES = 64

#: The largest value of v, and of probabilities: they are multiples of its inverse, those of int8 whole ones.
LARGEST = {"int8": (127, 255), "fp8": (448, 448)}
#: Of a smaller largest value the integers are 0, as the reciprocal of the scale would overflow.
LEAST = 2.0**-100


@dataclass(frozen=True)
class Operands:
    """q, k and v of one sequence in 8 bits. [heads, rows, columns], their values as float32; scales by which they are multiplied.

    A score is `q k^T` times q_scale, k_scale and the softmax's scale, plus `shift`, which k's centre adds to all scores of a row.
    """

    q: Tensor  #: [H, Sq, D]
    q_scale: Tensor  #: [H, Sq, 1]
    shift: Tensor  #: [H, Sq, 1], of unscaled scores
    k: Tensor  #: [Hk, Sk, D]
    k_scale: Tensor  #: [Hk, Sk, 1]
    v: Tensor  #: [Hk, Sk, Dv]
    v_scale: Tensor  #: [Hk, 1, Dv]
    v_block_scale: Tensor  #: [Hk, Sk, 1]: of each BLOCK keys the first one's counts
    dtype: str = "int8"  #: of v and of probabilities


def rounded(x: Tensor, dtype: str) -> Tensor:
    """To whole numbers, or to e4m3; float32."""
    return x.round() if dtype == "int8" else x.to(torch.float8_e4m3fn).float()


def in_units(x: Tensor, largest: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """(x in units of which `largest` has as many as there are steps, the unit), NaN where `largest` is a NaN or infinite."""
    steps = LARGEST[dtype][0]
    largest = torch.where(largest.isinf(), torch.nan, largest)
    # steps / largest would be torch's steps times the reciprocal, which is rounded twice: a step off where a value is half of one.
    inverse = torch.full_like(largest, steps) / largest
    inverse = torch.where(largest < LEAST, 0, inverse)
    return x * inverse, largest / steps


def largest_of(x: Tensor, dim: int) -> Tensor:
    return x.abs().amax(dim, keepdim=True) if x.shape[dim] else torch.zeros_like(x.sum(dim, keepdim=True))


def to_8bit(x: Tensor, dim: int, dtype: str) -> tuple[Tensor, Tensor]:
    """(whole numbers from -127 to 127 or e4m3 to 448, the largest of which `dim` has, the scale)."""
    values, scale = in_units(x, largest_of(x, dim), dtype)
    return rounded(values, dtype), scale


def keys_to_8bit(k: Tensor) -> tuple[Tensor, Tensor]:
    """k [..., keys, columns] in int8, and a scale for each key, [..., keys, 1].

    In each BLOCK the keys are put in the order of their largest values, of equal ones in their own, and each GROUP takes the
    scale of its largest. A key with a NaN comes last and has NaN as its scale, but does not change that of its group.
    """
    keys = k.shape[-2]
    n = math.ceil(keys / BLOCK)
    largest = largest_of(k, -1).squeeze(-1)
    largest = torch.where(largest.isinf(), torch.nan, largest)
    blocks = F.pad(largest, (0, n * BLOCK - keys), value=torch.nan).unflatten(-1, (n, BLOCK))
    order = torch.where(blocks.isnan(), torch.inf, blocks).argsort(dim=-1, stable=True)
    of_groups = blocks.gather(-1, order).nan_to_num(0).unflatten(-1, (BLOCK // GROUP, GROUP)).amax(-1, keepdim=True)
    shared = torch.empty_like(blocks).scatter(-1, order, of_groups.expand(*of_groups.shape[:-1], GROUP).flatten(-2, -1))
    shared = torch.where(blocks.isnan(), torch.nan, shared).flatten(-2, -1)[..., :keys]
    values, scale = in_units(k, shared.unsqueeze(-1), "int8")
    return rounded(values, "int8"), scale


def values_to_8bit(v: Tensor, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """v [..., keys, columns] in 8 bits, a scale for each column, [..., 1, columns], and one for each BLOCK keys, all their columns,
    [..., keys, 1].

    The largest value of a column grows with the number of its keys. Most blocks are of smaller values, to which the second scale
    leaves all steps. It is 1 in e4m3, whose steps grow with the values. A column with a NaN does not change a block's scale.
    """
    values, scale = in_units(v, largest_of(v, -2), dtype)
    if dtype != "int8":
        return rounded(values, dtype), scale, torch.ones_like(values[..., :1])
    keys = v.shape[-2]
    n = math.ceil(keys / BLOCK)
    blocks = F.pad(values, (0, 0, 0, n * BLOCK - keys)).unflatten(-2, (n, BLOCK))
    blocks, block_scale = in_units(blocks, blocks.nan_to_num(0).abs().amax((-2, -1), keepdim=True), dtype)
    of_keys = block_scale.expand(*blocks.shape[:-1], 1).flatten(-3, -2)
    return rounded(blocks, dtype).flatten(-3, -2)[..., :keys, :], scale, of_keys[..., :keys, :]


def rotate(x: Tensor) -> Tensor:
    """Each block of as many columns as the largest power of two that divides their number, times a Hadamard matrix of +-1: in
    steps of 1, 2, 4, ... columns, (a, b) becomes (a + b, a - b)."""
    columns = x.shape[-1]
    step = 1
    while columns % (2 * step) == 0:
        a, b = x.unflatten(-1, (-1, 2, step)).unbind(-2)
        x = torch.stack([a + b, a - b], -2).flatten(-3)
        step *= 2
    return x


def rotation_size(columns: int) -> int:
    return columns & -columns


def centre_of(k: Tensor) -> Tensor:
    """[Hk, 1, D], of k [Hk, Sk, D] in float32: the mean of SAMPLES keys, which are added up in order."""
    keys = k.shape[1]
    samples = min(keys, SAMPLES)
    total = torch.zeros_like(k[:, :1] if keys else k.new_zeros(len(k), 1, k.shape[2]))
    for i in range(samples):
        place = i * (keys - 1) // max(samples - 1, 1)
        total = total + k[:, place : place + 1]
    return total * (1 / samples if samples else 0)


def quantize(q: Tensor, k: Tensor, v: Tensor, rotates: bool, dtype: str = "int8") -> Operands:
    """q [Sq, H, D], k [Sk, Hk, D] and v [Sk, Hk, Dv] of one sequence."""
    q, k, v = (x.transpose(0, 1).float() for x in (q, k, v))
    centre = centre_of(k)
    group = len(q) // len(k)
    shift = (q * centre.repeat_interleave(group, 0)).sum(-1, keepdim=True)
    k = k - centre
    n = rotation_size(q.shape[-1]) if rotates else 1
    if rotates:
        q, k = rotate(q), rotate(k)
    (q, q_scale), (k, k_scale) = to_8bit(q, -1, "int8"), keys_to_8bit(k)
    return Operands(q, q_scale, shift, k, k_scale * (1 / n), *values_to_8bit(v, dtype), dtype)


def attend(
    x: Operands,
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float,
    mask: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """o [H, Sq, Dv] and lse [H, Sq], float32, of one sequence. mask: broadcastable to [H, Sq, Sk]; slopes: [H]."""
    group = len(x.q) // len(x.k)
    k, k_scale, v = (t.repeat_interleave(group, 0) for t in (x.k, x.k_scale, x.v))
    rows, keys = x.q.shape[1], k.shape[1]
    s = (x.q.double() @ k.double().transpose(1, 2)).float() * k_scale.transpose(1, 2) * (x.q_scale * scale)
    # What is added to all scores of a row changes neither their softmax nor what is added to single ones.
    shift = x.shift * scale
    if softcap > 0:
        s = softcap * torch.tanh((s + shift) / softcap)
        shift = torch.zeros_like(shift)
    distance = torch.arange(keys, device=s.device) - torch.arange(keys - rows, keys, device=s.device).unsqueeze(1)
    if slopes is not None:
        s = s - slopes.reshape(-1, 1, 1) * distance.abs()
    allowed = torch.ones_like(distance, dtype=torch.bool)
    if left is not None:
        allowed = allowed & (distance >= -left)
    if right is not None:
        allowed = allowed & (distance <= right)
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        s = s + mask.float()
        allowed = allowed & ~(mask.float() / math.log(2)).isneginf()
    s = s.masked_fill(~allowed, -torch.inf)
    v_scale, v_block_scale = (t.repeat_interleave(group, 0).double() for t in (x.v_scale, x.v_block_scale))
    return _softmax(s, v, v_scale, v_block_scale, x.dtype, shift, sinks)


def _softmax(
    s: Tensor, v: Tensor, v_scale: Tensor, v_block_scale: Tensor, dtype: str, shift: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The probabilities of a block of keys are relative to its largest; the denominator is the sum of them as they were."""
    steps = LARGEST[dtype][1]
    sink = s.new_full((*s.shape[:-1], 1), -torch.inf) if sinks is None else sinks.float().reshape(-1, 1, 1) - shift
    maximum = torch.cat([s, sink], -1).amax(-1, keepdim=True)
    finite = torch.where(maximum == -torch.inf, 0, maximum)  # of a row without keys
    total = (sink - finite).exp().double()
    out = torch.zeros(*s.shape[:-1], v.shape[-1], dtype=torch.float64, device=s.device)
    for begin in range(0, s.shape[-1], BLOCK):
        block = s[..., begin : begin + BLOCK]
        unit = block.amax(-1, keepdim=True)
        unit = torch.where(unit == -torch.inf, 0, unit)
        p = (block - unit).exp()
        weight = (unit - finite).exp().double()
        weight = torch.where((p > 0).any(-1, keepdim=True) | p.isnan().any(-1, keepdim=True), weight, 0)
        total = total + p.double().sum(-1, keepdim=True) * weight
        part = rounded(p * steps, dtype).double() @ v[:, begin : begin + BLOCK].double()
        out = out + part * (weight / steps * v_block_scale[:, begin : begin + 1])
    lse = torch.where(maximum == -torch.inf, -torch.inf, finite + shift + total.log())
    o = torch.where(total == 0, 0, out / total) * v_scale
    o = torch.where(maximum == -torch.inf, torch.zeros_like(o), o)  # whatever v's scales are
    return o.float(), lse.squeeze(-1).float()


#: q, q_scale, q_shift, k, k_scale, v, v_scale and v_block_scale, as quantize_attention returns them
Quantized = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def empty_operands(q: Tensor, k: Tensor, v: Tensor, dtype: str, sequences: int) -> Quantized:
    """Contiguous tensors for what quantize_attention returns, without values."""

    def scales(*shape: int) -> Tensor:
        return q.new_empty(shape, dtype=torch.float32)

    return (
        q.new_empty(q.shape, dtype=torch.int8),
        scales(*q.shape[:-1]),
        scales(*q.shape[:-1]),
        k.new_empty(k.shape, dtype=torch.int8),
        scales(*k.shape[:-1]),
        v.new_empty(v.shape, dtype=torch.int8 if dtype == "int8" else torch.float8_e4m3fn),
        scales(sequences, *v.shape[-2:]),
        scales(*k.shape[:-1]) if dtype == "int8" else scales(0),
    )


def sequences_of(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> list[tuple[int | slice, int | slice]]:
    """Where the rows and the keys of each known sequence are, in q and in k: x[where] is [rows, heads, columns]."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return [(b, b) for b in range(len(q))]
    return list(zip(known_sequences(cu_seqlens_q, len(q)), known_sequences(cu_seqlens_k, len(k))))


def quantize_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dtype: str,
    rotates: bool,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Quantized:
    to = empty_operands(q, k, v, dtype, len(q) if cu_seqlens_q is None else len(cu_seqlens_q) - 1)
    for part in to:  # what is of no known sequence
        part.fill_(torch.nan if part.dtype is torch.float32 and part is not to[6] else 0)
    for b, (rows, keys) in enumerate(sequences_of(q, k, cu_seqlens_q, cu_seqlens_k)):
        x = quantize(q[rows], k[keys], v[keys], rotates, dtype)
        of_rows, of_keys = (x.q, x.q_scale[..., 0], x.shift[..., 0]), (x.k, x.k_scale[..., 0], x.v)
        for where, parts, values in ((rows, to[:3], of_rows), (keys, to[3:6], of_keys)):
            for part, value in zip(parts, values):
                value = value.transpose(0, 1)
                part[where] = value.nan_to_num(0) if part.dtype is torch.int8 else value  # its scale is NaN
        to[6][b] = x.v_scale[:, 0]
        if dtype == "int8":
            to[7][keys] = x.v_block_scale[..., 0].transpose(0, 1)
    return to


def attention_8bit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dtype: str,
    rotates: bool,
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
    q_scale: Tensor | None = None,
    q_shift: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    v_block_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return attention_8bit_with_lse(
        q, k, v, dtype, rotates, scale, causal, window_left, window_right, softcap, mask, alibi_slopes, sinks, cu_seqlens_q,
        cu_seqlens_k, batch_invariant, q_scale, q_shift, k_scale, v_scale, v_block_scale, out_dtype,
    )[0]  # fmt: skip


def attention_8bit_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dtype: str,
    rotates: bool,
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
    q_scale: Tensor | None = None,
    q_shift: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    v_block_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """With q_scale, q to v_block_scale are what quantize_attention has returned, and out_dtype is q's before it."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    right = 0 if causal else window_right
    out_dtype = out_dtype or q.dtype
    if q_scale is None or q_shift is None or k_scale is None or v_scale is None:
        q, q_scale, q_shift, k, k_scale, v, v_scale, v_block_scale = quantize_attention(
            q, k, v, dtype, rotates, cu_seqlens_q, cu_seqlens_k
        )
    if v_block_scale is None or dtype != "int8":  # e4m3 has none
        v_block_scale = torch.ones_like(k_scale)
    o, lse = (x.fill_(torch.nan) for x in outputs_of(q.to(out_dtype), v, torch.float32))
    for b, (rows, keys) in enumerate(sequences_of(q, k, cu_seqlens_q, cu_seqlens_k)):
        of_rows = [y[rows].transpose(0, 1).float() for y in (q, q_scale[..., None], q_shift[..., None])]
        of_keys = [y[keys].transpose(0, 1).float() for y in (k, k_scale[..., None], v, v_block_scale[..., None])]
        x = Operands(
            of_rows[0],
            of_rows[1],
            of_rows[2],
            of_keys[0],
            of_keys[1],
            of_keys[2],
            v_scale[b, :, None],
            of_keys[3],
            dtype,
        )
        mask_b = mask[b if mask.shape[0] > 1 else 0] if mask is not None and mask.dim() == 4 else mask
        slopes = alibi_slopes[b] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        o_part, lse_part = attend(x, scale, window_left, right, softcap, mask_b, slopes, sinks)
        o[rows] = o_part.transpose(0, 1).to(out_dtype)
        (lse[b] if cu_seqlens_q is None else lse[:, rows]).copy_(lse_part)
    return o, lse
