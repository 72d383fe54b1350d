"""What is read from a model's code is run, before it is believed.

An activation that a layer computes itself, an MLP as one unit, layers of one input as one product: each is found by reading. Here
the model runs as it is, and then so rewritten, in its own floats: the same operations on the same values, in the order that the
rewriting has. Where the two differ, code does something that was not seen, and that rewriting is not made. `inputs` has what it
runs on. A model that runs on none of these is not believed: of its modules those that take one tensor run alone.

A model of 16 bits runs in its own dtype and, as its rounding would hide an error of a few percent, in float32 besides.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..common.batches import device_of, evaluating
from ..common.models.compare import relative_error
from ..common.models.float32 import InFloat32
from ..dispatch import Reason
from ..dispatch.choice import choosing, interpreter
from ..nn import QuantizedModule
from .inputs import Call, Output
from .rewritings import Rewriting, put

#: Relative errors up to which results are those of the same operations. Our attention instead of torch's in 30 layers of a Llama of
#: random weights, of a deviation of .02 and .1: float32 4e-7 and 3e-6, float16 1.6e-3 and 5.3e-3, bfloat16 .010 and .035.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}
#: Of a model of 16 bits that runs in float32: its code may name the 16 bits in places, where an error of 1e-6 flips a rounding.
_OF_16_BITS = 1e-3
#: Where layers of a model round to 8 bits already, sums in another order flip roundings: 2e-3.
_ROUNDING = 2e-2
#: Elements of a buffer that is put back where a model writes into it as it runs.
_KEPT = 1 << 20
#: Interpreted kernels take a thousand times as long, and which kernels there are is no question of what code does.
_ON_CPU: dict[str, Any] = {"backend": "auto", "interpreter": None, "arch": None}
UNPROVEN = Reason(
    "unproven",
    "no input could be made up to run it so, and its code alone is not believed",
    "call fp.swap with calibrate= and a batch of your own",
)


class Candidate(Protocol):
    """What may be done to a model."""

    def in_place(self) -> AbstractContextManager[None]:
        """The model is so within it."""


class Error(NamedTuple):
    """How far results are off, in units of what may be: at what is no padding, and everywhere. Up to 1 it is the order of sums."""

    tokens: float
    everywhere: float
    relative: float  #: the relative error of what is off the most


class Run(NamedTuple):
    """A call, what the model gave for it, and what is relatively as far off as may be."""

    call: Call
    expected: list[Output]
    tolerance: float

    def error(self, outputs: Sequence[Output]) -> Error:
        if len(outputs) != len(self.expected):
            return Error(math.inf, math.inf, math.inf)
        tokens = max(_off(y.rows, e.rows) for y, e in zip(outputs, self.expected))
        everywhere = max(_off(y.value, e.value) for y, e in zip(outputs, self.expected))
        return Error(tokens / self.tolerance, everywhere / self.tolerance, tokens)


class Prover:
    """A model, what it is run on, and what it gave for that as it is."""

    def __init__(
        self,
        model: nn.Module,
        *sources: Iterable[list[Call]],
        stand_ins: Sequence[tuple[nn.Module, str, nn.Module]] = (),
        again: bool = False,
    ) -> None:
        """
        Args:
            sources: lists of calls, of each source of which the first that the model takes is run.
            stand_ins: (holder, name, module that stands there for as long as the model runs).
            again: it has been proven elsewhere. One of 16 bits then runs in float32 alone, which halves the time.
        """
        self.model, self._stand_ins = model, stand_ins
        self._runs: list[Run] = []
        self._in_float32: list[Run] = []
        with self._running():
            self._wide = InFloat32.of(model)
            with self._wide if again and self._wide is not None else contextlib.nullcontext():
                results = [x for source in sources for x in _taken(model, source)]
            tolerance = max(_OF_16_BITS, self._rounding)
            if self._wide is None:
                self._runs = [Run(call, outputs, self._tolerance) for call, outputs in results]
            elif again:
                self._in_float32 = [Run(call, outputs, tolerance) for call, outputs in results]
            else:
                self._runs = [Run(call, outputs, self._tolerance) for call, outputs in results]
                with self._wide:
                    calls = (call.in_float32() for call, _ in results)
                    tried = ((call, _tried(model, call)) for call in calls)
                    self._in_float32 = [Run(call, x, tolerance) for call, x in tried if x is not None]

    @property
    def runs(self) -> bool:
        return bool(self._runs or self._in_float32)

    @property
    def _tolerance(self) -> float:
        """By the coarsest of its weights."""
        dtypes = {p.dtype for p in self.model.parameters()}
        return max(*(_TOLERANCE.get(dtype, 0.0) for dtype in dtypes), _TOLERANCE[torch.float32], self._rounding)

    @property
    def _rounding(self) -> float:
        return _ROUNDING * any(isinstance(m, QuantizedModule) for m in self.model.modules())

    def error(self, candidates: Sequence[Candidate] = ()) -> Error:
        """The model's with these in place. What its code raises is raised."""
        with self._running(), ExitStack() as stack:
            for candidate in candidates:
                stack.enter_context(candidate.in_place())
            errors = [run.error(_outputs(self.model, run.call)) for run in self._runs]
            if self._in_float32 and self._wide is not None:
                with self._wide:
                    errors += [run.error(_outputs(self.model, run.call)) for run in self._in_float32]
        return Error(*(max(x) for x in zip(*errors)))

    def why_not(self, candidates: Sequence[Candidate]) -> Reason | None:
        """None where the model is what it was with all of these in place, but for the order of sums."""
        try:
            error = self.error(candidates)
        except Exception as e:
            return Reason("disproved", f"run so, its code raises {type(e).__name__}", "leave it")
        if error.tokens <= 1:
            return None
        return Reason(
            "disproved",
            f"run so, the model gives something else (off by {error.relative:.2g}): its code does more than was read",
            "leave it",
        )

    def is_steady(self) -> bool:
        """Whether it computes the same each time, from the same random numbers."""
        try:
            return self.error().tokens <= 1
        except Exception:  # as it may, where it counts its calls in something outside
            return False

    def run_once(self) -> None:
        """The model runs as it is, for what looks at it meanwhile. Tensors count what is written into them."""
        runs = self._runs or self._in_float32
        with self._running(), torch.inference_mode(False), torch.no_grad():
            _outputs(self.model, runs[0].call)

    def of(self, model: nn.Module, *sources: Iterable[list[Call]]) -> Prover:
        """The same of a part of it."""
        return Prover(model, *sources, stand_ins=self._stand_ins)

    @contextmanager
    def _running(self) -> Iterator[None]:
        devices = (
            range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        )  # manual_seed is for all of them
        interpreting = interpreter()
        on_cpu = _ON_CPU if interpreting is not None and interpreting.memory == "cpu" else {}
        with choosing(on_cpu), evaluating(self.model), torch.random.fork_rng(devices), ExitStack() as stack:
            for holder, name, module in self._stand_ins:
                put(stack, holder, name, module)
            yield


def _taken(model: nn.Module, source: Iterable[list[Call]]) -> list[tuple[Call, list[Output]]]:
    """The first calls that go together and of which a model takes any: those that it takes, and what it gives."""
    with contextlib.suppress(Exception):  # of a config or a batch of a kind that nobody knows
        for calls in source:
            outputs = ((call, _tried(model, call)) for call in calls)
            if runs := [(call, x) for call, x in outputs if x is not None]:
                return runs
    return []


def _tried(model: nn.Module, call: Call) -> list[Output] | None:
    """None where its code raises, whatever that is, or nothing that it gives is finite."""
    try:
        outputs = _outputs(model, call)
    except Exception:
        return None
    return outputs if any(x.rows.isfinite().any() for x in outputs) else None


def _outputs(model: nn.Module, call: Call) -> list[Output]:
    _seed()
    with _as_it_was(model):
        return call.outputs(model)


def _seed() -> None:
    """As torch.manual_seed(0), which formats the stack three times a call and keeps the texts until CUDA, MTIA and XPU are used."""
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


def _off(y: Tensor, expected: Tensor) -> float:
    """The relative error of what is finite; infinite where the two are not finite in the same places."""
    finite = expected.isfinite()
    if y.shape != expected.shape or not torch.equal(y.isfinite(), finite):
        return math.inf
    return relative_error(y[finite], expected[finite])


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """What a model keeps of a call is gone after it: counters, caches of cosines, hooks that are made when they are needed."""
    before = [(vars(m), {name: (x, _kept(x)) for name, x in vars(m).items()}) for m in model.modules()]
    buffers = [(b, b.clone()) for b in model.buffers() if b.numel() <= _KEPT]
    try:
        yield
    finally:
        for attributes, values in before:
            _put_back(attributes, {name: x for name, (x, _) in values.items()})
            for x, entries in values.values():
                if entries is not None:
                    _put_back(x, entries)
        for buffer, value in buffers:
            if not torch.equal(buffer, value):
                buffer.copy_(value)


def _kept(x: Any) -> dict[Any, Any] | None:
    return dict(x) if isinstance(x, dict) else None


def _put_back(x: dict[Any, Any], entries: Mapping[Any, Any]) -> None:
    if len(x) != len(entries) or any(key not in x or x[key] is not value for key, value in entries.items()):
        x.clear()
        x.update(entries)


def disproved(prover: Prover, candidates: Iterable[Rewriting]) -> dict[str, Reason]:
    """The rewritings that are not made, by the names of their first layers: with which the model computes something else, or of
    which nobody knows."""
    kinds: dict[tuple[Any, ...], list[Rewriting]] = {}
    for rewriting in candidates:
        kinds.setdefault(rewriting.key, []).append(rewriting)
    return {
        x.fqn: reason
        for alike in kinds.values()
        if (reason := prover.why_not(alike) if prover.runs else _why_not_alone(prover, alike[0]))
        for x in alike
    }


def _why_not_alone(prover: Prover, rewriting: Rewriting) -> Reason | None:
    if not rewriting.needs_proof:
        return None
    if rewriting.alone is None:
        return UNPROVEN
    holder, name, inputs_of = rewriting.alone
    module: Any = holder._modules[name]
    if device_of(module).type == "meta":
        return UNPROVEN
    required = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]

    def forward(holder: nn.Module, x: Tensor) -> Any:
        member: Any = holder._modules[name]
        return member(x.clone(), *[None] * (len(required) - 1))

    calls = ([Call(x, forward) for x in inputs] for inputs in inputs_of(module))
    alone = prover.of(holder, calls)
    return alone.why_not([rewriting]) if alone.runs and alone.is_steady() else UNPROVEN
