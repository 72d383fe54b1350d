"""The weight of a quantised layer, for code that reads it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


class DequantizedWeight(Tensor):
    """What `weight` of a quantised layer is: a float tensor of the weight's shape, dtype and device that holds no values.

    An operation that reads it computes them, from the integers and scales that the layer has at that moment, and gives a plain
    tensor; the first one of a process warns of the cost. What asks for the shape, the dtype or the device costs nothing. Views of
    it (`t()`, `weight[0]`, `detach()`, `data`) are such tensors too, and whatever would write into one raises: the values have no
    place of their own.

    Args:
        read: computes the values; they are converted to dtype.
        like: a tensor on the meta device of the shape, the strides and the dtype.
    """

    _read: Callable[[], Tensor]
    _is_hf_initialized = True  #: so that transformers, while it loads a model, does not initialise it
    __torch_function__: Any = torch._C._disabled_torch_function_impl  # attributes cost what they cost of a plain tensor

    @staticmethod
    def __new__(cls, read: Callable[[], Tensor], like: Tensor, device: torch.device) -> DequantizedWeight:
        with torch.inference_mode(False):  # of a tensor of inference mode there are no views
            weight: DequantizedWeight = Tensor._make_wrapper_subclass(
                cls, like.shape, like.stride(), like.storage_offset(), dtype=like.dtype, device=device
            )
        weight._read = read
        return weight

    def values(self) -> Tensor:
        """A plain tensor of the values, computed anew."""
        _warn_of_cost(self)
        return self._read().to(self.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            values_of = {a.name: x for a, x in zip(func._schema.arguments, args)} | kwargs
            written = [values_of.get(a.name) for a in func._schema.arguments if a.is_write]
            if any(isinstance(x, cls) for x in tree_leaves(written)):
                _refuse(func.__name__)
        if func.is_view and isinstance(args[0], cls):
            return args[0]._view(func, args[1:], kwargs)
        values = tree_map(lambda x: x.values() if isinstance(x, cls) else x, (args, kwargs))
        return func(*values[0], **values[1])

    def _view(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """func of it, which says of its result only where it lies."""
        if func._can_decompose() and (result := func.decompose(self, *args, **kwargs)) is not NotImplemented:
            return result  # of operations that are a view or a copy; under inference mode torch hands them over whole
        empty = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta")
        like = func(empty, *args, **kwargs)

        def one(i: int | None, part: Tensor) -> DequantizedWeight:
            def read() -> Tensor:
                whole = func(self._read().to(self.dtype), *args, **kwargs)
                return whole if i is None else whole[i]

            return DequantizedWeight(read, part, self.device)

        return one(None, like) if isinstance(like, Tensor) else [one(i, part) for i, part in enumerate(like)]

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        _refuse("data =")

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        return _refuse("requires_grad_") if requires_grad else self

    def data_ptr(self) -> NoReturn:
        raise RuntimeError("the weight of a quantised layer has no memory of its own: pass weight.clone()")

    def numpy(self, *, force: bool = False) -> Any:
        array = self.values().numpy(force=force)
        array.flags.writeable = False  # a copy, which nothing would come of
        return array

    def tolist(self) -> Any:
        return self.values().tolist()

    def __array__(self, dtype: Any = None) -> Any:
        return self.values().__array__(dtype)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"DequantizedWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __format__(self, spec: str) -> str:
        return self.values().__format__(spec)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.values()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.values().__reduce_ex__(protocol)


def _refuse(what: str) -> NoReturn:
    raise RuntimeError(f"{what} would write into the weight of a quantised layer, which is computed from its 8-bit "
                       "values and keeps nothing: restore the layer (fp.restore), change that, and swap it again")  # fmt: skip


_warned = False


def _warn_of_cost(weight: Tensor) -> None:
    global _warned
    if not _warned:
        _warned = True
        shape = " x ".join(map(str, weight.shape))
        warnings.warn(f"code reads the weight of a quantised layer ({shape}), which is dequantised anew each time: have it call "
                      "the layer, or exclude the layer from the swap", stacklevel=5)  # fmt: skip


class ReadableWeight(nn.Module):
    """Base of the layers whose integers are a buffer `qweight`, beside which stands a `weight` for code that reads it."""

    qweight: Tensor
    anchor: nn.Parameter
    _weight: DequantizedWeight | None = None

    def _reading(self) -> tuple[Callable[[], Tensor], tuple[int, ...]]:
        """(what computes the weight, its shape)"""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """Values, of the shape and dtype of the weight that was replaced: qweight times its scales, and what inputs are multiplied
        by besides."""
        weight, q, dtype = self._weight, self.qweight, self.anchor.dtype
        if torch.compiler.is_compiling():
            return self._reading()[0]().to(dtype)
        if type(weight) is not DequantizedWeight or (weight.dtype, weight.device, weight.numel()) != (
            dtype, q.device, q.numel(),
        ):  # fmt: skip
            read, shape = self._reading()
            like = torch.empty(shape, dtype=dtype, device="meta")
            self._weight = weight = DequantizedWeight(read, like, q.device)
        return weight

    @weight.setter
    def weight(self, value: Tensor) -> None:
        raise AttributeError(f"the weight of {type(self).__name__} is computed from its {self.qweight.dtype} values, and cannot be "
                             "set: restore the layer (fp.restore), set its weight, and swap it again")  # fmt: skip

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":  # nn.Module asks no property
            type(self).weight.fset(self, param)  # type: ignore[attr-defined]
        super().register_parameter(name, param)
