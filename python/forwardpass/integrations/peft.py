"""Adapters that peft is asked for once a model is swapped: for layers that had adapters before, and for no others.

A swapped layer is no nn.Linear, so peft takes none for a target. Some are not even there under their names (of an MLP that is one
module), and their adapters would be left out without a word.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from ..common.imports import when_imported
from ..nn.mlp import TwoProducts, quantised_layers
from . import patches

#: The name under which an adapter holds the layer below it.
BASE = "base_layer"


def register_when_imported() -> None:
    """Has peft ask before it looks for the layers that are to have an adapter, as soon as it is imported, or now."""
    when_imported("peft.tuners.tuners_utils", _register)


def _register() -> None:
    from peft.tuners.tuners_utils import BaseTuner

    patches.put(BaseTuner, "inject_adapter", _checking)


def _checking(inject: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(inject)
    def check_and_inject(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        names = [
            name for name in _swapped(model) if _is_target(self, model, adapter_name, kwargs.get("state_dict"), name)
        ]
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"the adapter {adapter_name!r} is for {names[0]}{more}, which is swapped already: add adapters to the "
                             "model as it was (fp.restore(model), or the original model), and swap it then")  # fmt: skip
        inject(self, model, adapter_name, *args, **kwargs)

    return check_and_inject


def _swapped(model: nn.Module) -> list[str]:
    """The names that swapped layers without an adapter had."""
    names = []
    for fqn, module in quantised_layers(model).items():
        if isinstance(module, TwoProducts):
            names += [f"{fqn}.{name}" for name in module.separate()]
        elif fqn.rpartition(".")[2] != BASE:
            names.append(fqn)
    return names


def _is_target(tuner: Any, model: nn.Module, adapter: str, state_dict: Any, name: str) -> bool:
    if state_dict is not None:
        return any(key.startswith(f"{name}.") for key in state_dict)
    config = tuner._prepare_adapter_config(tuner.peft_config[adapter], tuner.get_model_config(model))
    return config.target_modules == "all-linear" or bool(tuner._check_target_module_exists(config, name))
