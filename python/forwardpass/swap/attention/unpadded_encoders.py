"""Which encoders of a model may run without their padding once they are swapped, and what that changes in the model.

What runs then, and when a call stays padded all the same, is in `integrations.transformers.unpadding`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...common.batches import device_of
from ...dispatch import Reason, gpu_takes
from ...integrations.sentence_transformers import caller_of
from ...integrations.transformers.attention import dispatches
from ...integrations.transformers.unpadding import CLASSES, PLACE, Stack, why_replaced
from ...proofs.walker import Leaf
from .. import rules
from ..plan import UNPAD
from ..report import Unpadded, Unpadding
from .attention_modules import NOT_PLANNED, AttentionDecision, holders_of_configs, why_not_named

_OFF = Reason("unpad_off", "unpad=False keeps it", "drop it")
_NO_ENCODER = Reason("no_encoder", "there is no text encoder of transformers", "leave it")
_NOT_PLANNED = Reason("not_planned", "the plan keeps it", "plan again to change that")


@dataclass(frozen=True)
class UnpaddingDecision:
    """The stacks that run without padding, and why the others do not, or all where there are none."""

    stacks: tuple[Stack, ...]
    reason: Reason | None

    @property
    def planned(self) -> str | None:
        """What a plan says of it."""
        return UNPAD[any(stack.by_interface for stack in self.stacks)] if self.stacks else None

    @property
    def named(self) -> tuple[nn.Module, ...]:
        """Attention whose config has to name our implementation, swapped or not."""
        return tuple(module for stack in self.stacks if stack.by_interface for module in stack.attention)

    def report(self, attention: AttentionDecision) -> Unpadding:
        swapped = {id(leaf.module) for leaf in attention.swapped}

        def kind(stack: Stack) -> str:
            kernels = all(id(m) in swapped or not gpu_takes(device_of(m)) for m in stack.attention)
            return "varlen" if stack.by_interface and kernels else "padded"

        return Unpadding(tuple(Unpadded(x.fqn, len(x.layers), kind(x)) for x in self.stacks), self.reason)


def check_unpad(unpad: str | bool) -> None:
    if unpad not in ("auto", True, False) or (isinstance(unpad, int) and not isinstance(unpad, bool)):
        raise TypeError(f'unpad is "auto", True or False, not {unpad!r}')


def decide_unpadding(
    context: rules.Context,
    swapped: list[Leaf],
    attention: AttentionDecision,
    unpad: str | bool,
    planned: str | None = UNPAD[1],
) -> UnpaddingDecision:
    """`unpad` is that of `fp.swap`; planned: that of a plan or a checkpoint. swapped: layers."""
    if not unpad or planned is None:
        return UnpaddingDecision((), _NOT_PLANNED if unpad else _OFF)
    changed = {id(leaf.module) for leaf in (*swapped, *attention.swapped)}
    stacks, reasons = [], []
    for fqn, model, layers in _stacks(context.model, attention):
        stack = _stack(fqn, model, layers, attention, planned, caller_of(context.model, model))
        reason = _why_not(stack, changed)
        if reason is None:
            stacks.append(stack)
        else:
            reasons.append(reason)
    return UnpaddingDecision(tuple(stacks), next(iter(reasons), None if stacks else _NO_ENCODER))


def stacks_of(model: nn.Module, attention: AttentionDecision) -> Iterator[tuple[str, nn.ModuleList]]:
    """The lists of an encoder's layers, by name: of one class, with one attention each that sees both sides."""
    for fqn, holder, layers in _stacks(model, attention):
        if not getattr(holder.config, "is_decoder", False):
            yield fqn, layers


def _stacks(model: nn.Module, attention: AttentionDecision) -> Iterator[tuple[str, nn.Module, nn.ModuleList]]:
    """Each list of layers of one class with one attention each that sees both sides, its name, and the model of transformers that
    holds it and takes tokens and a mask. A run says whether they compute row by row besides, and the code around them nothing in
    between."""
    attending = {id(leaf.module) for leaf in attention.leaves}
    for fqn, layers in model.named_modules():
        if not isinstance(layers, nn.ModuleList) or len({type(layer) for layer in layers}) != 1:
            continue
        names = fqn.split(".")
        above = (model.get_submodule(".".join(names[:i])) for i in reversed(range(len(names))))
        holder = next((m for m in above if is_pretrained(m)), None)
        if (
            holder is not None
            and {"input_ids", "attention_mask"} <= inspect.signature(type(holder).forward).parameters.keys()
            and all(_is_of_encoder(layer, attending, holder) for layer in layers)
        ):
            yield fqn, holder, layers


def _is_of_encoder(layer: nn.Module, attending: set[int], holder: nn.Module) -> bool:
    within = [m for m in layer.modules() if id(m) in attending]
    is_decoder = getattr(holder.config, "is_decoder", False)  # which has a reason of its own
    return (
        len(within) == 1
        and within[0] is not layer
        and (is_decoder or getattr(within[0], "is_causal", False) is not True)
    )


def is_pretrained(module: nn.Module) -> bool:
    return any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__)


def _stack(
    fqn: str,
    model: nn.Module,
    layers: nn.ModuleList,
    attention: AttentionDecision,
    planned: str,
    caller: nn.Module | None,
) -> Stack:
    below = {id(m) for layer in layers for m in layer.modules()}
    modules = tuple(leaf.module for leaf in attention.leaves if id(leaf.module) in below)
    reasons = {s.fqn: s.reason for s in attention.skipped}
    swapped = {id(leaf.module) for leaf in attention.swapped}
    holders = holders_of_configs(model).get(id(model.config), [])

    def comes_to_us(leaf: Leaf) -> bool:
        if not dispatches(leaf.module) or leaf.module.config is not model.config:
            return False
        if id(leaf.module) in swapped:
            return True
        reason = reasons[leaf.fqn]
        is_kept = planned != UNPAD[1] if reason == NOT_PLANNED else rules.KINDS.get(reason.code) == "user"
        return not is_kept and why_not_named(leaf.module, holders) is None

    by_interface = all(comes_to_us(leaf) for leaf in attention.leaves if id(leaf.module) in below)
    return Stack(fqn, model, tuple(layers), modules, caller, by_interface)


def _why_not(stack: Stack, changed: set[int]) -> Reason | None:
    config: Any = stack.model.config
    inside = {id(m): m for layer in stack.layers for m in layer.modules()}
    if getattr(config, "is_decoder", False):
        return Reason("decoder", "it is a decoder", "leave it")
    if changed.isdisjoint(inside):
        return Reason("unchanged", "none of its layers is swapped", "see why they are skipped")
    if (replaced := why_replaced(stack.classes)) is not None:
        return Reason("replaced", f"the code of {replaced} is not what transformers has in its file",
                      "undo what replaced it, to run without padding")  # fmt: skip
    if len({id(layer) for layer in stack.layers}) < len(stack.layers) or len(stack.attention) != len(stack.layers):
        return Reason("shared", "its layers are not each another one with one attention", "leave it")
    if any(
        _watches(hook) for m in inside.values() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    ):
        return Reason("hooks", "hooks on its layers would see rows without padding",
                      "remove them, and register them after the swap")  # fmt: skip
    if getattr(config, "chunk_size_feed_forward", 0):
        return Reason("chunks", "chunk_size_feed_forward cuts its rows into chunks of one length",
                      "set it to 0 in the config")  # fmt: skip
    if getattr(config, "conv_kernel_size", 0) or getattr(stack.model, "z_steps", 0) > 1:
        return Reason("between_layers", "its code computes between the layers", "leave it")
    return None


def _watches(hook: object) -> bool:
    """All do but those of transformers, which act where hidden states or attention weights are asked for: such a call stays
    padded.
    """
    return getattr(hook, "__module__", None) != "transformers.utils.output_capturing"


class UnpaddingSwap:
    """What that changes in a model: hooks, and an attribute of each model that unpads."""

    def __init__(self, decision: UnpaddingDecision):
        """Changes nothing."""
        self._stacks = decision.stacks
        self._handles: list[Any] = []

    def put(self) -> None:
        """After that of attention, which gives the configs their names."""
        for stack in self._stacks:
            name = stack.model.config._attn_implementation if stack.by_interface else None  # type: ignore[union-attr]
            vars(stack.model).update({PLACE: name, CLASSES: stack.classes})
            self._handles += stack.hooks()

    def undo(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for stack in self._stacks:
            vars(stack.model).pop(PLACE, None)
            vars(stack.model).pop(CLASSES, None)


def unpads(model: nn.Module) -> str | None:
    """What a plan would say of this model."""
    names = [vars(m)[PLACE] for m in model.modules() if PLACE in vars(m)]
    return UNPAD[any(name is not None for name in names)] if names else None
