"""q, k and v of attention_8bit in 8 bits, in Triton: the kernels that quantise them, the layout in which attention's kernel reads
them, and that layout from AttentionOperands and back.

Keys are in blocks of 64, which share the unit of their probabilities, and each sequence begins with a block of its own: keys behind
the last one are zeros, and no load of keys has a bound. v has its keys side by side, as products of bytes need it. The columns of q
and k are those of the bucket.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention.triton_kernel import find_sequence, sequence_of, sequences, strides, tiles_of
from ..common.quantized_rows import E4M3
from ..common.triton_rows import magnitudes, to_e4m3_bits
from .reference import BLOCK, GROUP, LEAST, SAMPLES, Quantized, rotation_size

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
GROUP_KEYS = tl.constexpr(GROUP)
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
def shared_range(largest, inside):
    """For each key of a block the largest magnitude of the group that shares a scale: keys are in the order of their magnitudes,
    of equal ones in their own. Those that are NaN come last, and stay as they are."""
    n = tl.arange(0, KEYS)
    bits = tl.where(inside, largest.to(tl.int32, bitcast=True), 0x7FFFFFFF)
    before = (bits[None, :] < bits[:, None]) | ((bits[None, :] == bits[:, None]) & (n[None, :] < n[:, None]))
    group = tl.sum(before.to(tl.int32), 1) // GROUP_KEYS
    share = (group[None, :] == group[:, None]) & (bits < 0x7F800000)[None, :]
    most = tl.max(tl.where(share, bits[None, :], 0), 1)
    return tl.where(inside, tl.where(bits < 0x7F800000, most, bits), 0).to(tl.float32, bitcast=True)


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
    """k's centre, and the magnitudes of v's channels in each chunk of keys, for each sequence and kv head."""
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
        first_range = ((sequence * kv_heads + head).to(tl.int64) * chunks + part) * VALUE_COLUMNS
        tl.store(range_ptr + first_range + channel, largest)


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
    v_start_ptr, v_block_scale_ptr, batch, kv_heads, rows, keys, blocks, tiles, chunks, dim, value_dim, packed, cu_seqlens_q_ptr,
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
    largest = shared_range(range_of(magnitude_bits(x), 1), key < keys)
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
        x = in_units(x, largest[None, :], 127.0)
        most = tl.max(tl.max(tl.where(x == x, tl.abs(x), 0.0), 1), 0)  # of no channel with a NaN
        tl.store(v_block_scale_ptr + head.to(tl.int64) * blocks + block, tl.math.div_rn(most, 127.0))
        values = to_int8(x, most)
        start = tl.sum(values.to(tl.int32), 0) * 128 + MAGIC_BITS
        tl.store(v_start_ptr + columns_of_v, start, mask=c < VALUE_D)
    tl.store(v8 + columns_of_v[:, None] * KEYS + n[None, :], tl.trans(values), mask=(c < VALUE_D)[:, None])


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
    v_block_scale: Tensor  #: float32 [Hk, blocks], in int8
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
        empty(kv_heads, 0 if fp8 else blocks),
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
        *kv, to.k, to.k_scale, to.v.view(torch.uint8) if fp8 else to.v, to.v_scale, to.v_start, to.v_block_scale, batch, kv_heads,
        rows, keys, to.blocks, triton.cdiv(keys, BLOCK), chunks, dim // 8, value_dim // 8, **packed, D=dims[0], COLUMNS=columns,
        VALUE_D=dims[1], VALUE_COLUMNS=value_columns, CHUNKS=triton.next_power_of_2(chunks), FP8=fp8, num_warps=8,
        **rotates_by, **EXACT,
    )  # fmt: skip
    return to


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
    nearest = sequence.clamp(min=0)
    token = begin[nearest] + place - first[nearest]
    return torch.where((sequence >= 0) & known[nearest] & (token < end[nearest]), token, keys)


def to_callers(
    x: Operands, to: Quantized, known: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> None:
    """The kernels' operands in the layout of AttentionOperands."""
    (q, q_scale, q_shift), (k, k_scale, v), v_scale, v_block_scale = to[:3], to[3:6], to[6], to[7]
    of_keys = [k, k_scale, v]
    (heads, dim), value_dim = q.shape[-2:], v.shape[-1]
    rows_of = (*((len(q),) if known is None else ()), heads, q.shape[-3])
    for source, target in ((x.q.view(*rows_of, -1)[..., :dim], q), (x.q_scale, q_scale), (x.shift, q_shift)):
        target.copy_(source.view(rows_of).transpose(-1, -2) if source.dim() == 1 else source.transpose(-2, -3))
    keys = k.shape[-3]
    token = tokens_of(x.blocks, keys, len(x.v_scale), known, cu_seqlens_k, q)
    v8 = x.v.view(torch.uint8).transpose(-1, -2)
    pairs = [(x.k[..., :dim], 2, k), (x.k_scale, 1, k_scale), (v8[..., :value_dim], 2, v)]
    if v.dtype is torch.int8:
        pairs.append((x.v_block_scale[..., None].expand_as(x.k_scale), 1, v_block_scale))
        of_keys.append(v_block_scale)
    for source, dims, target in pairs:
        by_token = source.flatten(1, 2).transpose(0, 1)
        ordered = torch.zeros(len(flat(target, dims)) + 1, *by_token.shape[1:], dtype=source.dtype, device=q.device)
        ordered.index_copy_(0, token, by_token)
        flat(target, dims).view(source.dtype).copy_(ordered[:-1])
    v_scale.copy_(x.v_scale[..., :value_dim])
    if known is not None and cu_seqlens_q is not None and cu_seqlens_k is not None:
        for cu_seqlens, values in ((cu_seqlens_q, [q, q_scale, q_shift]), (cu_seqlens_k, of_keys)):
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
    scales: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    dims: tuple[int, int],
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Operands:
    """AttentionOperands in the kernels' layout."""
    to = allocate(q, k, v.dtype is E4M3, dims, cu_seqlens_q)
    q_scale, q_shift, k_scale, v_scale, v_block_scale = scales
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
    if v_block_scale is not None:
        to.v_block_scale.copy_(in_blocks(v_block_scale, 1)[..., 0])
        to.v_start.copy_(v8.sum(-1, dtype=torch.int32) * 128 + MAGIC_BITS.value)
    return to
