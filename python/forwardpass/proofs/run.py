"""What is read from a model's code is run, before it is believed.

An activation that a layer computes itself, an MLP as one unit, layers of one input as one product: each is found by reading. Here
the model runs as it is, and then so rewritten, in its own floats: the same operations on the same values, in the order that the
rewriting has. Where the two differ, code does something that was not seen, and that rewriting is not made. `inputs` has what it
runs on. A model that runs on none of these is not believed: of its modules those that take one tensor run alone.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..common.batches import device_of, evaluating
from ..common.compare import relative_error
from ..dispatch import Reason
from ..nn import QuantizedModule
from .inputs import Call, Output, features_in
from .mlp import Block
from .siblings import siblings
from .walker import Leaf

#: Relative errors up to which results are those of the same operations: sums in another order are off by 1e-6 in float32, and by
#: 3e-2 behind 30 layers of attention in bfloat16. Faults that were found were off by .015 to 1.3.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}
#: Where layers of a model round to 8 bits already, sums in another order flip roundings: 2e-3.
_ROUNDING = 2e-2
#: Elements of a buffer that is put back where a model writes into it as it runs.
_KEPT = 1 << 20
UNPROVEN = Reason(
    "unproven",
    "no input could be made up to run it so, and its code alone is not believed",
    "call fp.swap with calibrate= and a batch of your own",
)


class Candidate(Protocol):
    """What may be done to a model."""

    def in_place(self) -> AbstractContextManager[None]:
        """The model is so within it."""


@dataclass(frozen=True)
class Rewriting:
    """One place that would be rewritten: its first layer's name, what is alike in others, and what stands where meanwhile."""

    fqn: str
    key: tuple[Any, ...]
    modules: Callable[[], Iterable[tuple[nn.Module, str, nn.Module]]]  #: makes (holder, name, module)
    alone: tuple[nn.Module, str, int] | None  #: (holder, name of a module that may run alone, features of its input)
    needs_proof: bool = True

    @contextmanager
    def in_place(self) -> Iterator[None]:
        with ExitStack() as stack:
            for holder, name, module in self.modules():
                _put(stack, holder, name, module)
            yield


def _put(stack: ExitStack, holder: nn.Module, name: str, module: nn.Module) -> None:
    stack.callback(holder._modules.__setitem__, name, holder._modules[name])
    holder._modules[name] = module.eval()


class _WithActivation(nn.Module):
    """A layer and the activation behind it."""

    def __init__(self, layer: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.layer, self.activation = layer, activation

    def forward(self, x: Any) -> Any:
        return self.activation(self.layer(x))

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name in ("layer", "activation") else getattr(self.layer, name)


class _OneUnit(nn.Module):
    """The formula of an MLP, of the members that it has."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self._block = block

    def forward(self, x: Any) -> Any:
        f, modules = self._block.formula, self._block.module._modules

        def applied(names: Sequence[str], x: Any) -> Any:
            for name in names:
                module: Any = modules[name]
                x = module(x.to(module.weight.dtype) if name in f.converted else x)
            return x

        first = [modules[name](x) for name in f.layers[:-1]]  # type: ignore[misc]
        if not f.gated:
            h = applied([f.activation], first[0])
        else:
            gate, up = first if len(first) == 2 else first[0].chunk(2, -1)
            h = applied([f.activation], gate) * up
        return applied((*f.between, f.layers[-1], *f.behind), h)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "_block" else getattr(vars(self)["_block"].module, name)


class _Product:
    """Layers of one input: the first call computes for all."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = tuple(layers)
        self.result: tuple[Any, list[Any]] | None = None

    def __call__(self, i: int, x: Any) -> Any:
        if i == 0:
            self.result = x, [layer(x) for layer in self.layers]
        if self.result is None or self.result[0] is not x:
            return self.layers[i](x)
        return self.result[1][i]


class _OfProduct(nn.Module):
    def __init__(self, product: _Product, i: int) -> None:
        super().__init__()
        self._product, self._i = product, i

    def forward(self, x: Any) -> Any:
        return self._product(self._i, x)

    def __getattr__(self, name: str) -> Any:
        attributes = vars(self)
        return getattr(attributes["_product"].layers[attributes["_i"]], name)


def rewritings(leaves: Sequence[Leaf]) -> Iterator[Rewriting]:
    """Those of layers that are swapped together."""
    units = [leaf for leaf in leaves if isinstance(leaf.block, Block)]
    within = {name for leaf in units if isinstance(leaf.block, Block) for name in leaf.block.names}
    for leaf in units:
        block, (_, holder) = leaf.block, leaf.ancestors[-2]
        assert isinstance(block, Block)
        name = leaf.ancestors[-1][0]
        yield Rewriting(leaf.fqn, ("mlp", type(block.module), block.formula), _unit(holder, name, block), _alone(leaf))
    others = [leaf for leaf in leaves if leaf.fqn not in within]
    for leaf in others:
        if leaf.activation is not None and not leaf.is_experts:
            key = "activation", type(leaf.parent), leaf.name
            in_sequence = type(leaf.parent) is nn.Sequential  # whose code is torch's
            yield Rewriting(leaf.fqn, key, _activated(leaf), _alone(leaf), not in_sequence)
    for run in siblings(others):
        key = "product", type(run[0].parent), tuple(leaf.name for leaf in run)  # type: ignore[assignment]
        yield Rewriting(run[0].fqn, key, _one_product(run), _alone(run[0]))


_Modules = Callable[[], Iterable[tuple[nn.Module, str, nn.Module]]]


def _unit(holder: nn.Module, name: str, block: Block) -> _Modules:
    return lambda: [(holder, name, _OneUnit(block))]


def _activated(leaf: Leaf) -> _Modules:
    act = leaf.activation
    assert act is not None
    return lambda: [
        (leaf.parent, leaf.name, _WithActivation(_member(leaf), act.module)),
        (leaf.parent, act.fqn.rpartition(".")[2], nn.Identity()),
    ]


def _one_product(run: Sequence[Leaf]) -> _Modules:
    def modules() -> Iterator[tuple[nn.Module, str, nn.Module]]:
        product = _Product([_member(leaf) for leaf in run])
        for i, leaf in enumerate(run):
            yield leaf.parent, leaf.name, _OfProduct(product, i)

    return modules


def _member(leaf: Leaf) -> nn.Module:
    """What stands in a layer's place now."""
    module = leaf.parent._modules[leaf.name]
    assert module is not None
    return module


def _alone(leaf: Leaf) -> tuple[nn.Module, str, int] | None:
    return None if len(leaf.ancestors) < 2 else (leaf.ancestors[-2][1], leaf.ancestors[-1][0], leaf.in_features)


class Error(NamedTuple):
    """Relative errors: at what is no padding, and everywhere."""

    tokens: float
    everywhere: float


_INFINITE = Error(math.inf, math.inf)


class Prover:
    """A model, what it is run on, and what it gave for that as it is."""

    def __init__(
        self,
        model: nn.Module,
        *sources: Iterable[list[Call]],
        stand_ins: Sequence[tuple[nn.Module, str, nn.Module]] = (),
    ) -> None:
        """sources: lists of calls, of each source of which the first that the model takes is run; stand_ins: (holder, name, module
        that stands there for as long as the model runs)."""
        self.model, self._stand_ins = model, stand_ins
        self._runs: list[tuple[Call, list[Output]]] = []
        with self._running():
            for source in sources:
                self._runs += _taken(model, source)

    @property
    def runs(self) -> bool:
        return bool(self._runs)

    @property
    def tolerance(self) -> float:
        """By the coarsest of its weights."""
        dtypes = {p.dtype for p in self.model.parameters()}
        rounds = any(isinstance(m, QuantizedModule) for m in self.model.modules())
        return max(*(_TOLERANCE.get(dtype, 0.0) for dtype in dtypes), _TOLERANCE[torch.float32], _ROUNDING * rounds)

    def error(self, candidates: Sequence[Candidate] = ()) -> Error:
        """Of the model with these in place. What its code raises is raised."""
        with self._running(), ExitStack() as stack:
            for candidate in candidates:
                stack.enter_context(candidate.in_place())
            errors = [_error(_outputs(self.model, call), expected) for call, expected in self._runs]
        return Error(*(max(x) for x in zip(*errors)))

    def why_not(self, candidates: Sequence[Candidate]) -> Reason | None:
        """None where the model is what it was with all of these in place, but for the order of sums."""
        try:
            error = self.error(candidates).tokens
        except Exception as e:
            return Reason("disproved", f"run so, its code raises {type(e).__name__}", "leave it")
        if error <= self.tolerance:
            return None
        return Reason(
            "disproved",
            f"run so, the model gives something else (off by {error:.2g}): its code does more than was read",
            "leave it",
        )

    def is_steady(self) -> bool:
        """Whether it computes the same each time."""
        return self.error().tokens <= self.tolerance

    def of(self, model: nn.Module, *sources: Iterable[list[Call]]) -> Prover:
        """The same of a part of it."""
        return Prover(model, *sources, stand_ins=self._stand_ins)

    @contextmanager
    def _running(self) -> Iterator[None]:
        device = device_of(self.model)
        devices = [device] if device.type == "cuda" else []
        with evaluating(self.model), torch.random.fork_rng(devices), ExitStack() as stack:
            for holder, name, module in self._stand_ins:
                _put(stack, holder, name, module)
            yield


def _taken(model: nn.Module, source: Iterable[list[Call]]) -> list[tuple[Call, list[Output]]]:
    """Of the first calls that go together and of which a model takes any, those that it takes, and what it gives."""
    with contextlib.suppress(Exception):  # of a config or a batch of a kind that nobody knows
        for calls in source:
            outputs = ((call, _tried(model, call)) for call in calls)
            if taken := [(call, x) for call, x in outputs if x is not None]:
                return taken
    return []


def _tried(model: nn.Module, call: Call) -> list[Output] | None:
    """None where its code raises, whatever that is, or nothing that it gives is finite."""
    try:
        outputs = _outputs(model, call)
    except Exception:
        return None
    return outputs if any(x.rows.isfinite().any() for x in outputs) else None


def _outputs(model: nn.Module, call: Call) -> list[Output]:
    torch.manual_seed(0)
    with _as_it_was(model):
        return call.outputs(model)


def _error(outputs: Sequence[Output], expected: Sequence[Output]) -> Error:
    if len(outputs) != len(expected):
        return _INFINITE
    errors = [(_off(y.rows, e.rows), _off(y.value, e.value)) for y, e in zip(outputs, expected)]
    return Error(*(max(x) for x in zip(*errors)))


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
    holder, name, features = rewriting.alone
    module: Any = holder._modules[name]
    if device_of(module).type == "meta":
        return UNPROVEN
    required = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]

    def forward(holder: nn.Module, x: Tensor) -> Any:
        member: Any = holder._modules[name]
        return member(x.clone(), *[None] * (len(required) - 1))

    calls = ([Call(x, forward) for x in inputs] for inputs in features_in(module, features))
    alone = prover.of(holder, calls)
    return alone.why_not([rewriting]) if alone.runs and alone.is_steady() else UNPROVEN
