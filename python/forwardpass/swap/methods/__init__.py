"""Methods of a swapped model that would take 8-bit values for float weights: what is called in their places, or before them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...nn import GatedMLP, QuantizedModule
from . import refusals, saving


def put(model: nn.Module) -> None:
    """On each module that holds swapped layers, once."""
    saving.put(model)
    refusals.put(model)
    if not _checks(model) and any(isinstance(m, QuantizedModule) for m in model.modules()):
        model.register_load_state_dict_pre_hook(_check_state_dict)


def take_away(model: nn.Module) -> None:
    for module in model.modules():
        for name, method in [*vars(module).items()]:
            if isinstance(method, saving.SavesFolder | refusals.Refusal):
                del vars(module)[name]
                vars(module).update(zip((name,), method.before))
    for key in _checks(model):
        del model._load_state_dict_pre_hooks[key]


def _check_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Before `load_state_dict` writes anything: a layer that refuses in the middle of it leaves the norms before it changed."""
    of_gated = {
        id(m.layers[0]) for m in model.modules() if isinstance(m, GatedMLP)
    }  # whose names are those of its parts
    for fqn, module in model.named_modules():
        if isinstance(module, QuantizedModule) and id(module) not in of_gated:
            module.check_state_dict(state_dict, f"{prefix}{fqn}." if fqn else prefix)


def _checks(model: nn.Module) -> list[int]:
    """The keys of that hook among a model's."""
    hooks = model._load_state_dict_pre_hooks.items()
    return [key for key, hook in hooks if getattr(hook, "hook", None) is _check_state_dict]
