"""Attention as rows of a plan: what each module's takes in 8 bits, and what that brings."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...common.timing import Timing, Track, interleave
from ...dispatch import Reason
from ...nn.eight_bits import EightBits, calls_size, least_keys, watched, why_no_kernel, why_not
from ...ops.attention import ATTENTION
from ...ops.attention_8bit import DTYPES
from ...proofs.walker import Leaf
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

    def all_forms(self) -> list[Form]:
        """Each once."""
        return list(dict.fromkeys(form for forms in self.forms.values() for form in forms))


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
        crossover: of `fp.plan`; None: measured.
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
        for layer in self.layers:
            self._refuse_without_kernel(layer)
            with annotated(f"while timing {layer.leaf.fqn}; the model is as it was"):
                self._time(layer, measurer)
        advance()
        with annotated("while measuring errors of attention; the model is as it was"):
            self._errors(measurer, batch)
        advance()
        self._examples.clear()

    def _refuse_without_kernel(self, layer: AttentionLayer) -> None:
        if not layer.forms:
            _refuse(layer, _NOT_SEEN)
        for name in layer.open():
            q, _, v = self._examples[layer.all_forms()[0]][:3]
            if reason := why_no_kernel(name, q.device, q.dtype, q.shape[-1], v.shape[-1]):
                text = f"{reason.text}, and the reference is slower than what it replaces"
                layer.candidates[name].refusal = Reason("reference", text, "")

    def _time(self, layer: AttentionLayer, measurer: Measurer) -> None:
        """Fills in what calls take, from how many keys on 8 bits are to count, and what both come to."""
        names, content = layer.open(), measurer.content["times"]
        times: dict[Form, dict[str, Timing]] = {}
        for form in layer.all_forms():
            key = repr(("attention", form, names))
            if key not in content:
                content[key] = _timings(self._examples[form], names)
                measurer.measurements.keep()
            times[form] = {name: Timing(**timing) for name, timing in content[key].items()}
        layer.calls = {phase: tuple((*q, k[-3]) for (q, *_), (k, *_), *_ in x) for phase, x in layer.forms.items()}
        layer.bits = {name: EightBits(name, self._crossover(name, times)) for name in names}
        parts: dict[str | None, Layer | Candidate] = {None: layer}
        for name, x in (parts | {n: layer.candidates[n] for n in names}).items():
            bits = layer.bits.get(name) if name is not None else None
            x.phases = {phase: _total(times, forms, bits) for phase, forms in layer.forms.items()}
            x.ms = measurer.workload.total(x.phases) if x.phases else None

    def _crossover(self, name: str, times: Mapping[Form, Mapping[str, Timing]]) -> int:
        """The one that is given; or the size of the smallest call above all that were seen to gain nothing, or fewer keys, where
        those are known to be enough."""
        if self.crossover is not None:
            return self.crossover
        sizes = [_size(form) for form in times]
        no_gain = max((_size(form) for form, x in times.items() if x[name].low >= x["before"].low), default=0)
        if not (gaining := [size for size in sizes if size > no_gain]):
            return min(sizes)  # it is refused, with what it takes
        q, _, v = self._examples[next(iter(times))][:3]
        where = q.device, q.dtype, q.shape[-1]
        known = [] if why_not(name, *where, v.shape[-1]) else [least_keys(*where)]
        return min([*gaining, *(keys for keys in known if keys > no_gain)])

    def _errors(self, measurer: Measurer, batch: Any) -> None:
        """On the calls that a batch makes: of those that are in 8 bits, together."""
        layers = [x for x in self.layers if x.open()]
        key = repr(("attention errors", [(x.leaf.fqn, [vars(x.bits[n]) for n in x.open()]) for x in layers]))
        errors = measurer.content["times"].get(key)
        if errors is None:
            errors = measurer.content["times"][key] = _errors_on(measurer, layers, batch)
            measurer.measurements.keep()
        for layer in layers:
            for name in layer.open():
                error, most = errors[layer.leaf.fqn][name]
                layer.candidates[name].error = layer.candidates[name].quantisation = error
                if error is None:
                    least = layer.bits[name].crossover
                    layer.candidates[name].refusal = Reason("not_reached", f"the calls of the first of `batches` have {most} keys "
                        f"or rows at most, and it is planned from {least} on", "")  # fmt: skip


def _timings(arguments: tuple[Any, ...], names: Sequence[str]) -> dict[str, Any]:
    calls: dict[str, Callable[[], object]] = {"before": lambda: ATTENTION(*arguments)}
    calls |= {name: functools.partial(EightBits(name, 0).run, arguments) for name in names}
    with torch.inference_mode():
        timings = interleave(calls, arguments[0].device, rounds=ROUNDS, warmup=WARMUP)
    return {name: timing.to_json() for name, timing in timings.items()}


def _total(times: Mapping[Form, Mapping[str, Timing]], forms: list[Form], bits: EightBits | None) -> Timing:
    """The time of a phase's calls, in 8 bits where they are long enough."""
    timings = [
        times[form]["before" if bits is None or _size(form) < (bits.crossover or 0) else bits.dtype] for form in forms
    ]
    low, median, high = (sum(getattr(t, q) for t in timings) for q in ("low", "median", "high"))
    return Timing(median, low, high, timings[0].rounds)


def _errors_on(measurer: Measurer, layers: Sequence[AttentionLayer], batch: Any) -> dict[str, Any]:
    """For each module and candidate (the relative error, None where no call is in 8 bits; the size of the largest call)."""
    by_module = {id(x.leaf.module): x for x in layers}
    squares: dict[tuple[str, str], list[float]] = {}  # sums, of differences and of what they are relative to
    most: dict[str, int] = defaultdict(int)

    def compare(module: object, arguments: tuple[Any, ...]) -> None:
        layer = by_module.get(id(module))
        if layer is None:
            return
        fqn, size = layer.leaf.fqn, _size(_form(arguments))
        most[fqn] = max(most[fqn], size)
        names = [name for name in layer.open() if size >= (layer.bits[name].crossover or 0)]
        if not names:
            return
        expected = ATTENTION(*arguments).double()
        for name in names:
            sums = squares.setdefault((fqn, name), [0.0, 0.0])
            for i, x in enumerate((layer.bits[name].run(arguments) - expected, expected)):
                sums[i] += x.square().sum().item()

    errors: dict[str, Any] = {}
    with watched(compare):
        for _ in measurer.subject.outputs([batch]):
            pass
    for layer in layers:
        of_layer = errors[layer.leaf.fqn] = {}
        for name in layer.open():
            difference, size = squares.get((layer.leaf.fqn, name), (0.0, 0.0))
            of_layer[name] = math.sqrt(difference / size) if size else None, most[layer.leaf.fqn]
    return errors


def _refuse(layer: Layer, reason: Reason) -> None:
    for name in layer.open():
        layer.candidates[name].refusal = reason
