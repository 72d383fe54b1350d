"""append_kv in Triton: a program takes one head of one new token: its key and its value, or a row of q.

Launched with enable_fp_fusion=False: the formula's products are rounded before they are added.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention_decode.triton_kernel import scales
from ..common.cache_layout import QUANTIZED, capacity, is_per_token
from ..common.quantized_rows import E4M3
from ..common.triton_rows import magnitudes, segment_scale, store_quantized
from .reference import NORM_SUMS


@triton.jit
def store_row(
    x, column, cache, first, row, head, first_step, row_step, head_step, scale_ptr, scale_first, scale_row, scale_head,
    DIM: tl.constexpr, QUANTIZED: tl.constexpr, E4M3: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    """x [BLOCK_D], zeros from DIM on, to its place in the cache."""
    to = (
        cache + (first.to(tl.int64) * first_step + row.to(tl.int64) * row_step + head.to(tl.int64) * head_step) + column
    )
    if QUANTIZED:
        scale_ptr += first.to(tl.int64) * scale_first + row.to(tl.int64) * scale_row + head.to(tl.int64) * scale_head
        high, low = magnitudes(x)
        inverse, zero_point = segment_scale(
            tl.max(high), tl.max(low), 0, 0, scale_ptr, scale_ptr, 0, E4M3, True, STATIC
        )  # fmt: skip
        store_quantized(x, to, column < DIM, inverse, zero_point, E4M3, True)
    else:
        tl.store(to, x.to(cache.dtype.element_ty), mask=column < DIM)


@triton.jit
def prepare_row(
    x, column, norm_ptr, norm_eps, cos, sin, rotated,
    DIM: tl.constexpr, NORM: tl.constexpr, NORM_SUMS: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The row [BLOCK_D] at x, normed and rotated, zeros from DIM on."""
    inverse = 1.0
    if NORM:
        index = tl.arange(0, NORM_SUMS)
        sums = tl.zeros([NORM_SUMS], tl.float32)
        for first in tl.static_range(0, DIM, NORM_SUMS):
            part = tl.load(x + first + index, mask=first + index < DIM, other=0.0).to(tl.float32)
            sums += part * part
        squares = added_halves(sums, NORM_SUMS)
        inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, DIM * 1.0) + norm_eps)) + squares * 0.0
    row = load_normed(x, column, column < DIM, norm_ptr, inverse, NORM)
    if ROTARY:
        turned = column < rotated
        if INTERLEAVED:
            low = column % 2 == 0
            partner = column ^ 1
        else:
            low = column < rotated // 2
            partner = tl.where(low, column + rotated // 2, column - rotated // 2)
        y = load_normed(x, partner, turned, norm_ptr, inverse, NORM)
        cosines = tl.load(cos + column, mask=turned, other=0.0).to(tl.float32)
        sines = tl.load(sin + column, mask=turned, other=0.0).to(tl.float32)
        # by -1: Triton's -y is 0 - y, which is 0 of 0
        row = tl.where(turned, row * cosines + tl.where(low, y * -1.0, y) * sines, row)
    return row


@triton.jit
def load_normed(x, column, mask, norm_ptr, inverse, NORM: tl.constexpr):
    row = tl.load(x + column, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        row = row * inverse * tl.load(norm_ptr + column, mask=mask, other=0.0).to(tl.float32)
    return row


@triton.jit
def added_halves(sums, COUNT: tl.constexpr):
    """The second half of sums [COUNT] is added to the first, until one is left."""
    half = tl.sum(tl.reshape(sums, [2, COUNT // 2]), 0)
    if COUNT == 4:
        return tl.sum(half, 0)
    else:
        return added_halves(half, COUNT // 2)


_RUN_TIME = [
    "k_scale_first", "k_scale_row", "k_scale_head", "v_scale_first", "v_scale_row", "v_scale_head", "table_step", "page", "pages",
    "room", "tokens", "rotated", "cos_batch", "cos_row", "sin_batch", "sin_row", "kv_heads", "q_heads",
]  # fmt: skip
_ANY_ALIGNMENT = ["k_scale_ptr", "v_scale_ptr", "seq_lens_ptr", "table_ptr", "q_norm_ptr", "k_norm_ptr"]


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def append_kernel(
    k, k_batch, k_row, k_head, v, v_batch, v_row, v_head, k_cache, k_cache_first, k_cache_row, k_cache_head, v_cache,
    v_cache_first, v_cache_row, v_cache_head, k_scale_ptr, k_scale_first, k_scale_row, k_scale_head, v_scale_ptr,
    v_scale_first, v_scale_row, v_scale_head, seq_lens_ptr, table_ptr, table_step, page, pages, room, tokens, cos_ptr,
    cos_batch, cos_row, sin_ptr, sin_batch, sin_row, rotated, kv_heads, q, q_batch, q_row, q_head, q_out, q_heads, q_norm_ptr,
    k_norm_ptr, norm_eps, DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    PAGED: tl.constexpr, QUANTIZED: tl.constexpr, E4M3: tl.constexpr, K_STATIC: tl.constexpr, V_STATIC: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, NORM_SUMS: tl.constexpr,
):  # fmt: skip
    heads = kv_heads + q_heads  # all in the grid's x: in y it has 65535 at most
    row_of_tokens, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    batch, token = row_of_tokens // tokens, row_of_tokens % tokens
    column = tl.arange(0, BLOCK_D)
    cos_ptr += batch.to(tl.int64) * cos_batch + token.to(tl.int64) * cos_row
    sin_ptr += batch.to(tl.int64) * sin_batch + token.to(tl.int64) * sin_row
    length = tl.load(seq_lens_ptr + batch)
    position = length - tokens + token
    first, row = batch, position
    is_lost = (length < 0) | (length > room)
    if PAGED:
        table_ptr += batch.to(tl.int64) * table_step + position // page
        first = tl.load(table_ptr, mask=(position >= 0) & (length <= room), other=0)
        row = position % page
        is_lost = is_lost | (first < 0) | (first >= pages)
    if head >= kv_heads:
        head -= kv_heads
        q += batch.to(tl.int64) * q_batch + token.to(tl.int64) * q_row + head.to(tl.int64) * q_head
        x = prepare_row(q, column, q_norm_ptr, norm_eps, cos_ptr, sin_ptr, rotated, DIM, Q_NORM, NORM_SUMS, ROTARY,
                        INTERLEAVED)  # fmt: skip
        q_out += ((batch.to(tl.int64) * tokens + token) * q_heads + head) * DIM
        x = tl.where(is_lost, float("nan"), x)
        tl.store(q_out + column, x.to(q_out.dtype.element_ty), mask=column < DIM)
        return
    if position < 0 or is_lost:
        return
    k += batch.to(tl.int64) * k_batch + token.to(tl.int64) * k_row + head.to(tl.int64) * k_head
    v += batch.to(tl.int64) * v_batch + token.to(tl.int64) * v_row + head.to(tl.int64) * v_head
    x = prepare_row(k, column, k_norm_ptr, norm_eps, cos_ptr, sin_ptr, rotated, DIM, K_NORM, NORM_SUMS, ROTARY,
                    INTERLEAVED)  # fmt: skip
    store_row(x, column, k_cache, first, row, head, k_cache_first, k_cache_row, k_cache_head, k_scale_ptr, k_scale_first,
              k_scale_row, k_scale_head, DIM, QUANTIZED, E4M3, K_STATIC)  # fmt: skip
    column = tl.arange(0, BLOCK_V)
    x = tl.load(v + column, mask=column < VALUE_DIM, other=0.0).to(tl.float32)
    store_row(x, column, v_cache, first, row, head, v_cache_first, v_cache_row, v_cache_head, v_scale_ptr, v_scale_first,
              v_scale_row, v_scale_head, VALUE_DIM, QUANTIZED, E4M3, V_STATIC)  # fmt: skip


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
    if not k.numel():
        return
    batch, tokens, heads, dim = k.shape
    caches = [x.view(torch.uint8) if x.dtype == E4M3 else x for x in (k_cache, v_cache)]
    floats = seq_lens.view(torch.float32)  # for what is not there
    table, table_step = (seq_lens, 0) if block_table is None else (block_table, block_table.stride(0))
    queries, q_heads = (k, 0) if q is None else (q, q.shape[2])
    with torch.cuda.device_of(k):
        append_kernel[(batch * tokens * (heads + q_heads),)](
            k, *k.stride()[:3], v, *v.stride()[:3], caches[0], *k_cache.stride()[:3], caches[1], *v_cache.stride()[:3],
            *scales(k_scale, floats), *scales(v_scale, floats), seq_lens, table, table_step, k_cache.shape[1], k_cache.shape[0],
            min(capacity(k_cache, block_table), 2**30), tokens, *rotation(cos, k), *rotation(sin, k),
            0 if cos is None else cos.shape[2], heads, queries, *queries.stride()[:3], k if q_out is None else q_out, q_heads,
            floats if q_norm is None else q_norm, floats if k_norm is None else k_norm, norm_eps, DIM=dim,
            BLOCK_D=triton.next_power_of_2(dim), VALUE_DIM=v.shape[3],
            BLOCK_V=triton.next_power_of_2(v.shape[3]), PAGED=block_table is not None, QUANTIZED=k_cache.dtype in QUANTIZED,
            E4M3=k_cache.dtype == E4M3, K_STATIC=not is_per_token(k_scale), V_STATIC=not is_per_token(v_scale),
            ROTARY=cos is not None, INTERLEAVED=interleaved,
            Q_NORM=q_norm is not None, K_NORM=k_norm is not None, NORM_SUMS=NORM_SUMS, num_warps=1,
            enable_fp_fusion=False,
        )  # fmt: skip


def rotation(x: Tensor | None, stand_in: Tensor) -> tuple[Tensor, int, int]:
    """cos or sin [B or 1, S, R], and the strides of sequences and tokens."""
    return (stand_in, 0, 0) if x is None else (x, 0 if x.shape[0] == 1 else x.stride(0), x.stride(1))


torch.library.impl("forwardpass::append_kv_triton", ("cuda", "cpu"))(append_kv)
