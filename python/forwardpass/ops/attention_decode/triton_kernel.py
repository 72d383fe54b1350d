"""attention_decode in Triton: split-KV, whose ranges each program computes from the lengths on the device.

A program has one head of the cache, all rows of the query heads that share it (padded to the 16 rows of a matrix instruction),
and one of the ranges into which its sequence's keys are split. What it leaves, the normalised output and the base-2 logarithm of
its sum, a second kernel merges in the order of the ranges; with one range the first kernel writes the output.

How many ranges there are depends on shapes alone, so that a CUDA graph can be replayed; which keys they have, on lengths. With
batch_invariant a range has CHUNK keys, or more where a sequence is so long that it would have more than `most` ranges: its bits
depend neither on the batch nor on the width of the table.

It reads the cache once, and is bound by that: 8-bit elements become 16-bit ones in registers, scales multiply scores and
probabilities. Nothing here has been timed on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver

from ..attention.triton_kernel import LN_2, LOG2_E, capped, load_logits
from ..common.cache_layout import QUANTIZED, capacity
from ..common.triton_gemm import Machine, machine_of, upconvert
from . import OPERATION, WITH_LSE

#: keys of a range where a row's bits must not depend on the batch
CHUNK = 512
#: of which a program's overhead, some 2 us, is a small part
LEAST_KEYS = 256


@dataclass(frozen=True)
class DecodeTiling:
    """`block_m` rows and `block_n` keys a tile, `tiles` of the rows of a head of the cache; `splits` ranges of keys, and the
    `most` that a sequence of any length has."""

    block_m: int
    block_n: int
    tiles: int
    splits: int
    most: int
    warps: int = 4
    stages: int = 3


def tiling_of(
    batch: int, heads: int, rows: int, keys: int, dim: int, batch_invariant: bool, machine: Machine
) -> DecodeTiling:
    """A function of the shape and the machine: heads and rows of the cache's heads, keys that a sequence can have.

    unmeasured: two programs a multiprocessor, so that one computes where the other ends. Batch invariant: those of one sequence.
    With a range for each 512 keys, 64 sequences of 32 heads and a table of 128k keys took 268 MB of workspace, now 35.
    """
    block_m = min(64, max(16, triton.next_power_of_2(rows)))
    tiles = triton.cdiv(rows, block_m)
    programs = (1 if batch_invariant else batch) * heads * tiles
    most = triton.cdiv(2 * machine.multiprocessors, programs)
    splits = min(most, triton.cdiv(keys, CHUNK if batch_invariant else LEAST_KEYS))
    if batch_invariant and most > 1:
        splits = max(splits, 2)  # a single one is rounded otherwise than the same beside empty ones
    else:
        splits = most = max(splits, 1)
    # K and V of 32 keys of 128 16-bit columns, three stages: 48 KB, of which two blocks fit a card with 99 KB
    return DecodeTiling(block_m, 64 if dim <= 64 else 32, tiles, splits, most)


@triton.jit
def rows_of_keys(
    x, first, row, head, valid, first_step, row_step, head_step, to: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    QUANTIZED: tl.constexpr,
):  # fmt: skip
    """Tile [N, BLOCK_D] of the cache x, zeros where a key is not valid."""
    column = tl.arange(0, BLOCK_D)
    offset = first.to(tl.int64) * first_step + row.to(tl.int64) * row_step + head.to(tl.int64) * head_step
    tile = tl.load(x + offset[:, None] + column[None, :], mask=valid[:, None] & (column < DIM)[None, :], other=0)
    if QUANTIZED:
        tile = upconvert(tile, to, True)
    return tile


@triton.jit
def load_scales(ptr, first, row, head, valid, first_step, row_step, head_step):
    offset = first.to(tl.int64) * first_step + row.to(tl.int64) * row_step + head.to(tl.int64) * head_step
    return tl.load(ptr + offset, mask=valid, other=0.0)


@triton.jit
def sink_of(sinks_ptr, head, kind, dtype: tl.constexpr):
    """In units of log2(e), -inf where there is none."""
    sink = tl.full(head.shape, float("-inf"), tl.float32)
    if kind != 0:
        sink = load_logits(sinks_ptr, head, kind, dtype)
    return sink


_RUN_TIME = [
    "k_scale_first", "k_scale_row", "k_scale_head", "v_scale_first", "v_scale_row", "v_scale_head", "table_step", "page", "pages",
    "room", "heads", "kv_heads", "group", "rows", "tiles", "left", "sinks_kind", "is_padded", "has_alibi", "alibi_batch", "has_lse",
    "chunk", "most", "splits",
]  # fmt: skip
_ANY_ALIGNMENT = [
    "k_scale_ptr", "v_scale_ptr", "seq_lens_ptr", "table_ptr", "sinks_ptr", "leftpad_ptr", "alibi_ptr", "lse_ptr"
]  # fmt: skip


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def decode_kernel(
    q, q_batch, q_row, q_head, k, k_first, k_row, k_head, v, v_first, v_row, v_head, k_scale_ptr, k_scale_first, k_scale_row,
    k_scale_head, v_scale_ptr, v_scale_first, v_scale_row, v_scale_head, seq_lens_ptr, table_ptr, table_step, page, pages,
    room, out, lse_ptr, has_lse, partial_ptr, partial_lse_ptr, heads, kv_heads, group, rows, tiles, scale, softcap, left,
    sinks_ptr, sinks_kind, leftpad_ptr, is_padded, alibi_ptr, has_alibi, alibi_batch, chunk, most, splits, M: tl.constexpr,
    N: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    PAGED: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """rows: of a sequence; group: query heads of a head of the cache; room: keys that a sequence can have. A sequence has up to
    `most` ranges, of at least `chunk` keys."""
    dtype: tl.constexpr = q.dtype.element_ty
    head, tile, batch = (
        tl.program_id(0) % kv_heads,
        tl.program_id(0) // kv_heads % tiles,
        tl.program_id(0) // kv_heads // tiles,
    )
    split = tl.program_id(1)
    length = tl.load(seq_lens_ptr + batch)
    leftpad = tl.load(leftpad_ptr + batch, mask=is_padded != 0, other=0)
    in_range = (length >= 0) & (length <= room) & (leftpad >= 0)
    length = tl.where(in_range, length, 0)
    place = length - rows  # of the first row
    begin = tl.minimum(tl.maximum(place - left, tl.maximum(leftpad, 0)), length)
    share = tl.maximum(chunk, tl.cdiv(tl.cdiv(length - begin, most), N) * N)
    first = tl.minimum(begin + split * share, length)
    last = tl.minimum(first + share, length)

    t = tile * M + tl.arange(0, M)
    inside = t < group * rows
    query_head, row = head * group + t // rows, t % rows
    high = place + row
    low = high - left
    # many rows: a tile of them sees a part of what all see
    first = tl.maximum(first, tl.min(tl.where(inside, low, last)))
    last = tl.minimum(last, tl.max(tl.where(inside, high, -1)) + 1)
    slope = tl.zeros((M,), tl.float32)
    if has_alibi:
        slope = tl.load(alibi_ptr + batch.to(tl.int64) * alibi_batch + query_head, mask=inside, other=0.0)
    column = tl.arange(0, BLOCK_D)
    q_offset = batch.to(tl.int64) * q_batch + row.to(tl.int64) * q_row + query_head.to(tl.int64) * q_head
    is_column = (column < DIM)[None, :]
    q_tile = tl.load(q + q_offset[:, None] + column[None, :], mask=inside[:, None] & is_column, other=0.0)

    values = tl.arange(0, BLOCK_V)
    is_value = (values < VALUE_DIM)[None, :]
    acc = tl.zeros((M, BLOCK_V), tl.float32)
    maxima = tl.full((M,), float("-inf"), tl.float32)
    # rows of a sequence that is not in range are NaN
    total = tl.zeros((M,), tl.float32) + tl.where(in_range, 0.0, float("nan"))
    for key in tl.range(first, last, N):
        j = key + tl.arange(0, N)
        valid = j < last
        seen = valid[None, :] & (j[None, :] <= high[:, None]) & (j[None, :] >= low[:, None])
        unit = tl.full((N,), LOG2_E, tl.float32)
        if PAGED:
            index = tl.load(table_ptr + batch.to(tl.int64) * table_step + j // page, mask=valid, other=-1)
            valid = valid & (index >= 0) & (index < pages)
            # a key without a page makes NaN of the sums, and of the values, of rows that see it
            unit = tl.where(valid, unit, float("nan"))
            cache_row = j % page
        else:
            index = tl.zeros((N,), tl.int32) + batch
            cache_row = j
        k_tile = rows_of_keys(k, index, cache_row, head, valid, k_first, k_row, k_head, dtype, DIM, BLOCK_D, QUANTIZED)
        v_tile = rows_of_keys(
            v, index, cache_row, head, valid, v_first, v_row, v_head, dtype, VALUE_DIM, BLOCK_V, QUANTIZED
        )
        s = tl.dot(q_tile, k_tile.T) * scale
        if QUANTIZED:
            s *= load_scales(k_scale_ptr, index, cache_row, head, valid, k_scale_first, k_scale_row, k_scale_head)[
                None, :
            ]
        if softcap > 0:
            s = capped(s, softcap, softcap)
        if has_alibi:
            s -= slope[:, None] * tl.abs(high[:, None] - j[None, :]).to(tl.float32)
        s = tl.where(seen, s * unit[None, :], float("-inf"))
        highest = tl.maximum(maxima, tl.max(s, 1))
        shift = tl.where(highest == float("-inf"), 0.0, highest)  # no key yet
        p = tl.exp2(s - shift[:, None])
        correction = tl.exp2(maxima - shift)
        maxima = highest
        total = total * correction + tl.sum(p, 1)
        if QUANTIZED:
            p *= load_scales(v_scale_ptr, index, cache_row, head, valid, v_scale_first, v_scale_row, v_scale_head)[
                None, :
            ]
        acc = tl.dot(p.to(dtype), v_tile, acc * correction[:, None])

    if splits == 1:
        sink = sink_of(sinks_ptr, tl.minimum(query_head, heads - 1), sinks_kind, dtype)
        highest = tl.maximum(maxima, sink)
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        correction = tl.exp2(maxima - shift)
        total = total * correction + tl.exp2(sink - shift)
        factor = correction / tl.where(total == 0, 1.0, total)  # a row that sees nothing is 0
        offset = ((batch.to(tl.int64) * rows + row) * heads + query_head) * VALUE_DIM
        tl.store(
            out + offset[:, None] + values[None, :], (acc * factor[:, None]).to(dtype), mask=inside[:, None] & is_value
        )
        if has_lse:
            result = (batch.to(tl.int64) * heads + query_head) * rows + row
            tl.store(lse_ptr + result, (shift + tl.log2(total)) * LN_2, mask=inside)
    else:
        result = (
            (split.to(tl.int64) * (tl.num_programs(0) // (kv_heads * tiles)) + batch) * heads * rows
            + head * group * rows
            + t
        )
        tl.store(partial_lse_ptr + result, maxima + tl.log2(total), mask=inside)
        o = acc / tl.where(total == 0, 1.0, total)[:, None]
        tl.store(
            partial_ptr + result[:, None] * VALUE_DIM + values[None, :],
            o,
            mask=(inside & (total != 0))[:, None] & is_value,
        )


@triton.jit(
    do_not_specialize=["results", "heads", "rows", "splits", "sinks_kind", "has_lse"],
    do_not_specialize_on_alignment=["sinks_ptr", "lse_ptr"],
)
def merge_kernel(
    partial_ptr, partial_lse_ptr, out, lse_ptr, has_lse, results, heads, rows, splits, sinks_ptr, sinks_kind,
    SPLITS: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One of the results [B, H, Sq] from its ranges, in their order. SPLITS: a power of two, at least splits."""
    dtype: tl.constexpr = out.dtype.element_ty
    result = tl.program_id(0)
    row, head, batch = result % rows, result // rows % heads, result // rows // heads
    split = tl.arange(0, SPLITS)
    lse = tl.load(partial_lse_ptr + split.to(tl.int64) * results + result, mask=split < splits, other=float("-inf"))
    sink = tl.max(sink_of(sinks_ptr, head + tl.zeros((1,), tl.int32), sinks_kind, dtype))
    highest = tl.maximum(tl.max(lse), sink)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp2(lse - shift)) + tl.exp2(sink - shift)
    column = tl.arange(0, BLOCK_V)
    acc = tl.zeros((BLOCK_V,), tl.float32)
    results = tl.cast(results, tl.int64)
    for i in range(splits):
        lse_i = tl.load(partial_lse_ptr + i * results + result)
        # a range without keys has no output
        mask = (column < VALUE_DIM) & (lse_i != float("-inf"))
        o = tl.load(partial_ptr + (i * results + result) * VALUE_DIM + column, mask=mask, other=0.0)
        acc += o * tl.exp2(lse_i - shift)
    if has_lse:
        tl.store(lse_ptr + result, (shift + tl.log2(total)) * LN_2)
    acc = acc / tl.where(total == 0, 1.0, total)
    offset = ((batch.to(tl.int64) * rows + row) * heads + head) * VALUE_DIM
    tl.store(out + offset + column, acc.to(dtype), mask=column < VALUE_DIM)


def run(
    out: Tensor,
    lse: Tensor | None,
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
) -> None:
    """Fills out, and lse where there is one."""
    if not out.numel():
        return
    batch, rows, heads, dim = q.shape
    value_dim = v_cache.shape[3]
    kv_heads, quantized = k_cache.shape[2], k_cache.dtype in QUANTIZED
    room = min(capacity(k_cache, block_table), 2**30)
    left = 2**30 if window_left is None else min(window_left, 2**30)
    group = heads // kv_heads
    with torch.cuda.device_of(q):
        machine = machine_of(driver.active.get_current_device())
        tiling = tiling_of(batch, kv_heads, group * rows, min(room, left + rows), dim, batch_invariant, machine)
        floats, bits = seq_lens.view(torch.float32), seq_lens.view(torch.uint8)  # for what is not there
        partial, partial_lse = floats, floats
        results = batch * heads * rows
        if tiling.splits > 1:
            partial = torch.empty(tiling.splits, results, value_dim, dtype=torch.float32, device=q.device)
            partial_lse = torch.empty(tiling.splits, results, dtype=torch.float32, device=q.device)
        sums = (floats if lse is None else lse, lse is not None)
        caches = [x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x for x in (k_cache, v_cache)]
        sink = (
            bits if sinks is None else sinks.view(torch.uint8),
            0 if sinks is None else 2 if sinks.dtype == torch.float32 else 3,
        )
        columns, value_columns = (triton.next_power_of_2(max(n, 16)) for n in (dim, value_dim))
        decode_kernel[(kv_heads * tiling.tiles * batch, tiling.splits)](
            q, *q.stride()[:3], caches[0], *k_cache.stride()[:3], caches[1], *v_cache.stride()[:3],
            *scales(k_scale, floats), *scales(v_scale, floats), seq_lens, seq_lens if block_table is None else block_table,
            0 if block_table is None else block_table.stride(0), k_cache.shape[1], k_cache.shape[0], room, out, *sums,
            partial, partial_lse, heads, kv_heads, group, rows, tiling.tiles, dim**-0.5 if scale is None else scale, softcap, left,
            *sink, seq_lens if leftpad is None else leftpad, leftpad is not None,
            floats if alibi_slopes is None else alibi_slopes, alibi_slopes is not None,
            heads if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0, CHUNK if batch_invariant else 0,
            tiling.most, tiling.splits,
            M=tiling.block_m, N=tiling.block_n, DIM=dim, BLOCK_D=columns, VALUE_DIM=value_dim, BLOCK_V=value_columns,
            PAGED=block_table is not None, QUANTIZED=quantized, num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip
        if tiling.splits > 1:
            merge_kernel[(results,)](
                partial, partial_lse, out, *sums, results, heads, rows, tiling.splits, *sink, VALUE_DIM=value_dim,
                BLOCK_V=value_columns, SPLITS=triton.next_power_of_2(tiling.most), num_warps=1,
            )  # fmt: skip


def attention_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, *options: Any) -> Tensor:
    out = OPERATION.fake(q, k_cache, v_cache)
    run(out, None, q, k_cache, v_cache, *options)
    return out


def attention_decode_with_lse(q: Tensor, k_cache: Tensor, v_cache: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    out, lse = WITH_LSE.fake(q, k_cache, v_cache)
    run(out, lse, q, k_cache, v_cache, *options)
    return out, lse


def scales(scale: Tensor | None, stand_in: Tensor) -> tuple[Tensor, int, int, int]:
    """A cache's, and their strides, 0 in dimensions that share one."""
    if scale is None:
        return stand_in, 0, 0, 0
    first, row, head = scale.stride() if scale.dim() == 3 else (0, 0, scale.stride(0) if scale.numel() > 1 else 0)
    return scale, first, row, head


torch.library.impl("forwardpass::attention_decode_triton", ("cuda", "cpu"))(attention_decode)
torch.library.impl("forwardpass::attention_decode_with_lse_triton", ("cuda", "cpu"))(attention_decode_with_lse)
