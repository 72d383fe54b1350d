"""A model of 16 bits in float32, for as long as it runs so: its rounding would hide an error of a few percent.

What is proven is about code and not about values. So parameters of the same place in modules of the same class share the copy of
the first: of the layers of a transformer one is in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .inputs import HALVES, in_float32


class InFloat32:
    """Copies of a model's parameters and buffers of 16 bits: in their places within it. Not for two threads at once, as a swap is
    not."""

    def __init__(self, model: nn.Module) -> None:
        """Copies what there is of each kind. RuntimeError where the memory does not hold it."""
        copies: dict[tuple[Any, ...], Tensor] = {}
        #: tables of modules that hold them, names there, what is there, and what is there within it
        self._places: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
        for fqn, module in model.named_modules():
            path, _, place = fqn.rpartition(".")
            of_module = type(model.get_submodule(path)), place, type(module)
            for table in (module._parameters, module._buffers):
                for name, t in table.items():
                    if t is None or t.dtype not in HALVES:
                        continue
                    key = *of_module, name, t.shape, t.dtype, t.device
                    if key not in copies:
                        copies[key] = in_float32(t.detach())
                    new = nn.Parameter(copies[key], False) if isinstance(t, nn.Parameter) else copies[key]
                    self._places.append((table, name, t, new))

    @staticmethod
    def of(model: nn.Module) -> InFloat32 | None:
        """None of a model without such tensors, or with some that are none of torch's own with values, or are too many."""
        tensors = [t for t in (*model.parameters(), *model.buffers()) if t.dtype in HALVES and t.numel()]
        if not tensors or any(t.is_meta or type(t.data) is not Tensor for t in tensors):
            return None
        try:
            return InFloat32(model)
        except RuntimeError:  # out of memory
            return None

    def __enter__(self) -> None:
        for table, name, _, new in self._places:
            table[name] = new

    def __exit__(self, *_: object) -> None:
        for table, name, t, _ in self._places:
            table[name] = t
