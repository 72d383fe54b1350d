"""Attention as rows of a plan: what each module's takes in 8 bits, and what that brings."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..common.compare import relative_error
from ..common.timing import Timing, Track, interleave
from ..dispatch import Reason
from ..nn.eight_bits import EightBits, calls_size, least_keys, watched, why_no_kernel, why_not
from ..ops.attention import ATTENTION
from ..ops.attention_8bit import DTYPES
from ..proofs.walker import Leaf
from .measure import ROUNDS, WARMUP, Candidate, Layer, Measurer, annotated

#: A call of `ATTENTION`, by all that its time depends on.
Form = tuple[Any, ...]

NO_WEIGHTS = Reason("no_weights", "attention has no weights", "")
NOT_OF_LAYERS = Reason("attention_only", "it is a candidate of attention alone", "")
_NOT_SEEN = Reason("never_called", "no batch of `shapes` calls it in a way that fused attention takes", "")


def attention_candidates(attention: object) -> tuple[str, ...]:
    """Those of `attention=` of `fp.plan`, one or several; none where it is what `fp.swap` takes besides.

    Raises:
        ValueError: `attention_8bit` has no such dtype.
    """
    names = (attention,) if isinstance(attention, str) else attention
    if attention == "auto" or not isinstance(names, Iterable):
        return ()
    listed = tuple(names)
    if not listed or not all(name in DTYPES for name in listed):
        raise ValueError(f"attention of a plan is 'auto', True, False, or one or several of {', '.join(map(repr, DTYPES))}, which "
                         f"are weighed, not {attention!r}")  # fmt: skip
    return tuple(dict.fromkeys(map(str, listed)))


@dataclass
class AttentionLayer(Layer):
    """The attention of one module. As it is: `ATTENTION` in the model's dtype, by torch's kernel where ours is none."""

    bits: dict[str, EightBits] = field(default_factory=dict)  #: what each candidate is
    forms: dict[str, list[Form]] = field(default_factory=dict)  #: of its calls in each phase

    @property
    def features(self) -> tuple[int, int]:
        """Columns of all heads of q, and of k."""
        shapes = next((form[:2] for forms in self.forms.values() for form in forms), None)
        if shapes is None:
            return 0, 0
        (q, *_), (k, *_) = shapes
        return q[-1] * q[-2], k[-1] * k[-2]

    def sizes(self) -> list[int]:
        return [_size(form) for forms in self.forms.values() for form in forms]


def _form(arguments: tuple[Any, ...]) -> Form:
    return tuple((tuple(x.shape), x.stride(), str(x.dtype)) if isinstance(x, Tensor) else x for x in arguments)


def _size(form: Form) -> int:
    (q, *_), (k, *_), ends = form[0], form[1], form[11]
    return calls_size(q, k, None if ends is None else ends[0])


class Attention:
    """Those of a model that may be planned in 8 bits.

    Args:
        leaves: modules that a swap can swap.
        names: of the candidates; none: there is nothing to plan.
        crossover: of `fp.plan`; None: the keys from which 8 bits are known to be faster here, or those of the shortest call of
            `shapes`, where that is shorter: it is measured.
        others: candidates of layers, which attention does not take.
    """

    def __init__(
        self, leaves: Sequence[Leaf], names: Sequence[str], crossover: int | None, others: Iterable[str]
    ) -> None:
        self.crossover = crossover
        refused = {name: Candidate(NO_WEIGHTS) for name in others if name not in names}
        self.layers = [
            AttentionLayer(leaf, {}, 0, {**refused, **{name: Candidate() for name in names}})
            for leaf in (leaves if names else ())
        ]
        self._names = tuple(names)
        self._by_module = {id(x.leaf.module): x for x in self.layers}
        self._examples: dict[Form, tuple[Any, ...]] = {}

    def measure(self, measurer: Measurer, batch: Any, track: Track) -> None:
        """Fills in times and errors. The model runs with all of this attention swapped, in its dtype."""
        advance = track("measuring attention", 3)
        phase = ""

        def note(module: object, arguments: tuple[Any, ...]) -> None:
            if layer := self._by_module.get(id(module)):
                form = _form(arguments)
                layer.forms.setdefault(phase, []).append(form)
                self._examples.setdefault(form, arguments)

        def begin(name: str) -> None:
            nonlocal phase
            phase = name

        with watched(note):
            measurer.workload.walk(begin)
        advance()
        self._choose_crossovers()
        with annotated("while timing attention; the model is as it was"):
            self._time(measurer)
        advance()
        with annotated("while measuring errors of attention; the model is as it was"):
            self._errors(measurer, batch)
        advance()
        self._examples.clear()

    def _choose_crossovers(self) -> None:
        for layer in self.layers:
            if not layer.forms:
                _refuse(layer, _NOT_SEEN)
                continue
            layer.calls = {phase: tuple((*q, k[-3]) for (q, *_), (k, *_), *_ in x) for phase, x in layer.forms.items()}
            q, _, v = self._examples[next(iter(layer.forms.values()))[0]][:3]
            for name in self._names:
                where = q.device, q.dtype, q.shape[-1]
                if reason := why_no_kernel(name, *where, v.shape[-1]):
                    text = f"{reason.text}, and the reference is slower than what it replaces"
                    layer.candidates[name].refusal = Reason("reference", text, "")
                crossover = self.crossover
                if crossover is None:
                    known = why_not(name, *where, v.shape[-1]) is None
                    crossover = min([*layer.sizes(), *([least_keys(*where)] if known else [])])
                layer.bits[name] = EightBits(name, crossover)

    def _time(self, measurer: Measurer) -> None:
        times = measurer.content["times"]
        for layer in self.layers:
            names = layer.open()
            for form in dict.fromkeys(form for forms in layer.forms.values() for form in forms):
                if (key := _key(form, names)) not in times:
                    times[key] = _timings(self._examples[form], names)
                    measurer.measurements.keep()
            parts: dict[str | None, Layer | Candidate] = {None: layer}
            for name, x in (parts | {n: layer.candidates[n] for n in names}).items():
                x.phases = {phase: _total(times, layer, forms, name) for phase, forms in layer.forms.items()}
                x.ms = measurer.workload.total(x.phases) if x.phases else None

    def _errors(self, measurer: Measurer, batch: Any) -> None:
        """On the calls that a batch makes: of those that are in 8 bits, together."""
        layers = [x for x in self.layers if x.open()]
        key = repr(("attention errors", [(x.leaf.fqn, [vars(x.bits[n]) for n in x.open()]) for x in layers]))
        found = measurer.content["times"].get(key)
        if found is None:
            found = measurer.content["times"][key] = _errors_on(measurer, layers, batch)
            measurer.measurements.keep()
        for layer in layers:
            for name in layer.open():
                error, most = found[layer.leaf.fqn][name]
                layer.candidates[name].error = layer.candidates[name].quantisation = error
                if error is None:
                    least = layer.bits[name].crossover
                    layer.candidates[name].refusal = Reason("not_reached", f"the calls of the first of `batches` have {most} keys "
                        f"or rows at most, and it is planned from {least} on", "")  # fmt: skip


def _key(form: Form, names: Sequence[str]) -> str:
    return repr(("attention", form, names))


def _timings(arguments: tuple[Any, ...], names: Sequence[str]) -> dict[str, Any]:
    calls: dict[str, Callable[[], object]] = {"before": lambda: ATTENTION(*arguments)}
    calls |= {name: functools.partial(EightBits(name, 0).run, arguments) for name in names}
    with torch.inference_mode():
        timings = interleave(calls, arguments[0].device, rounds=ROUNDS, warmup=WARMUP)
    return {name: timing.to_json() for name, timing in timings.items()}


def _total(times: Mapping[str, Any], layer: AttentionLayer, forms: list[Form], name: str | None) -> Timing:
    """Of the calls of a phase: those that are too short for 8 bits take what they take as they are."""
    timings = []
    for form in forms:
        in_8_bits = name is not None and _size(form) >= (layer.bits[name].crossover or 0)
        timings.append(Timing(**times[_key(form, layer.open())][name if in_8_bits else "before"]))
    low, median, high = (sum(getattr(t, q) for t in timings) for q in ("low", "median", "high"))
    return Timing(median, low, high, timings[0].rounds)


def _errors_on(measurer: Measurer, layers: Sequence[AttentionLayer], batch: Any) -> dict[str, Any]:
    """For each module and candidate (the relative error, None where no call is in 8 bits; the size of the largest call)."""
    by_module = {id(x.leaf.module): x for x in layers}
    results: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    most: dict[str, int] = defaultdict(int)

    def compare(module: object, arguments: tuple[Any, ...]) -> None:
        layer = by_module.get(id(module))
        if layer is None:
            return
        fqn, size = layer.leaf.fqn, _size(_form(arguments))
        most[fqn] = max(most[fqn], size)
        expected = None
        for name in layer.open():
            if size >= (layer.bits[name].crossover or 0):
                expected = ATTENTION(*arguments).flatten() if expected is None else expected
                results[fqn, name].append((layer.bits[name].run(arguments).flatten(), expected))

    errors: dict[str, Any] = {}
    with watched(compare):
        for _ in measurer.subject.outputs([batch]):
            pass
    for layer in layers:
        of_layer = errors[layer.leaf.fqn] = {}
        for name in layer.open():
            pairs = results[layer.leaf.fqn, name]
            error = relative_error(*(torch.cat(x) for x in zip(*pairs))) if pairs else None
            of_layer[name] = error, most[layer.leaf.fqn]
    return errors


def _refuse(layer: Layer, reason: Reason) -> None:
    for name in layer.open():
        layer.candidates[name].refusal = reason
