"""The calls that models make, [B, H, S, D] and top-left, as arguments of the operation, [B, S, H, D] and bottom-right."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled as is_any_autocast_enabled  # asked before what costs more

from ..dispatch import Operation, Reason, asked_for_by_name, interpreter
from ..ops.attention import ATTENTION, ATTENTION_WITH_LSE
from ..ops.attention_decode import OPERATION as ATTENTION_DECODE
from ..ops.common.quantized_rows import FLOATS
from .transformers.kv_scales import scale_of


def arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    *,
    left: int | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Any, ...]:
    """What `ATTENTION` takes, of views: nothing is copied but an operand whose last dimension is strided.

    Args:
        query, key, value: [B, H, S, D] as scaled_dot_product_attention broadcasts them over B, and over H where one has one.
        mask: as the operation takes it.
        is_causal: row i sees keys up to i, however many there are.
        left: keys before a row that it sees, with as many keys as rows.
    """
    q, k, v = _rows(query), _rows(key), _rows(value)
    if mask is not None and (dtype := cast(mask.dtype, mask.device)) != mask.dtype:
        mask = mask.to(dtype)
    rows, keys = q.shape[1], k.shape[1]
    right = None
    if is_causal and keys > rows:  # none of the last keys is seen by any row
        k, v = k[:, :rows], v[:, :rows]
        mask = mask if mask is None or mask.shape[-1] == 1 else mask[..., :rows]
    elif is_causal and keys < rows:  # the operation's row i stands at i + keys - rows
        right = rows - keys
    if not (q.shape[0] == k.shape[0] == v.shape[0] and q.shape[2] == k.shape[2] == v.shape[2]):
        batch = max(t.shape[0] for t in (q, k, v))
        q, k, v = (t if t.shape[0] == batch else t.expand(batch, -1, -1, -1) for t in (q, k, v))
        kv_heads = max(k.shape[2], v.shape[2])
        q = q.expand(-1, -1, kv_heads, -1) if q.shape[2] == 1 else q
        k, v = (t if t.shape[2] == kv_heads else t.expand(-1, -1, kv_heads, -1) for t in (k, v))
    causal = is_causal and right is None
    return q, k, v, scale, causal, left, right, softcap, mask, None, sinks, None, None, False


def decode_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor | None,
    scale: float | None,
    softcap: float,
    sinks: Tensor | None,
) -> tuple[Any, ...] | None:
    """What `ATTENTION_DECODE` takes of a step of decoding, of views; None where it is no such step or no kernel takes it.

    Args:
        query, key, value: [B, H, S, D] of one batch size and dtype; or key and value are of 8 bits and carry their scales.
        bounds: as in `key_ranges`; None: the one row sees all keys.
    """
    batch, heads, rows, dim = query.shape
    if bounds is None and rows != 1:
        return None
    if key.shape[0] != batch or value.shape[:3] != key.shape[:3] or key.shape[3] != dim or heads % key.shape[1]:
        return None
    q, k, v = _rows(query), _rows(key), _rows(value)
    k_scale, v_scale = scale_of(key), scale_of(value)
    if q.dtype not in FLOATS or (k_scale is None and not q.dtype == k.dtype == v.dtype):
        return None
    if bounds is None:
        leftpad, seq_lens = None, torch.full((batch,), k.shape[1], dtype=torch.int32, device=q.device)
    else:
        leftpad, seq_lens = bounds[0, 0]
    call = q, k, v, seq_lens, None, k_scale, v_scale, scale, None, None, softcap, sinks, False, leftpad, None
    return call if why_no_kernel(ATTENTION_DECODE, call) is None else None


def _rows(x: Tensor) -> Tensor:
    if is_any_autocast_enabled() and (dtype := cast(x.dtype, x.device)) != x.dtype:
        x = x.to(dtype)
    return (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()).transpose(1, 2)


def cast(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What torch's own attention would convert this dtype to: autocast takes all floats but float64 to its dtype."""
    if torch.is_autocast_enabled(device.type) and dtype in FLOATS:
        return torch.get_autocast_dtype(device.type)
    return dtype


def why_training(tensors: Iterable[Tensor | None], dropout: float) -> Reason | None:
    """Why a call that is not inference falls back; None where it is inference."""
    if dropout:
        return Reason("dropout", "dropout is not 0, and forwardpass is for inference", "call model.eval()")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return Reason("grad", "an operand requires grad, and forwardpass has no backward", "use torch.inference_mode()")
    return None


def _limits_of_attention(call: tuple[Any, ...]) -> tuple[Any, ...]:
    q, v, softcap = call[0], call[2], call[7]
    return q.dtype, q.device, q.shape[-1], v.shape[-1], softcap > 0


def _limits_of_decode(call: tuple[Any, ...]) -> tuple[Any, ...]:
    q, k, v = call[:3]
    return q.dtype, k.dtype, q.device, q.shape[-1], v.shape[-1], _is_aligned(k) and _is_aligned(v)


def _is_aligned(x: Tensor) -> bool:
    """Whether each row begins at a multiple of 16 bytes of the storage."""
    batch, rows, heads, _ = x.stride()
    return (batch | rows | heads | int(x.storage_offset())) * x.element_size() % 16 == 0


#: All of a call that the limits of an operation's backends ask for; asking them takes 6 us.
_LIMITS = {
    ATTENTION.name: _limits_of_attention,
    ATTENTION_WITH_LSE.name: _limits_of_attention,
    ATTENTION_DECODE.name: _limits_of_decode,
}
_reasons: dict[Any, Reason | None] = {}


def why_no_kernel(operation: Operation, call: tuple[Any, ...]) -> Reason | None:
    """Where no kernel takes a call of one of these three operations, why; torch's own is then faster than the reference."""
    if asked_for_by_name():
        return None
    if torch.compiler.is_compiling():
        return _ask(operation, call)
    key = operation.name, getattr(interpreter(), "arch", None), *_LIMITS[operation.name](call)
    if key not in _reasons:
        _reasons[key] = _ask(operation, call)
    return _reasons[key]


def _ask(operation: Operation, call: tuple[Any, ...]) -> Reason | None:
    if operation.choose(*call) != "reference":
        return None
    return operation.why_not("cpu" if call[0].device.type == "cpu" else "cuda", *call)
