"""attention and attention_with_lse in Triton: one kernel for all masks and architectures.

A program has a tile of rows of one head. Of the keys that its rows may see, blocks that all of them see whole run without a
bound; those at an edge (of the causal triangle, of a window, of the keys) run in a second loop, which has one. Scores are in
units of log2(e), so that a probability is one fma and one ex2.

A whole block of keys lies within its sequence, so it may come by TMA, on sm_90 and later; a block at an edge may end in the
next sequence, whose NaN would pass through a probability of 0, and is loaded from pointers, with zeros beyond its sequence.

Masks, ALiBi and softcap share one more constant, GENERAL, within which they are chosen at run time, as everything else is:
there are two kernels for each dtype and bucket.

Instructions of the loop over whole blocks, a thread and score, for d = 64, 128, 256 (static, machine code by ptxas of Triton
3.6): 9.6, 15.1, 32.3 on sm_80 and 7.1, 7.5, 14.8 on sm_90; no kernel is on local memory. Nothing here has been timed on a GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from . import ATTENTION, ATTENTION_WITH_LSE, MOST_APART, bucket

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
UNLIMITED = 2**31 - 1


@dataclass(frozen=True)
class AttentionTiling:
    """How a head is cut up. `parts`: the widths of the tiles that q's and k's columns are, `value_parts` v's."""

    block_m: int
    block_n: int
    warps: int
    parts: tuple[int, ...]
    value_parts: tuple[int, ...]
    stages: int = 2  # the next block's keys and values are on their way; two of d = 256 are all that fit on sm_90


@functools.cache
def tiling_of(dims: tuple[int, int], general: bool, arch: int) -> AttentionTiling:
    """A function of the bucket, the kind of scores and the architecture: a row's bits depend on neither batch nor lengths.

    Each is the largest of those tried that does not spill (static, ptxas of Triton 3.6; later ones spill up to 384 bytes where
    a mask is added to scores, see STACK in test_triton.py).
    """
    block_m, warps = 128, 8
    if arch // 10 == 9:
        # two warpgroups of 64 rows: a thread has value_dim / 2 accumulators beside block_n / 2 scores
        block_n = 128 if dims[1] <= 128 else 64
    else:
        block_n = 64 if dims[0] <= 128 else 32
        if dims[1] == 64:
            warps = 4  # 32 rows a warp: k and v are read from shared memory half as often as by 16
        elif dims[1] == 256 and not general:
            block_m, warps = 64, 4  # a warp still has 16 rows; 128 of them take more shared memory than sm_89 has
    if general:
        # a mask's values and where they are take twice the registers of scores
        block_n = 32 if dims == (192, 128) else block_n // 2
    # Triton has warps side by side, which share a row's softmax, where a tile of accumulators is wider than high.
    return AttentionTiling(block_m, block_n, warps, widths(dims[0], 256), widths(dims[1], min(block_m, 128)))


def widths(columns: int, limit: int) -> tuple[int, ...]:
    """Powers of two, which Triton's tiles are: 192 is 128 and 64."""
    width = min(limit, 1 << columns.bit_length() >> 1)
    return (width, *widths(columns - width, limit)) if columns else ()


@triton.jit
def look_at(cu_seqlens_ptr, b, sequences, total):
    """(where sequences b begin, whether they begin or end out of order: fall, or lead beyond `total`). Of two numbers that fall
    either may be wrong, so that a sequence is out of order too whose end the next one falls below. Behind the last sequence nothing
    is."""
    begin = tl.load(cu_seqlens_ptr + b, mask=b <= sequences, other=0)
    end = tl.load(cu_seqlens_ptr + b + 1, mask=b < sequences, other=0)
    after = tl.load(cu_seqlens_ptr + b + 2, mask=b + 1 < sequences, other=2**31 - 1)
    return begin, (b < sequences) & ((begin > end) | (end > total) | (end > after) | ((b == 0) & (begin != 0)))


@triton.jit
def find_sequence(cu_seqlens_q_ptr, cu_seqlens_k_ptr, tile, sequences, rows, keys, M: tl.constexpr):
    """(the sequence to which a tile belongs, how many are known, from the first one on, before cu_seqlens fall or lead beyond the
    tensors). Nobody has looked at cu_seqlens on the host. Sequence b has tiles from cu_seqlens[b] / M + b on, at least as many as
    its rows need. Behind those that are known, the other rows are one sequence more."""
    b, known = 0, sequences
    for first in range(0, sequences + 1, 128):
        i = first + tl.arange(0, 128)
        begin, wrong = look_at(cu_seqlens_q_ptr, i, sequences, rows)
        _, wrong_keys = look_at(cu_seqlens_k_ptr, i, sequences, keys)
        known = tl.minimum(known, tl.min(tl.where(wrong | wrong_keys, i, sequences)))
        b += tl.sum(((begin // M + i <= tile) & (i > 0) & (i <= known)).to(tl.int32))
    return b, known


@triton.jit
def sequence_of(tile, tiles, sequences, rows, keys, packed, cu_seqlens_q_ptr, cu_seqlens_k_ptr, M: tl.constexpr):
    """(sequence, its first row, its rows, its first key, its keys, the tile among its own) of a tile of M rows. Of packed ones
    `rows` and `keys` are all; keys are -1 of rows whose sequence is not known, and the tile is below 0 where there is none."""
    if packed:
        sequence, known = find_sequence(cu_seqlens_q_ptr, cu_seqlens_k_ptr, tile, sequences, rows, keys, M)
        q_origin = tl.load(cu_seqlens_q_ptr + sequence, mask=sequence > 0, other=0)
        tile -= q_origin // M + sequence
        is_known = sequence < known
        k_origin = tl.load(cu_seqlens_k_ptr + sequence, mask=is_known, other=0)
        rows = tl.load(cu_seqlens_q_ptr + sequence + 1, mask=is_known, other=rows) - q_origin
        keys = tl.load(cu_seqlens_k_ptr + sequence + 1, mask=is_known, other=-1) - k_origin
    else:
        q_origin, k_origin = 0, 0
        sequence = tile // tiles
        tile = tile % tiles
    return sequence, q_origin, rows, k_origin, keys, tile


@triton.jit
def store_nan(out, lse_ptr, has_lse, first_row, rows, head, heads, columns, M: tl.constexpr):
    """To M rows of packed sequences, of which it is not known whose they are."""
    row = first_row + tl.arange(0, M)
    if has_lse:
        tl.store(lse_ptr + head.to(tl.int64) * rows + row, float("nan"), mask=row < rows)
    for column in range(0, columns, 32):
        c = column + tl.arange(0, 32)
        offset = (row.to(tl.int64) * heads + head)[:, None] * columns + c[None, :]
        tl.store(out + offset, float("nan"), mask=(row < rows)[:, None] & (c < columns)[None, :])


@triton.jit
def visible(place, keys, left, right):
    """The first and the last key that a row at `place` may see."""
    place = place.to(tl.int64)
    return tl.maximum(place - left, 0).to(tl.int32), tl.minimum(place + right, keys - 1).to(tl.int32)


@triton.jit
def key_blocks(first_row, rows, keys, left, right, M: tl.constexpr, N: tl.constexpr):
    """The blocks of N keys of M rows: (the first, the first that all rows see whole, the end of those, the end)."""
    # both bounds rise from the first row to the last
    first_low, first_high = visible(first_row + keys - rows, keys, left, right)
    last_low, last_high = visible(tl.minimum(first_row + M, rows) - 1 + keys - rows, keys, left, right)
    begin = first_low // N
    end = tl.maximum(tl.cdiv(last_high + 1, N), begin)
    whole = tl.minimum(tl.cdiv(last_low, N), end)
    return begin, whole, tl.maximum((first_high + 1) // N, whole), end


@triton.jit
def tiles_at(
    x, descriptors, key, keys, origin, batch, head, step, dim, N: tl.constexpr, PARTS: tl.constexpr, WHOLE: tl.constexpr
):
    """Keys [N] from `key` on of k or v [keys, dim * 8]: a tile for each of PARTS, zeros beyond."""
    tiles = ()
    column = 0
    for i in tl.static_range(len(PARTS)):
        if WHOLE and descriptors is not None:
            tile = descriptors[i].load([batch, head, origin + key, column]).reshape(N, PARTS[i])
        else:
            n, c = tl.arange(0, N), column + tl.arange(0, PARTS[i])
            inside = (c < dim * 8)[None, :]
            if not WHOLE:
                inside = inside & (n < keys - key)[:, None]
            tile = tl.load(
                x + key.to(tl.int64) * (step * 8) + (n[:, None] * (step * 8) + c[None, :]), mask=inside, other=0.0
            )
        tiles += (tile,)  # type: ignore[assignment]
        column += PARTS[i]
    return tiles


@triton.jit
def reciprocal(x):
    """Within a unit in the last place; 0 of infinity."""
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def capped(s, softcap, limit):
    """limit * tanh(s / softcap); tanh(x) is 1 - 2 / (1 + exp(2 x)). tanh.approx.f32 takes half of the instructions that bound
    softmax, but it is only within 2^-11: log-sum-exps of scores near a softcap of 50 were off by 1.8e-2."""
    return limit - 2 * limit * reciprocal(1 + tl.exp2(s * (2 * LOG2_E / softcap)))


@triton.jit
def load_logits(ptr, offset, kind, dtype: tl.constexpr):
    """Masks or sinks, bool, float32 or of q's dtype, in units of log2(e)."""
    if kind == 1:
        logits = tl.where(tl.load(ptr + offset) != 0, 0.0, float("-inf"))
    elif kind == 2:
        logits = tl.load(ptr.to(tl.pointer_type(tl.float32)) + offset) * LOG2_E
    else:
        logits = tl.load(ptr.to(tl.pointer_type(dtype)) + offset).to(tl.float32) * LOG2_E
    return logits


@triton.jit
def general_scores(s, scale, column, keys, options, dtype: tl.constexpr):
    """Products [M, N] to scores in units of log2(e)."""
    softcap, slope, place, row, rows, mask_ptr, mask_offset, mask_kind, mask_row, mask_column = options
    s *= scale
    if softcap > 0:
        s = capped(s, softcap, softcap * LOG2_E)
    else:
        s *= LOG2_E
    if slope != 0:
        s -= slope * tl.abs(place[:, None] - column[None, :]).to(tl.float32)
    if mask_kind != 0:
        # beyond its end the last row and key again: scores that nobody uses
        offset = mask_offset + tl.minimum(column, keys - 1).to(tl.int64) * mask_column
        if mask_row == 0:  # of keys alone, such as padding
            s += load_logits(mask_ptr, offset, mask_kind, dtype)[None, :]
        else:
            row_offset = tl.minimum(row, rows - 1).to(tl.int64) * mask_row
            s += load_logits(mask_ptr, row_offset[:, None] + offset[None, :], mask_kind, dtype)
    return s


@triton.jit
def attend_blocks(
    q, acc, maxima, total, first, middle, last, gap, k, v, k_descriptors, v_descriptors, k_step, v_step, origin, batch, kv_head,
    keys, dim, value_dim, low, high, scale, score_options, N: tl.constexpr, PARTS: tl.constexpr, VALUE_PARTS: tl.constexpr,
    WHOLE: tl.constexpr, GENERAL: tl.constexpr,
):  # fmt: skip
    """The accumulators, `maxima` and the sums `total` of rows after the blocks of N keys from `first` to `last`, but for
    `gap` of them from `middle` on. low, high [M]: each row's first and last key. `scale` is times log2(e), except where GENERAL."""
    for i in tl.range(first, last - gap, disable_licm=GENERAL):
        key = (i if WHOLE else tl.where(i < middle, i, i + gap)) * N
        column = key + tl.arange(0, N)
        k_tiles = tiles_at(k, k_descriptors, key, keys, origin, batch, kv_head, k_step, dim, N, PARTS, WHOLE)
        s = tl.dot(q[0], k_tiles[0].T)
        for j in tl.static_range(1, len(PARTS)):
            s = tl.dot(q[j], k_tiles[j].T, s)
        v_tiles = tiles_at(
            v, v_descriptors, key, keys, origin, batch, kv_head, v_step, value_dim, N, VALUE_PARTS, WHOLE
        )
        factor = scale
        if GENERAL:
            s = general_scores(s, scale, column, keys, score_options, q[0].dtype)
            factor = 1.0
        if not WHOLE:
            s = tl.where((column[None, :] >= low[:, None]) & (column[None, :] <= high[:, None]), s, float("-inf"))
        highest = tl.maximum(maxima, tl.max(s, 1) * factor)
        shift = highest
        if GENERAL or not WHOLE:
            shift = tl.where(highest == float("-inf"), 0.0, highest)  # no key yet
        p = tl.exp2(s * factor - shift[:, None])
        correction = tl.exp2(maxima - shift)
        maxima = highest
        total = total * correction + tl.sum(p, 1)
        p = p.to(q[0].dtype)
        sums = ()
        for j in tl.static_range(len(VALUE_PARTS)):
            sums += (tl.dot(p, v_tiles[j], acc[j] * correction[:, None]),)  # type: ignore[assignment]
        acc = sums
    return acc, maxima, total


@triton.jit
def with_sink(maxima, total, sink):
    """(maxima, sums) of rows whose softmax has one logit more, and by what their accumulators are to be multiplied."""
    highest = tl.maximum(maxima, sink)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    correction = tl.exp2(maxima - shift)
    return highest, total * correction + tl.exp2(sink - shift), correction


_RUN_TIME = [
    "q_batch", "q_step", "q_head", "k_batch", "k_step", "k_head", "v_batch", "v_step", "v_head", "has_lse", "batch",
    "heads", "group", "rows", "keys", "tiles", "dim", "value_dim", "left", "right", "sinks_kind", "has_alibi",
    "alibi_batch", "mask_kind", "mask_batch", "mask_head", "mask_row", "mask_column", "packed",
]  # fmt: skip
_ANY_ALIGNMENT = ["lse_ptr", "mask_ptr", "alibi_ptr", "sinks_ptr", "cu_seqlens_q_ptr", "cu_seqlens_k_ptr"]


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def attention_kernel(
    q, k, v, k_descriptors, v_descriptors, q_batch, q_step, q_head, k_batch, k_step, k_head, v_batch, v_step, v_head, out,
    lse_ptr, has_lse, batch, heads, group, rows, keys, tiles, dim, value_dim, scale, softcap, left, right, mask_ptr,
    mask_kind, mask_batch, mask_head, mask_row, mask_column, alibi_ptr, has_alibi, alibi_batch, sinks_ptr, sinks_kind,
    packed, cu_seqlens_q_ptr, cu_seqlens_k_ptr, M: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr,
    VALUE_PARTS: tl.constexpr, GENERAL: tl.constexpr,
):  # fmt: skip
    """Strides of q, k and v, dim and value_dim count 8 elements, 16 bytes: alignment shows. `tiles`: of a sequence's rows;
    all of them where packed, whose rows and keys are those of all sequences."""
    head, tile = tl.program_id(0) % heads, tl.program_id(0) // heads  # heads that share keys run together
    kv_head = head // group
    all_rows = rows
    sequence, q_origin, rows, k_origin, keys, tile = sequence_of(
        tile, tiles, batch, rows, keys, packed, cu_seqlens_q_ptr, cu_seqlens_k_ptr, M
    )
    first_row = (tl.cdiv(rows, M) - 1 - tile) * M  # last rows first: of causal ones they have the most keys
    if first_row < 0 or tile < 0:
        return
    if keys < 0:
        store_nan(out, lse_ptr, has_lse, q_origin + first_row, all_rows, head, heads, value_dim * 8, M)
        return

    row = first_row + tl.arange(0, M)
    place = row + (keys - rows)
    low, high = visible(place, keys, left, right)
    begin, whole, whole_end, end = key_blocks(first_row, rows, keys, left, right, M, N)

    batch_index = tl.where(packed, 0, sequence)
    q += (batch_index.to(tl.int64) * q_batch + q_origin.to(tl.int64) * q_step + head.to(tl.int64) * q_head) * 8
    k += (batch_index.to(tl.int64) * k_batch + k_origin.to(tl.int64) * k_step + kv_head.to(tl.int64) * k_head) * 8
    v += (batch_index.to(tl.int64) * v_batch + k_origin.to(tl.int64) * v_step + kv_head.to(tl.int64) * v_head) * 8
    q_tiles = tiles_at(q, None, first_row, rows, 0, 0, 0, q_step, dim, M, PARTS, False)
    if not GENERAL:
        scale *= LOG2_E
    slope = 0.0
    if has_alibi:
        slope = tl.load(alibi_ptr + sequence.to(tl.int64) * alibi_batch + head) * LOG2_E
    mask_offset = sequence.to(tl.int64) * mask_batch + head.to(tl.int64) * mask_head
    options = (softcap, slope, place, row, rows, mask_ptr, mask_offset, mask_kind, mask_row, mask_column)
    acc = ()
    for j in tl.static_range(len(VALUE_PARTS)):
        acc += (tl.zeros((M, tl.constexpr(VALUE_PARTS[j])), tl.float32),)  # type: ignore[assignment]
    maxima = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc, maxima, total = attend_blocks(
        q_tiles, acc, maxima, total, whole, whole_end, whole_end, 0, k, v, k_descriptors, v_descriptors, k_step, v_step, k_origin,
        batch_index, kv_head, keys, dim, value_dim, low, high, scale, options, N, PARTS, VALUE_PARTS, True, GENERAL,
    )  # fmt: skip
    acc, maxima, total = attend_blocks(
        q_tiles, acc, maxima, total, begin, whole, end, whole_end - whole, k, v, k_descriptors, v_descriptors, k_step, v_step,
        k_origin, batch_index, kv_head, keys, dim, value_dim, low, high, scale, options, N, PARTS, VALUE_PARTS, False, GENERAL,
    )  # fmt: skip

    correction = tl.full((M,), 1.0, tl.float32)
    if sinks_kind != 0:
        sink = load_logits(sinks_ptr, head, sinks_kind, q.dtype.element_ty)
        maxima, total, correction = with_sink(maxima, total, sink)
    inside = row < rows
    row_index = batch_index.to(tl.int64) * all_rows + q_origin + row
    if has_lse:
        lse_offset = (batch_index.to(tl.int64) * heads + head) * all_rows + q_origin + row
        tl.store(lse_ptr + lse_offset, (maxima + tl.log2(total)) * LN_2, mask=inside)
    factor = correction / tl.where(total == 0, 1.0, total)  # a row that sees nothing is 0
    column = 0
    for j in tl.static_range(len(VALUE_PARTS)):
        c = (column + tl.arange(0, VALUE_PARTS[j]))[None, :]
        offset = ((row_index * heads + head) * (value_dim * 8))[:, None] + c
        o = (acc[j] * factor[:, None]).to(q.dtype.element_ty)
        tl.store(out + offset, o, mask=inside[:, None] & (c < value_dim * 8))
        column += VALUE_PARTS[j]


def aligned(x: Tensor) -> Tensor:
    """x [..., rows, heads, dim] with its first byte and its strides multiples of 16 bytes and rows less than MOST_APART apart:
    a copy where they are not, else x with 0 as the stride of dimensions of one element."""
    strides = [0 if n == 1 else s for n, s in zip(x.shape[:-1], x.stride())]
    if x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in strides) and strides[-2] < MOST_APART:
        return x.as_strided(x.shape, (*strides, 1))
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)


def descriptors(x: Tensor, n: int, parts: tuple[int, ...]) -> tuple[TensorDescriptor, ...]:
    """TMA descriptors of k or v as [batch, head, key, dim], one for each width of tile."""
    x = x.transpose(-2, -3) if x.dim() == 4 else x.transpose(0, 1).unsqueeze(0)
    return tuple(TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, n, width]) for width in parts)


def strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, row and head, in units of 16 bytes."""
    row, head = (s // 8 for s in x.stride()[-3:-1])
    return (x.stride(0) // 8 if x.dim() == 4 else 0), row, head


def modifies(mask: Tensor | None, alibi_slopes: Tensor | None, softcap: float) -> bool:
    """Whether scores are more than products: GENERAL."""
    return mask is not None or alibi_slopes is not None or softcap > 0


def filled_without_kernel(
    out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, sinks: Tensor | None, cu_seqlens_q: Tensor | None
) -> bool:
    """Writes the result of no sequences, and of rows without keys, which no kernel takes; whether it is one of them."""
    if not out.numel():
        return True
    if not (q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1):  # the rows of no sequence
        out.fill_(torch.nan)
        if lse is not None:
            lse.fill_(torch.nan)
        return True
    if k.numel() or cu_seqlens_q is not None:
        return False
    out.zero_()
    if lse is not None:
        lse.copy_(sinks.unsqueeze(1)) if sinks is not None else lse.fill_(-torch.inf)
    return True


def tiles_of(
    q: Tensor, keys: int, kv_heads: int, block_m: int, cu_seqlens_q: Tensor | None
) -> tuple[tuple[int], dict[str, int]]:
    """The programs of a launch, one for each head and tile of rows, and the kernel's arguments that say how many there are."""
    rows, heads = q.shape[-3:-1]
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    tiles = triton.cdiv(rows, block_m)
    programs = tiles * batch if cu_seqlens_q is None else rows // block_m + batch + 1
    shape = {"batch": batch, "heads": heads, "group": heads // kv_heads, "rows": rows, "keys": keys, "tiles": tiles}
    return (programs * heads,), shape


def outputs(out: Tensor, lse: Tensor | None) -> dict[str, Any]:
    return {"out": out, "lse_ptr": out.view(torch.float32) if lse is None else lse, "has_lse": lse is not None}


def score_options(
    out: Tensor,
    shape: dict[str, int],
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> dict[str, Any]:
    """What is done to scores, as arguments of a kernel. `out`, of q's dtype, stands for what is not there."""
    heads = shape["heads"]
    floats, bits = (out.view(dtype) for dtype in (torch.float32, torch.uint8))
    mask = None if mask is None else mask.expand(shape["batch"], heads, shape["rows"], shape["keys"])
    kinds = {torch.bool: 1, torch.float32: 2, out.dtype: 3}  # of load_logits
    mask_strides = (0,) * 4 if mask is None else mask.stride()
    return {
        "softcap": softcap,
        "left": UNLIMITED if window_left is None else min(window_left, UNLIMITED),
        "right": 0 if causal else UNLIMITED if window_right is None else min(window_right, UNLIMITED),
        "mask_ptr": bits if mask is None else triton.reinterpret(mask, tl.uint8),
        "mask_kind": 0 if mask is None else kinds[mask.dtype],
        **dict(zip(("mask_batch", "mask_head", "mask_row", "mask_column"), mask_strides)),
        "alibi_ptr": floats if alibi_slopes is None else alibi_slopes,
        "has_alibi": alibi_slopes is not None,
        "alibi_batch": heads if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0,
        "sinks_ptr": bits if sinks is None else sinks.view(torch.uint8),
        "sinks_kind": 0 if sinks is None else kinds[sinks.dtype],
    }


def sequences(out: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> dict[str, Any]:
    """Where packed sequences begin, as arguments of a kernel."""
    ints = out.view(torch.int32)
    return {
        "packed": cu_seqlens_q is not None,
        "cu_seqlens_q_ptr": ints if cu_seqlens_q is None else cu_seqlens_q,
        "cu_seqlens_k_ptr": ints if cu_seqlens_k is None else cu_seqlens_k,
    }


def run(
    out: Tensor,
    lse: Tensor | None,
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
) -> None:
    """Fills out, and lse where there is one. Batch invariant it always is."""
    if filled_without_kernel(out, lse, q, k, sinks, cu_seqlens_q):
        return
    keys, kv_heads, value_dim = v.shape[-3:]
    dim = q.shape[-1]
    if not keys:
        k = v = q  # what cu_seqlens say is still looked at; of keys nothing is read
    dims = bucket(dim, value_dim)
    assert dims  # else why_not has refused
    general = modifies(mask, alibi_slopes, softcap)
    with torch.cuda.device_of(q):
        arch = driver.active.get_current_target().arch
        tiling = tiling_of(dims, general, arch)
        q, k, v = (aligned(x) for x in (q, k, v))
        k_descriptors, v_descriptors = None, None
        if arch >= 90:
            k_descriptors, v_descriptors = (
                descriptors(k, tiling.block_n, tiling.parts),
                descriptors(v, tiling.block_n, tiling.value_parts),
            )
        grid, shape = tiles_of(q, keys, kv_heads, tiling.block_m, cu_seqlens_q)
        attention_kernel[grid](
            q, k, v, k_descriptors, v_descriptors, *strides(q), *strides(k), *strides(v), **outputs(out, lse), **shape,
            dim=dim // 8, value_dim=value_dim // 8, scale=dim**-0.5 if scale is None else scale,
            **score_options(out, shape, causal, window_left, window_right, softcap, mask, alibi_slopes, sinks),
            **sequences(out, cu_seqlens_q, cu_seqlens_k), M=tiling.block_m, N=tiling.block_n, PARTS=tiling.parts,
            VALUE_PARTS=tiling.value_parts, GENERAL=general, num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip


def attention(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    out = ATTENTION.fake(q, k, v)
    run(out, None, q, k, v, *options)
    return out


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    out, lse = ATTENTION_WITH_LSE.fake(q, k, v)
    run(out, lse, q, k, v, *options)
    return out, lse


torch.library.impl("forwardpass::attention_triton", ("cuda", "cpu"))(attention)
torch.library.impl("forwardpass::attention_with_lse_triton", ("cuda", "cpu"))(attention_with_lse)
