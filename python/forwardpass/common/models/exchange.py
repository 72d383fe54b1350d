"""Modules of a model and what is put into their places, all or none."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Replaced:
    """One layer: the module that was there, and the one that is there now."""

    fqn: str
    original: nn.Module
    replacement: nn.Module


_exchanging = threading.Lock()  #: two threads that swap one model: the second finds it changed


def exchange(model: nn.Module, layers: Iterable[tuple[str, nn.Module, nn.Module]]) -> None:
    """Puts `new` in the place of `old` for every (fqn, old, new); all of them, or none and an exception."""
    edges = []
    with _exchanging:
        for fqn, old, new in layers:
            path, _, name = fqn.rpartition(".")
            try:
                parent = model.get_submodule(path)
            except AttributeError:
                parent = None
            if parent is None or parent._modules.get(name) is not old:
                raise RuntimeError(f"{fqn} is no longer the {type(old).__name__} that was there when the model was "
                                   f"looked at: undo what replaced it, and call again")  # fmt: skip
            edges.append((parent, name, old, new))
        try:
            for parent, name, _, new in edges:
                parent._modules[name] = new
        except BaseException:  # an interrupt is all that can come here
            for parent, name, old, _ in edges:
                parent._modules[name] = old
            raise


def put_in_place(model: nn.Module, replaced: Iterable[Replaced]) -> None:
    """Replacements into the places of their originals, all or none."""
    exchange(model, [(x.fqn, x.original, x.replacement) for x in replaced])
