"""`fp.ops.attention` as an implementation of torch's flash attention: for the whole process, where a user asks for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import Reason
from ..dispatch.calls import decline, take
from ..ops.attention import ATTENTION_WITH_LSE
from . import heads_first

NAME = "forwardpass"
_OP = "_scaled_dot_product_flash_attention"


def register_flash_attention_impl() -> None:
    """Makes "forwardpass" known to `torch.nn.attention`, and changes nothing else.

    `torch.nn.attention.activate_flash_attention_impl("forwardpass")` then gives it every call on a GPU that torch would send to
    its own flash kernel, of every thread and from C++ too, until `torch.nn.attention.restore_flash_attention_impl()`. Those are
    calls without a mask and of 16 bits: `with fp.sdpa():` reaches the others too. What the kernels do not take (dropout, an
    input that requires grad, head dims below 32) runs on torch's own, and `fp.call_counts()` counts it.

    It could not be run on a GPU yet; on a CPU its results and its registration were compared with torch's.
    """
    torch.nn.attention.register_flash_attention_impl(NAME, register_fn=activate)


class Activated:
    """While it lives, the operation of torch runs here."""

    def __init__(self, key: str) -> None:
        try:
            torchs = torch.library.get_kernel(f"aten::{_OP}", key)
        except RuntimeError:  # this build of torch has none
            torchs = None
        self._library: torch.library.Library | None = torch.library.Library("aten", "IMPL")

        def run(
            keyset: Any,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            return_debug_mask: bool = False,
            *,
            scale: float | None = None,
        ) -> Any:
            call = heads_first.arguments(query, key, value, None, is_causal, scale)
            reason = _why_not(query, key, value, dropout_p, return_debug_mask)
            reason = reason or heads_first.why_no_kernel(ATTENTION_WITH_LSE, call)
            if reason is None:
                take(_OP)
                return _results(query, key, *ATTENTION_WITH_LSE(*call))
            decline(_OP, reason)
            if torchs is None:
                raise RuntimeError(
                    f"forwardpass does not take this call of {_OP}, and this torch has nothing else: {reason}"
                )
            return torchs.call_boxed(keyset, query, key, value, dropout_p, is_causal, return_debug_mask, scale=scale)

        self._library.impl(_OP, run, key, with_keyset=True, allow_override=True)

    def remove(self) -> None:
        """Torch's own again; twice is no error."""
        if self._library is not None:
            self._library._destroy()  # its reference alone may live on
        self._library = None


def activate(key: str = "CUDA") -> Activated:
    """What `torch.nn.attention` calls. key: a dispatch key."""
    return Activated(key)


def _why_not(query: Tensor, key: Tensor, value: Tensor, dropout_p: float, return_debug_mask: bool) -> Reason | None:
    if reason := heads_first.why_training((query, key, value), dropout_p):
        return reason
    if return_debug_mask:
        return Reason("debug_mask", "return_debug_mask asks for the probabilities", "leave it")
    return None


def _results(query: Tensor, key: Tensor, o: Tensor, lse: Tensor) -> tuple[Any, ...]:
    """As torch has them, the output with the strides of query: a compiled graph relies on them."""
    o = o.transpose(1, 2)
    if o.stride() != (like := torch.empty_like(query)).stride():
        o = like.copy_(o)
    empty = query.new_empty(0)
    seed, offset = (torch.zeros(size, dtype=torch.uint64, device=query.device) for size in ((2,), ()))
    return o, lse, None, None, query.shape[2], key.shape[2], seed, offset, empty
