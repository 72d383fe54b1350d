"""Methods of a swapped model, its adapters and its attention that would treat 8-bit values as float weights: they refuse.

An adapter that is merged would be added to integers, one that is made late would read them, and diffusers would make a Linear of
them. transformers would resize the embeddings, and then fail at a head that is no Linear. The refusal is an attribute of each
module that has such a method. It goes with the module into copies and pickles, and a restore takes it away.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...common.models.modules import head_of
from ...nn import QuantizedModule
from ...proofs.adapters import ADDING, MERGING, MERGING_ALL, is_plain, is_quantized_below

_MERGES = ("would add to the 8-bit weights of swapped layers, or take from them, as if they were floats: call fp.restore(model) "
           "first, and swap again when it is done")  # fmt: skip
_ADDS = ("would read the 8-bit weight of a swapped layer as if it were floats, and can add a plain LoRA alone (no DoRA or other "
         "variant, init_lora_weights True, False or \"gaussian\"): call fp.restore(model) first, and swap again when it is "
         "done")  # fmt: skip
#: Of attention in diffusers: q, k and v as one Linear.
_FUSING = "fuse_projections"
_FUSES = "would take the 8-bit weights of swapped layers for those of a Linear: fuse first, and swap then (fp.restore(model))"
#: Of models of transformers: of the embeddings and the head.
_RESIZING = "resize_token_embeddings"
_RESIZES = ("can neither add rows to a swapped head nor take them from it: call fp.restore(model) first, and swap again when it is "
            "resized")  # fmt: skip
_TEXTS = {**dict.fromkeys((*MERGING, *MERGING_ALL), _MERGES), ADDING: _ADDS, _FUSING: _FUSES, _RESIZING: _RESIZES}


@dataclass(frozen=True, eq=False)
class Refusal:
    """What is called in place of a module's method; `before` has what the module itself held under that name, if anything."""

    module: nn.Module
    method: str
    before: tuple[Any, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("config")
        adds_plain = self.method == ADDING and dataclasses.is_dataclass(config) and is_plain(config)
        if adds_plain or (self.method == _RESIZING and _keeps_size(self.module, *args, **kwargs)):
            return getattr(type(self.module), self.method)(self.module, *args, **kwargs)
        raise RuntimeError(f"{type(self.module).__name__}.{self.method} {_TEXTS[self.method]}")


def _keeps_size(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
) -> bool:
    """Whether resize_token_embeddings would change nothing: scripts call it with the size of their tokenizer."""
    tokens = model.get_input_embeddings().weight.shape[0]
    new = tokens if new_num_tokens is None else new_num_tokens
    padding = -new % pad_to_multiple_of if pad_to_multiple_of else 0
    return bool(new + padding == tokens)


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
    if method == _RESIZING:
        return isinstance(head_of(module), QuantizedModule)
    return any(map(is_quantized_below, module.modules()))
