"""attention_8bit and attention_8bit_with_lse in Triton: attention's kernel with 8-bit products, of the operands that the kernels of
triton_operands.py quantise.

The integers are the reference's. Their sums are exact, and no conversion takes them to float32: accumulators begin with the bits
of MAGIC, so that as a float each is MAGIC plus the sum. Sums of e4m3, which tensor cores add with fewer bits than float32 has, are
of one block of keys each.

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
    general_scores,
    key_blocks,
    load_logits,
    modifies,
    outputs,
    score_options,
    sequence_of,
    sequences,
    store_nan,
    tiles_of,
    visible,
    widths,
    with_sink,
)
from ..common.quantized_rows import E4M3
from . import ATTENTION_8BIT, ATTENTION_8BIT_WITH_LSE, QUANTIZE_ATTENTION
from .reference import BLOCK, Quantized
from .triton_operands import (
    EXACT,
    KEYS,
    MAGIC,
    MAGIC_BITS,
    Operands,
    kernel,
    known_sequences,
    quantize,
    to_callers,
    to_kernels,
)


@triton.jit
def tile_at(x, descriptor, head, block, row, column, rows, step, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] from a row and a column of a block of k or v on, which has `rows` rows of `step` columns. x: a head's."""
    if descriptor is not None:
        tile = descriptor.load([head, block, row, column]).reshape(ROWS, COLUMNS)
    else:
        r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        tile = tl.load(x + block.to(tl.int64) * (rows * step) + (r[:, None] * step + c[None, :]))
    return tile


_TO_E4M3 = tl.constexpr("""{
    .reg .b16 low, high;
    cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
    cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
    mov.b32 $0, {low, high};
}""")


@triton.jit
def to_bytes(p, FP8: tl.constexpr):
    """Probabilities in 448ths as e4m3, or 255 p - 128 as int8, which the low byte of a sum is."""
    if FP8:
        # For sm_89 Triton's own conversion goes by float16, and rounds twice: o was off by 3e-3 of its norm, now by 2e-4.
        p8 = tl.inline_asm_elementwise(_TO_E4M3, "=r,f,f,f,f", [p * 448.0], dtype=tl.uint8, is_pure=True, pack=4).to(
            tl.float8e4nv, bitcast=True
        )
    else:
        p8 = tl.fma(p, 255.0, MAGIC - 128.0).to(tl.int32, bitcast=True).to(tl.int8)
    return p8


@triton.jit
def attend_blocks(
    q, acc, maxima, total, first, middle, last, gap, keys_of_head, kv_head, first_block, keys, low, high, row_scale, row_shift,
    score_options, dtype: tl.constexpr, D: tl.constexpr, VALUE_D: tl.constexpr, PARTS: tl.constexpr, VALUE_PARTS: tl.constexpr,
    WHOLE: tl.constexpr, GENERAL: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """attention's, with the sums of a block's products added with the block's weight. keys_of_head: k, its scales, v, what its
    accumulators begin with and its blocks' scales, from the head's first block on. row_scale [M]: of products of q's integers and
    k's values, times log2(e) except where GENERAL; row_shift: of scores that a softcap sees, else 0."""
    k8, k_descriptors, k_scale_ptr, v8, v_descriptors, v_start_ptr, v_block_scale_ptr = keys_of_head
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
        if not FP8:
            weight *= tl.load(v_block_scale_ptr + place)
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
    q8, q_scale_ptr, shift_ptr, k8, k_descriptors, k_scale_ptr, v8, v_descriptors, v_scale_ptr, v_start_ptr,
    v_block_scale_ptr, blocks, out, lse_ptr, has_lse, batch, heads, group, rows, keys, tiles, value_dim, scale, softcap, left,
    right, mask_ptr, mask_kind, mask_batch, mask_head, mask_row, mask_column, alibi_ptr, has_alibi, alibi_batch, sinks_ptr,
    sinks_kind, packed, cu_seqlens_q_ptr, cu_seqlens_k_ptr, M: tl.constexpr, D: tl.constexpr, VALUE_D: tl.constexpr,
    PARTS: tl.constexpr, VALUE_PARTS: tl.constexpr, GENERAL: tl.constexpr, FP8: tl.constexpr,
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
        v_start_ptr + before * VALUE_D, v_block_scale_ptr + before,
    )  # fmt: skip
    row_scale = tl.load(q_scale_ptr + row_index, mask=inside, other=0.0) * scale
    shift = tl.load(shift_ptr + row_index, mask=inside, other=0.0) * scale
    row_shift = tl.where(softcap > 0, shift, 0.0)
    shift = tl.where(softcap > 0, 0.0, shift)  # what is not in the scores; as a difference NaN would stay
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
        v_scale = tl.load(v_scale_ptr + c, mask=(c >= 0) & (keys > 0), other=0.0)  # of no keys there are none
        o = acc[j] * factor[:, None] * v_scale[None, :]
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

    Static, ptxas: of those tried the ones that spill least; up to 328 bytes of stack at 256 columns, 112 at fewer (STACK in
    test_triton.py). v's columns by 128 at 256 spill nothing without modifiers, and 96 bytes with them instead of 8 to 40.
    """
    if dims[1] == 256:
        # warps side by side: 16 rows of all columns do not fit a warp's registers beside a block's products
        return Tiling(64, 8, widths(dims[0], 256), widths(dims[1], 64 if arch < 90 else 32))
    return Tiling(128, 8, widths(dims[0], 256), widths(dims[1], 64))


def descriptors(x: Operands, tiling: Tiling, arch: int) -> tuple[tuple[TensorDescriptor | None, ...], ...]:
    """Those by which TMA loads tiles of k and of v, on sm_90 and later. Not of fp8 on sm_120: Triton 3.7 lets TMA write where warps
    have exchanged maxima before, without the fence.proxy.async between them that it has on sm_90."""
    blocks = [[BLOCK, part] for part in tiling.parts], [[part, BLOCK] for part in tiling.value_parts]
    if arch < 90 or (arch == 120 and x.v.dtype is E4M3):
        return tuple((None,) * len(shapes) for shapes in blocks)
    return tuple(
        tuple(TensorDescriptor(y, list(y.shape), list(y.stride()), [1, 1, *block]) for block in shapes)
        for y, shapes in zip((x.k, x.v), blocks)
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
        x.q, x.q_scale, x.shift, x.k, k_descriptors, x.k_scale, x.v, v_descriptors, x.v_scale, x.v_start,
        x.v_block_scale, x.blocks,
        **outputs(out, lse), **shape, value_dim=out.shape[-1] // 8, scale=scale,
        **score_options(out, shape, softcap=softcap, mask=mask, alibi_slopes=alibi_slopes, **options),
        **sequences(out, cu_seqlens_q, cu_seqlens_k), M=tiling.block_m, D=dims[0], VALUE_D=dims[1], PARTS=tiling.parts,
        VALUE_PARTS=tiling.value_parts, GENERAL=general, FP8=x.v.dtype is E4M3, num_warps=tiling.warps,
        num_stages=tiling.stages, **EXACT,
    )  # fmt: skip


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
    v_block_scale: Tensor | None = None,
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
            x = to_kernels(
                q, k, v, (q_scale, q_shift, k_scale, v_scale, v_block_scale), dims, cu_seqlens_q, cu_seqlens_k
            )
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
