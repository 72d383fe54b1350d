"""What a swap did, what it left alone, and why."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ..common.models.modules import plain_module
from ..common.printing.printed import Block, Printed, Table
from ..common.printing.text import count, megabytes, together, with_numbers, without_numbers
from ..dispatch import Reason
from ..integrations.timesteps import describe
from ..proofs.walker import ConvolutionLeaf
from . import originals
from .plan import Plan

SCHEMA = "forwardpass.report/1"


@dataclass(frozen=True)
class Swapped:
    """A layer that was replaced."""

    fqn: str
    precision: str
    version: int
    in_features: int
    out_features: int
    bytes_before: int
    bytes_after: int
    activation: str | None = None  #: that stood behind it, and is computed in it
    tied_to: str | None = None  #: the embedding's weight that was its own too, and stays as it is
    window: str | None = None  #: of a convolution, in words: "3 x 3 / 2"
    norm: bool = False  #: whether a BatchNorm stood behind it, and is computed in it
    then: tuple[str, ...] = ()  #: what is done with its output and computed in it too, found by running (`Int8Conv2d`)

    @property
    def computes(self) -> str:
        """In words: "int8 v2", of a convolution its window, and what it computes besides."""
        besides = ["batch norm"] * self.norm + ([self.activation] if self.activation else [])
        besides += ["int8 out" if step == "int8" else step for step in self.then]
        window = f", {self.window}" if self.window else ""
        return " + ".join([f"{self.precision} v{self.version}{window}", *besides])


#: Which calls stay as they are where attention computes in 8 bits.
IN_ITS_DTYPE = ("calls with fewer rows or keys, and steps that read a cache, compute in the model's dtype; calls with dropout, "
                "gradients or attention weights run what ran before")  # fmt: skip


@dataclass(frozen=True)
class SwappedAttention:
    """Attention that runs on `fp.ops.attention` now, and what ran before: "torch", or transformers' name for it."""

    fqn: str
    module: str  #: the class
    before: str
    bits: str | None = None  #: what it computes in where 8 bits were asked for, in words: "int8 from 256 keys on"


@dataclass(frozen=True)
class Skipped:
    """A layer, or attention, that was left as it is."""

    fqn: str
    reason: Reason
    bytes: int | None = None  #: of a convolution's parameters

    def to_json(self) -> dict[str, Any]:
        return {"fqn": self.fqn, **vars(self.reason), **({} if self.bytes is None else {"bytes": self.bytes})}


@dataclass(frozen=True)
class Unpadded:
    """An encoder that runs without the padding of its batches."""

    fqn: str  #: of the list of its layers
    layers: int
    attention: str  #: "varlen", or "padded" where attention computes on padded q, k and v or hidden states

    def __str__(self) -> str:
        around = "" if self.attention == "varlen" else " but in attention"
        return f"{self.fqn} ({count(self.layers, 'layer')}) runs without it{around}"


@dataclass(frozen=True)
class Unpadding:
    """The encoders that run without padding, and why another, or all there is, does not."""

    encoders: tuple[Unpadded, ...]
    reason: Reason | None

    def to_json(self) -> dict[str, Any]:
        reason = None if self.reason is None else dict(vars(self.reason))
        return {"encoders": [dict(vars(x)) for x in self.encoders], "reason": reason}

    def __str__(self) -> str:
        """A line; empty where there is no text encoder."""
        if self.reason is not None and self.reason.code == "no_encoder":
            return ""
        stays = [f"stays: {self.reason}"] if self.reason is not None else []
        return "; ".join([*map(str, self.encoders), *stays])


@dataclass(frozen=True)
class OtherLayers:
    """Layers of a class that a swap has nothing for, neither Linear-like nor attention: those that compute, and those that hold a
    hundredth of the model's bytes.
    """

    module: str  #: the class
    first: str  #: the name of one of them; "" is the model itself
    count: int
    bytes: int  #: of their own parameters and buffers
    reason: Reason

    def to_json(self) -> dict[str, Any]:
        entries = {"module": self.module, "first": self.first, "count": self.count, "bytes": self.bytes}
        return {**entries, **vars(self.reason)}


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of parameters and buffers. `after` is the model's own, `originals` what the originals take beside it, `peak`
    the most that stood at any one time: originals are freed, or moved, only after every replacement is built and in
    its place.
    """

    before: int
    after: int
    originals: int
    originals_device: str | None
    peak: int

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Folded:
    """A convolution that stays in floats, and computes the norm and the activation behind it."""

    fqn: str
    activation: str | None
    norm: bool

    @staticmethod
    def of(leaf: ConvolutionLeaf) -> Folded:
        return Folded(leaf.fqn, leaf.formula, leaf.norm is not None)

    @property
    def computes(self) -> str:
        return " + ".join([*["batch norm"] * self.norm, *([self.activation] if self.activation else [])])


@dataclass(frozen=True)
class EncoderLayers:
    """Whether an encoder's layers, or a decoder's, are one operation on a CPU."""

    stacks: tuple[tuple[str, int], ...]  #: the list of layers by name, and how many they are
    reason: Reason | None  #: why not, or why others are not

    def __str__(self) -> str:
        if self.stacks:
            return "; ".join(f"the {n} layers of {fqn} are one operation" for fqn, n in self.stacks)
        silent = self.reason is None or self.reason.code in (
            "encoder_off",
            "no_encoder",
            "decoder_off",
            "no_decoder",
            "on_gpu",
        )
        return "" if silent else f"layer by layer: {self.reason}"

    def to_json(self) -> dict[str, Any]:
        stacks = [{"layers": fqn, "count": n} for fqn, n in self.stacks]
        return {"stacks": stacks, "reason": None if self.reason is None else dict(vars(self.reason))}


@dataclass(repr=False)
class Report(Printed):
    """The result of `fp.swap`. As a context manager it restores the model on exit. `print` shows tables, a notebook HTML."""

    swapped: list[Swapped]
    joined: list[tuple[str, ...]]  #: swapped layers that are called with one input, and are one product
    mlps: list[tuple[str, ...]]  #: swapped layers that are one `fp.nn.MLP` or `fp.nn.GatedMLP`
    apart: list[
        Skipped
    ]  #: what is not rewritten: first layers of MLPs and products, and attention, each with its reason
    norms: list[str]  #: norms before MLPs that quantise for them on a GPU
    attention: list[SwappedAttention]
    skipped: list[Skipped]
    other_layers: list[OtherLayers]
    unpadding: Unpadding
    kv_cache: str | None
    warnings: list[str]
    weight_bytes: WeightBytes
    plan: Plan
    device: str  #: of the model, as "cpu" or "cuda"
    dry_run: bool = False
    encoder: EncoderLayers = field(default_factory=lambda: EncoderLayers((), None))
    folded: list[Folded] = field(default_factory=list)
    decoder: EncoderLayers = field(default_factory=lambda: EncoderLayers((), None))
    _model: weakref.ref[nn.Module] | None = field(default=None, repr=False, compare=False)
    _swap: weakref.ref[originals.Originals] | None = field(default=None, repr=False, compare=False)

    def attach(self, model: nn.Module, swapped: originals.Originals) -> None:
        """Ties the report to the swap that it describes. Weakly: a report keeps no model and no weights alive."""
        self._model, self._swap = weakref.ref(model), weakref.ref(swapped)
        swapped.report = self

    def _current(self) -> tuple[nn.Module, originals.Originals] | None:
        """The model and its swap, while it is there: not restored since, perhaps swapped again."""
        model = self._model() if self._model else None
        swap = self._swap() if self._swap else None
        newest = originals.find(model) if model is not None else None
        return (model, swap) if model and swap and newest and any(s is swap for s in newest.all()) else None

    def save_plan(self, path: str) -> None:
        """Writes the plan as JSON; `fp.swap(model, plan=path)` replays it."""
        self.plan.save(path)

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types, with `schema`, versions, and the plan."""
        return {
            "schema": SCHEMA,
            "versions": {"forwardpass": self.plan.forwardpass, "torch": torch.__version__},
            "dry_run": self.dry_run,
            "device": self.device,
            "swapped": [dict(vars(s)) for s in self.swapped],
            "joined": [list(names) for names in self.joined],
            "mlps": [list(names) for names in self.mlps],
            "apart": [s.to_json() for s in self.apart],
            "norms": list(self.norms),
            "attention": [dict(vars(s)) for s in self.attention],
            "skipped": [s.to_json() for s in self.skipped],
            "other_layers": [x.to_json() for x in self.other_layers],
            "unpadding": self.unpadding.to_json(),
            "encoder": self.encoder.to_json(),
            "folded": [dict(vars(x)) for x in self.folded],
            "decoder": self.decoder.to_json(),
            "kv_cache": self.kv_cache,
            "warnings": list(self.warnings),
            "weight_bytes": self.weight_bytes.to_json(),
            "plan": self.plan.to_json(),
        }

    def __enter__(self) -> Report:
        current = self._current()
        if current and not current[1].restorable:
            raise RuntimeError("with fp.swap(…) restores the model on exit, and keep=False let the originals go: call "
                               "fp.swap without `with`, or use another keep")  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if current := self._current():
            model, swap = current
            newest = originals.find(model)
            assert newest is not None
            swaps = [*newest.all()]
            originals.undo_swaps(model, swaps[: swaps.index(swap) + 1])

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": None, "_swap": None}

    def _blocks(self) -> Iterator[Block]:
        yield self._headline()
        if self.swapped:
            rows: list[tuple[str, ...] | str] = [("swapped", "precision", "in", "out", "bytes")]
            alike = together(self.swapped, lambda s: s.fqn, lambda s: (s.computes, s.in_features, s.out_features))
            rows += [
                (name, s.computes, str(s.in_features), str(s.out_features),
                 f"{sum(x.bytes_before for x in group):,} -> {sum(x.bytes_after for x in group):,}")
                for name, group in alike for s in group[:1]
            ]  # fmt: skip
            yield from ("", Table(rows, right=(2, 3, 4)))
            yield from (tied(s.fqn, s.tied_to) for s in self.swapped if s.tied_to)
        for title, groups in (("one product", self.joined), ("one MLP", self.mlps)):
            if groups:
                runs = together(groups, lambda names: names[0], lambda names: tuple(_last(n) for n in names[1:]))
                yield from (
                    "",
                    Table([(title, "with"), *((name, ", ".join(map(_last, x[0][1:]))) for name, x in runs)]),
                )
        if self.apart:
            yield from ("", _reasons("layers that stay apart", self.apart))
        if self.norms and self.device != "cpu":  # where they do what they did
            names = [name for name, _ in together(self.norms, lambda fqn: fqn)]
            yield from ("", Table([("norms that quantise for an MLP",), *((name,) for name in names)]))
        if self.attention:
            modules = together(self.attention, lambda s: s.fqn, lambda s: (s.module, s.before, s.bits))
            asked = any(s.bits for s in self.attention)
            rows = [("attention", "module", "before", *(("computes in",) if asked else ()))]
            rows += [
                (name, x.module, x.before, *((x.bits or "its dtype",) if asked else ())) for name, (x, *_) in modules
            ]
            yield from ("", Table(rows))
            if asked:
                yield f"attention: {IN_ITS_DTYPE}"
        if self.plan.timesteps is not None:
            yield from ("", f"swapped at {describe(self.plan.timesteps)}; at others the model runs on its originals")
        if line := str(self.unpadding):
            yield from ("", f"padding: {line}")
        for name, layers in (("encoder", self.encoder), ("decoder", self.decoder)):
            if line := str(layers):
                yield from ("", f"{name}: {line}")
        if self.kv_cache is not None:
            dtype = "the model's dtype" if self.kv_cache == "auto" else self.kv_cache
            yield from ("", f"caches of keys and values: {dtype}, appended to in place")
        if self.folded:
            in_floats = together(self.folded, lambda x: x.fqn, lambda x: x.computes)
            table = [("in floats", "computes too"), *((name, alike[0].computes) for name, alike in in_floats)]
            yield from ("", Table(table))
        if self.skipped:
            yield from ("", _reasons("skipped", self.skipped))
        if self.other_layers:
            rows = [("other layers", "first", "count", "bytes")]
            for why in dict.fromkeys(x.reason for x in self.other_layers):
                rows += [str(why), *((x.module, x.first, str(x.count), f"{x.bytes:,}") for x in self.other_layers
                                        if x.reason == why)]  # fmt: skip
            yield from ("", Table(rows, right=(2, 3)))
        if self.warnings:
            yield from ("", *(f"warning: {w}" for w in self.warnings))

    def _headline(self) -> str:
        b = self.weight_bytes
        verb = "would be swapped" if self.dry_run else "swapped"
        attention = f", {count(len(self.attention), 'attention module')}" if self.attention else ""
        parts = [f"{count(len(self.swapped), 'layer')}{attention} {verb}, {len(self.skipped)} skipped"]
        others = [(x.reason.code, x.module, x.bytes) for x in self.other_layers]
        convolutions = [("convolution", "", x.bytes) for x in self.skipped if x.bytes is not None]
        if line := mostly([*others, *convolutions], b.before):
            parts.append(line)
        originals = (
            f"originals {megabytes(b.originals)} on {b.originals_device}"
            if b.originals_device
            else "originals not kept"
        )
        parts.append(f"weights {megabytes(b.before)} -> {megabytes(b.after)}, {originals}, peak {megabytes(b.peak)}")
        return "; ".join(parts)


def report(model: nn.Module) -> Report:
    """The report of the swap that a model is in: what `fp.swap` returned, or a load with `fp.Config` left behind.

    Raises:
        RuntimeError: the model is not swapped, or is a copy of a swapped one or loaded from a checkpoint, of which there is none.

    Example:
        >>> swapped = fp.swap(model, "int8")
        >>> fp.report(model) is swapped
        True
    """
    entry = originals.find(plain_module("report", model))
    if entry is None:
        raise RuntimeError("this model has no report: it is not swapped, or is a copy of a swapped model or loaded from a "
                           "checkpoint; fp.swap(model, …) makes one")  # fmt: skip
    swapped: Report = entry.report
    return swapped


def _last(fqn: str) -> str:
    return fqn.rpartition(".")[2]


def _reasons(title: str, layers: Iterable[Skipped]) -> Table:
    rows: list[tuple[str, ...] | str] = [(title,)]
    for reason, names in by_reason((s.fqn, s.reason.code, str(s.reason)) for s in layers):
        rows += [reason, *((name,) for name in names)]
    return Table(rows)


#: What layers are called that hold most of a model, by the code of the reason for which they stay; others by their class.
_CALLED = {"convolution": "convolutions", "embedding": "embeddings", "recurrent": "recurrent layers"}


def mostly(others: Iterable[tuple[str, str, int]], total: int) -> str:
    """What a model is where half of its bytes or more, `total` in all, are in layers of one kind that stay; else nothing.

    Args:
        others: code of the reason, class and bytes of the layers that a swap has nothing for.
    """
    by_name: Counter[str] = Counter()
    for code, module, size in others:
        by_name[_CALLED.get(code, module)] += size
    name, size = max(by_name.items(), key=lambda x: x[1], default=("", 0))
    return f"{size / total:.0%} of the weights are {name} and stay" if 2 * size >= total > 0 else ""


def tied(fqn: str, embedding: str) -> str:
    """What became of a head that shared its weight."""
    return f"{fqn} has a copy of its own now, beside {embedding}, to which it was tied, and which stays as it is"


def by_reason(skipped: Iterable[tuple[str, str, str]]) -> list[tuple[str, list[str]]]:
    """(reason, the names that it is for), each reason once. One that names its layer, to include it, is the same for all, and so
    are those that differ in numbers alone.

    Args:
        skipped: names, codes and texts.
    """
    reasons: dict[tuple[str, str], list[tuple[str, str, str]]] = {}
    for fqn, code, text in skipped:
        of_any = text.replace(repr(fqn), "its name")
        reasons.setdefault((code, without_numbers(of_any)), []).append((fqn, text, of_any))
    return [
        (f"{code}: {group[0][1] if len(group) == 1 else with_numbers(text for *_, text in group)}",
         [name for name, _ in together(group, lambda x: x[0])])
        for (code, _), group in reasons.items()
    ]  # fmt: skip
