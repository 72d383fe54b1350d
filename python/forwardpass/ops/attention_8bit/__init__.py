"""attention_8bit and attention_8bit_with_lse: attention whose two products are of 8 bits, with all that attention takes; and
quantize_attention, what they quantise.

The contract; what it computes is in reference.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...dispatch import Operation, Reason, gpu_capability
from ..attention import Window, check, fake, fake_with_lse, split_window, why_not_gpu
from ..common.quantized_rows import E4M3, FLOATS
from ..fp8_gemm import why_no_fp8
from . import cache_operands as cache
from . import reference

DTYPES = ("int8", "fp8")
#: the dtype of v, by that of a call
VALUES = {"int8": torch.int8, "fp8": E4M3}
#: Options of attention behind q, k and v.
MODIFIERS = 11
#: of q and k: 127^2 * 2^17 < 2^31
MAX_COLUMNS = 2**17


@dataclasses.dataclass(frozen=True)
class AttentionOperands:
    """q, k and v in 8 bits, as `quantize_attention` and `of_cache` return them. `attention_8bit` takes them in place of q, k and v.

    Of row i and key j, `scale * (q_i k_j * q_scale_i * k_scale_j + q_shift_i)` is the score; v times v_scale and v_block_scale are
    the values. With cu_seqlens B and S are one dimension, T, except in v_scale, whose B are the sequences. All are contiguous.

    Attributes:
        q: int8 [B, Sq, H, D], rotated where `rotate`.
        q_scale: float32 [B, Sq, H].
        q_shift: float32 [B, Sq, H]: q times the centre that k has lost.
        k: int8 [B, Sk, Hk, D], centred, and rotated where `rotate`.
        k_scale: float32 [B, Sk, Hk].
        v: int8, with dtype "fp8" float8_e4m3fn, [B, Sk, Hk, Dv].
        v_scale: float32 [B, Hk, Dv].
        v_block_scale: float32 [B, Sk, Hk], or None with dtype "fp8": the same for 64 keys, from the first one of each sequence on.
            Kernels read it of the first of these keys.
        dtype: "int8" or "fp8", of the probabilities and v.
        rotate: whether q and k are rotated.
        out_dtype: the dtype that q had, which the output has.
        cu_seqlens_q, cu_seqlens_k: of `of_cache` alone, whose sequences are packed: where they begin.
    """

    q: Tensor
    q_scale: Tensor
    q_shift: Tensor
    k: Tensor
    k_scale: Tensor
    v: Tensor
    v_scale: Tensor
    v_block_scale: Tensor | None
    dtype: str
    rotate: bool
    out_dtype: torch.dtype
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None

    @classmethod
    def of_cache(
        cls,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        seq_lens: Tensor,
        *,
        k_scale: Tensor,
        v_scale: Tensor,
        block_table: Tensor | None = None,
        dtype: str = "int8",
    ) -> AttentionOperands:
        """Those of a cache that `append_kv` has written in int8: for many new rows, such as chunks of a prompt, where
        `attention_decode` would read the keys anew for every few rows.

        `attention_8bit(x, rotate=False, causal=True)` then computes what `attention_decode` does with the same arguments, with both
        products in 8 bits. k's integers and scales are the cache's. v's are too where a head has one scale and dtype is "int8";
        else they are rounded again, to the scales of `quantize_attention`. A copy of the sequences' keys is made, of as many
        as the cache has room for. No number of the device is looked at.

        Args:
            q, k_cache, v_cache, seq_lens, k_scale, v_scale, block_table: as `attention_decode` takes them; the cache is int8.
            dtype: of the probabilities and v, as in `attention_8bit`.

        Returns:
            operands whose `attention_8bit` has q's shape, with v's columns. Rows whose sequence has no length within the cache are
            NaN, and so are rows that attend to a key without a page.

        Raises:
            TypeError, ValueError: as attention_decode; the cache is not int8; q has more rows than the cache has room for keys.

        Example:
            >>> lengths = torch.tensor([300, 64], dtype=torch.int32)
            >>> q, (k_cache, v_cache) = torch.randn(2, 50, 8, 64), torch.randint(-127, 128, (2, 2, 512, 4, 64), dtype=torch.int8)
            >>> scales = {"k_scale": torch.full((4,), 0.02), "v_scale": torch.full((4,), 0.02)}
            >>> x = fp.ops.AttentionOperands.of_cache(q, k_cache, v_cache, lengths, **scales)
            >>> o = fp.ops.attention_8bit(x, rotate=False, causal=True)
            >>> exact = fp.ops.attention_decode(q, k_cache, v_cache, lengths, **scales)
            >>> o.shape == exact.shape and bool((o - exact).norm() < 0.02 * exact.norm())
            True
        """
        _check_dtype("AttentionOperands.of_cache", dtype, False)
        return cls(*cache.operands(q, k_cache, v_cache, seq_lens, block_table, k_scale, v_scale, dtype))


def quantize_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dtype: str = "int8",
    rotate: bool = True,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> AttentionOperands:
    """q, k and v as `attention_8bit` multiplies them, to be looked at, kept, or used in several calls.

    `attention_8bit(quantize_attention(q, k, v), …)` has the bits of `attention_8bit(q, k, v, …)` on the same backend. The
    integers are the same on every backend. A call on operands still lays them out for its kernel, so a single call is faster with
    q, k and v.

    Args:
        q, k, v: as `attention` takes them.
        dtype, rotate: as in `attention_8bit`.
        cu_seqlens_q, cu_seqlens_k: as in `attention`, and the same in the call that takes the operands.

    Returns:
        the operands. Rows and keys of no sequence that is known by cu_seqlens, and those with a NaN or an infinity, have scales
        that are NaN, and integers that mean nothing.

    Raises:
        TypeError, ValueError, Unsupported: as attention_8bit.

    Example:
        >>> q, k, v = torch.randn(3, 2, 16, 8, 64)
        >>> x = fp.ops.quantize_attention(q, k, v)
        >>> x.k.dtype, x.k_scale.shape
        (torch.int8, torch.Size([2, 16, 8]))
        >>> torch.equal(fp.ops.attention_8bit(x, causal=True), fp.ops.attention_8bit(q, k, v, causal=True))
        True
    """
    _check_dtype("quantize_attention", dtype, rotate)
    q8, q_scale, q_shift, k8, k_scale, v8, v_scale, of_block = QUANTIZE_ATTENTION(
        q, k, v, dtype, rotate, cu_seqlens_q, cu_seqlens_k
    )
    v_block_scale = of_block if dtype == "int8" else None
    return AttentionOperands(q8, q_scale, q_shift, k8, k_scale, v8, v_scale, v_block_scale, dtype, rotate, q.dtype)


def attention_8bit(
    q: Tensor | AttentionOperands,
    k: Tensor | None = None,
    v: Tensor | None = None,
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
    exact. v has a scale for each channel and, in int8, one for each 64 keys. Probabilities are relative to the largest of 64 keys.
    A row is divided by their sum before rounding, in float32. Against float64, random normal q, k and v: an error of 1.4 % of the
    output's norm with "int8", 3.5 % with "fp8" (`python -m benchmarks.attention_8bit_error` has other data, and other
    arithmetics).

    Args:
        q, k, v: as `attention` takes them; or q alone, the AttentionOperands that `quantize_attention` or
            `AttentionOperands.of_cache` has returned.
        dtype: of the probabilities and v. "int8": probabilities are whole 255ths, and sums are exact. "fp8": both are e4m3,
            probabilities in 448ths, so that small ones keep three bits; the sums of 64 keys are added up in float32, as tensor
            cores add e4m3 products with fewer bits.
        rotate: False: without the rotation, which pays where channels have no outliers. Of AttentionOperands dtype and rotate
            must be what they were quantised with.
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
    sequences, of_cache = _sequences("attention_8bit", q, cu_seqlens_q, cu_seqlens_k)
    q, k, v, *quantized = _operands("attention_8bit", q, k, v, dtype, rotate)
    o = ATTENTION_8BIT(
        q, k, v, dtype, rotate, scale, causal, left, right, softcap, mask, alibi_slopes, sinks, *sequences, batch_invariant,
        *quantized,
    )  # fmt: skip
    return cache.unpacked(o, 0, len(sequences[0]) - 1) if of_cache else o


def attention_8bit_with_lse(
    q: Tensor | AttentionOperands,
    k: Tensor | None = None,
    v: Tensor | None = None,
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
    sequences, of_cache = _sequences("attention_8bit_with_lse", q, cu_seqlens_q, cu_seqlens_k)
    q, k, v, *quantized = _operands("attention_8bit_with_lse", q, k, v, dtype, rotate)
    o, lse = ATTENTION_8BIT_WITH_LSE(
        q, k, v, dtype, rotate, scale, causal, left, right, softcap, mask, alibi_slopes, sinks, *sequences, batch_invariant,
        *quantized,
    )  # fmt: skip
    batch = len(sequences[0]) - 1 if of_cache else 0
    return (
        (cache.unpacked(o, 0, batch), cache.unpacked(lse, 1, batch).transpose(0, 1).contiguous())
        if of_cache
        else (o, lse)
    )


def _check_dtype(op: str, dtype: object, rotate: object) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"{op}: dtype is {' or '.join(map(repr, DTYPES))}, not {dtype!r}")
    if not isinstance(rotate, bool):
        raise TypeError(f"{op}: rotate must be True or False, not {rotate!r}")


def _sequences(op: str, q: object, *cu_seqlens: Tensor | None) -> tuple[tuple[Any, Any], bool]:
    """cu_seqlens of a call, and whether they are those of a cache."""
    if not isinstance(q, AttentionOperands) or q.cu_seqlens_q is None:
        return cu_seqlens, False  # type: ignore[return-value]
    if any(x is not None for x in cu_seqlens):
        raise ValueError(
            f"{op}: the operands are of a cache, whose sequences they know: leave out cu_seqlens_q and cu_seqlens_k"
        )
    return (q.cu_seqlens_q, q.cu_seqlens_k), True


def _operands(op: str, q: Any, k: Any, v: Any, dtype: str, rotate: bool) -> tuple[Any, ...]:
    """q, k and v of the schema and, of AttentionOperands, what it has behind the other options."""
    _check_dtype(op, dtype, rotate)
    if not isinstance(q, AttentionOperands):
        return q, k, v
    if k is not None or v is not None:
        raise TypeError(f"{op}: k and v go with a tensor q, and q is AttentionOperands, which has them: leave both out")
    for name, value, before in (("dtype", dtype, q.dtype), ("rotate", rotate, q.rotate)):
        if value != before:
            raise ValueError(f"{op}: the operands were quantised with {name}={before!r}, and {name} is {value!r}: "
                             f"pass {name}={before!r}")  # fmt: skip
    return q.q, q.k, q.v, q.q_scale, q.q_shift, q.k_scale, q.v_scale, q.v_block_scale, q.out_dtype


def _check(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dtype: str,
    rotates: bool,
    *options: Any,
) -> None:
    options, quantized = options[:MODIFIERS], options[MODIFIERS:]
    if any(x is not None for x in quantized):
        batch = len(q) if options[-2] is None else len(options[-2]) - 1
        q, k, v = _check_operands(op, q, k, v, dtype, batch, *quantized)
    check(op, q, k, v, *options)
    _check_columns(op, q)


def _check_columns(op: str, q: Tensor) -> None:
    if q.shape[-1] > MAX_COLUMNS:
        raise ValueError(
            f"{op}: q and k must have at most {MAX_COLUMNS} columns, whose products an int32 sums, and have {q.shape[-1]}"
        )


def _check_operands(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dtype: str,
    batch: int,
    q_scale: Tensor,
    q_shift: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    v_block_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    """AttentionOperands, whose fields anyone may have put there. Returns tensors of their shapes in out_dtype, without values."""
    if out_dtype not in FLOATS:
        raise TypeError(f"{op}: out_dtype of the operands must be float16, bfloat16 or float32, not {out_dtype}")
    shapes: dict[str, tuple[Tensor | None, torch.dtype, Any]] = {
        "q": (q, torch.int8, q.shape),
        "k": (k, torch.int8, k.shape),
        "v": (v, VALUES[dtype], v.shape),
        "q_scale": (q_scale, torch.float32, q.shape[:-1]),
        "q_shift": (q_shift, torch.float32, q.shape[:-1]),
        "k_scale": (k_scale, torch.float32, k.shape[:-1]),
        "v_scale": (v_scale, torch.float32, (batch, *v.shape[-2:])),
    }
    if dtype == "int8":
        shapes["v_block_scale"] = v_block_scale, torch.float32, k.shape[:-1]
    elif v_block_scale is not None:
        raise TypeError(
            f"{op}: v_block_scale of the operands is of int8 alone, and dtype is {dtype!r}: it must be None"
        )
    for name, (x, expected, shape) in shapes.items():
        if not isinstance(x, Tensor) or x.dtype is not expected:
            raise TypeError(
                f"{op}: {name} of the operands must be a tensor of {expected}, not {getattr(x, 'dtype', type(x).__name__)}"
            )
        if x.shape != shape or not x.is_contiguous() or x.device != q.device:
            raise ValueError(f"{op}: {name} of the operands must be {list(shape)}, contiguous and on {q.device}, and is "
                             f"{list(x.shape)} with strides {x.stride()} on {x.device}")  # fmt: skip
    return [_like(x, out_dtype) for x in (q, k, v)]


def _fake(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    return fake(_of_out_dtype(q, options), k, v)


def _fake_with_lse(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return fake_with_lse(_of_out_dtype(q, options), k, v)


def _of_out_dtype(q: Tensor, options: tuple[Any, ...]) -> Tensor:
    """q, or a tensor of its shape in the dtype that it had before it was quantised."""
    quantized = options[2 + MODIFIERS :]
    return q if not quantized or quantized[-1] is None else _like(q, quantized[-1])


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of x's shape, without values, which takes the memory of a row."""
    return x.new_empty(x.shape[-1:], dtype=dtype).expand(x.shape)


def _why_not_gpu(
    backend: str, q: Tensor, k: Tensor, v: Tensor, dtype: str | None, rotates: bool, *options: Any
) -> Reason | None:
    if dtype == "fp8" and (reason := why_no_fp8(backend, gpu_capability(q.device))):
        return dataclasses.replace(reason, fix='use dtype="int8", which is also nearer to exact')
    return why_not_gpu(_of_out_dtype(q, (dtype, rotates, *options)), k, v, *options)


def _why_not_cpu(q: Tensor, k: Tensor, v: Tensor, dtype: str | None, *options: Any) -> Reason | None:
    if dtype != "fp8":
        return None
    return Reason(
        "dtype", "no CPU multiplies e4m3", 'use dtype="int8", which is also nearer to exact, or the reference backend'
    )


def _check_quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dtype: str,
    rotates: bool,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> None:
    op = "quantize_attention"
    no_options = (None, False, None, None, 0.0, None, None, None)
    check(op, q, k, v, *no_options, cu_seqlens_q, cu_seqlens_k, False)
    _check_columns(op, q)


def _fake_quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dtype: str,
    rotates: bool,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> reference.Quantized:
    return reference.empty_operands(q, k, v, dtype, len(q) if cu_seqlens_q is None else len(cu_seqlens_q) - 1)


def _operation(
    function: Callable[..., Any], run: Callable[..., Any], fake: Callable[..., Any], check: Callable[..., None]
) -> Operation:
    limits: dict[str, Callable[..., Reason | None]] = {
        "cuda": functools.partial(_why_not_gpu, "cuda"),
        "triton": functools.partial(_why_not_gpu, "triton"),
        "cpu": _why_not_cpu,
    }
    return Operation(function, check, run, fake, why_not=limits)


ATTENTION_8BIT = _operation(
    attention_8bit, reference.attention_8bit, _fake, functools.partial(_check, "attention_8bit")
)
ATTENTION_8BIT_WITH_LSE = _operation(
    attention_8bit_with_lse,
    reference.attention_8bit_with_lse,
    _fake_with_lse,
    functools.partial(_check, "attention_8bit_with_lse"),
)
QUANTIZE_ATTENTION = _operation(quantize_attention, reference.quantize_attention, _fake_quantize, _check_quantize)
