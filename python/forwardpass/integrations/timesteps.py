"""Swaps that count at some timesteps of a diffusion model, and how a call says its timestep.

A call of such a model gets how noisy its input is: pipelines of diffusers pass it as `timestep`, and so do other loops. It is read
from there, or said by `with fp.timestep(t):`. Outside of the range of a swap a call runs on the originals, which are exchanged for
its time: nothing of a layer's own forward asks for the timestep, so that what is compiled below the model has no new branch.
"""

from __future__ import annotations

import inspect
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..common.batches import device_of
from ..common.models.exchange import Replaced, exchange, put_in_place

#: (least, greatest) timestep at which a swap counts, both included; None: no bound
Timesteps = tuple[float | None, float | None]
#: What arguments of models are called that hold it.
ARGUMENTS = ("timestep", "timesteps", "t")
_said: ContextVar[float | None] = ContextVar("forwardpass_timestep", default=None)
_COMPILED = "a swap with timesteps= reads the timestep on the host: compile the model's blocks, not the whole with fullgraph=True"
_CAPTURED = (
    "a swap with timesteps= cannot read the timestep while a CUDA graph is captured: capture within `with fp.timestep(t):`, a "
    "graph of a timestep in the range and another of one outside of it"
)


@contextmanager
def timestep(t: float | Tensor) -> Iterator[None]:
    """Within the block and this thread, calls of models that were swapped with timesteps= are at this timestep.

    For loops whose model has no argument called timestep, timesteps or t, for the capture of CUDA graphs, and where the argument is
    on a GPU and its value is known on the host: reading it there waits for the GPU, once a call.

    Args:
        t: a number, or a tensor of one element, on the model's own scale.

    Example:
        >>> for t in (900.0, 500.0, 100.0):
        ...     with fp.timestep(t):
        ...         x = model(x)
    """
    value = t.item() if isinstance(t, Tensor) and t.numel() == 1 else t
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise TypeError(f"fp.timestep takes a number, or a tensor of one element, not {t!r}")
    token = _said.set(float(value))
    try:
        yield
    finally:
        _said.reset(token)


def check_timesteps(timesteps: object) -> None:
    """ValueError or TypeError where it is no range of timesteps."""
    if timesteps is None:
        return
    fix = "pass (least, greatest), both included, None for no bound"
    if not isinstance(timesteps, tuple | list) or len(timesteps) != 2:
        raise TypeError(f"timesteps is a pair of numbers, not {timesteps!r}: {fix}")
    for t in timesteps:
        if t is not None and (isinstance(t, bool) or not isinstance(t, int | float) or not math.isfinite(t)):
            raise TypeError(f"timesteps holds {t!r}, which is no finite number: {fix}")
    low, high = bounds(timesteps)
    if low > high or (low, high) == (-math.inf, math.inf):
        why = "starts above its end" if low > high else "has no bound, which is a swap at every timestep"
        raise ValueError(f"timesteps={tuple(timesteps)!r} {why}: {fix}")


def bounds(timesteps: Sequence[float | None]) -> tuple[float, float]:
    low, high = timesteps
    return -math.inf if low is None else low, math.inf if high is None else high


def describe(timesteps: Sequence[float | None]) -> str:
    """In words: "timesteps 50 to 950"."""
    low, high = timesteps
    if low is None or high is None:
        return f"timesteps up to {high:g}" if low is None else f"timesteps from {low:g} on"
    return f"timesteps {low:g} to {high:g}"


def place_of(model: nn.Module) -> int | None:
    """Which argument of a model's forward is the timestep, by position."""
    names = [*inspect.signature(type(model).forward).parameters][1:]
    return next((names.index(name) for name in ARGUMENTS if name in names), None)


def timesteps_of(place: int | None, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[float, float] | None:
    """The least and the greatest timestep of a call of a model; None where nothing says it.

    Args:
        place: `place_of` the model.

    Raises:
        RuntimeError: it would have to be read while a CUDA graph is captured.
    """
    if (t := _said.get()) is not None:
        return t, t
    value = next((kwargs[name] for name in ARGUMENTS if kwargs.get(name) is not None), None)
    if value is None and place is not None and place < len(args):
        value = args[place]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value), float(value)
    if not isinstance(value, Tensor) or value.dim() > 2 or not value.numel() or value.is_complex() or value.is_meta:
        return None
    if value.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(_CAPTURED)
    low, high = torch.stack(torch.aminmax(value.detach().double())).tolist()
    return low, high


class Change(Protocol):
    """What a swap changes besides modules."""

    def put(self) -> None: ...

    def undo(self) -> None: ...


class ByTimestep:
    """In the place of a model's forward: that forward, on the originals outside of the range. One call at a time: others wait.

    Args:
        before: what stood in the place of its class's forward, such as a hook of accelerate; None: nothing.
        replaced, changes: what a swap put in place, which is exchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        timesteps: Timesteps,
        replaced: Sequence[Replaced],
        changes: Sequence[Change],
        before: Callable[..., Any] | None,
    ) -> None:
        self.timesteps, self._place = timesteps, place_of(model)
        self._model, self._replaced, self._changes, self._before = model, replaced, changes, before
        self._lock, self._aside = threading.RLock(), False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(msg=_COMPILED)  # what is called here is compiled, once on each side of the range
        with self._lock:
            if self._aside or self._counts(args, kwargs):
                return self._forward(*args, **kwargs)
            self._put_aside()
            try:
                return self._forward(*args, **kwargs)
            finally:
                self._put_back()

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._before is not None:
            return self._before(*args, **kwargs)
        return type(self._model).forward(self._model, *args, **kwargs)

    def _counts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        of_call = timesteps_of(self._place, args, kwargs)
        if of_call is None:
            name = type(self._model).__name__
            raise RuntimeError(f"this {name} was swapped for {describe(self.timesteps)}, and the call does not say its own, as an "
                               f"argument {', '.join(ARGUMENTS[:-1])} or {ARGUMENTS[-1]}: call it within `with fp.timestep(t):`"
                               )  # fmt: skip
        low, high = bounds(self.timesteps)
        return low <= of_call[0] and of_call[1] <= high

    def _put_aside(self) -> None:
        """All or nothing."""
        if self._replaced:
            x = self._replaced[0]
            if device_of(x.original) != device_of(x.replacement):
                raise RuntimeError(f"the model was moved to {device_of(x.replacement)} since fp.swap, and its originals, which run "
                                   "outside of timesteps=, were not: move it first, then swap it")  # fmt: skip
            for x in self._replaced:
                if x.original.training != x.replacement.training:
                    x.original.train(x.replacement.training)
            exchange(self._model, [(x.fqn, x.replacement, x.original) for x in self._replaced])
        self._aside = True
        for change in reversed(self._changes):
            change.undo()

    def _put_back(self) -> None:
        put_in_place(self._model, self._replaced)
        for change in self._changes:
            change.put()
        self._aside = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model has one with originals of its own."""
        return {**vars(self), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock())


class TimestepSwap:
    """The change of a model whose swap counts at some timesteps. It does not keep the model alive."""

    def __init__(
        self, model: nn.Module, timesteps: Timesteps, replaced: Sequence[Replaced], changes: Sequence[Change]
    ) -> None:
        self._model, self._of = weakref.ref(model), (timesteps, replaced, changes)
        self._before: Callable[..., Any] | None = None

    def put(self) -> None:
        if (model := self._model()) is not None:
            self._before = vars(model).get("forward")
            vars(model)["forward"] = ByTimestep(model, *self._of, self._before)

    def undo(self) -> None:
        if (model := self._model()) is None or not isinstance(vars(model).get("forward"), ByTimestep):
            return
        if self._before is None:
            del vars(model)["forward"]
        else:
            vars(model)["forward"] = self._before


def range_of(model: nn.Module) -> Timesteps | None:
    """The timesteps at which the swap of a model counts; None: all, or it is not swapped."""
    forward = vars(model).get("forward")
    return forward.timesteps if isinstance(forward, ByTimestep) else None
