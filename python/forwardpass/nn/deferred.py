"""Results that wait for their readers: what becomes of one decides in which form it is computed.

A `Waiting` is a tensor to all code. Some operations on it are steps of what one kernel computes; every other one computes it first.
`UnreadImage` is the output of a convolution. Here are the sums of adaLN, of products and of norms:

    x = norm(x) * (1 + scale[:, None]) + shift[:, None]
    x = x + gate[:, None] * layer(x)

The code of a model writes its sums itself. A layer or a norm that defers gives a `Deferred`, which remembers the first steps of
such a sum. One kernel then computes all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.batches import map_tensors
from ..common.models.modules import is_watched
from ..dispatch import gpu_takes
from ..ops.norm_quantize import NORM_QUANTIZE
from .guard import code_guard
from .linear.joined import writes
from .linear.quantized_inputs import Quantized, rows

W = TypeVar("W", bound="Waiting")
Reads = tuple[tuple[Tensor, int | None], ...]

#: What is asked of a tensor without reading it.
_QUESTIONS = frozenset((
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta",
                                                 "requires_grad", "grad_fn", "is_leaf", "is_sparse", "is_quantized")),
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.stride, Tensor.is_contiguous,
    Tensor.is_floating_point, Tensor.is_complex, Tensor.is_inference, Tensor.__len__,
    torch.is_floating_point, torch.is_complex, torch.numel,
))  # fmt: skip


def writable(*tensors: Tensor | None) -> Reads:
    """Tensors, and how often each had been written to."""
    return tuple((t, writes(t)) for t in tensors if t is not None)


class Waiting(Tensor):
    """A result that has not been computed yet. It has no memory: what needs its values computes them, once, and gets a plain
    tensor.

    A class of them says in `step` which operations it takes part in, and in `compute` what the result is.
    """

    float_dtype: torch.dtype  #: `dtype` and `shape`, which cost more to ask for
    sizes: torch.Size
    _reads: Reads  #: what `compute` reads and others may write into
    _floats: Tensor | None

    @classmethod
    def waiting(
        cls: type[W],
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None,
        dtype: torch.dtype,
        device: torch.device,
        reads: Reads,
        **state: Any,
    ) -> W:
        """One of this shape. state: its attributes."""
        x: W = Tensor._make_wrapper_subclass(cls, shape, strides, dtype=dtype, device=device)
        vars(x).update(state, float_dtype=dtype, sizes=torch.Size(shape), _reads=reads, _floats=None)
        return x

    def compute(self) -> Tensor:
        """The result."""
        raise NotImplementedError

    @classmethod
    def step(cls, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The result of an operation, which may wait too; None where that is computed as it is written."""
        return None

    def was_written(self) -> None:
        """Raises, in most cases, because something has written into what is read."""
        raise NotImplementedError

    def is_current(self) -> bool:
        """Whether nothing has written into what is read, where torch counts that."""
        return all(writes(t) == before for t, before in self._reads)

    def floats(self) -> Tensor:
        """The result, a plain tensor: the same one each time."""
        if self._floats is None:
            self._floats = self.compute()
        return self._floats

    def check_reads(self) -> None:
        if not self.is_current():
            self.was_written()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        y = cls.step(func, args, kwargs)
        return func(*map_tensors(args, computed), **map_tensors(kwargs, computed)) if y is None else y

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*map_tensors(args, computed), **map_tensors(kwargs or {}, computed))


def computed(x: Tensor) -> Tensor:
    return x.floats() if isinstance(x, Waiting) else x


class Deferred(Waiting):
    """The result [B, T, N] of a layer or a norm, times a factor of each sample. Once it is computed, nothing is added to what it
    remembers.

    Args:
        owner: the module whose result it is.
        x: its input.
        shape: of the result.
    """

    owner: Any
    x: Any
    factor: Tensor | None  #: [B, 1, N], multiplies the result

    @staticmethod
    def __new__(cls, owner: Any, x: Any, shape: torch.Size) -> Deferred:
        read = x.values if isinstance(x, Quantized) else x
        return cls.waiting(shape, None, x.dtype, read.device, writable(read), owner=owner, x=x, factor=None)

    def times(self, other: Tensor) -> Deferred | None:
        """The result times a factor of each sample; None where that is to be computed now."""
        if self.factor is not None or not self._goes_with(other) or not self._is_of_samples(other):
            return None
        return self._with(factor=other.expand(self.sizes[0], 1, self.sizes[2]))

    def plus(self, other: Tensor) -> Tensor | None:
        """The sum with a tensor; None where that is to be computed as it is written."""
        raise NotImplementedError

    def rows_for(self, layer: Any) -> Any:
        """The result as the input of a layer, which may get it quantised."""
        return self.floats()

    def compute(self) -> Tensor:
        """The result and what is remembered of the sum, each operation as it is written."""
        self.check_reads()
        y = self.alone()
        return y if self.factor is None else y * self.factor

    def alone(self) -> Tensor:
        """What the owner gives."""
        raise NotImplementedError

    def was_written(self) -> None:
        raise RuntimeError(f"{type(self.owner).__name__}: its input was written into before its result was computed, as it was "
                           "not when fp.swap ran the model: swap the model again, with calibrate= and a batch that does "
                           "so")  # fmt: skip

    @classmethod
    def step(cls, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        if func in _SUMS and len(args) == 2 and not kwargs:
            return _SUMS[func](*args)
        return args[0] if func is F.dropout and not kwargs.get("training", True) else None

    def _with(self, **remembered: Tensor | None) -> Deferred:
        """The same, not computed yet, that remembers more."""
        other = type(self)(self.owner, self.x, self.sizes)
        vars(other).update(remembered, _reads=self._reads)
        return other

    def _goes_with(self, other: Any) -> bool:
        """Whether an operation may take this tensor beside the result."""
        return (
            self._floats is None
            and type(other) in _PLAIN
            and other.dtype == self.float_dtype
            and other.device == self._reads[0][0].device
            and not (other.requires_grad and torch.is_grad_enabled())
        )

    def _is_of_samples(self, other: Tensor) -> bool:
        samples, _, columns = self.sizes
        return (
            other.dim() == 3
            and other.shape[1:] == (1, columns)
            and other.shape[0] in (1, samples)
            and other.stride(2) == 1
        )


class DeferredProduct(Deferred):
    """The result of a layer, whose `product` takes a residual and a gate."""

    def plus(self, other: Tensor) -> Tensor | None:
        if not self._goes_with(other) or other.shape != self.sizes or not self.is_current():
            return None
        gate = None if self.factor is None else self.factor.squeeze(1)
        y: Tensor = self.owner.product(self.x, rows(other), gate)
        return y

    def alone(self) -> Tensor:
        y: Tensor = self.owner.product(self.x)
        return y


class DeferredNorm(Deferred):
    """The result of a `DeferringNorm`, quantised once for all layers that quantise it alike."""

    shift: Tensor | None  #: [B, 1, N], added last
    quantized: dict[Any, Quantized]

    @staticmethod
    def __new__(cls, owner: Any, x: Tensor, shape: torch.Size) -> DeferredNorm:
        y = Deferred.__new__(cls, owner, x, shape)
        vars(y).update(shift=None, quantized={})
        return y  # type: ignore[return-value]

    def times(self, other: Tensor) -> Deferred | None:
        return None if self.shift is not None else super().times(other)

    def plus(self, other: Tensor) -> Tensor | None:
        if self.shift is not None or not self._goes_with(other) or not self._is_of_samples(other):
            return None
        return self._with(factor=self.factor, shift=other.expand(self.sizes[0], 1, self.sizes[2]))

    def rows_for(self, layer: Any) -> Any:
        how = layer.row_quantization()
        if how is None or self._floats is not None or not self.is_current():
            return self.floats()
        dtype, symmetric, channel_scale, rotate = how
        key = dtype, symmetric, None if channel_scale is None else id(channel_scale), rotate
        quantized = self.quantized.get(key)
        if quantized is None:
            kind, eps = self.owner.computes
            factor, shift = (None if t is None else t.squeeze(1) for t in (self.factor, self.shift))
            scale = None if factor is None else factor - 1  # exact for factors from 1/2 to 2
            q, s, zero_point = NORM_QUANTIZE(
                rows(self.x), None, eps, dtype, kind, None, symmetric, channel_scale, rotate, scale, shift
            )
            quantized = Quantized(q, s, self.float_dtype, None if symmetric else zero_point)
            self.quantized[key] = quantized
        return quantized

    def compute(self) -> Tensor:
        y = super().compute()
        return y if self.shift is None else y + self.shift

    def alone(self) -> Tensor:
        y: Tensor = self.owner.normed(self.x)
        return y


def _product(a: Any, b: Any) -> Tensor | None:
    if not isinstance(a, Deferred):
        a, b = b, a
    return a.times(b)


def _sum(a: Any, b: Any) -> Tensor | None:
    if not isinstance(a, Deferred) or (isinstance(b, Deferred) and b.factor is not None):
        a, b = b, a
    return a.plus(computed(b))


def _quotient(a: Any, b: Any) -> Tensor | None:
    """By 1, as attention of diffusers divides its output."""
    return a if isinstance(a, Deferred) and isinstance(b, int | float) and b == 1 else None


_PLAIN = (Tensor, nn.Parameter)
_SUMS: dict[Any, Callable[[Any, Any], Tensor | None]] = {
    Tensor.mul: _product,
    torch.mul: _product,
    Tensor.add: _sum,
    torch.add: _sum,
    Tensor.div: _quotient,
}


class DeferringNorm(nn.Module):
    """A norm without weights whose result layers quantise, with adaLN between them. On a GPU the norm, its scale and shift of each
    sample and the quantisation are one pass over the rows, for all layers that quantise them alike.

    Elsewhere it is the norm that it was made from, and so it is where something is around it, under autocast, in compiled code, and
    where the code of its class is another one.

    `fp.swap` makes it.

    Args:
        norm: the one that it stands for.
        kind, eps: what the norm computes, in the words of `norm_quantize`.

    Shapes: input [B, T, K]; output [B, T, K], a `Deferred` on a GPU.

    Example:
        >>> norm = fp.nn.DeferringNorm(torch.nn.LayerNorm(64, elementwise_affine=False), "layer", 1e-5)
        >>> scale, shift = torch.randn(2, 1, 64), torch.randn(2, 1, 64)
        >>> (norm(torch.randn(2, 7, 64)) * (1 + scale) + shift).shape
        torch.Size([2, 7, 64])
    """

    def __init__(self, norm: nn.Module, kind: str, eps: float) -> None:
        super().__init__()
        state = vars(self)
        state.update(
            {key: value for key, value in vars(norm).items() if key not in state}
        )  # what others may ask it for
        self.training = norm.training
        self._norm = (norm,)  # in a tuple, which holds no children
        self.computes = kind, eps
        self._guard = code_guard(type(norm))

    def normed(self, x: Tensor) -> Tensor:
        y: Tensor = self._norm[0](x)
        return y

    def _defers(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling() or not (type(x) is Tensor and x.dim() == 3 and gpu_takes(x.device)):
            return False
        if (
            torch.is_autocast_enabled(x.device.type)
            or is_watched(self)
            or (x.requires_grad and torch.is_grad_enabled())
        ):
            return False
        return self._guard.is_as_proven(self._norm[0], "it is computed by itself")

    def forward(self, x: Tensor) -> Tensor:
        x = computed(x)
        return DeferredNorm(self, x, x.shape) if self._defers(x) else self.normed(x)

    def extra_repr(self) -> str:
        return f"{type(self._norm[0]).__name__}, quantises for layers"
