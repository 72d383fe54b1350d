"""attention_decode and attention_decode_with_lse: attention of each sequence's last tokens to a cache of keys and values.

The contract; what it computes is in reference.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...dispatch import Operation, Reason
from ..attention import Window, check_alibi_slopes, check_number, check_scale, check_window, split_window
from ..common.cache_layout import check_cache, check_ints, check_leftpad, check_lengths, check_new_rows
from ..common.quantized_rows import check_vector
from . import reference


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    *,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    batch_invariant: bool = False,
    leftpad: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Attention of new tokens to what their sequences' cache has, the tokens themselves included: fp.ops.append_kv came first.

    Row i of Sq stands at place seq_len - Sq + i of its sequence, and sees the keys up to there. Scores, softmax and rounding are
    those of fp.ops.attention. Many rows, as a prompt in chunks has them (chunked prefill), run in attention's kernels on a GPU;
    of an 8-bit cache, or with leftpad, in the kernel for few rows, which reads the keys anew for every 16 of Sq * H / Hk.

    Args:
        q: float16, bfloat16 (or, on a CPU, float32) [B, Sq, H, D]; last stride 1.
        k_cache: [B, L, Hk, D] or, with a block_table, pages [P, page, Hk, D] of any number of tokens; of q's dtype, int8 or
            float8_e4m3fn; H is a multiple of Hk. Last stride 1, others free; what is beyond a sequence's length is never read.
        v_cache: as k_cache, of Dv columns; the two may be views of one tensor that overlap.
        seq_lens: int32 [B]: keys that count. A row before the first key, as all are where it is 0, gives 0. Below 0 or beyond the
            cache, all rows of the sequence are NaN.
        block_table: int32 [B, n]: sequence b's token j is row j % page of page block_table[b, j // page]. Entries of which no row
            sees a key, such as -1, are never read as pages. A row that sees a key of an entry that names no page is NaN.
        k_scale: float32 [1], [Hk] or k_cache's shape without D: what the elements of an 8-bit cache are multiplied by.
        v_scale: as k_scale, of v_cache.
        scale: positive; None: 1 / sqrt(D).
        window: (left, right): keys from place - left on only; no row sees a key to its right anyway. None: unlimited.
        softcap: 0: none.
        sinks: float32 or q's dtype [H]: a logit more in each row's softmax, whose value is 0.
        batch_invariant: a row's bits do not depend on what else is in the batch.
        leftpad: int32 [B]: a sequence's keys before this one are padding on the left, as prompts of different lengths have it;
            seq_lens counts them, and they are never read. A row that stands before it, as all do from seq_len on, gives 0. Below 0,
            all rows of the sequence are NaN.
        alibi_slopes: float32 [H] or [B, H]: alibi_slopes[h] * (place - j) is subtracted from the score of key j, after the softcap.

    Returns:
        [B, Sq, H, Dv] of q's dtype, contiguous. On every backend rows are NaN whose length, leftpad or pages are out of range, and
        other rows are what they would be without those. No host looks at these numbers, as it would have to wait for a GPU. On a
        CPU a NaN or an infinity in a key, a value or a token's scale reaches the rows that see it, and no others.

    Raises:
        TypeError: an argument is of another type or dtype than above.
        ValueError: a shape, layout, device, value or combination of arguments is not one of those above. With FORWARDPASS_DEBUG=1
            in the environment also for lengths, paddings and pages that are out of range: the host looks, outside of graphs.
        Unsupported: a backend asked for by name cannot run these arguments.
        RuntimeError: an input requires grad, in grad mode: operations have no backward.

    Example:
        >>> q = torch.randn(2, 1, 8, 64)  # a new token of each of 2 sequences
        >>> k_cache, v_cache = torch.randn(2, 2, 128, 4, 64)  # which append_kv has written
        >>> seq_lens = torch.tensor([7, 3], dtype=torch.int32)
        >>> fp.ops.attention_decode(q, k_cache, v_cache, seq_lens).shape
        torch.Size([2, 1, 8, 64])
    """
    left, right = split_window("attention_decode", window)
    return OPERATION(
        q, k_cache, v_cache, seq_lens, block_table, k_scale, v_scale, scale, left, right, softcap, sinks, batch_invariant,
        leftpad, alibi_slopes,
    )  # fmt: skip


def attention_decode_with_lse(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    *,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    batch_invariant: bool = False,
    leftpad: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """attention_decode, and the natural logarithm of each row's sum of exp(s): what merges attention over parts of the keys, such
    as a prefix that sequences share and what each has of its own.

    Args:
        q: as in attention_decode, and so is everything else.

    Returns:
        o as attention_decode; lse float32 [B, H, Sq], contiguous: sinks included, -inf where a row has neither key nor sink, NaN
        where o is for its length, leftpad or pages.

    Raises:
        TypeError: an argument is of another type or dtype than above.
        ValueError: a shape, layout, device, value or combination of arguments is not one of those above.
        Unsupported: a backend asked for by name cannot run these arguments.
        RuntimeError: an input requires grad, in grad mode: operations have no backward.

    Example:
        >>> q, (k_cache, v_cache) = torch.randn(2, 1, 8, 64), torch.randn(2, 2, 128, 4, 64)
        >>> o, lse = fp.ops.attention_decode_with_lse(q, k_cache, v_cache, torch.tensor([7, 3], dtype=torch.int32))
        >>> o.shape, lse.shape
        (torch.Size([2, 1, 8, 64]), torch.Size([2, 8, 1]))
    """
    left, right = split_window("attention_decode_with_lse", window)
    return WITH_LSE(
        q, k_cache, v_cache, seq_lens, block_table, k_scale, v_scale, scale, left, right, softcap, sinks, batch_invariant,
        leftpad, alibi_slopes,
    )  # fmt: skip


def _check(
    op: str,
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
    check_new_rows(op, "q", q)
    if not q.shape[1]:
        raise ValueError(f"{op}: q must have a row for each sequence, and has shape {tuple(q.shape)}")
    check_cache(op, "q", q, k_cache, v_cache, seq_lens, block_table, k_scale, v_scale, None)
    if q.shape[2] % k_cache.shape[2]:
        raise ValueError(
            f"{op}: the heads of q must be a multiple of the cache's, and are {q.shape[2]} and {k_cache.shape[2]}"
        )
    check_scale(op, scale)
    if not 0 <= check_number(op, "softcap", softcap) < math.inf:
        raise ValueError(f"{op}: softcap must be finite and at least 0, which is none, not {softcap}")
    if not isinstance(batch_invariant, bool):
        raise TypeError(f"{op}: batch_invariant must be True or False, not {batch_invariant!r}")
    check_window(op, window_left, window_right)
    check_vector(op, "sinks", sinks, q.shape[2], (torch.float32, q.dtype), q)
    check_alibi_slopes(op, alibi_slopes, q.shape[0], q.shape[2], q)
    if leftpad is not None:
        check_ints(op, "leftpad", leftpad, "q", q)
        check_leftpad(op, leftpad)
    first = reference.first_key(seq_lens, q.shape[1], window_left, leftpad)
    check_lengths(op, k_cache, seq_lens, block_table, first)


def _fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, *options: object) -> Tensor:
    return q.new_empty(*q.shape[:-1], v_cache.shape[-1])


def _fake_with_lse(q: Tensor, k_cache: Tensor, v_cache: Tensor, *options: object) -> tuple[Tensor, Tensor]:
    batch, rows, heads, _ = q.shape
    return _fake(q, k_cache, v_cache), q.new_empty(batch, heads, rows, dtype=torch.float32)


def _why_not_triton(q: Tensor, k_cache: Tensor | None, v_cache: Tensor | None, *options: Any) -> Reason | None:
    if q.dtype == torch.float32:
        return Reason(
            "dtype", "tensor cores multiply 16-bit operands, and q is float32", "convert q and the cache to bfloat16"
        )
    if (widest := max(q.shape[-1], 0 if v_cache is None else v_cache.shape[-1])) > 256:
        return Reason("head_dim", f"the kernel takes head dims up to 256, not {widest}", "use the reference backend")
    return None


def _why_not_cuda(q: Tensor, k_cache: Tensor | None, v_cache: Tensor | None, *options: Any) -> Reason | None:
    if reason := _why_not_triton(q, k_cache, v_cache):
        return reason
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x is None:
            continue
        size = x.element_size()
        strides = [s for n, s in zip(x.shape[:-1], x.stride()) if n > 1]
        if any(s * size % 16 for s in (x.shape[-1], *strides, x.storage_offset())):
            return Reason(
                "alignment",
                f"16 bytes are copied at a time, and rows of {name} are not of a multiple of 16 bytes, or not at multiples",
                "use the triton backend, or a cache with such rows",
            )
    return None


def _operation(function: Callable[..., Any], run: Callable[..., Any], fake: Callable[..., Any]) -> Operation:
    check = functools.partial(_check, function.__name__)
    return Operation(function, check, run, fake, why_not={"triton": _why_not_triton, "cuda": _why_not_cuda})


OPERATION = _operation(attention_decode, reference.attention_decode, _fake)
WITH_LSE = _operation(attention_decode_with_lse, reference.attention_decode_with_lse, _fake_with_lse)
