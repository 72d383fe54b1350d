"""A swapped model's own `save_pretrained`: it would write integers under the names of float weights, so it refuses.

The refusal is an attribute of each module that has such a method (those of transformers, diffusers, sentence-transformers) and
holds quantised layers. It goes with the module into copies and pickles, and a restore takes it away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn

from ..nn import QuantizedModule

_METHOD = "save_pretrained"


@dataclass(frozen=True, eq=False)
class Refusal:
    """What is called in place of the method; `before` has what the module itself held under that name, if anything."""

    owner: str
    before: tuple[Any, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(f"{self.owner}.save_pretrained would write the 8-bit values of swapped layers as if they were float "
                           "weights: use fp.save_pretrained(model, folder), or call fp.restore(model) first")  # fmt: skip


def refuse(model: nn.Module) -> None:
    for module in model.modules():
        method = vars(module).get(_METHOD)
        if not hasattr(type(module), _METHOD) or isinstance(method, Refusal):
            continue
        if any(isinstance(m, QuantizedModule) for m in module.modules()):
            vars(module)[_METHOD] = Refusal(type(module).__name__, () if method is None else (method,))


def allow(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(refusal := vars(module).get(_METHOD), Refusal):
            del vars(module)[_METHOD]
            vars(module).update(zip((_METHOD,), refusal.before))
