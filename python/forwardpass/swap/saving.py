"""Methods of a swapped model, and of adapters in it, that would treat 8-bit values as float weights: they refuse.

A model's own `save_pretrained` would write integers under the names of float weights, an adapter that is merged would be added to
them, and diffusers would make a Linear of them. The refusal is an attribute of each module that has such a method. It goes with the
module into copies and pickles, and a restore takes it away.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..nn import QuantizedModule
from .adapters import ADDING, MERGING, MERGING_ALL, is_plain, is_quantized_below

_SAVING = "save_pretrained"
_WRITES = ("would write the 8-bit values of swapped layers as if they were float weights: use fp.save_pretrained(model, folder), "
           "or call fp.restore(model) first")  # fmt: skip
_MERGES = ("would add to the 8-bit weights of swapped layers, or take from them, as if they were floats: call fp.restore(model) "
           "first, and swap again when it is done")  # fmt: skip
_ADDS = ("would read the 8-bit weight of a swapped layer as if it were floats, and can add a plain LoRA alone (no DoRA or other "
         "variant, init_lora_weights True, False or \"gaussian\"): call fp.restore(model) first, and swap again when it is "
         "done")  # fmt: skip
#: Of attention in diffusers: q, k and v as one Linear.
_FUSING = "fuse_projections"
_FUSES = "would take the 8-bit weights of swapped layers for those of a Linear: fuse first, and swap then (fp.restore(model))"
_TEXTS = {_SAVING: _WRITES, **dict.fromkeys((*MERGING, *MERGING_ALL), _MERGES), ADDING: _ADDS, _FUSING: _FUSES}


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


def refuse(model: nn.Module) -> None:
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
    if method in MERGING_ALL:
        return any(map(is_quantized_below, module.modules()))
    if (
        getattr(type(module), _SAVING).__module__.partition(".")[0] == "peft"
    ):  # writes adapters alone, and resized heads
        head = getattr(module, "get_output_embeddings", lambda: None)()
        return isinstance(head, QuantizedModule)
    return any(isinstance(m, QuantizedModule) for m in module.modules())


def allow(model: nn.Module) -> None:
    for module in model.modules():
        for name in _TEXTS:
            if isinstance(refusal := vars(module).get(name), Refusal):
                del vars(module)[name]
                vars(module).update(zip((name,), refusal.before))
