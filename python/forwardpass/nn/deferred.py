"""Results that are not computed before it is known what becomes of them: of a product, which a gate of adaLN-Zero and a residual
may follow, and of a norm, which adaLN may follow before layers quantise it.

    x = norm(x) * (1 + scale[:, None]) + shift[:, None]
    x = x + gate[:, None] * layer(x)

The code of a model writes its sums itself. A layer or a norm that defers gives a `Deferred`, which remembers the first steps of
such a sum. One kernel then computes all of it. Every other operation on a `Deferred` computes it first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.batches import map_tensors
from ..common.models.modules import is_watched
from ..dispatch import gpu_takes
from ..ops.norm_quantize import NORM_QUANTIZE
from .guard import CodeGuard, is_as_proven
from .linear.joined import writes
from .linear.quantized_inputs import Quantized, rows


class Later:
    """A result, and what of a sum is remembered besides. A sum begins with the result; once that is computed, nothing is added to
    what is remembered."""

    def __init__(self, owner: Any, x: Any, shape: torch.Size) -> None:
        """owner: the module whose result it is; x: its input; shape: of the result, [B, T, N]."""
        self.owner, self.x, self.shape = owner, x, shape
        self.factor: Tensor | None = None  #: [B, 1, N], multiplies the result
        self._result: Tensor | None = None
        read = x.values if isinstance(x, Quantized) else x
        self._read, self._writes = read, writes(read)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.x.dtype
        return dtype

    def deferred(self) -> Deferred:
        key = self.dtype, self._read.device
        nan = _NAN.get(key)
        if nan is None:
            with torch.inference_mode(False):
                nan = _NAN[key] = torch.full((), torch.nan, dtype=key[0], device=key[1])
        deferred = nan.expand(self.shape).as_subclass(Deferred)
        deferred.later = self
        return deferred

    def times(self, other: Tensor) -> Deferred | None:
        """The result times a factor of each sample; None where that is to be computed now."""
        if self.factor is not None or not self._goes_with(other) or not self._is_of_samples(other):
            return None
        later = self._alike()
        later.factor = other.expand(self.shape[0], 1, self.shape[2])
        return later.deferred()

    def plus(self, other: Tensor) -> Tensor | None:
        """The sum with a tensor; None where that is to be computed as it is written."""
        raise NotImplementedError

    def rows_for(self, layer: Any) -> Any:
        """The result as the input of a layer, which may get it quantised."""
        return self.value()

    def value(self) -> Tensor:
        """The result and what is remembered of the sum, each operation as it is written."""
        if self._result is None:
            if writes(self._read) != self._writes:
                raise RuntimeError(f"{type(self.owner).__name__}: its input was written into before its result was computed, as it "
                                   "was not when fp.swap ran the model: swap the model again, with calibrate= and a batch that "
                                   "does so")  # fmt: skip
            y = self._computed()
            self._result = y if self.factor is None else y * self.factor
        return self._result

    def _computed(self) -> Tensor:
        raise NotImplementedError

    def _alike(self) -> Any:
        later = type(self)(self.owner, self.x, self.shape)
        later._writes = self._writes
        return later

    def _goes_with(self, other: Any) -> bool:
        """Whether an operation may take this tensor beside the result."""
        return (
            self._result is None
            and type(other) in _PLAIN
            and other.dtype == self.dtype
            and other.device == self._read.device
            and not (other.requires_grad and torch.is_grad_enabled())
        )

    def _is_of_samples(self, other: Tensor) -> bool:
        samples, _, columns = self.shape
        return (
            other.dim() == 3
            and other.shape[1:] == (1, columns)
            and other.shape[0] in (1, samples)
            and other.stride(2) == 1
        )


class LaterProduct(Later):
    """The result of a layer, whose `product` takes a residual and a gate."""

    def plus(self, other: Tensor) -> Tensor | None:
        if not self._goes_with(other) or other.shape != self.shape or writes(self._read) != self._writes:
            return None
        gate = None if self.factor is None else self.factor.squeeze(1)
        y: Tensor = self.owner.product(self.x, rows(other), gate)
        return y

    def _computed(self) -> Tensor:
        y: Tensor = self.owner.product(self.x)
        return y


class LaterNorm(Later):
    """The result of a `DeferringNorm`, quantised once for all layers that quantise it alike."""

    def __init__(self, owner: Any, x: Tensor, shape: torch.Size) -> None:
        super().__init__(owner, x, shape)
        self._shift: Tensor | None = None  #: [B, 1, N], added last
        self._quantized: dict[Any, Quantized] = {}

    def times(self, other: Tensor) -> Deferred | None:
        return None if self._shift is not None else super().times(other)

    def plus(self, other: Tensor) -> Tensor | None:
        if self._shift is not None or not self._goes_with(other) or not self._is_of_samples(other):
            return None
        later = self._alike()
        later.factor, later._shift = self.factor, other.expand(self.shape[0], 1, self.shape[2])
        deferred: Deferred = later.deferred()
        return deferred

    def rows_for(self, layer: Any) -> Any:
        how = layer.row_quantization()
        if how is None or self._result is not None or writes(self._read) != self._writes:
            return self.value()
        dtype, symmetric, channel_scale, rotate = how
        key = dtype, symmetric, None if channel_scale is None else id(channel_scale), rotate
        quantized = self._quantized.get(key)
        if quantized is None:
            kind, eps = self.owner.computes
            factor, shift = (None if t is None else t.squeeze(1) for t in (self.factor, self._shift))
            scale = None if factor is None else factor - 1  # exact for factors from 1/2 to 2
            q, s, zero_point = NORM_QUANTIZE(
                rows(self.x), None, eps, dtype, kind, None, symmetric, channel_scale, rotate, scale, shift
            )
            quantized = Quantized(q, s, self.dtype, None if symmetric else zero_point)
            self._quantized[key] = quantized
        return quantized

    def _computed(self) -> Tensor:
        y: Tensor = self.owner.normed(self.x)
        return y

    def value(self) -> Tensor:
        if self._result is None:
            y = super().value()
            self._result = y if self._shift is None else y + self._shift
        return self._result


class Deferred(Tensor):
    """A result that is not computed yet: `later` has it. Its memory is a single NaN, for code that reads it without torch."""

    later: Later

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _SUMS and len(args) == 2 and not kwargs:
            y = _SUMS[func](*args)
            if y is not None:
                return y
        elif func is F.dropout and not kwargs.get("training", True):
            return args[0]
        return func(*map_tensors(args, computed), **map_tensors(kwargs, computed))


def computed(x: Tensor) -> Tensor:
    return x.later.value() if type(x) is Deferred else x


def _product(a: Any, b: Any) -> Tensor | None:
    if type(a) is not Deferred:
        a, b = b, a
    return a.later.times(b)


def _sum(a: Any, b: Any) -> Tensor | None:
    if type(a) is not Deferred or (type(b) is Deferred and b.later.factor is not None):
        a, b = b, a
    return a.later.plus(computed(b) if isinstance(b, Tensor) else b)


def _quotient(a: Any, b: Any) -> Tensor | None:
    """By 1, as attention of diffusers divides its output."""
    return a if type(a) is Deferred and isinstance(b, int | float) and b == 1 else None


_PLAIN = (Tensor, nn.Parameter)
_NAN: dict[tuple[torch.dtype, torch.device], Tensor] = {}
_SUMS: dict[Any, Callable[[Any, Any], Tensor | None]] = {
    Tensor.mul: _product,
    torch.mul: _product,
    Tensor.add: _sum,
    torch.add: _sum,
    Tensor.div: _quotient,
}
#: What is asked of a tensor without its values.
_QUESTIONS = frozenset(
    (
        *(
            getattr(Tensor, name).__get__
            for name in ("shape", "ndim", "dtype", "device", "is_cuda", "layout", "requires_grad")
        ),
        *(
            getattr(Tensor, name)
            for name in ("size", "dim", "numel", "is_floating_point", "element_size", "is_complex")
        ),
    )
)


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
        self._guard = CodeGuard(type(norm))

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
        return is_as_proven(self._guard, self._norm[0], "it is computed by itself")

    def forward(self, x: Tensor) -> Tensor:
        x = computed(x)
        return LaterNorm(self, x, x.shape).deferred() if self._defers(x) else self.normed(x)

    def extra_repr(self) -> str:
        return f"{type(self._norm[0]).__name__}, quantises for layers"
