"""attention_8bit and attention_8bit_with_lse: attention whose two products are of 8 bits, with all that attention takes.

The contract; what it computes is in reference.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...dispatch import Operation, Reason, gpu_capability
from ..attention import Window, check, fake, fake_with_lse, split_window, why_not_gpu
from ..fp8_gemm import why_no_fp8
from . import reference

DTYPES = ("int8", "fp8")
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
    """`attention(q, k, v, …)` with q, k, v and the probabilities in 8 bits.

    k loses the mean of 64 of its keys, which softmax does not see. The columns of q and k are rotated by a Hadamard matrix, which
    spreads outliers of a channel. q and k are then int8, with a scale for each row and each key, and the sums of their products are
    exact. v has a scale for each channel. Probabilities are relative to the largest of 64 keys. A row is divided by their sum
    before rounding, in float32. Against float64, random normal q, k and v: an error of 1.4 % of the output's norm with "int8",
    3.5 % with "fp8" (`python -m benchmarks.attention_8bit_error` has other data, and other arithmetics).

    Args:
        q, k, v: as `attention` takes them.
        dtype: of the probabilities and v. "int8": probabilities are whole 255ths, and sums are exact. "fp8": both are e4m3,
            probabilities in 448ths, so that small ones keep three bits; the sums of 64 keys are added up in float32, as tensor
            cores add e4m3 products with fewer bits.
        rotate: False: without the rotation, which pays where channels have no outliers.
        scale, causal, window, softcap, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, batch_invariant: as in `attention`.

    Returns:
        as attention. A NaN or an infinity in a key or value may reach all rows of its sequence and heads, masked or not, by the
        keys' mean or a channel's scale; it does not reach another sequence.

    Raises:
        TypeError, ValueError, Unsupported: as attention; ValueError also where q and k have more than 2^17 columns; Unsupported
            also where the CPU's or a GPU's kernels are asked for "fp8", and it is a CPU, or a GPU below sm_89 or of sm_100 to
            sm_110.

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
        q, k, v, dtype, rotate, scale, causal, left, right, softcap, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k,
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
        q, k, v, dtype, rotate, scale, causal, left, right, softcap, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k,
        batch_invariant,
    )  # fmt: skip


def _check_dtype(op: str, dtype: object, rotate: object) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"{op}: dtype is {' or '.join(map(repr, DTYPES))}, not {dtype!r}")
    if not isinstance(rotate, bool):
        raise TypeError(f"{op}: rotate must be True or False, not {rotate!r}")


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, dtype: str, rotates: bool, *options: Any) -> None:
    check(op, q, k, v, *options)
    if q.shape[-1] > MAX_COLUMNS:
        raise ValueError(
            f"{op}: q and k must have at most {MAX_COLUMNS} columns, whose products an int32 sums, and have {q.shape[-1]}"
        )


def _fake(q: Tensor, k: Tensor, v: Tensor, *options: object) -> Tensor:
    return fake(q, k, v)


def _fake_with_lse(q: Tensor, k: Tensor, v: Tensor, *options: object) -> tuple[Tensor, Tensor]:
    return fake_with_lse(q, k, v)


def _why_not_gpu(
    backend: str, q: Tensor, k: Tensor, v: Tensor, dtype: str | None, rotates: bool, *options: Any
) -> Reason | None:
    if dtype == "fp8" and (reason := _why_no_e4m3(backend, gpu_capability(q.device))):
        return dataclasses.replace(reason, fix='use dtype="int8", which is also nearer to exact')
    return why_not_gpu(q, k, v, *options)


def _why_no_e4m3(backend: str, capability: tuple[int, int]) -> Reason | None:
    if backend == "cuda" and capability == (9, 0):
        return Reason("emulated_fp8", "this GPU is sm_90, where the FP8 mma.sync of the CUDA kernels is emulated", "")
    return why_no_fp8(backend, capability)


def _why_not_cpu(q: Tensor, k: Tensor, v: Tensor, dtype: str | None, *options: Any) -> Reason | None:
    if dtype != "fp8":
        return None
    return Reason(
        "dtype", "no CPU multiplies e4m3", 'use dtype="int8", which is also nearer to exact, or the reference backend'
    )


def _operation(function: Callable[..., Any], run: Callable[..., Any], fake: Callable[..., Any]) -> Operation:
    limits: dict[str, Callable[..., Reason | None]] = {
        "cuda": functools.partial(_why_not_gpu, "cuda"),
        "cpu": _why_not_cpu,
    }
    return Operation(
        function, functools.partial(_check, function.__name__), run, fake, why_not=limits, backends=("cuda", "cpu")
    )


ATTENTION_8BIT = _operation(attention_8bit, reference.attention_8bit, _fake)
ATTENTION_8BIT_WITH_LSE = _operation(attention_8bit_with_lse, reference.attention_8bit_with_lse, _fake_with_lse)
