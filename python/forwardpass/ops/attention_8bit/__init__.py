"""attention_8bit and attention_8bit_with_lse: attention whose two products are of int8, with all that attention takes.

The contract; what it computes is in reference.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...dispatch import Operation, Reason
from ..attention import Window, check, fake, fake_with_lse, split_window, why_not_gpu
from . import reference

DTYPES = ("int8",)
#: of q and k: 127^2 * 2^17 < 2^31
MAX_COLUMNS = 2**17


def attention_8bit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dtype: str = "int8",
    rotate: bool = True,
    scale: float | None = None,
    causal: bool = False,
    window: Window | None = None,
    softcap: float = 0.0,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """`attention(q, k, v, …)` with q, k, v and the probabilities in 8 bits, and exact sums of their products.

    k loses the mean of 64 of its keys, which softmax does not see. The columns of q and k are rotated by a Hadamard matrix, which
    spreads outliers of a channel. q then has a scale a row, k one a key, v one a channel, and probabilities are whole 255ths of the
    largest of 64 keys. Their sum, by which a row is divided, is of float32 before rounding. Against float64, random normal q, k and
    v: an error of 1.4 % of the output's norm (`python -m benchmarks.attention_8bit_error` has other data, and other arithmetics).

    Args:
        q, k, v: as `attention` takes them.
        dtype: "int8": of both products.
        rotate: False: without the rotation, which pays where channels have no outliers.
        scale, causal, window, softcap, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, batch_invariant: as in `attention`.

    Returns:
        as attention. A NaN or an infinity in a key or value may reach all rows of its sequence and heads, masked or not, by the
        keys' mean or a channel's scale; it does not reach another sequence.

    Raises:
        TypeError, ValueError, Unsupported: as attention; ValueError also where q and k have more than 2^17 columns.

    Example:
        >>> q = torch.randn(2, 16, 8, 64)
        >>> k, v = torch.randn(2, 20, 2, 64), torch.randn(2, 20, 2, 64)  # a head of them serves 4 of q
        >>> o = fp.ops.attention_8bit(q, k, v, causal=True)
        >>> exact = fp.ops.attention(q, k, v, causal=True)
        >>> (o - exact).norm() < 0.02 * exact.norm()
        tensor(True)
    """
    left, right = split_window("attention_8bit", window)
    _check_dtype("attention_8bit", dtype, rotate)
    return ATTENTION_8BIT(
        q, k, v, rotate, scale, causal, left, right, softcap, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k,
        batch_invariant,
    )  # fmt: skip


def attention_8bit_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dtype: str = "int8",
    rotate: bool = True,
    scale: float | None = None,
    causal: bool = False,
    window: Window | None = None,
    softcap: float = 0.0,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """attention_8bit, and the natural logarithm of each row's sum of exp(s), as `attention_with_lse` has it.

    Args:
        q: as in attention_8bit, and so is everything else.

    Returns:
        o as attention_8bit; lse float32 [B, H, Sq], or [H, Tq], contiguous, of the scores that 8 bits give.

    Raises:
        TypeError, ValueError, Unsupported: as attention.

    Example:
        >>> q, k, v = torch.randn(3, 2, 16, 8, 64)
        >>> o, lse = fp.ops.attention_8bit_with_lse(q, k, v)
        >>> o.shape, lse.shape
        (torch.Size([2, 16, 8, 64]), torch.Size([2, 8, 16]))
    """
    left, right = split_window("attention_8bit_with_lse", window)
    _check_dtype("attention_8bit_with_lse", dtype, rotate)
    return ATTENTION_8BIT_WITH_LSE(
        q, k, v, rotate, scale, causal, left, right, softcap, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k,
        batch_invariant,
    )  # fmt: skip


def _check_dtype(op: str, dtype: object, rotate: object) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"{op}: dtype is {' or '.join(map(repr, DTYPES))}, not {dtype!r}")
    if not isinstance(rotate, bool):
        raise TypeError(f"{op}: rotate must be True or False, not {rotate!r}")


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, rotates: bool, *options: Any) -> None:
    check(op, q, k, v, *options)
    if q.shape[-1] > MAX_COLUMNS:
        raise ValueError(
            f"{op}: q and k must have at most {MAX_COLUMNS} columns, whose products an int32 sums, and have {q.shape[-1]}"
        )


def _fake(q: Tensor, k: Tensor, v: Tensor, *options: object) -> Tensor:
    return fake(q, k, v)


def _fake_with_lse(q: Tensor, k: Tensor, v: Tensor, *options: object) -> tuple[Tensor, Tensor]:
    return fake_with_lse(q, k, v)


def _why_not_gpu(q: Tensor, k: Tensor, v: Tensor, rotates: bool, *options: Any) -> Reason | None:
    return why_not_gpu(q, k, v, *options)


def _operation(function: Callable[..., Any], run: Callable[..., Any], fake: Callable[..., Any]) -> Operation:
    limits = {"cuda": _why_not_gpu}
    return Operation(
        function, functools.partial(_check, function.__name__), run, fake, why_not=limits, backends=("cuda", "cpu")
    )


ATTENTION_8BIT = _operation(attention_8bit, reference.attention_8bit, _fake)
ATTENTION_8BIT_WITH_LSE = _operation(attention_8bit_with_lse, reference.attention_8bit_with_lse, _fake_with_lse)
