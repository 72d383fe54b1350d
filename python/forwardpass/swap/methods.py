"""Methods of a swapped model that would take 8-bit values for float weights: what is called in their places."""

from __future__ import annotations

from torch import nn

from . import refusals, saving


def put(model: nn.Module) -> None:
    """On each module that holds swapped layers, once."""
    saving.put(model)
    refusals.put(model)


def take_away(model: nn.Module) -> None:
    for module in model.modules():
        for name, method in [*vars(module).items()]:
            if isinstance(method, saving.SavesFolder | refusals.Refusal):
                del vars(module)[name]
                vars(module).update(zip((name,), method.before))
