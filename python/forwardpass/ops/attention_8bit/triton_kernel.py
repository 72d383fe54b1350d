"""attention_8bit and attention_8bit_with_lse in Triton: three kernels that quantise, and attention's kernel with 8-bit products.

The integers are the reference's. Their sums are exact, and no conversion takes them to float32: accumulators begin with the bits
of MAGIC, so that as a float each is MAGIC plus the sum. Sums of e4m3, which tensor cores add with fewer bits than float32 has, are
of one block of keys each.

The operands have keys in blocks of 64, which share the unit of their probabilities, and each sequence begins with a block of its
own: keys behind the last one are zeros, and no load of keys has a bound. v has its keys side by side, as products of bytes need
it. The columns of q and k are those of the bucket.

Probabilities in int8 are 0 to 255, and a product of Triton's takes two operands of one type. So p - 128 is multiplied, and the
accumulators begin with 128 times the sums of v's block, which the quantising kernel leaves beside it: one load for each column of
a block. The alternative, 7 bits, has half the precision and not the integers of the other backends.

Nothing here has been timed on a GPU.
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

from ..attention import bucket
from ..attention.triton_kernel import (
    LN_2,
    LOG2_E,
    aligned,
    filled_without_kernel,
    find_sequence,
    general_scores,
    key_blocks,
    load_logits,
    modifies,
    outputs,
    score_options,
    sequence_of,
    sequences,
    store_nan,
    strides,
    tiles_of,
    visible,
    widths,
    with_sink,
)
from ..common.quantized_rows import E4M3
from ..common.triton_rows import magnitudes, to_e4m3_bits
from . import ATTENTION_8BIT, ATTENTION_8BIT_WITH_LSE, QUANTIZE_ATTENTION
from .reference import BLOCK, LEAST, SAMPLES, Quantized, rotation_size

#: Rows of q that a program quantises.
ROWS = 32
#: Keys of v whose largest values are found together, and the most such chunks of a sequence.
CHUNK_KEYS, MOST_CHUNKS = 128, 16
#: Options of a launch: products are rounded before anything is added to them, but for `tl.fma`. Integers depend on it; and where a
#: score is rounded for the maximum of its block, but not for its probability, one beyond 2^15 may have 256 of 255, whose byte is 0.
EXACT = {"enable_fp_fusion": False}
MAGIC_BITS = tl.constexpr(0x4B400000)
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23
KEYS = tl.constexpr(BLOCK)
LEAST_RANGE = tl.constexpr(LEAST)
CENTRE_SAMPLES = tl.constexpr(SAMPLES)


@triton.jit
def range_of(bits, axis: tl.constexpr):
    """The largest magnitude of floats, of which `bits` are the magnitudes'; NaN where one is NaN or infinite."""
    largest = tl.max(bits, axis)
    return tl.where(largest < 0x7F800000, largest, 0x7FC00000).to(tl.float32, bitcast=True)


@triton.jit
def magnitude_bits(x):
    high, low = magnitudes(x)
    return tl.maximum(high, low)


@triton.jit
def in_units(x, largest, steps: tl.constexpr):
    """x in units of which `largest` has `steps`; 0 where it is less than what a scale can be of."""
    return x * tl.where(largest < LEAST_RANGE, 0.0, tl.math.div_rn(steps, largest))


@triton.jit
def to_int8(x, largest):
    """Whole numbers from -127 to 127, the last of them `largest`."""
    return (in_units(x, largest, 127.0) + MAGIC).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def rotated(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROTATION: tl.constexpr, STEPS: tl.constexpr):
    """Each ROTATION = 2^STEPS columns times a Hadamard matrix of +-1, with the reference's sums in its order. A product with the
    matrix on tensor cores adds in another one, which moves some integers by a step. Each step takes the lowest bit of a
    column's number and makes it the highest: in the end all are where they were."""
    if STEPS > 0:
        for _ in tl.static_range(STEPS):
            a, b = tl.split(tl.reshape(x, (ROWS * COLUMNS // ROTATION, ROTATION // 2, 2)))
            x = tl.permute(tl.join(a + b, a - b), (0, 2, 1))
        x = tl.reshape(x, (ROWS, COLUMNS))
    return x


@triton.jit
def load_rows(x, row, rows, column, columns, step):
    """float32 [row, column] of x, whose rows are `step` * 8 apart; zeros beyond its rows and columns."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(x + row.to(tl.int64)[:, None] * (step * 8) + column[None, :], mask=inside, other=0.0).to(tl.float32)


_RUN_TIME = [
    "q_batch", "q_step", "q_head", "k_batch", "k_step", "k_head", "v_batch", "v_step", "v_head", "has_lse", "batch", "heads",
    "kv_heads", "group", "rows", "keys", "tiles", "blocks", "chunks", "dim", "value_dim", "left", "right", "sinks_kind",
    "has_alibi", "alibi_batch", "mask_kind", "mask_batch", "mask_head", "mask_row", "mask_column", "packed",
]  # fmt: skip
_ANY_ALIGNMENT = ["lse_ptr", "mask_ptr", "alibi_ptr", "sinks_ptr", "cu_seqlens_q_ptr", "cu_seqlens_k_ptr"]


def kernel(function: Any) -> Any:
    """A kernel whose arguments are all of run time, but for constants: one for each bucket."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    present = [[n for n in listed if n in names] for listed in (_RUN_TIME, _ANY_ALIGNMENT)]
    return triton.jit(function, do_not_specialize=present[0], do_not_specialize_on_alignment=present[1])


@kernel
def statistics_kernel(
    k, v, k_batch, k_step, k_head, v_batch, v_step, v_head, centre_ptr, range_ptr, batch, kv_heads, rows, keys, chunks, dim,
    value_dim, packed, cu_seqlens_q_ptr, cu_seqlens_k_ptr, COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Of each sequence and kv head: k's centre, and the magnitudes of v's channels in each chunk of its keys."""
    parts = chunks + 1
    part, head, sequence = (
        tl.program_id(0) % parts,
        tl.program_id(0) // parts % kv_heads,
        tl.program_id(0) // parts // kv_heads,
    )
    origin = tl.zeros((), tl.int32)
    if packed:
        _, known = find_sequence(cu_seqlens_q_ptr, cu_seqlens_k_ptr, 0, batch, rows, keys, KEYS)
        if sequence >= known:
            return
        origin = tl.load(cu_seqlens_k_ptr + sequence)
        keys = tl.load(cu_seqlens_k_ptr + sequence + 1) - origin
    batch_index = tl.where(packed, 0, sequence).to(tl.int64)
    if part == chunks:
        c = tl.arange(0, COLUMNS)
        k += (batch_index * k_batch + origin.to(tl.int64) * k_step + head.to(tl.int64) * k_head) * 8
        samples = tl.minimum(keys, CENTRE_SAMPLES)
        total = tl.zeros((COLUMNS,), tl.float32)
        for i in range(samples):
            key = (keys - 1).to(tl.int64) * i // tl.maximum(samples - 1, 1)
            total += tl.load(k + key * (k_step * 8) + c, mask=c < dim * 8, other=0.0).to(tl.float32)
        share = tl.where(samples > 0, tl.math.div_rn(1.0, samples.to(tl.float32)), 0.0)
        tl.store(centre_ptr + (sequence * kv_heads + head).to(tl.int64) * COLUMNS + c, total * share)
    else:
        channel = tl.arange(0, VALUE_COLUMNS)
        v += (batch_index * v_batch + origin.to(tl.int64) * v_step + head.to(tl.int64) * v_head) * 8
        first, end = (
            (keys.to(tl.int64) * part // chunks).to(tl.int32),
            (keys.to(tl.int64) * (part + 1) // chunks).to(tl.int32),
        )
        largest = tl.zeros((VALUE_COLUMNS,), tl.int32)
        for key in range(first, end, TILE):
            x = load_rows(v, key + tl.arange(0, TILE), end, channel, value_dim * 8, v_step)
            largest = tl.maximum(largest, tl.max(magnitude_bits(x), 0))
        at = ((sequence * kv_heads + head).to(tl.int64) * chunks + part) * VALUE_COLUMNS
        tl.store(range_ptr + at + channel, largest)


@kernel
def quantize_q_kernel(
    q, q_batch, q_step, q_head, centre_ptr, q8, q_scale_ptr, shift_ptr, batch, heads, group, rows, keys, tiles, dim, packed,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, M: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, ROTATION: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """M rows of a head, in the order of the lse."""
    head, tile = tl.program_id(0) % heads, tl.program_id(0) // heads
    all_rows = rows
    sequence, q_origin, rows, _, keys, tile = sequence_of(
        tile, tiles, batch, rows, keys, packed, cu_seqlens_q_ptr, cu_seqlens_k_ptr, M
    )
    if keys < 0 or tile < 0 or tile * M >= rows:
        return
    batch_index = tl.where(packed, 0, sequence).to(tl.int64)
    q += (batch_index * q_batch + q_origin.to(tl.int64) * q_step + head.to(tl.int64) * q_head) * 8
    row, c = tile * M + tl.arange(0, M), tl.arange(0, COLUMNS)
    x = load_rows(q, row, rows, c, dim * 8, q_step)
    centre = tl.load(centre_ptr + (sequence * (heads // group) + head // group).to(tl.int64) * COLUMNS + c)
    shift = tl.sum(x * centre[None, :], 1)
    x = rotated(x, M, COLUMNS, ROTATION, STEPS)
    largest = range_of(magnitude_bits(x), 1)
    to = (batch_index * heads + head) * all_rows + q_origin + row
    tl.store(
        q8 + to[:, None] * D + c[None, :], to_int8(x, largest[:, None]), mask=(row < rows)[:, None] & (c < D)[None, :]
    )
    tl.store(q_scale_ptr + to, tl.math.div_rn(largest, 127.0), mask=row < rows)
    tl.store(shift_ptr + to, shift, mask=row < rows)


@kernel
def quantize_kv_kernel(
    k, v, k_batch, k_step, k_head, v_batch, v_step, v_head, centre_ptr, range_ptr, k8, k_scale_ptr, v8, v_scale_ptr,
    v_start_ptr, batch, kv_heads, rows, keys, blocks, tiles, chunks, dim, value_dim, packed, cu_seqlens_q_ptr,
    cu_seqlens_k_ptr, D: tl.constexpr, COLUMNS: tl.constexpr, VALUE_D: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    ROTATION: tl.constexpr, STEPS: tl.constexpr, CHUNKS: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """A block of keys of a kv head. FP8: v8 are the bits of e4m3."""
    block, head = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    # find_sequence treats both sides alike: here the keys are the rows
    sequence, origin, keys, _, known, tile = sequence_of(
        block, tiles, batch, keys, rows, packed, cu_seqlens_k_ptr, cu_seqlens_q_ptr, KEYS
    )
    if known < 0 or tile < 0 or tile * KEYS >= keys:
        return
    batch_index = tl.where(packed, 0, sequence).to(tl.int64)
    kv_sequence = (sequence * kv_heads + head).to(tl.int64)
    key, n = tile * KEYS + tl.arange(0, KEYS), tl.arange(0, KEYS)
    to = head.to(tl.int64) * blocks * KEYS + block * KEYS + n

    c = tl.arange(0, COLUMNS)
    k += (batch_index * k_batch + origin.to(tl.int64) * k_step + head.to(tl.int64) * k_head) * 8
    x = load_rows(k, key, keys, c, dim * 8, k_step) - tl.load(centre_ptr + kv_sequence * COLUMNS + c)[None, :]
    x = rotated(tl.where((key < keys)[:, None], x, 0.0), KEYS, COLUMNS, ROTATION, STEPS)
    largest = range_of(magnitude_bits(x), 1)
    tl.store(k8 + to[:, None] * D + c[None, :], to_int8(x, largest[:, None]), mask=(c < D)[None, :])
    tl.store(k_scale_ptr + to, tl.math.div_rn(largest, 127.0) * (1.0 / ROTATION))

    c = tl.arange(0, VALUE_COLUMNS)
    chunk = tl.arange(0, CHUNKS)
    ranges = range_ptr + (kv_sequence * chunks + chunk[:, None]) * VALUE_COLUMNS + c[None, :]
    largest = range_of(tl.load(ranges, mask=(chunk < chunks)[:, None], other=0), 0)
    if tile == 0:
        scale = tl.math.div_rn(largest, 448.0 if FP8 else 127.0)
        tl.store(v_scale_ptr + kv_sequence * VALUE_D + c, scale, mask=c < VALUE_D)
    v += (batch_index * v_batch + origin.to(tl.int64) * v_step + head.to(tl.int64) * v_head) * 8
    x = load_rows(v, key, keys, c, value_dim * 8, v_step)
    columns_of_v = (head.to(tl.int64) * blocks + block) * VALUE_D + c
    if FP8:
        values = to_e4m3_bits(in_units(x, largest[None, :], 448.0))
    else:
        values = to_int8(x, largest[None, :])
        start = tl.sum(values.to(tl.int32), 0) * 128 + MAGIC_BITS
        tl.store(v_start_ptr + columns_of_v, start, mask=c < VALUE_D)
    tl.store(v8 + columns_of_v[:, None] * KEYS + n[None, :], tl.trans(values), mask=(c < VALUE_D)[:, None])


@triton.jit
def tile_at(x, descriptor, head, block, row, column, rows, step, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] from a row and a column of a block of k or v on, which has `rows` rows of `step` columns. x: a head's."""
    if descriptor is not None:
        tile = descriptor.load([head, block, row, column]).reshape(ROWS, COLUMNS)
    else:
        r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        tile = tl.load(x + block.to(tl.int64) * (rows * step) + (r[:, None] * step + c[None, :]))
    return tile


@triton.jit
def to_bytes(p, FP8: tl.constexpr):
    """Probabilities in 448ths as e4m3, or 255 p - 128 as int8, which the low byte of a sum is."""
    if FP8:  # noqa: SIM108
        p8 = (p * 448.0).to(tl.float8e4nv)
    else:
        p8 = tl.fma(p, 255.0, MAGIC - 128.0).to(tl.int32, bitcast=True).to(tl.int8)
    return p8


@triton.jit
def attend_blocks(
    q, acc, maxima, total, first, middle, last, gap, keys_of_head, kv_head, first_block, keys, low, high, row_scale, row_shift,
    score_options, dtype: tl.constexpr, D: tl.constexpr, VALUE_D: tl.constexpr, PARTS: tl.constexpr, VALUE_PARTS: tl.constexpr,
    WHOLE: tl.constexpr, GENERAL: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """attention's, with the sums of a block's products added with the block's weight. keys_of_head: k, its scales, v and what its
    accumulators begin with, from the head's first block on. row_scale [M]: of products of q's integers and k's values, times
    log2(e) except where GENERAL; row_shift: of scores that a softcap sees, else 0."""
    k8, k_descriptors, k_scale_ptr, v8, v_descriptors, v_start_ptr = keys_of_head
    for i in tl.range(first, last - gap, disable_licm=GENERAL):
        block = i if WHOLE else tl.where(i < middle, i, i + gap)
        n = block * KEYS + tl.arange(0, KEYS)
        place = first_block + block
        s = tl.full((q[0].shape[0], KEYS), MAGIC_BITS, tl.int32)
        column = 0
        for j in tl.static_range(len(PARTS)):
            k_tile = tile_at(k8, k_descriptors[j], kv_head, place, 0, column, KEYS, D, KEYS, PARTS[j])
            s = tl.dot(q[j], k_tile.T, s, out_dtype=tl.int32)
            column += PARTS[j]
        k_scale = tl.load(k_scale_ptr + place.to(tl.int64) * KEYS + tl.arange(0, KEYS))
        s = (s.to(tl.float32, bitcast=True) - MAGIC) * k_scale[None, :] * row_scale[:, None]
        if GENERAL:
            s = general_scores(s + row_shift[:, None], 1.0, n, keys, score_options, dtype)
        if not WHOLE:
            s = tl.where((n[None, :] >= low[:, None]) & (n[None, :] <= high[:, None]), s, float("-inf"))
        unit = tl.max(s, 1)
        highest = tl.maximum(maxima, unit)
        base, shift = unit, highest
        if GENERAL or not WHOLE:
            base = tl.where(unit == float("-inf"), 0.0, unit)  # no key in this block
            shift = tl.where(highest == float("-inf"), 0.0, highest)  # no key yet
        p = tl.exp2(s - base[:, None])
        weight = tl.exp2(unit - shift)
        correction = tl.exp2(maxima - shift)
        maxima = highest
        total = tl.fma(total, correction, tl.sum(p, 1) * weight)
        p8 = to_bytes(p, FP8)
        sums = ()
        column = 0
        for j in tl.static_range(len(VALUE_PARTS)):
            v_tile = tile_at(v8, v_descriptors[j], kv_head, place, column, 0, VALUE_D, KEYS, VALUE_PARTS[j], KEYS)
            if FP8:
                products = tl.dot(p8, v_tile.T)
            else:
                start = tl.load(v_start_ptr + place.to(tl.int64) * VALUE_D + column + tl.arange(0, VALUE_PARTS[j]))
                start = tl.broadcast_to(start[None, :], (q[0].shape[0], VALUE_PARTS[j]))
                products = tl.dot(p8, v_tile.T, start, out_dtype=tl.int32).to(tl.float32, bitcast=True) - MAGIC
            sums += (tl.fma(acc[j], correction[:, None], products * weight[:, None]),)  # type: ignore[assignment]
            column += VALUE_PARTS[j]
        acc = sums
    return acc, maxima, total


@kernel
def attention_8bit_kernel(
    q8, q_scale_ptr, shift_ptr, k8, k_descriptors, k_scale_ptr, v8, v_descriptors, v_scale_ptr, v_start_ptr, blocks, out,
    lse_ptr, has_lse, batch, heads, group, rows, keys, tiles, value_dim, scale, softcap, left, right, mask_ptr, mask_kind,
    mask_batch, mask_head, mask_row, mask_column, alibi_ptr, has_alibi, alibi_batch, sinks_ptr, sinks_kind, packed,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, M: tl.constexpr, D: tl.constexpr, VALUE_D: tl.constexpr, PARTS: tl.constexpr,
    VALUE_PARTS: tl.constexpr, GENERAL: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """attention_kernel, of quantised operands. value_dim counts 8 elements, as it does there."""
    head, tile = tl.program_id(0) % heads, tl.program_id(0) // heads  # heads that share keys run together
    kv_head = head // group
    all_rows, all_keys = rows, keys
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
    inside = row < rows
    place = row + (keys - rows)
    low, high = visible(place, keys, left, right)
    begin, whole, whole_end, end = key_blocks(first_row, rows, keys, left, right, M, KEYS)

    batch_index = tl.where(packed, 0, sequence)
    row_index = (batch_index.to(tl.int64) * heads + head) * all_rows + q_origin + row  # of the lse
    q_tiles = ()
    column = 0
    for j in tl.static_range(len(PARTS)):
        c = column + tl.arange(0, PARTS[j])
        q_tiles += (tl.load(q8 + row_index[:, None] * D + c[None, :], mask=inside[:, None], other=0),)  # type: ignore[assignment]
        column += PARTS[j]
    first_block = tl.where(packed, k_origin // KEYS + sequence, sequence * tl.cdiv(all_keys, KEYS))
    before = kv_head.to(tl.int64) * blocks
    keys_of_head = (
        k8 + before * (KEYS * D), k_descriptors, k_scale_ptr + before * KEYS, v8 + before * (KEYS * VALUE_D), v_descriptors,
        v_start_ptr + before * VALUE_D,
    )  # fmt: skip
    row_scale = tl.load(q_scale_ptr + row_index, mask=inside, other=0.0) * scale
    shift = tl.load(shift_ptr + row_index, mask=inside, other=0.0) * scale
    row_shift = tl.where(softcap > 0, shift, 0.0)
    shift -= row_shift  # what is not in the scores
    if not GENERAL:
        row_scale *= LOG2_E
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
    dtype: tl.constexpr = out.dtype.element_ty
    acc, maxima, total = attend_blocks(
        q_tiles, acc, maxima, total, whole, whole_end, whole_end, 0, keys_of_head, kv_head, first_block, keys, low, high,
        row_scale, row_shift, options, dtype, D, VALUE_D, PARTS, VALUE_PARTS, True, GENERAL, FP8,
    )  # fmt: skip
    acc, maxima, total = attend_blocks(
        q_tiles, acc, maxima, total, begin, whole, end, whole_end - whole, keys_of_head, kv_head, first_block, keys, low, high,
        row_scale, row_shift, options, dtype, D, VALUE_D, PARTS, VALUE_PARTS, False, GENERAL, FP8,
    )  # fmt: skip

    correction = tl.full((M,), 1.0, tl.float32)
    if sinks_kind != 0:
        sink = load_logits(sinks_ptr, head, sinks_kind, dtype) - shift * LOG2_E
        maxima, total, correction = with_sink(maxima, total, sink)
    if has_lse:
        of_centre = tl.where(maxima == float("-inf"), 0.0, shift)
        tl.store(lse_ptr + row_index, (maxima + tl.log2(total)) * LN_2 + of_centre, mask=inside)
    # a row that sees nothing is 0, whatever v's scales are
    factor = tl.where(
        total == 0, 0.0, correction / tl.where(total == 0, 1.0, total) * (1.0 / 448 if FP8 else 1.0 / 255)
    )
    v_scale_ptr += (sequence * (heads // group) + kv_head).to(tl.int64) * VALUE_D
    out_row = ((batch_index.to(tl.int64) * all_rows + q_origin + row) * heads + head) * (value_dim * 8)
    column = 0
    for j in tl.static_range(len(VALUE_PARTS)):
        c = column + tl.arange(0, VALUE_PARTS[j])
        o = acc[j] * factor[:, None] * tl.load(v_scale_ptr + c)[None, :]
        o = tl.where((total == 0)[:, None], 0.0, o).to(dtype)
        tl.store(out + out_row[:, None] + c[None, :], o, mask=inside[:, None] & (c < value_dim * 8)[None, :])
        column += VALUE_PARTS[j]


@dataclass(frozen=True)
class Tiling:
    """How a head is cut up. `parts`: the widths of the tiles that q's and k's columns are, `value_parts` v's."""

    block_m: int
    warps: int
    parts: tuple[int, ...]
    value_parts: tuple[int, ...]
    stages: int = 2


@functools.cache
def tiling_of(dims: tuple[int, int], arch: int) -> Tiling:
    """A function of the bucket and the architecture: a row's bits depend on neither batch nor lengths.

    Static, ptxas: of those tried the ones that spill least; up to 200 bytes of stack at 256 columns, 48 at fewer (STACK in
    test_triton.py).
    """
    if (
        dims[1] == 256
    ):  # warps side by side: 16 rows of all columns do not fit a warp's registers beside a block's products
        return Tiling(64, 8, widths(dims[0], 256), widths(dims[1], 64 if arch < 90 else 32))
    return Tiling(128, 8, widths(dims[0], 256), widths(dims[1], 64))


@dataclass(frozen=True)
class Operands:
    """q, k and v in 8 bits, as the kernels read them. `blocks`: of a kv head's keys, all sequences'."""

    q: Tensor  #: int8 [rows, columns], rows in the order of the lse
    q_scale: Tensor  #: float32 [rows]
    shift: Tensor  #: float32 [rows]
    k: Tensor  #: int8 [Hk, blocks, 64, columns]
    k_scale: Tensor  #: float32 [Hk, blocks, 64]
    v: Tensor  #: int8 or e4m3 [Hk, blocks, value columns, 64]
    v_scale: Tensor  #: float32 [sequences, Hk, value columns]
    v_start: (
        Tensor  #: int32 [Hk, blocks, value columns]: what the accumulators of a block's products begin with, in int8
    )
    blocks: int


def allocate(q: Tensor, k: Tensor, fp8: bool, dims: tuple[int, int], cu_seqlens_q: Tensor | None) -> Operands:
    keys, kv_heads = k.shape[-3:-1]
    packed = cu_seqlens_q is not None
    batch = cu_seqlens_q.numel() - 1 if cu_seqlens_q is not None else q.shape[0]
    blocks = keys // BLOCK + batch if packed else batch * triton.cdiv(keys, BLOCK)
    rows = q.shape[:-1].numel()

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    return Operands(
        empty(rows, dims[0], dtype=torch.int8),
        empty(rows),
        empty(rows),
        empty(kv_heads, blocks, BLOCK, dims[0], dtype=torch.int8),
        empty(kv_heads, blocks, BLOCK),
        empty(kv_heads, blocks, dims[1], BLOCK, dtype=E4M3 if fp8 else torch.int8),
        empty(batch, kv_heads, dims[1]),
        empty(kv_heads, 0 if fp8 else blocks, dims[1], dtype=torch.int32),
        blocks,
    )


def quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fp8: bool,
    rotates: bool,
    dims: tuple[int, int],
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Operands:
    """The operands of 16-bit ones, which `aligned` has returned; neither is empty, but for the keys of packed sequences."""
    to = allocate(q, k, fp8, dims, cu_seqlens_q)
    (keys, kv_heads, value_dim), dim = v.shape[-3:], q.shape[-1]
    columns, value_columns = (triton.next_power_of_2(d) for d in dims)
    grid, shape = tiles_of(q, keys, kv_heads, ROWS, cu_seqlens_q)
    batch, rows = shape["batch"], shape["rows"]
    packed = sequences(to.q, cu_seqlens_q, cu_seqlens_k)
    chunks = min(max(keys // (batch if packed["packed"] else 1) // CHUNK_KEYS, 1), MOST_CHUNKS)
    centre = torch.empty(batch, kv_heads, columns, device=q.device)
    ranges = torch.empty(batch, kv_heads, chunks, value_columns, dtype=torch.int32, device=q.device)
    rotation = rotation_size(dim) if rotates else 1
    rotates_by = {"ROTATION": rotation, "STEPS": rotation.bit_length() - 1}
    kv = (k, v, *strides(k), *strides(v), centre, ranges)
    statistics_kernel[(batch * kv_heads * (chunks + 1),)](
        *kv, batch, kv_heads, rows, keys, chunks, dim // 8, value_dim // 8, **packed, COLUMNS=columns,
        VALUE_COLUMNS=value_columns, TILE=32, **EXACT,
    )  # fmt: skip
    quantize_q_kernel[grid](
        q, *strides(q), centre, to.q, to.q_scale, to.shift, **shape, dim=dim // 8, **packed, M=ROWS, D=dims[0], COLUMNS=columns,
        **rotates_by, **EXACT,
    )  # fmt: skip
    quantize_kv_kernel[(to.blocks * kv_heads,)](
        *kv, to.k, to.k_scale, to.v.view(torch.uint8) if fp8 else to.v, to.v_scale, to.v_start, batch, kv_heads, rows, keys,
        to.blocks, triton.cdiv(keys, BLOCK), chunks, dim // 8, value_dim // 8, **packed, D=dims[0], COLUMNS=columns,
        VALUE_D=dims[1], VALUE_COLUMNS=value_columns, CHUNKS=triton.next_power_of_2(chunks), FP8=fp8, num_warps=8,
        **rotates_by, **EXACT,
    )  # fmt: skip
    return to


def descriptors(x: Operands, tiling: Tiling, arch: int) -> tuple[tuple[TensorDescriptor | None, ...], ...]:
    """Those by which TMA loads tiles of k and of v, on sm_90 and later."""
    blocks = [[BLOCK, part] for part in tiling.parts], [[part, BLOCK] for part in tiling.value_parts]
    if arch < 90:
        return tuple((None,) * len(of) for of in blocks)
    return tuple(
        tuple(TensorDescriptor(y, list(y.shape), list(y.stride()), [1, 1, *block]) for block in of)
        for y, of in zip((x.k, x.v), blocks)
    )


def attend(
    out: Tensor,
    lse: Tensor | None,
    q: Tensor,
    x: Operands,
    keys: int,
    dims: tuple[int, int],
    scale: float,
    softcap: float,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    **options: Any,
) -> None:
    """Fills out, and lse where there is one. q: of its shape alone."""
    general = modifies(mask, alibi_slopes, softcap)
    arch = driver.active.get_current_target().arch
    tiling = tiling_of(dims, arch)
    k_descriptors, v_descriptors = descriptors(x, tiling, arch)
    grid, shape = tiles_of(q, keys, x.k.shape[0], tiling.block_m, cu_seqlens_q)
    attention_8bit_kernel[grid](
        x.q, x.q_scale, x.shift, x.k, k_descriptors, x.k_scale, x.v, v_descriptors, x.v_scale, x.v_start, x.blocks,
        **outputs(out, lse), **shape, value_dim=out.shape[-1] // 8, scale=scale,
        **score_options(out, shape, softcap=softcap, mask=mask, alibi_slopes=alibi_slopes, **options),
        **sequences(out, cu_seqlens_q, cu_seqlens_k), M=tiling.block_m, D=dims[0], VALUE_D=dims[1], PARTS=tiling.parts,
        VALUE_PARTS=tiling.value_parts, GENERAL=general, FP8=x.v.dtype is E4M3, num_warps=tiling.warps,
        num_stages=tiling.stages, **EXACT,
    )  # fmt: skip


def flat(x: Tensor, dims: int) -> Tensor:
    """x [B, S, …] or [T, …], whose tensors of one token have `dims` dimensions, as [T, …]; bytes for e4m3, which few operations
    of torch take."""
    return (x.view(torch.uint8) if x.dtype is E4M3 else x).flatten(0, -dims - 1)


def is_known(cu_seqlens: Tensor, total: int) -> Tensor:
    """[B] bool: of each of the packed sequences, as look_at."""
    begin, end = cu_seqlens[:-1], cu_seqlens[1:]
    after = torch.cat([cu_seqlens[2:], cu_seqlens.new_full((1,), 2**31 - 1)])[: len(end)]
    wrong = (begin > end) | (end > total) | (end > after)
    wrong[0] |= begin[0] != 0
    return ~wrong


def known_sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, rows: int, keys: int) -> Tensor:
    """[B] bool, without a look at the numbers."""
    known = is_known(cu_seqlens_q, rows) & is_known(cu_seqlens_k, keys)
    return known.int().cumprod(0).bool()


def tokens_of(
    blocks: int, keys: int, batch: int, known: Tensor | None, cu_seqlens_k: Tensor | None, like: Tensor
) -> Tensor:
    """[blocks * 64]: of each place for a key in the kernels' blocks, the key's number among all keys; behind the last one where
    there is none."""
    place = torch.arange(blocks * BLOCK, device=like.device)
    if known is None or cu_seqlens_k is None:
        room = triton.cdiv(keys, BLOCK) * BLOCK
        sequence, key = place // max(room, 1), place % max(room, 1)
        return torch.where(key < keys, sequence * keys + key, batch * keys)
    begin, end = cu_seqlens_k[:-1].long(), cu_seqlens_k[1:].long()
    first = (begin // BLOCK + torch.arange(batch, device=like.device)) * BLOCK
    first = torch.where(known, first, torch.iinfo(torch.int64).max)
    sequence = torch.searchsorted(first, place, right=True) - 1
    of_one = sequence.clamp(min=0)
    token = begin[of_one] + place - first[of_one]
    return torch.where((sequence >= 0) & known[of_one] & (token < end[of_one]), token, keys)


def to_callers(
    x: Operands, to: Quantized, known: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> None:
    """The kernels' operands in the layout of AttentionOperands."""
    (q, q_scale, q_shift), (k, k_scale, v), v_scale = to[:3], to[3:6], to[6]
    (heads, dim), value_dim = q.shape[-2:], v.shape[-1]
    rows_of = (*((len(q),) if known is None else ()), heads, q.shape[-3])
    for mine, theirs in ((x.q.view(*rows_of, -1)[..., :dim], q), (x.q_scale, q_scale), (x.shift, q_shift)):
        theirs.copy_(mine.view(rows_of).transpose(-1, -2) if mine.dim() == 1 else mine.transpose(-2, -3))
    keys = k.shape[-3]
    token = tokens_of(x.blocks, keys, len(x.v_scale), known, cu_seqlens_k, q)
    v8 = x.v.view(torch.uint8).transpose(-1, -2)
    sources = (x.k[..., :dim], 2, k), (x.k_scale, 1, k_scale), (v8[..., :value_dim], 2, v)
    for mine, dims, theirs in sources:
        by_token = mine.flatten(1, 2).transpose(0, 1)
        ordered = torch.zeros(len(flat(theirs, dims)) + 1, *by_token.shape[1:], dtype=mine.dtype, device=q.device)
        ordered.index_copy_(0, token, by_token)
        flat(theirs, dims).view(mine.dtype).copy_(ordered[:-1])
    v_scale.copy_(x.v_scale[..., :value_dim])
    if known is not None and cu_seqlens_q is not None and cu_seqlens_k is not None:
        for cu_seqlens, values in ((cu_seqlens_q, (q, q_scale, q_shift)), (cu_seqlens_k, (k, k_scale, v))):
            end = torch.where(known, cu_seqlens[1:], 0).amax()
            unknown = torch.arange(len(values[0]), device=q.device) >= end
            for y in values:
                y = y.view(torch.uint8) if y.dtype is E4M3 else y
                y.masked_fill_(unknown.reshape(-1, *(1,) * (y.dim() - 1)), torch.nan if y.dtype is torch.float32 else 0)
        no_keys = ~known | (cu_seqlens_k[1:] == cu_seqlens_k[:-1])
        v_scale.masked_fill_(no_keys.reshape(-1, 1, 1), 0)


def to_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: tuple[Tensor, ...],
    dims: tuple[int, int],
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Operands:
    """AttentionOperands in the kernels' layout."""
    to = allocate(q, k, v.dtype is E4M3, dims, cu_seqlens_q)
    q_scale, q_shift, k_scale, v_scale = scales
    to.q.zero_()[:, : q.shape[-1]].copy_(q.transpose(-2, -3).flatten(0, -2))
    to.q_scale.copy_(q_scale.transpose(-1, -2).flatten())
    to.shift.copy_(q_shift.transpose(-1, -2).flatten())
    keys, known = k.shape[-3], None
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        known = known_sequences(cu_seqlens_q, cu_seqlens_k, len(q), keys)
    token = tokens_of(to.blocks, keys, len(v_scale), known, cu_seqlens_k, q)

    def in_blocks(x: Tensor, dims: int) -> Tensor:  # [Hk, blocks, 64, …]
        x = flat(x, dims)
        x = torch.cat([x, x.new_zeros(1, *x.shape[1:])])[token]
        return x.transpose(0, 1).unflatten(1, (to.blocks, BLOCK))

    to.k.zero_()[..., : k.shape[-1]].copy_(in_blocks(k, 2))
    to.k_scale.copy_(in_blocks(k_scale, 1))
    v8 = to.v.view(torch.uint8) if v.dtype is E4M3 else to.v
    v8.zero_()[..., : v.shape[-1], :].copy_(in_blocks(v, 2).transpose(-1, -2))
    to.v_scale.zero_()[..., : v.shape[-1]].copy_(v_scale)
    if v.dtype is torch.int8:
        to.v_start.copy_(v8.sum(-1, dtype=torch.int32) * 128 + MAGIC_BITS.value)
    return to


def run(
    out: Tensor,
    lse: Tensor | None,
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
    out_dtype: torch.dtype | None = None,
) -> None:
    """Fills out, and lse where there is one. Batch invariant it always is."""
    if filled_without_kernel(out, lse, q, k, sinks, cu_seqlens_q):
        return
    keys = k.shape[-3]
    dims = bucket(q.shape[-1], v.shape[-1])
    assert dims  # else why_not has refused
    with torch.cuda.device_of(q):
        if q_scale is None or q_shift is None or k_scale is None or v_scale is None:
            q, k, v = (aligned(x) for x in (q, k, v))
            x = quantize(q, k, v, dtype == "fp8", rotates, dims, cu_seqlens_q, cu_seqlens_k)
        else:
            x = to_kernels(q, k, v, (q_scale, q_shift, k_scale, v_scale), dims, cu_seqlens_q, cu_seqlens_k)
        attend(
            out, lse, q, x, keys, dims, q.shape[-1] ** -0.5 if scale is None else scale, softcap, mask, alibi_slopes,
            cu_seqlens_q, cu_seqlens_k, causal=causal, window_left=window_left, window_right=window_right, sinks=sinks,
        )  # fmt: skip


def attention_8bit(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    out = ATTENTION_8BIT.fake(q, k, v, *options)
    run(out, None, q, k, v, *options)
    return out


def attention_8bit_with_lse(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    out, lse = ATTENTION_8BIT_WITH_LSE.fake(q, k, v, *options)
    run(out, lse, q, k, v, *options)
    return out, lse


def quantize_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dtype: str,
    rotates: bool,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Quantized:
    to = QUANTIZE_ATTENTION.fake(q, k, v, dtype, rotates, cu_seqlens_q, cu_seqlens_k)
    dims = bucket(q.shape[-1], v.shape[-1])
    assert dims
    known = None
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        known = known_sequences(cu_seqlens_q, cu_seqlens_k, len(q), len(k))
    if not len(to[6]):  # rows and keys of no sequence
        for part in to:
            part.fill_(torch.nan if part.dtype is torch.float32 else 0)
        return to
    with torch.cuda.device_of(q):
        q, k, v = (aligned(x) for x in (q, k, v))
        x = quantize(q, k, v, dtype == "fp8", rotates, dims, cu_seqlens_q, cu_seqlens_k)
    if not k.numel():
        x.v_scale.zero_()
    to_callers(x, to, known, cu_seqlens_q, cu_seqlens_k)
    return to


for operation in (attention_8bit, attention_8bit_with_lse, quantize_attention):
    torch.library.impl(f"forwardpass::{operation.__name__}_triton", ("cuda", "cpu"))(operation)
