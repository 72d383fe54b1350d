"""`kv_cache=` of a swap: a decoder's caches of keys and values become ours when they come to its forward.

What they are is in `integrations.transformers.cache`, which is imported where a swap asks for one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...integrations.transformers import attention as huggingface
from ...integrations.transformers import rotary
from ...integrations.transformers.cache_readers import why_not_read
from ...integrations.transformers.kv_scales import KV_CACHES
from .attention_modules import AttentionDecision
from .choices import Attention, AttentionChoices
from .unpadded_encoders import is_pretrained

#: The attribute of a model whose caches become ours: its kv_cache=.
PLACE = "forwardpass_kv_cache"


@dataclass(frozen=True)
class CacheDecision:
    """The models whose forward is given caches, and what those become; None: what they are."""

    kv_cache: str | None
    models: tuple[nn.Module, ...] = ()
    rotating: tuple[nn.Module, ...] = ()  #: attention whose rotary embedding is left to its cache
    calibrated: tuple[str, ...] = ()  #: attention with scales of its own for an 8-bit cache, which are not used


def check_kv_cache(kv_cache: str | None, attention: Attention) -> None:
    if kv_cache is None:
        return
    if kv_cache not in KV_CACHES:
        raise ValueError(f"kv_cache is None or one of {', '.join(map(repr, KV_CACHES))}, not {kv_cache!r}")
    if any(not choice for choice in AttentionChoices(attention).all):
        raise ValueError(f"kv_cache={kv_cache!r} needs swapped attention, which reads it: drop attention={attention!r}")


def decide_kv_cache(model: nn.Module, attention: AttentionDecision, kv_cache: str | None) -> CacheDecision:
    """ValueError where something would be given such a cache that does not read it."""
    if kv_cache is None:
        return CacheDecision(None)
    name = type(model).__name__
    models = tuple(_with_cache(model))
    readers = [leaf for leaf in attention.leaves if _reads_cache(leaf.module)]
    if not models or not readers:
        raise ValueError(
            f"kv_cache={kv_cache!r} is for decoders of transformers, and no part of this {name} takes a cache: drop it"
        )
    configs = {id(leaf.module.config) for leaf in attention.swapped if huggingface.dispatches(leaf.module)}
    for leaf in readers:
        if id(getattr(leaf.module, "config", None)) not in configs or not huggingface.dispatches(leaf.module):
            reason = next((s.reason for s in attention.skipped if s.fqn == leaf.fqn), "it computes attention itself")
            raise ValueError(
                f"kv_cache={kv_cache!r} needs swapped attention, which reads it, and {leaf.fqn} is not: {reason}"
            )
        if why := why_not_read(leaf.module, KV_CACHES[kv_cache]):
            raise ValueError(f"kv_cache={kv_cache!r} does not go with {type(leaf.module).__name__} ({leaf.fqn}), as {why}: drop "
                             "it")  # fmt: skip
    calibrated = readers if KV_CACHES[kv_cache] is not None else ()
    rotating = tuple(leaf.module for leaf in readers if rotary.why_apart(leaf.module) is None)
    return CacheDecision(
        kv_cache, models, rotating, tuple(leaf.fqn for leaf in calibrated if _is_calibrated(leaf.module))
    )


def _reads_cache(module: nn.Module) -> bool:
    """Attention of a decoder: that of an encoder has a place among layers too, and no cache."""
    return hasattr(module, "layer_idx") and any(getattr(module, name, False) for name in ("is_causal", "is_decoder"))


def _is_calibrated(attention: nn.Module) -> bool:
    """Whether a checkpoint brought scales for its cache: compressed-tensors keeps them beside the projections, ModelOpt in them."""
    places = (attention, *(getattr(attention, name, None) for name in ("k_proj", "v_proj")))
    return any(isinstance(getattr(x, name, None), Tensor) for x in places for name in ("k_scale", "v_scale"))


def _with_cache(model: nn.Module) -> Iterator[nn.Module]:
    from ...integrations.transformers.cache import takes_cache

    for module in model.modules():
        if is_pretrained(module) and takes_cache(module):
            yield module


class CacheSwap:
    """What that changes in a model: a hook on each that is given caches, and an attribute."""

    def __init__(self, decision: CacheDecision):
        """Changes nothing."""
        self._decision = decision
        self._handles: list[Any] = []

    def put(self) -> None:
        if self._decision.kv_cache is None:
            return
        from ...integrations.transformers.cache import Adapter

        adapter = Adapter(KV_CACHES[self._decision.kv_cache])
        for model in self._decision.models:
            vars(model)[PLACE] = self._decision.kv_cache
            self._handles.append(model.register_forward_pre_hook(adapter, prepend=True, with_kwargs=True))
        self._handles += [handle for attention in self._decision.rotating for handle in rotary.defer(attention)]

    def undo(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for model in self._decision.models:
            vars(model).pop(PLACE, None)


def kv_cache_of(model: nn.Module) -> str | None:
    """What a plan would say of this model."""
    return next((vars(m)[PLACE] for m in model.modules() if PLACE in vars(m)), None)
