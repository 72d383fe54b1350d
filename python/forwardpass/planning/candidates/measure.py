"""What every candidate costs and brings on every layer of a model: its time, its bytes, its error there and at the output.

One layer is replaced at a time, and put back before the next.
"""

from __future__ import annotations

import copy
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...calibration.running import LEAST_ROWS, Arguments, calibration_arguments
from ...common.batches import Fingerprint, Forward, Output, evaluating, main_output, padding_mask, run
from ...common.files.json_files import read_json, write_json
from ...common.models.decoding import Decoding, Generation, clock_of, logits_by_steps
from ...common.models.modules import hooked, tensor_bytes
from ...common.timing import Timing, Track, beyond_caches, interleave
from ...dispatch import Reason
from ...nn import FloatConv2d, Int8Conv2d
from ...nn.conv2d_classes import is_pointwise
from ...nn.linear.quantized_linear import QuantizedLinear
from ...proofs.siblings import in_floats
from ...proofs.walker import ConvolutionLeaf, Leaf
from ...swap.attention.kv_cache import kv_cache_of
from ...swap.plan import Plan
from ...swap.precision import LayerPrecision, find_precision
from ...swap.rules import Context
from ...swap.swapping import build, swap_planned
from ...swap.verdicts import Verdicts
from ..criterion import Criterion
from ..parity import LayerParity

CALIBRATED = "+calibrated"
#: Effects on the output are measured on batches that hold at least this many samples together.
SAMPLES = 32
#: Rows of a layer's input that candidates are compared with the layer on, about.
ROWS = 512
#: The same of a convolution.
IMAGES = 4
#: Calibration statistics of so many bytes are held at once; a model that has more is calibrated in several passes.
STATISTICS_BYTES = 1 << 30
ROUNDS, WARMUP = 15, 3
#: Copies of a layer that steps are timed with: of one of 64 KiB they fill 16 MiB.
MOST_TWINS = 256
PARTIAL = "forwardpass.plan.partial/5"


def find_candidate(name: str) -> LayerPrecision:
    """A precision, calibrated where the name ends in +calibrated. ValueError, in one sentence, where there is none."""
    base = find_precision(name.removesuffix(CALIBRATED))
    if name.endswith(CALIBRATED) and not base.takes_calibration:
        raise ValueError(f"{base.name} takes no calibration: use {base.name!r}, or int8{CALIBRATED}")
    return LayerPrecision(base, name.endswith(CALIBRATED))


#: phase -> the shapes of a layer's inputs in it; of experts [tokens, hidden, choices of a token]
Calls = Mapping[str, tuple[tuple[int, ...], ...]]


@dataclass
class Candidate:
    """One candidate on one layer. Errors are relative L2; `refusal` says why it cannot be, or is no gain."""

    refusal: Reason | None = None
    ms: Timing | None = None
    phases: dict[str, Timing] = field(default_factory=dict)  #: of it, of one time that there is each
    bytes: int = 0
    error: float | None = None  #: at the layer's output, on its real input
    quantisation: float | None = None  #: of it, by the operands' rounding
    kernel: float | None = None  #: of it, by the product
    output: list[float] | None = None  #: `Criterion.additive` of the model's output, of every sample or batch

    @property
    def output_mean(self) -> float:
        return sum(self.output) / len(self.output) if self.output else 0.0


@dataclass
class Layer:
    """A layer as it is, and what it may become; `calls`: the shapes of its inputs in each phase of what is timed."""

    leaf: Leaf
    calls: Calls
    bytes: int
    candidates: dict[str, Candidate]
    ms: Timing | None = None
    phases: dict[str, Timing] = field(default_factory=dict)
    folds: bool = False  #: whether it computes the norm and the activation behind it where it stays in floats

    @property
    def features(self) -> tuple[int, int]:
        """(in, out)"""
        return self.leaf.in_features, self.leaf.out_features

    def open(self) -> list[str]:
        """The candidates that are not refused."""
        return [name for name, c in self.candidates.items() if c.refusal is None]


@dataclass
class Subject:
    """A model, how batches go through it, and what it gives when nothing is replaced."""

    model: nn.Module
    criterion: Criterion
    forward: Forward | None
    output: Output | None
    verdicts: Verdicts = field(default_factory=Verdicts)  #: of a run of what swaps rewrite

    def outputs(self, batches: Iterable[Any]) -> Iterator[Tensor]:
        """What is compared, batch by batch."""
        for batch in batches:
            with evaluating(self.model):  # and left before the output is used: the model may be restored by then
                if kv_cache_of(self.model) is not None and self.forward is None:
                    y = logits_by_steps(self.model, _unpadded(batch))
                else:
                    y = (self.output or main_output)(run(self.model, batch, self.forward))
                y = self.criterion.compared(y, batch)
            yield y

    def reference(self, batches: list[Any], track: Track) -> list[Tensor]:
        """The model's own outputs, on the host. RuntimeError or ValueError, in one sentence, where a batch fails."""
        advance, outputs = track("running the model as it is", len(batches)), []
        for i in range(len(batches)):
            try:
                y = next(iter(self.outputs(batches[i : i + 1])))
            except Exception as e:
                raise RuntimeError(f"the model fails on batch {i} as it is, before any layer is replaced "
                                   f"({type(e).__name__}: {' '.join(str(e).split())[:200]}): repair or leave out that batch"
                                   ) from e  # fmt: skip
            if not y.isfinite().all():
                raise ValueError(f"the model's output of batch {i} holds NaN or infinity before any layer is replaced, so no "
                                 "error can be measured: repair or leave out that batch")  # fmt: skip
            outputs.append(y.cpu())
            advance()
        return outputs

    def swapped(self, plan: Plan, arguments: Arguments, keep: str = "auto") -> AbstractContextManager[object]:
        """Within it the model runs a plan."""
        return swap_planned(self.model, plan, arguments, keep, self.verdicts)


def _unpadded(batch: Any) -> Tensor:
    """The input_ids that go through a decoder step by step."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    mask = batch.get("attention_mask") if ids is not None else None
    if ids is None or (mask is not None and not mask.all()):
        raise ValueError("kv_cache= takes batches that are mappings with input_ids and without padding, whose perplexity is that "
                         "of steps: pass such batches, or forward=")  # fmt: skip
    return ids


class Workload:
    """What is timed: batches, whose forward is one phase, and what decoders generate, which has two, prefill and decode.

    Args:
        shapes: batches and `Decoding`s, at least one.
    """

    def __init__(self, subject: Subject, shapes: list[Any]) -> None:
        self.subject = subject
        self.batches = [x for x in shapes if not isinstance(x, Decoding)]
        self.decodings = [(x, x.prompts(subject.model)) for x in shapes if isinstance(x, Decoding)]
        #: how often there is each phase
        self.times: dict[str, int] = {"forward": 1} if self.batches else {}
        for i, (decoding, _) in enumerate(self.decodings):
            self.times |= {self._name("prefill", i): 1, self._name("decode", i): decoding.steps}

    def _name(self, phase: str, i: int) -> str:
        return f"{phase}, {self.decodings[i][0]}" if len(self.decodings) > 1 else phase

    def calls(self, leaves: list[Leaf]) -> dict[str, Calls]:
        """The shapes of each layer's inputs, in those phases in which it is called."""
        shapes: dict[str, dict[str, list[tuple[int, ...]]]] = {leaf.fqn: {} for leaf in leaves}
        phase = ""

        def note(leaf: Leaf, module: nn.Module, inputs: tuple[Any, ...]) -> None:
            choices = (inputs[1].shape[-1],) if leaf.is_experts else ()
            shapes[leaf.fqn].setdefault(phase, []).append((*inputs[0].shape, *choices))

        def begin(name: str) -> None:
            nonlocal phase
            phase = name

        with hooked(((leaf, leaf.module) for leaf in leaves), before=note, every=True):
            self.walk(begin)
        return {fqn: {p: tuple(x) for p, x in phases.items()} for fqn, phases in shapes.items()}

    def walk(self, begin: Callable[[str], None]) -> None:
        """Runs each phase once, one step of decode; `begin` is told its name before."""
        model = self.subject.model
        with evaluating(model):
            begin("forward")
            for batch in self.batches:
                run(model, batch, self.subject.forward)
            for i, (decoding, prompts) in enumerate(self.decodings):
                generation = Generation(model, prompts)
                begin(self._name("prefill", i))
                token = generation.prefill()
                begin(self._name("decode", i))
                generation.step(token.expand(-1, decoding.tokens))

    def run(self, record: dict[str, list[float]]) -> None:
        """All of it; the milliseconds of each phase, of a step of decode, are appended."""
        model = self.subject.model
        for batch in self.batches:
            run(model, batch, self.subject.forward)
        for i, (decoding, prompts) in enumerate(self.decodings):
            _, times = Generation(model, prompts).generate(decoding.steps, decoding.tokens, clock_of(model))
            spent = {"prefill": times[1] - times[0], "decode": (times[-1] - times[1]) / decoding.steps}
            for phase, seconds in spent.items():
                record.setdefault(self._name(phase, i), []).append(seconds * 1e3)

    def sum_of(self, phases: Mapping[str, float]) -> float:
        """The milliseconds of all, each phase as often as there is it."""
        return sum(ms * self.times[phase] for phase, ms in phases.items())

    def total(self, phases: Mapping[str, Timing]) -> Timing:
        """The time of all."""

        def add(quantile: str) -> float:
            return self.sum_of({phase: getattr(t, quantile) for phase, t in phases.items()})

        return Timing(add("median"), add("low"), add("high"), next(iter(phases.values())).rounds)


def calibrated_arguments(
    subject: Subject, layers: list[Layer], candidates: Mapping[str, LayerPrecision], batches: list[Any], track: Track
) -> Arguments:
    """Arguments of `from_torch` for every layer that a calibrated candidate may replace, in passes that hold no more than
    STATISTICS_BYTES. Where calibration does not reach a layer, that candidate is refused.
    """
    names = [name for name, p in candidates.items() if p.calibrated]
    passes: list[list[Leaf]] = []
    size_so_far = 0
    for layer in layers:
        if not any(layer.candidates[name].refusal is None for name in names):
            continue
        size = 4 * layer.leaf.in_features**2 * (not layer.leaf.is_convolution or is_pointwise(layer.leaf.module))
        if not passes or size_so_far + size > STATISTICS_BYTES:
            passes.append([])
            size_so_far = 0
        passes[-1].append(layer.leaf)
        size_so_far += size
    arguments: Arguments = {}
    rotations = {x.leaf.fqn: {candidates[n].rotate for n in names if x.candidates[n].refusal is None} for x in layers}
    if passes:
        advance = track("calibrating", len(passes))
    for leaves in passes:
        arguments |= calibration_arguments(subject.model, leaves, batches, subject.forward, rotations)[0]
        advance()
    for layer in layers:
        for name in names:
            if layer.candidates[name].refusal is None and layer.leaf.fqn not in arguments:
                layer.candidates[name].refusal = Reason(
                    "not_calibrated", f"calibration sees fewer than {LEAST_ROWS} rows of it, or NaN", ""
                )
    return arguments


@contextmanager
def annotated(text: str) -> Iterator[None]:
    """Errors and interrupts say what was being done."""
    try:
        yield
    except BaseException as e:
        if hasattr(e, "add_note"):
            e.add_note(text)
        raise


def form_of(leaf: Leaf) -> tuple[Any, ...]:
    """What the time of a layer depends on."""
    weight = leaf.weight
    form = leaf.out_features, leaf.in_features, leaf.has_bias, str(weight.dtype), str(weight.device), leaf.formula
    if not isinstance(leaf, ConvolutionLeaf):
        return form
    m: Any = leaf.module
    return (*form, *weight.shape, m.stride, m.padding, m.dilation, m.groups, leaf.norm is not None)


def _behind(leaf: Leaf) -> nn.Module | None:
    """What a replacement computes besides, as one module."""
    norm = leaf.norm if isinstance(leaf, ConvolutionLeaf) else None
    behind = [x.module for x in (norm, leaf.activation) if x is not None]
    return behind[0] if len(behind) == 1 else nn.Sequential(*behind) if behind else None


def sample_inputs(leaf: Leaf, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """What a layer is timed on; experts on tokens that choose among them at random."""
    options: dict[str, Any] = {"dtype": leaf.weight.dtype, "device": leaf.weight.device}
    if (
        leaf.is_convolution and len(shape) == 4
    ):  # as the swapped layers before it leave it, and torch's are no slower so
        return (torch.randn(shape, **options).contiguous(memory_format=torch.channels_last),)
    if not leaf.is_experts:
        return (torch.randn(shape, **options),)
    scores = torch.rand(*shape[:-2], leaf.weight.shape[0], **options)
    weights, index = scores.topk(shape[-1])
    return torch.randn(shape[:-1], **options), index, weights


def twins(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[nn.Module]:
    """The module, and on a CPU as many others with weights of their own as leave no cache anything to keep: between two steps of a
    decoder come the weights of all other layers. Each has been called. On a GPU timing writes over the cache by itself.
    """
    size = max(tensor_bytes([module]), 1)
    count = min(beyond_caches() // size, MOST_TWINS) if inputs[0].device.type == "cpu" else 0
    modules = [module, *(_twin(module) for _ in range(count))]
    for m in modules:  # int8 packs its weight
        m(*inputs)
    return modules


def _twin(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    for name in ("_parameters", "_buffers"):
        tensors: dict[str, Tensor | None] = {}
        for key, t in vars(module)[name].items():
            value = (
                None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)
            )
            tensors[key] = nn.Parameter(value, False) if value is not None and name == "_parameters" else value
        vars(twin)[name] = tensors
    return twin


class Measurements:
    """Measurements so far, and the file that they are kept in, where there is one.

    Raises:
        ValueError: the file holds measurements of something else than `identity`, or there is none to tell it by.
    """

    def __init__(self, file: str | os.PathLike[str] | None, identity: str | None) -> None:
        self.file = pathlib.Path(file) if file is not None else None
        self.content: dict[str, Any] = {
            "schema": PARTIAL,
            "identity": identity,
            "times": {},
            "local": None,
            "output": {},
        }
        if self.file is not None:
            if identity is None:
                raise ValueError("resume= takes batches of tensors, mappings, lists and numbers, which can be told from others, "
                                 "and these hold something else: drop resume=")  # fmt: skip
            if self.file.exists():
                content = read_json(self.file, "file of a plan's measurements", "remove it to measure anew")
                if {k: content.get(k) for k in ("schema", "identity")} != {"schema": PARTIAL, "identity": identity}:
                    raise ValueError(f"{self.file} holds measurements of another model, other batches or candidates, or of "
                                     "another machine: remove it to measure anew, or give another file")  # fmt: skip
                self.content = content

    def keep(self) -> None:
        if self.file is not None:
            write_json(self.file, self.content)


class Measurer:
    """Measures layers in turn.

    Args:
        candidates: by name; arguments: of calibrated layers, by layer.
    """

    def __init__(
        self,
        subject: Subject,
        candidates: Mapping[str, LayerPrecision],
        arguments: Arguments,
        measurements: Measurements,
        workload: Workload,
    ):
        self.subject, self.candidates, self.arguments, self.workload = subject, candidates, arguments, workload
        self.measurements, self.content = measurements, measurements.content

    def time(self, layers: list[Layer], track: Track) -> None:
        """Fills in times and bytes: one timing for all layers of one form that are called alike."""
        groups: dict[str, list[Layer]] = {}
        for layer in layers:
            if layer.open():
                groups.setdefault(repr((form_of(layer.leaf), layer.calls, layer.open(), layer.folds)), []).append(layer)
        advance = track("timing layers", len(groups))
        for key, group in groups.items():
            if key not in self.content["times"]:
                with annotated(f"while timing {group[0].leaf.fqn}; the model is as it was"):
                    self.content["times"][key] = self._time(group[0])
                self.measurements.keep()
            for layer in group:
                measured = self.content["times"][key]
                parts: dict[str, Layer | Candidate] = {
                    "before": layer,
                    **{n: layer.candidates[n] for n in layer.open()},
                }
                for name, x in parts.items():
                    x.phases = {phase: Timing(**timing) for phase, timing in measured[name]["phases"].items()}
                    x.ms, x.bytes = self.workload.total(x.phases), measured[name]["bytes"]
            advance()

    def _time(self, layer: Layer) -> dict[str, Any]:
        leaf, weight = layer.leaf, layer.leaf.weight
        before = in_floats(leaf) if layer.folds and isinstance(leaf, ConvolutionLeaf) else leaf.module
        modules = {"before": before} | {name: self.built(leaf, name) for name in layer.open()}
        behind = _behind(leaf)

        def call(modules: list[nn.Module], inputs: list[tuple[Tensor, ...]]) -> Callable[[], object]:
            first: Any = modules[0]
            fused = isinstance(first, QuantizedLinear | Int8Conv2d | FloatConv2d) and (
                first.activation or getattr(first, "norm", None)
            )
            turns = itertools.cycle(modules)
            if behind is None or fused:
                return lambda: [next(turns)(*x) for x in inputs]
            return lambda: [behind(next(turns)(*x)) for x in inputs]  # which a fused layer saves

        measured: dict[str, Any] = {n: {"phases": {}, "bytes": tensor_bytes([m])} for n, m in modules.items()}
        for phase, shapes in layer.calls.items():
            inputs = [sample_inputs(layer.leaf, shape) for shape in shapes]
            with torch.inference_mode():
                turns = {n: twins(m, inputs[0]) if phase.startswith("decode") else [m] for n, m in modules.items()}
                calls = {n: call(t, inputs) for n, t in turns.items()}
                timings = interleave(calls, weight.device, rounds=ROUNDS, warmup=WARMUP)
            for name, timing in timings.items():
                measured[name]["phases"][phase] = timing.to_json()
        return measured

    def built(self, leaf: Leaf, name: str) -> Any:
        """What a layer becomes."""
        candidate = self.candidates[name]
        return build(leaf, candidate.precision, candidate.calibration_of(self.arguments.get(leaf.fqn))).eval()

    def local_errors(self, layers: list[Layer], batch: Any, track: Track) -> None:
        """Fills in each candidate's error at its layer, on rows of the input that the layer has in the batch."""
        errors = self.content["local"]
        if errors is None:
            errors = self.content["local"] = self._local_errors(layers, batch, track)
            self.measurements.keep()
        for layer in layers:
            for name in layer.open():
                for part, value in errors[layer.leaf.fqn][name].items():
                    setattr(layer.candidates[name], part, value)

    def _local_errors(self, layers: list[Layer], batch: Any, track: Track) -> dict[str, Any]:
        parities = {x.leaf.fqn: {name: LayerParity(x.leaf.fqn, name) for name in x.open()} for x in layers}
        advance = track("measuring errors of layers", len(layers))

        def compare(leaf: Leaf, module: nn.Module, inputs: tuple[Tensor, ...], expected: Tensor) -> None:
            if leaf.is_convolution:  # whole images, as windows mix pixels
                *inputs_of_rows, expected = (t if t.dim() == 3 else t[:IMAGES] for t in (*inputs, expected))
            else:
                mask = padding_mask(batch, expected.shape[:-1], leaf.fqn)
                rows = [
                    t.reshape(-1, t.shape[-1]) if mask is None else t[mask.to(t.device)] for t in (*inputs, expected)
                ]
                stride = max(1, len(rows[0]) // ROWS)  # exact products are in fp64
                *inputs_of_rows, expected = (t[::stride].contiguous() for t in rows)
            for name, parity in parities[leaf.fqn].items():
                with annotated(f"while measuring the error of {leaf.fqn} in {name}; the model is as it was"):
                    candidate = self.built(leaf, name)
                    actual = candidate(*inputs_of_rows)
                    parity.add(candidate, tuple(inputs_of_rows), actual, candidate.activated(expected), None)
            advance()

        with hooked(((layer.leaf, layer.leaf.module) for layer in layers), after=compare, every=True):
            for _ in self.subject.outputs([batch]):
                pass
        parts = {"error": "total", "quantisation": "quantisation", "kernel": "kernel"}
        return {
            fqn: {
                name: {field: getattr(parity, part).to_json()["relative_error"] for field, part in parts.items()}
                for name, parity in by_candidate.items()
            }
            for fqn, by_candidate in parities.items()
        }

    def output_errors(
        self,
        layers: Sequence[Layer],
        batches: list[Any],
        worst: Tensor,
        surroundings: Plan,
        alone: Callable[[Layer, str], Plan],
        track: Track,
    ) -> None:
        """Fills in what each candidate brings at the output: one pass of the model over the batches for each, alone.

        Args:
            worst: the samples that count.
            surroundings: a plan of no layer, for what a swap changes besides: it runs without padding.
            alone: the same with one candidate of one layer.
        """
        todo = [(layer, name) for layer in layers for name in layer.open()]
        missing = [(x, name) for x, name in todo if name not in self.content["output"].get(x.leaf.fqn, {})]
        references: list[Tensor] = []
        if missing:
            with self.subject.swapped(surroundings, {}):
                references = [y.cpu() for y in self.subject.outputs(batches)]
        advance = track("measuring errors of the output", len(todo))
        for n, (layer, name) in enumerate(todo):
            errors = self.content["output"].setdefault(layer.leaf.fqn, {})
            if name not in errors:
                file = self.measurements.file
                progress = f"; {n} of {len(todo)} layers and candidates are in {file}" if file else ""
                with annotated(f"while measuring {layer.leaf.fqn} in {name}; the model is as it was{progress}"):
                    errors[name] = self.output_error(alone(layer, name), batches, references, worst)
                self.measurements.keep()
            layer.candidates[name].output = errors[name]
            if errors[name] is None:
                text = "with it the model's output holds NaN or infinity"
                layer.candidates[name].refusal = Reason("not_finite", text, "")
            advance()

    def output_error(
        self, plan: Plan, batches: list[Any], references: list[Tensor], worst: Tensor
    ) -> list[float] | None:
        """What a plan brings at the output, of each of the samples `worst`; None where it is not finite."""
        with self.subject.swapped(plan, self.arguments):
            errors = [
                self.subject.criterion.additive(actual, expected, batch)
                for batch, actual, expected in zip(batches, self.subject.outputs(batches), references)
            ]
        output = torch.cat(errors)[worst]
        return output.clamp_min(0).tolist() if output.isfinite().all() else None


def identity(
    model: nn.Module,
    leaves: list[Leaf],
    candidates: Mapping[str, LayerPrecision],
    criterion: Criterion,
    context: Context,
    attention: tuple[Any, ...],
    device: Mapping[str, Any],
    *batches: list[Any],
) -> str | None:
    """What measurements are of; of every weight a few thousand elements speak for all. attention: what is asked for of it, if
    anything."""
    fingerprint = Fingerprint()
    for leaf in leaves:
        weight = leaf.weight
        flat = weight.t().reshape(-1) if weight.dim() == 2 and not weight.is_contiguous() else weight.reshape(-1)
        fingerprint.add([leaf.fqn, list(weight.shape), flat[:: max(1, flat.numel() // 4096)]])
    fingerprint.add(
        [
            type(model).__name__,
            [(n, p.precision.name, p.precision.version, p.calibrated) for n, p in candidates.items()],
        ]
    )
    fingerprint.add([[p.text for p in context.include], [p.text for p in context.exclude]])
    if attention:
        fingerprint.add([list(attention)])
    told = [[asdict(x) if isinstance(x, Decoding) else x for x in listed] for listed in batches]
    return fingerprint.add([criterion.kind, torch.__version__, dict(device), *told]).value
