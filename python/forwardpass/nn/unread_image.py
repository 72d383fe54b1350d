"""UnreadImage: what a convolution gives where its reader decides in which form it is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.common.activations import PLAIN
from .deferred import Reads, Waiting, computed, writable

#: (activation, residual, residual_first, out_scale) to a result; with out_scale in int8
Compute = Callable[[str | None, Tensor | None, bool, Tensor | None], Tensor]

_ADDITIONS = {Tensor.__add__: False, Tensor.add: False, torch.add: False, Tensor.__iadd__: True, Tensor.add_: True}
#: functions of one tensor: their name in an epilogue, and whether they write into it
_ACTIVATIONS = {
    **{f: ("relu", False) for f in (F.relu, torch.relu, Tensor.relu)},
    **{f: ("relu", True) for f in (torch.relu_, Tensor.relu_)},
    F.hardtanh: ("relu6", False), F.relu6: ("relu6", False), F.silu: ("silu", False), F.hardswish: ("hard_swish", False),
}  # fmt: skip
_made = count()
ADD, INT8, FLOATS = "add", "int8", "floats"


def check_steps(steps: Sequence[str]) -> None:
    """ValueError where a convolution cannot compute these, or not in this order."""
    floats = [*steps][: -1 if [*steps][-1:] == [INT8] else None]
    names = [step for step in floats if step != ADD]
    if len(names) > 1 or not {*names} <= {*PLAIN} or floats.count(ADD) > (len(floats) == len(steps)):
        raise ValueError(f"Int8Conv2d: then is \"add\", an activation, or both in any order, or \"int8\" behind an activation "
                         f"or alone, not {steps!r}")  # fmt: skip


@dataclass(frozen=True)
class Steps:
    """What is done with a convolution's output, in order: names of activations, "add", and at the end "int8"."""

    expected: tuple[str, ...] | None  #: None: whatever comes, and it is noted
    seen: list[tuple[tuple[str, ...], str]] = field(default_factory=list)  #: (what was done before, what came)

    def chain(self) -> tuple[str, ...]:
        """The steps that came as the only reading of what was there before."""
        steps: tuple[str, ...] = ()
        while True:
            came = [step for before, step in self.seen if before == steps]
            step = came[0] if len({*came}) == 1 else FLOATS
            if step == FLOATS or (step != INT8 and len(came) > 1):
                return steps
            steps += (step,)
            if step == INT8:
                return steps


class UnreadImage(Waiting):
    """A convolution's output, [N, C, H, W] of floats, that has not been computed yet.

    The next `Int8Conv2d`, where it has one scale for all inputs, reads it in int8: the epilogue rounds, and floats are never
    written. A tensor that is added to it, and an activation behind that, go into the epilogue too.

    Which outputs are such ones, and what is expected to be done with them, `fp.swap` finds by running the model. What was expected
    and does not come costs time and changes nothing.

    Args:
        shape: its own; it is in channels_last memory.
        dtype, device: of its floats.
        compute: gives it.
        steps: what is expected to come.
        activation: what is applied in any case.
        read_later: what `compute` reads that others may write into.
        gives_int8: whether `compute` takes an out_scale.
    """

    _compute: Compute
    _steps: Steps
    _gives_int8: bool
    _activation: str | None
    _residual: Tensor | None
    _residual_first: bool
    _done: tuple[str, ...]  #: steps that `result` computes
    _quantized: tuple[Tensor, Tensor] | None
    _number: int  #: later ones have larger ones

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        compute: Compute,
        steps: Steps,
        activation: str | None,
        read_later: Reads,
        gives_int8: bool,
    ) -> UnreadImage:
        _, c, h, w = shape
        return cls.waiting(
            shape, (c * h * w, 1, c * w, c), dtype, device, read_later, _compute=compute, _steps=steps, _activation=activation,
            _gives_int8=gives_int8, _residual=None, _residual_first=False, _done=(), _quantized=None, _number=next(_made),
        )  # fmt: skip

    def compute(self) -> Tensor:
        self._note(FLOATS)
        return self._result(None)

    def in_int8(self, scale: Tensor) -> Tensor | None:
        """In steps of a scale [1]; None where it is there in floats or in other steps, or no int8 is expected of it."""
        expected, quantized = self._steps.expected, self._quantized
        if self._floats is not None or self._residual is not None or not self._gives_int8:
            return None
        if expected is not None and expected[len(self._done) :] != (INT8,):
            return None
        if quantized is None:
            quantized = self._quantized = scale, self._result(scale)
        elif quantized[0] is not scale and not torch.equal(quantized[0], scale):
            return None
        self._note(INT8)
        return quantized[1]

    def add(self, residual: Tensor, in_place: bool) -> Tensor | None:  # type: ignore[override]
        """The sum, which may wait too; None where none is expected, or there is one already."""
        if self._residual is not None or not self._expects(ADD):
            return None
        image = self._with(ADD, in_place)
        image._residual, image._reads = residual, image._reads + writable(residual)
        return image._complete(in_place)

    def activate(self, name: str, in_place: bool) -> Tensor | None:
        """Its activation, as `add`."""
        if self._activation is not None or not self._expects(name):
            return None
        image = self._with(name, in_place)
        image._activation, image._residual_first = name, image._residual is not None
        return image._complete(in_place)

    def _expects(self, step: str) -> bool:
        expected, count_done = self._steps.expected, len(self._done)
        return self._floats is None and (expected is None or expected[count_done : count_done + 1] == (step,))

    def _with(self, step: str, in_place: bool) -> UnreadImage:
        """This one or a copy, that is asked for a step more."""
        self._note(step)
        image = self
        if not in_place:
            options = self._compute, self._steps, self._activation, self._reads, self._gives_int8
            n, c, h, w = self.sizes
            image = UnreadImage((n, c, h, w), self.float_dtype, self.device, *options)
            image._residual, image._residual_first = self._residual, self._residual_first
        image._done, image._quantized = (*self._done, step), None
        return image

    def _complete(self, in_place: bool) -> Tensor:
        """This one; where no step is left, what it is: for all that have it, where it was asked in place."""
        if self._done != self._steps.expected:
            return self
        result = self._result(None)
        if in_place:
            self._floats = result
        return result

    def _note(self, step: str) -> None:
        if self._steps.expected is None:
            self._steps.seen.append((self._done, step))

    def _result(self, out_scale: Tensor | None) -> Tensor:
        self.check_reads()
        return self._compute(self._activation, self._residual, self._residual_first, out_scale)

    def was_written(self) -> None:
        if self._steps.expected is not None:
            raise RuntimeError("Int8Conv2d: something wrote into its input, or into what is added to its output, before that "
                               "output was read: set `then = ()` on the layer")  # fmt: skip
        self._steps.seen.extend([((), FLOATS), ((), ADD)])  # nothing alone came first

    @classmethod
    def step(cls, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        with torch._C.DisableTorchFunctionSubclass():  # its shape and its device cost less so
            if func in _ADDITIONS and len(args) == 2 and not kwargs:
                return _added(*args, in_place=_ADDITIONS[func])
            return _activated(func, args, kwargs) if func in _ACTIVATIONS and isinstance(args[0], UnreadImage) else None


def _activated(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The activation of an image; None where no epilogue computes it."""
    name, in_place = _ACTIVATIONS[func]
    options = dict(kwargs) | dict(
        zip(("min_val", "max_val", "inplace") if func is F.hardtanh else ("inplace",), args[1:])
    )
    in_place = bool(options.pop("inplace", in_place))
    if func is F.hardtanh and (options.pop("min_val", -1.0), options.pop("max_val", 1.0)) != (0.0, 6.0):
        return None
    return None if options else args[0].activate(name, in_place)


def _added(x: Any, y: Any, in_place: bool) -> Tensor | None:
    """The later one of two that are not read yet waits for the other."""
    if isinstance(x, UnreadImage) and isinstance(y, UnreadImage) and x._number > y._number and not in_place:
        x, y = y, x
    for image, other in ((y, x), (x, y)):
        if not isinstance(image, UnreadImage) or not isinstance(other, Tensor) or (in_place and image is not x):
            continue
        if (
            other is image
            or other.dtype != image.float_dtype
            or other.shape != image.shape
            or other.device != image.device
        ):
            continue
        residual = computed(other)
        if image._floats is None and (result := image.add(residual, in_place)) is not None:
            return result
    return None
