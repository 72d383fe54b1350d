"""`with fp.sdpa():` gives `F.scaled_dot_product_attention`, whoever calls it, forwardpass's attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..dispatch import Reason
from ..dispatch.calls import Calls, counted, decline
from ..nn.eight_bits import EightBits, attend
from ..ops.attention import ATTENTION
from ..ops.attention_8bit import DTYPES
from ..ops.common.quantized_rows import FLOATS
from . import heads_first

_CALL = "scaled_dot_product_attention"
_WITHIN = Reason(
    "within",
    "nn.MultiheadAttention's function calls it where no mode is asked",
    "use fp.swap(model, attention=True)",
)


@contextmanager
def sdpa(attention: str | bool = True, *, crossover: int | None = None) -> Iterator[Calls]:
    """Within the block and this thread, `F.scaled_dot_product_attention` runs on `fp.ops.attention`, or in 8 bits.

    For models that call it themselves: timm, diffusers, plain torch. Every argument is translated exactly (is_causal, which is
    top-left in torch, attn_mask, scale, enable_gqa, autocast), or the call is left to torch, with a reason: dropout_p, an input
    that requires grad in grad mode, a dtype or a shape that no kernel takes. Under `torch.compile(fullgraph=True)` too, entered
    inside of the compiled function or around the call of it. Blocks may be nested; each counts its own calls. Torch's own
    nn.MultiheadAttention and encoder layers call it where no mode is asked, which is counted too: `fp.swap` takes those.

    What `torch.nn.attention.sdpa_kernel` chooses holds for calls that are left to torch.

    Every call of torch within the block passes by Python, which is about a microsecond each; compiled code pays nothing.

    Args:
        attention: True: in the dtype of the operands. "int8": calls of enough rows and keys run on `fp.ops.attention_8bit`.
        crossover: how many those are, as `fp.Config` has it.

    Yields:
        Calls: how many ran the kernel, and how many fell back for which reason. `print` it.
    """
    bits = None if attention is True else EightBits(attention, crossover)  # type: ignore[arg-type]  # which it refuses
    if bits is None and crossover is not None:
        raise ValueError(
            f"crossover={crossover} is for attention in 8 bits: pass sdpa({DTYPES[0]!r}, crossover={crossover})"
        )
    with counted(Calls()) as calls, _Mode(bits):
        yield calls


def forward_within(
    module: nn.Module, bits: EightBits | None, before: Callable[..., Any] | None, *args: Any, **kwargs: Any
) -> Any:
    """The forward of swapped attention that calls `F.scaled_dot_product_attention` itself: as it is, and that call runs as within
    `sdpa`. before: what stood in the place of its class's forward, such as a hook of accelerate."""
    with _Mode(bits, module):
        return type(module).forward(module, *args, **kwargs) if before is None else before(*args, **kwargs)


class _Mode(TorchFunctionMode):
    """module: whose calls these are; None: anyone's."""

    def __init__(self, bits: EightBits | None, module: nn.Module | None = None) -> None:
        super().__init__()
        self.bits, self.module = bits, module

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(func, self.bits, self.module, *args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:
            decline("multi_head_attention_forward", _WITHIN)
        elif func is Tensor.unflatten and torch.compiler.is_compiling():
            func = torch.unflatten  # the method calls super(), which torch before 2.15 does not trace within a mode
        return func(*args, **(kwargs or {}))


def _attention(
    torch_attention: Callable[..., Tensor],
    bits: EightBits | None,
    module: nn.Module | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    call = query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
    name = _CALL if module is None else type(module).__name__
    reason = _why_not(*call)
    if reason is None:
        flat = query.dim() == 3  # one head
        q, k, v = (t.unsqueeze(1) if flat else t for t in (query, key, value))
        mask = attn_mask.unsqueeze(1) if flat and attn_mask is not None and attn_mask.dim() == 3 else attn_mask
        arguments = heads_first.arguments(q, k, v, mask, is_causal, scale)
        reason = heads_first.why_no_kernel(ATTENTION, arguments)
    if reason is None:
        o = attend(module, arguments, bits, name).transpose(1, 2)
        return o.squeeze(1) if flat else o
    decline(name, reason)
    return torch_attention(*call[:6], scale=scale, enable_gqa=enable_gqa)


def _why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Reason | None:
    """What translates into no call of `fp.ops.attention`; what torch refuses is torch's to refuse."""
    qkv = query, key, value
    tensors = qkv if mask is None else (*qkv, mask)
    if any(type(t) not in (Tensor, nn.Parameter) or t.is_nested for t in tensors):
        return Reason("tensor_class", "an operand is nested, or of a subclass of Tensor", "pass plain tensors")
    if reason := heads_first.why_training(tensors, dropout_p):
        return reason
    if query.dim() not in (3, 4) or any(t.dim() != query.dim() for t in qkv) or any(t.numel() == 0 for t in qkv):
        return Reason(
            "shape", "query, key and value are not all [B, H, S, D], or [B, S, D], with elements", "reshape them"
        )
    if scale is not None and not scale > 0:
        return Reason("scale", "scale is not positive", "negate the query for a negative one")
    if is_causal and mask is not None:
        return Reason("mask", "both is_causal and attn_mask are given", "put both into attn_mask")
    if any(t.device != query.device for t in tensors):
        return Reason("device", "the operands are on several devices", "move them to one")
    dtypes = {heads_first.cast(t.dtype, query.device) for t in qkv}
    if len(dtypes) > 1 or not dtypes <= set(FLOATS):
        return Reason("dtype", "query, key and value are not all float16, all bfloat16 or all float32", "convert them")
    if mask is not None and heads_first.cast(mask.dtype, query.device) not in (torch.bool, torch.float32, *dtypes):
        return Reason("mask", "attn_mask is neither bool, nor float32, nor of query's dtype", "convert it")
    shapes = [t.unsqueeze(1).shape if t.dim() == 3 else t.shape for t in qkv]
    batch, heads = (max(s[axis] for s in shapes) for axis in (0, 1))
    if any(s[0] != 1 and s[0] != batch for s in shapes) or shapes[0][3] != shapes[1][3] or shapes[1][2] != shapes[2][2]:
        return Reason("shape", "query, key and value do not fit each other", "see torch's message")
    kv_heads = {s[1] for s in shapes[1:]} - {1}
    if len(kv_heads) > 1 or any(n != heads and not (enable_gqa and heads % n == 0) for n in kv_heads):
        return Reason(
            "heads", "the heads of key and value are neither query's, nor one, nor grouped by enable_gqa", "repeat them"
        )
    if mask is not None:
        shape = (
            [batch, heads, shapes[0][2], shapes[1][2]] if query.dim() == 4 else [batch, query.shape[1], key.shape[1]]
        )
        if mask.dim() > len(shape) or any(n != 1 and n != w for n, w in zip(reversed(mask.shape), reversed(shape))):
            return Reason("mask", "attn_mask does not broadcast to the scores", "see torch's message")
    return None
