"""attention and attention_with_lse: softmax(q k) v without its scores in memory.

The contract; what it computes is in reference.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...common.environment import cpu_tier
from ...dispatch import DEBUG, Operation, Reason
from ..common.quantized_rows import FLOATS, check_elements, check_vector
from ..common.values import may_look
from . import reference

#: Between these is a scale of the softmax: float32 has them as 0 and as infinity.
SCALES = (2.0**-150, 2.0**128 - 2.0**103)
#: (head_dim of q and k, of v) for which there are kernels; other head dims run in the next one of as many columns or more.
BUCKETS = ((64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128))
#: The same of CUDA's kernels with a mask, ALiBi or softcap (csrc/kernels/attention/table_modified_sm80.cu).
MODIFIED_BUCKETS = ((64, 64), (128, 128), (256, 256))
#: Rows of an operand that are so many elements apart have offsets in a tile of 128 rows beyond the 32 bits that Triton's
#: kernel has for them: with 64, d = 256 spills (static, sm_80).
MOST_APART = 2**24
Window = tuple[int | None, int | None]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
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
    """Attention of every head: `softmax(scale * q @ k.T) @ v`, with what models add to the scores.

    Rows stand at the end of the keys: row i of Sq at i + Sk - Sq, its place below. The score of row i and key j::

        s = scale * <q_i, k_j>
        s = softcap * tanh(s / softcap)             where softcap > 0
        s = s - alibi_slopes[h] * |place - j|       with alibi_slopes
        s = s + mask[b, h, i, j]                    with a mask that is not bool

    Scores and their softmax are float32; 16-bit backends round the probabilities to q's dtype before the product with v.

    Args:
        q: float16, bfloat16 (or, without kernels, float32) [B, Sq, H, D]; last stride 1, others free, 0 too.
        k: [B, Sk, Hk, D] of q's dtype; H is a multiple of Hk, and head h reads k's and v's head h // (H / Hk).
        v: [B, Sk, Hk, Dv] of q's dtype.
        scale: positive; None: 1 / sqrt(D).
        causal: keys up to a row's place only, j <= place: of more keys than rows, the last rows' (bottom-right).
        window: (left, right): keys with place - left <= j <= place + right only; None for a side: unlimited.
        softcap: 0: none.
        mask: broadcastable to [B, H, Sq, Sk], any strides. Bool: True where a key may be attended to. float32 or q's dtype:
            added; -inf where it may not, and so are values below -2.35e38, as the least of float32 and bfloat16.
        alibi_slopes: float32 [H] or [B, H].
        sinks: float32 or q's dtype [H]: a logit more in each row's softmax, whose value is 0; neither scaled nor softcapped.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1]: varlen, packed sequences in place of a batch, the b-th from
            cu_seqlens[b] to cu_seqlens[b + 1]. They rise from 0, cu_seqlens_q to Tq and cu_seqlens_k to at most Tk. q is then
            [Tq, H, D], k [Tk, Hk, D] and v [Tk, Hk, Dv]; Sq and Sk are each sequence's own; no mask. No host looks at the
            numbers. The first one beyond Tq or Tk gives NaN, on every backend, in the rows of the sequence that it ends and of all
            behind; one that falls also in those of the sequence before, as either of the two numbers may be wrong; a first
            number that is not 0 in all rows. Rows of no sequence are NaN, and keys of none are not read.
        batch_invariant: a row's bits do not depend on what else is in the batch.

    Returns:
        [B, Sq, H, Dv], or [Tq, H, Dv], of q's dtype, contiguous. A row that may attend to no key is 0; one whose sequence is not
        known by cu_seqlens is NaN. NaN passes through; a NaN or an infinity in a key or value that is masked may do so too (0 *
        NaN is NaN), but not from another sequence, and not where the call runs our kernel for CPUs instead of torch's.

    Raises:
        TypeError: an argument is of another type or dtype than above.
        ValueError: a shape, layout, device, value or combination of arguments is not one of those above. With
            FORWARDPASS_DEBUG=1 also: cu_seqlens give NaN.
        Unsupported: a backend asked for by name cannot run these arguments. Kernels for GPUs take float16 and bfloat16, with
            D = Dv a multiple of 8 from 32 to 256, or D = 192 and Dv = 128.
        RuntimeError: an input requires grad, in grad mode: operations have no backward.

    Example:
        >>> q = torch.randn(2, 16, 8, 64)
        >>> k, v = torch.randn(2, 20, 2, 64), torch.randn(2, 20, 2, 64)  # a head of them serves 4 of q
        >>> fp.ops.attention(q, k, v, causal=True).shape
        torch.Size([2, 16, 8, 64])
    """
    left, right = split_window("attention", window)
    return ATTENTION(
        q, k, v, scale, causal, left, right, softcap, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, batch_invariant
    )  # fmt: skip


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
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
    """attention, and the natural logarithm of each row's sum of exp(s): what merges attention over parts of the keys.

    Args:
        q: as in attention, and so is everything else.

    Returns:
        o as attention; lse float32 [B, H, Sq], or [H, Tq], contiguous: sinks included, -inf where a row has neither key nor
        sink, NaN where its sequence is not known.

    Raises:
        TypeError: an argument is of another type or dtype than above.
        ValueError: a shape, layout, device, value or combination of arguments is not one of those above.
        Unsupported: a backend asked for by name cannot run these arguments.
        RuntimeError: an input requires grad, in grad mode: operations have no backward.

    Example:
        >>> q, k, v = torch.randn(3, 2, 16, 8, 64)
        >>> o, lse = fp.ops.attention_with_lse(q, k, v)
        >>> o.shape, lse.shape
        (torch.Size([2, 16, 8, 64]), torch.Size([2, 8, 16]))
    """
    left, right = split_window("attention_with_lse", window)
    return ATTENTION_WITH_LSE(
        q, k, v, scale, causal, left, right, softcap, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, batch_invariant
    )  # fmt: skip


def split_window(op: str, window: Window | None) -> Window:
    """(left, right), which the schema has apart."""
    if window is None:
        return None, None
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise TypeError(f"{op}: window must be (left, right) or None, not {window!r}")
    left, right = window
    return left, right


def _check_operands(op: str, q: Tensor, k: Tensor, v: Tensor, packed: bool) -> None:
    for name, x, shape in zip("qkv", (q, k, v), ("q, H, D]", "k, Hk, D]", "k, Hk, Dv]")):
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, not {type(x).__name__}")
        if x.dtype not in FLOATS:
            raise TypeError(
                f"{op}: {name} must be float16, bfloat16 or float32, not {x.dtype}: convert it with .to(torch.float16)"
            )
        if x.dtype != q.dtype:
            raise TypeError(f"{op}: {name} must have the dtype of q, {q.dtype}, not {x.dtype}: convert one of them")
        if x.device != q.device:
            raise ValueError(f"{op}: {name} is on {x.device} and q on {q.device}: move one of them")
        if x.dim() != (3 if packed else 4):
            shape_text = f"[T{shape} with cu_seqlens" if packed else f"[B, S{shape} without cu_seqlens"
            raise ValueError(f"{op}: {name} must be {shape_text}, and has shape {tuple(x.shape)}")
        if x.shape[-1] == 0 or x.shape[-2] == 0:
            raise ValueError(f"{op}: {name} must have a head and a column, and has shape {tuple(x.shape)}")
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(
                f"{op}: the last dimension of {name} must have stride 1, not {x.stride(-1)}: pass {name}.contiguous()"
            )
        if any(n > 2**30 for n in x.shape):
            raise ValueError(f"{op}: {name} must have at most 2^30 rows, not {tuple(x.shape)}: split it")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"{op}: k and v must have the same keys and heads, and have shapes {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"{op}: q and k must have the same last dimension, and have shapes {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if not packed and q.shape[0] != k.shape[0]:
        raise ValueError(
            f"{op}: q, k and v must be of one batch size, and q has {q.shape[0]} and k {k.shape[0]}: expand one"
        )
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(f"{op}: the heads of q must be a multiple of those of k and v, and are {q.shape[-2]} and "
                         f"{k.shape[-2]}: repeat those of k and v")  # fmt: skip


def _check_cu_seqlens(op: str, q: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> bool:
    """Whether there are any; checked before q, k and v, whose dimensions depend on it."""
    if cu_seqlens_q is None and cu_seqlens_k is None:
        return False
    if cu_seqlens_q is None or cu_seqlens_k is None:
        side = "q" if cu_seqlens_k is None else "k"
        raise ValueError(f"{op}: cu_seqlens_q and cu_seqlens_k go together, and only cu_seqlens_{side} was given")
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(cu, Tensor) or cu.dtype != torch.int32:
            raise TypeError(
                f"{op}: {name} must be an int32 tensor, not {getattr(cu, 'dtype', type(cu).__name__)}: use .int()"
            )
        if cu.dim() != 1 or cu.numel() < 1 or not cu.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous [B + 1], and has shape {tuple(cu.shape)}")
        if cu.numel() != cu_seqlens_q.numel():
            raise ValueError(f"{op}: cu_seqlens_q and cu_seqlens_k must have as many elements, one more than there are "
                             f"sequences, and have {cu_seqlens_q.numel()} and {cu.numel()}")  # fmt: skip
        if isinstance(q, Tensor) and cu.device != q.device:
            raise ValueError(f"{op}: {name} is on {cu.device} and q on {q.device}: move one of them")
    return True


def _check_rise(op: str, name: str, cu_seqlens: Tensor, total: int, covers: bool) -> None:
    """Under FORWARDPASS_DEBUG, whether all sequences are known, and, where it `covers` them, have all rows. Without it rows are
    NaN instead, on every backend: to look would be to wait for a GPU."""
    if not DEBUG or not may_look(op, cu_seqlens):
        return
    begin = torch.cat([cu_seqlens.new_zeros(1), cu_seqlens[:-1]])
    wrong = (cu_seqlens < begin) | (cu_seqlens > total)
    wrong[0] = cu_seqlens[0] != 0
    if covers and not wrong.any():
        wrong[-1] = cu_seqlens[-1] != total
    if wrong.any():
        b = int(wrong.nonzero()[0])
        end = f"{total}, the rows of q" if covers else f"at most {total}, the rows of k"
        raise ValueError(f"{op}: {name} must rise from 0 to {end}, and entry {b} is {int(cu_seqlens[b])}")


def _check_mask(op: str, mask: Tensor, q: Tensor, k: Tensor, packed: bool) -> None:
    if not isinstance(mask, Tensor) or mask.dtype not in (torch.bool, torch.float32, q.dtype):
        dtype = getattr(mask, "dtype", type(mask).__name__)
        raise TypeError(
            f"{op}: mask must be a tensor of torch.bool, torch.float32 or q's dtype, {q.dtype}, not {dtype}: convert it, "
            "integers with .bool()"
        )
    if packed:
        raise ValueError(
            f"{op}: a mask does not go with cu_seqlens: use causal, window or alibi_slopes, or a padded batch"
        )
    full_shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if mask.dim() > 4 or any(n not in (1, w) for n, w in zip(mask.shape[::-1], full_shape[::-1])):
        raise ValueError(
            f"{op}: mask must broadcast to [B, H, Sq, Sk], here {list(full_shape)}, and has shape {tuple(mask.shape)}"
        )
    if mask.device != q.device:
        raise ValueError(f"{op}: mask is on {mask.device} and q on {q.device}: move one of them")


def check_window(op: str, left: int | None, right: int | None) -> None:
    for side in (left, right):
        if side is not None and (isinstance(side, bool) or not isinstance(side, int)):
            raise TypeError(f"{op}: each side of window must be an integer or None, not {side!r}")
        if side is not None and side < 0:
            raise ValueError(f"{op}: each side of window must be at least 0, not {side}: None is unlimited")


def check_alibi_slopes(op: str, slopes: Tensor | None, batch: int, heads: int, q: Tensor) -> None:
    per_batch = isinstance(slopes, Tensor) and slopes.dim() == 2
    check_elements(op, "alibi_slopes", slopes, batch * heads if per_batch else heads, torch.float32, q)
    if slopes is not None and tuple(slopes.shape) not in ((heads,), (batch, heads)):
        raise ValueError(
            f"{op}: alibi_slopes must be [{heads}] or [{batch}, {heads}], and has shape {tuple(slopes.shape)}"
        )


def check_number(op: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, not {type(value).__name__}: pass .item() of a tensor")
    return value


def check_scale(op: str, scale: float | None) -> None:
    if scale is not None and not SCALES[0] < check_number(op, "scale", scale) < SCALES[1]:
        raise ValueError(
            f"{op}: scale must be positive and finite in float32, not {scale}: negate q for a negative one"
        )


def check(
    op: str,
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
    packed = _check_cu_seqlens(op, q, cu_seqlens_q, cu_seqlens_k)
    _check_operands(op, q, k, v, packed)
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        _check_rise(op, "cu_seqlens_q", cu_seqlens_q, q.shape[0], True)
        _check_rise(op, "cu_seqlens_k", cu_seqlens_k, k.shape[0], False)
    heads = q.shape[-2]
    batch = cu_seqlens_q.numel() - 1 if cu_seqlens_q is not None else q.shape[0]
    check_scale(op, scale)
    if not 0 <= check_number(op, "softcap", softcap) < math.inf:
        raise ValueError(f"{op}: softcap must be finite and at least 0, which is none, not {softcap}")
    for name, flag in (("causal", causal), ("batch_invariant", batch_invariant)):
        if not isinstance(flag, bool):
            raise TypeError(f"{op}: {name} must be True or False, not {flag!r}")
    check_window(op, window_left, window_right)
    if mask is not None:
        _check_mask(op, mask, q, k, packed)
    check_alibi_slopes(op, alibi_slopes, batch, heads, q)
    check_vector(op, "sinks", sinks, heads, (torch.float32, q.dtype), q)


def fake(q: Tensor, k: Tensor, v: Tensor, *options: object) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


def fake_with_lse(q: Tensor, k: Tensor, v: Tensor, *options: object) -> tuple[Tensor, Tensor]:
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return fake(q, k, v), q.new_empty(shape, dtype=torch.float32)


def bucket(head_dim: int, value_dim: int) -> tuple[int, int] | None:
    """The entry of BUCKETS in which a kernel runs these head dims, None where there is none."""
    if head_dim != value_dim:
        return (head_dim, value_dim) if (head_dim, value_dim) in BUCKETS else None
    if head_dim % 8 or head_dim < 32:
        return None
    return next((b for b in BUCKETS if b[0] == b[1] >= head_dim), None)


def _notes_on_buckets(head_dim: int, value_dim: int, modified: bool) -> list[str]:
    """Sentences: in which kernels head dims run that have none of their own, and the work that this adds."""
    dims = head_dim, value_dim
    if (triton := bucket(*dims)) is None:
        return []
    cuda = next(b for b in MODIFIED_BUCKETS if b[0] >= head_dim) if modified else triton
    if cuda == triton:
        kernels = {"CUDA and Triton kernels": cuda}
    else:
        kernels = {"CUDA kernels with a mask, ALiBi or softcap": cuda, "Triton kernels": triton}

    def text(pair: tuple[int, int]) -> str:
        return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]} with {pair[1]} of v"

    return [f"head dim {text(dims)} runs as {text(b)} in {where}: {sum(b) / sum(dims):.2f} times the work"
            for where, b in kernels.items() if b != dims]  # fmt: skip


def faster_than_torch(device: torch.device, dtype: torch.dtype, head_dim: int, rows: int) -> bool:
    """Whether the cpu backend takes this to its own kernel (csrc/cpu/attention_rows_cpu.cpp), in place of torch's."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.float16, torch.bfloat16) or cpu_tier() is None:
        return False
    return torch.ops.forwardpass._cpu_has_attention(dtype, head_dim, rows)


def why_not_gpu(q: Tensor, k: Tensor | None, v: Tensor | None, *options: Any) -> Reason | None:
    if q.dtype == torch.float32:
        return Reason(
            "dtype", "tensor cores multiply 16-bit operands, and q is float32", "convert q, k and v to bfloat16"
        )
    if v is not None and bucket(dims := q.shape[-1], values := v.shape[-1]) is None:
        return Reason(
            "head_dim",
            f"the kernels take head dims that are multiples of 8 from 32 to 256, or 192 with 128 of v, not {dims} with {values}",
            "use the reference backend; smaller ones can be padded with zeros, and scale passed",
        )
    return None


def _why_not_cpu(q: Tensor, k: Tensor | None, v: Tensor | None, *options: Any) -> Reason | None:
    """It takes what torch's scaled_dot_product_attention takes, which it hands most on to."""
    if options[4]:
        return Reason("softcap", "torch's fused attention for CPUs has no softcap", "use the reference backend")
    if v is not None and q.shape[-1] != (values := v.shape[-1]):
        return Reason(
            "head_dim",
            f"torch's fused attention for CPUs takes one head dim for q, k and v, not {q.shape[-1]} and {values}",
            "use the reference backend",
        )
    return None


def _notes(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> list[str]:
    notes = []
    size = q.element_size()
    for name, x in (("q", q), ("k", k), ("v", v)):
        strides = [s for n, s in zip(x.shape[:-1], x.stride()) if n > 1]
        if x.numel() and any(s * size % 16 for s in (*strides, x.storage_offset())):
            notes.append(f"strides {x.stride()} and the first byte of {name} are not all multiples of 16 bytes: CUDA and Triton "
                         f"kernels first copy it, {x.numel() * size} bytes")  # fmt: skip
        elif x.shape[-3] > 1 and x.stride(-3) >= MOST_APART:
            notes.append(f"rows of {name} are {x.stride(-3)} elements apart, {MOST_APART} or more: Triton's kernel first "
                         f"copies it, {x.numel() * size} bytes")  # fmt: skip
    _, causal, left, right, softcap, mask, alibi_slopes = options[:7]
    modified = softcap > 0 or mask is not None or alibi_slopes is not None
    notes += _notes_on_buckets(q.shape[-1], v.shape[-1], modified)
    limited = left is not None or right is not None or (causal and q.shape[-3] != k.shape[-3])
    faster = faster_than_torch(q.device, q.dtype, q.shape[-1], q.shape[-3])
    if q.device.type == "cpu" and ((limited and not faster) or mask is not None or alibi_slopes is not None):
        notes.append("it takes an additive mask alone: the cpu backend writes one, of at most 16 MiB or one row of every head at a "
                     "time")  # fmt: skip
    return notes


def _operation(function: Callable[..., Any], run: Callable[..., Any], fake: Callable[..., Any]) -> Operation:
    limits = {"cuda": why_not_gpu, "triton": why_not_gpu, "cpu": _why_not_cpu}
    return Operation(function, functools.partial(check, function.__name__), run, fake, why_not=limits, notes=_notes)


ATTENTION = _operation(attention, reference.attention, fake)
ATTENTION_WITH_LSE = _operation(attention_with_lse, reference.attention_with_lse, fake_with_lse)
