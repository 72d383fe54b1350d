"""What several parts of the package ask of a module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def plain_module(caller: str, model: nn.Module) -> nn.Module:
    """The module that is worked on: what `torch.compile` wrapped. TypeError, in one sentence, where there is none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller} takes a torch.nn.Module, not {type(model).__name__}: pass the model itself")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"{caller} cannot look into a TorchScript module: pass the eager model it was made from")
    inner = model._modules.get("_orig_mod")
    return model if inner is None else inner


def tensor_bytes(modules: Iterable[nn.Module]) -> int:
    """Of the storages of parameters and buffers, each counted once."""
    sizes: dict[Any, int] = {}
    for module in modules:
        for t in (*module._parameters.values(), *module._buffers.values()):
            if t is None or is_lazy(t):
                continue
            if type(t) in (Tensor, nn.Parameter):
                sizes[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
            else:  # a wrapper, e.g. a DTensor, has no storage of its own
                sizes[id(t)] = t.numel() * t.element_size()
    return sum(sizes.values())
