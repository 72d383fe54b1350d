"""Methods of adapters and of attention below a swapped model that would treat 8-bit values as float weights: they refuse.

An adapter that is merged would be added to integers, one that is made late would read them, and diffusers would make a Linear of
them. The refusal is an attribute of each module that has such a method. It goes with the module into copies and pickles, and a
restore takes it away.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..nn import QuantizedModule
from .adapters import ADDING, MERGING, MERGING_ALL, is_plain, is_quantized_below

_MERGES = ("would add to the 8-bit weights of swapped layers, or take from them, as if they were floats: call fp.restore(model) "
           "first, and swap again when it is done")  # fmt: skip
_ADDS = ("would read the 8-bit weight of a swapped layer as if it were floats, and can add a plain LoRA alone (no DoRA or other "
         "variant, init_lora_weights True, False or \"gaussian\"): call fp.restore(model) first, and swap again when it is "
         "done")  # fmt: skip
#: Of attention in diffusers: q, k and v as one Linear.
_FUSING = "fuse_projections"
_FUSES = "would take the 8-bit weights of swapped layers for those of a Linear: fuse first, and swap then (fp.restore(model))"
_TEXTS = {**dict.fromkeys((*MERGING, *MERGING_ALL), _MERGES), ADDING: _ADDS, _FUSING: _FUSES}


@dataclass(frozen=True, eq=False)
class Refusal:
    """What is called in place of a module's method; `before` has what the module itself held under that name, if anything."""

    module: nn.Module
    method: str
    before: tuple[Any, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("config")
        if self.method == ADDING and dataclasses.is_dataclass(config) and is_plain(config):
            return getattr(type(self.module), ADDING)(self.module, *args, **kwargs)
        raise RuntimeError(f"{type(self.module).__name__}.{self.method} {_TEXTS[self.method]}")


def put(model: nn.Module) -> None:
    for module in model.modules():
        for name in _TEXTS:
            method = vars(module).get(name)
            if hasattr(type(module), name) and not isinstance(method, Refusal) and _is_concerned(module, name):
                vars(module)[name] = Refusal(module, name, () if method is None else (method,))


def _is_concerned(module: nn.Module, method: str) -> bool:
    if method in (*MERGING, ADDING):
        return is_quantized_below(module)
    if method == _FUSING:
        return any(isinstance(m, QuantizedModule) for m in module.children())
    return any(map(is_quantized_below, module.modules()))
