"""A model of 16 bits in float32, for as long as it runs so: its rounding would hide an error of a few percent.

For proofs, which are about code and not about values. So parameters of the same place in modules of the same class share the copy
of the first: of the layers of a transformer one is in memory. Embeddings and heads of many rows have no copy. What is looked up in
them, or multiplied by them, is widened piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

#: Floats of 16 bits.
HALVES = (torch.float16, torch.bfloat16)
#: Elements of a tensor that has no copy, and of its pieces, which fit into caches.
LARGE, PIECE = 1 << 24, 1 << 20


def in_float32(t: Tensor) -> Tensor:
    """A tensor of 16 bits as float32, any other as it is."""
    return t.float() if t.dtype in HALVES else t


class InFloat32:
    """Copies of a model's parameters and buffers of 16 bits: in their places within it. Not for two threads at once, as a swap is
    not."""

    def __init__(self, model: nn.Module) -> None:
        """Copies what there is of each kind. RuntimeError where the memory does not hold it."""
        copies: dict[tuple[Any, ...], Tensor] = {}
        #: tables of modules that hold them, names there, what is there, and what is there within it
        self._places: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
        large: set[int] = set()
        for fqn, module in model.named_modules():
            path, _, place = fqn.rpartition(".")
            of_module = type(model.get_submodule(path)), place, type(module)
            for table in (module._parameters, module._buffers):
                for name, t in table.items():
                    if t is None or t.dtype not in HALVES:
                        continue
                    if t.dim() == 2 and min(t.numel(), _elements(t)) >= LARGE:
                        large.add(id(t))
                        continue
                    key = *of_module, name, t.shape, t.dtype, t.device
                    if key not in copies:
                        copies[key] = _widened(t.detach())
                    new = nn.Parameter(copies[key], False) if isinstance(t, nn.Parameter) else copies[key]
                    self._places.append((table, name, t, new))
        self._widening = _Widening(large)

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

    def __enter__(self) -> InFloat32:
        for table, name, _, new in self._places:
            table[name] = new
        self._widening.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._widening.__exit__(*error)
        for table, name, t, _ in self._places:
            table[name] = t


def _widened(t: Tensor) -> Tensor:
    """A copy, as small as the tensor is: rows that are parts of one vector stay so, as those of layers that are quantised while a
    model is loaded."""
    if (elements := _elements(t)) >= t.numel():
        return in_float32(t)
    return in_float32(t.as_strided((elements,), (1,), 0)).as_strided(t.shape, t.stride(), t.storage_offset())


def _elements(t: Tensor) -> int:
    """In memory."""
    return t.untyped_storage().nbytes() // t.itemsize


class _Widening(TorchFunctionMode):
    """Looks up, and multiplies by, parameters of 16 bits (by their ids) as if they were float32."""

    def __init__(self, large: set[int]) -> None:
        super().__init__()
        self._large = large

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._large and len(args) > 1 and (id(args[0]) in self._large or id(args[1]) in self._large):
            if func in (F.embedding, torch.embedding):
                return in_float32(func(*args, **kwargs))
            if func is F.linear and args[0].dtype == torch.float32:
                return _linear(*args, **kwargs)
        return func(*args, **kwargs)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = max(PIECE // weight.shape[1], 1)
    y = torch.cat([F.linear(x, in_float32(piece)) for piece in weight.split(rows)], -1)
    return y if bias is None else y + bias
