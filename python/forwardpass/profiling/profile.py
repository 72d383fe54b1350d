"""`fp.profile`: where the time of a request goes, phase by phase and layer by layer, and what to do about the largest part."""

from __future__ import annotations

import functools
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..common import environment
from ..common.batches import Forward, check_several, device_of, eval_mode, evaluating, several, tensors
from ..common.models.modules import plain_module
from ..common.printing.printed import Block, Printed, Table
from ..common.printing.text import count, together
from ..common.timing import Track, untracked
from ..serving.pipeline import Pipeline
from .advice import Advice, advise
from .layers import BEYOND, Inside, Row, look_inside
from .phases import FORWARDS, Overlap, Phase, Request, Sample, measure, predict, summarise, whole_forward

SCHEMA = "forwardpass.profile/1"
#: the items whose layers are looked at, and how often
_INSIDE_ITEMS, _INSIDE_PASSES = 4, 3
#: rows of layers and operations that `print` shows; JSON and HTML have all
_SHOWN = 8


@dataclass(frozen=True)
class Failed:
    """An item that was left out, as it raised."""

    index: int
    phase: str
    error: str


@dataclass(repr=False)
class Profile(Printed):
    """What `fp.profile` found; times are milliseconds. `print` shows tables, a notebook HTML; `save_html` writes plots too."""

    model: str
    items: int  #: that were measured
    rounds: int
    phases: list[Phase]
    wall_ms: float  #: of the plain loop, all rounds, by its own clock
    overlap: Overlap
    inside: Inside | None
    advice: list[Advice]
    failed: list[Failed]
    warnings: list[str]
    device: dict[str, Any]
    samples: list[Sample] = field(repr=False)

    @property
    def unaccounted(self) -> float:
        """The share of the wall time that is in none of the phases: the clock's, and the loop's own."""
        return 1 - sum(p.total_ms for p in self.phases) / self.wall_ms if self.wall_ms else 0.0

    @property
    def largest(self) -> Phase:
        return max(self.phases, key=lambda p: p.total_ms)

    def to_json(self) -> dict[str, Any]:
        measured = ["phases", "wall_ms", "unaccounted"]
        result = {
            "schema": SCHEMA,
            "versions": environment.versions(),
            "device": self.device,
            "model": self.model,
            "items": self.items,
            "rounds": self.rounds,
            "phases": {p.name: p.to_json() for p in self.phases},
            "wall_ms": self.wall_ms,
            "unaccounted": self.unaccounted,
            "overlap": {**vars(self.overlap), "speedup": self.overlap.speedup},
            "advice": [vars(a) for a in self.advice],
            "failed": [vars(f) for f in self.failed],
            "warnings": list(self.warnings),
            "modelled": ["overlap", "advice"],
        }
        if self.inside:
            limits = self.inside.limits
            result |= {
                "kinds": [row.to_json() for row in self.inside.kinds],
                "layers": [row.to_json() for row in self.inside.layers],
                "operations": [row.to_json() for row in self.inside.operations],
                "profiled_forward_ms": self.inside.ms,
                "roofline": {
                    "bytes_per_s": limits.bytes_per_s,
                    "flops_per_s": limits.flops,
                    "sources": limits.sources,
                },
            }
            measured += ["kinds", "layers", "operations", "profiled_forward_ms"]
        return result | {"measured": measured}

    def save_trace(self, path: str | os.PathLike[str]) -> None:
        """Writes a Chrome trace of the profiled passes, with the phases and layers by name: chrome://tracing, Perfetto."""
        if self.inside is None:
            raise ValueError("there is no trace, as the layers were not looked at: profile with layers=True")
        pathlib.Path(path).write_text(self.inside.trace)

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Writes one HTML file with tables and plots, which needs nothing else."""
        from .html import render

        pathlib.Path(path).write_text(render(self), encoding="utf-8")

    def _blocks(self) -> Iterator[Block]:
        extent = f"{count(self.items, 'item')} x {count(self.rounds, 'round')} on {self.device['name']}"
        yield from (f"{self.model}: {extent}, {self.wall_ms / self.items / self.rounds:.2f} ms an item", "")
        rows: list[tuple[str, ...]] = [("phase", "share", "median ms", "p99 ms", "CPU ms", "waiting")]
        rows += [(p.name, f"{p.share:.1%}", f"{p.median_ms:.2f}", f"{p.p99_ms:.2f}", f"{p.cpu_ms:.2f}", f"{p.waiting:.0%}")
                 for p in self.phases]  # fmt: skip
        rows.append(("sum", f"{1 - self.unaccounted:.1%}", "", "", "", ""))
        yield Table(rows, right=range(1, 6))
        for p in self.phases:
            size = f"{p.details['bytes'] / 1e6:.2f} MB an item" if p.details.get("bytes") else ""
            if note := "; ".join(filter(None, (size, str(p.details.get("reason", ""))))):
                yield f"{p.name}: {note}"
        yield "sum: of the loop's wall time"
        if self.inside:
            yield from self._inside_blocks(self.inside)
        o = self.overlap
        yield ""
        yield (f"fp.Pipeline, modelled: {o.period_ms:.2f} ms an item after {o.plain_ms:.2f}, {o.speedup:.2f} times as fast; "
               f"{o.reason}")  # fmt: skip
        yield from map(str, self.advice)
        yield from (f"failed: item {f.index} in {f.phase}: {f.error}" for f in self.failed)
        yield from (f"warning: {w}" for w in self.warnings)

    def _inside_blocks(self, inside: Inside) -> Iterator[Block]:
        for title, members in (
            ("layers of class", inside.kinds),
            ("layers", alike(inside.layers)),
            ("operation", inside.operations),
        ):
            yield from ("", Table([_head(title), *(_cells(row) for row in members[:_SHOWN])], right=range(1, 6)))
            if len(members) > _SHOWN:
                share = sum(row.share for row in members[_SHOWN:])
                yield f"and {len(members) - _SHOWN} more, {share:.1%} of the forward"
        yield ""
        yield from (
            f"{name.replace('_per_s', '')} {self._limit(name)}: {x}" for name, x in inside.limits.sources.items()
        )
        if any(row.roofline > 1 for row in (*inside.layers, *inside.operations)):
            yield BEYOND

    def _limit(self, name: str) -> str:
        assert self.inside is not None
        limits = self.inside.limits
        if name == "bytes_per_s":
            return f"{limits.bytes_per_s / 1e9:.1f} GB/s"
        return f"{limits.flops[name] / 1e9:.0f} GFLOP/s"


def alike(layers: list[Row]) -> list[Row]:
    """Layers whose names differ in numbers alone, as one row; the longest first."""
    groups = together(layers, lambda row: row.name, lambda row: row.kind)
    return sorted((Row.together(name, rows) for name, rows in groups), key=lambda row: -row.ms)


def _head(title: str) -> tuple[str, ...]:
    return (title, "share", "ms", "GFLOP/s", "GB/s", "of\nlimit", "bound\nby")


def _cells(row: Row) -> tuple[str, ...]:
    name = row.name or "(the model itself)"
    rates = (f"{rate / 1e9 / (row.ms / 1e3):.1f}" if rate else "-" for rate in (row.flops, row.bytes))
    reached = f"{row.roofline:.0%}" if row.roofline else "-"
    return (
        f"{name} ({row.kind})" if row.kind else name,
        f"{row.share:.1%}",
        f"{row.ms:.3f}",
        *rates,
        reached,
        row.bound,
    )


def profile(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    preprocess: Callable[[Any], Any] | None = None,
    postprocess: Callable[[Any], Any] | None = None,
    forward: Forward | None = None,
    output: Callable[[Any], Any] | None = None,
    steps: int | None = None,
    rounds: int = 3,
    layers: bool = True,
    progress: Track = untracked,
) -> Profile:
    """Measures the four phases of a plain loop over `batches`, in it the layers of the forward, and says what would help.

    The plain loop: preprocess(item), to the model's device, forward, back to the host and postprocess(result), one item
    after the other; a first pass is not timed. Layers and operations are measured in passes of their own.

    Args:
        model: runs in eval and inference mode; its flags are put back. Compiled or not; its layers are looked at eagerly.
        batches: what preprocess takes, or batches (see `forwardpass.common.batches`) where there is none. All of it is kept.
        preprocess, postprocess: of an item, of a result on the host. As for `fp.Pipeline`.
        forward, output: forward(model, batch), where the convention does not fit; output(result), on the device: what is
            copied to the host (default: all of the result).
        steps: of a decoder of transformers: how many tokens it generates, greedily, after each batch of prompts. Its forward is
            two phases, prefill and decode, and what postprocess takes are the tokens.
        rounds: timed passes over the items.
        layers: whether to look inside the forward.
        progress: progress(what, steps or None) -> called after each step.

    An item that raises in the first pass is left out and listed in `failed`.

    Raises:
        TypeError: `model` is no nn.Module, or `batches` is one batch and no iterable of them.
        ValueError: there is no batch, a number is out of its bounds, or every item fails.
    """
    plain = plain_module("profile", model)
    check_several("batches", batches)
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise ValueError(f"rounds is a number of passes of 1 or more, not {rounds!r}")
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise ValueError(f"steps is a number of tokens of 1 or more, not {steps!r}")
    if steps is not None and (forward is not None or output is not None):
        raise ValueError("profile takes steps=, or forward= and output=: with steps the model's own forward is called")
    items = list(several("batches", batches))
    request = Request(model, device_of(plain), preprocess, postprocess, forward, output, steps)
    with eval_mode(plain), torch.inference_mode():
        good, failed, warnings = _first_pass(request, items, progress("first pass", len(items)))
        loop = measure(request, good, rounds, on_item=progress("timing", rounds * len(good)))
    inside = None
    if layers:
        with evaluating(plain):
            few = good[:_INSIDE_ITEMS]
            looking = Request(plain, request.device, preprocess, postprocess, forward, output, steps)
            progress("looking inside the forward", None)
            inside = look_inside(looking, few, _INSIDE_PASSES)
    phases = summarise(loop, request.device, request.phases)
    if steps is not None:
        phases = [_with_rate(p, request, good[0]) for p in phases]
    wall, cpu = (whole_forward(loop.typical(quantity)) for quantity in (lambda s: s.wall, lambda s: s.cpu))
    overlap = functools.partial(predict, wall, cpu, loop.cores, handover=_handover())
    return Profile(
        type(plain).__name__, len(good), rounds, phases, loop.seconds * 1e3, overlap(1), inside,
        advise(request, good[0], phases, overlap, inside), failed, warnings, environment.device(request.device), loop.samples,
    )  # fmt: skip


def _with_rate(phase: Phase, request: Request, item: Any) -> Phase:
    """A phase of a decoder, with the tokens that it goes through each second."""
    if phase.name not in FORWARDS or request.steps is None:
        return phase
    batch = request.input(item)
    ids = batch["input_ids"] if isinstance(batch, Mapping) else batch
    tokens = ids.numel() if phase.name == "prefill" else len(ids) * request.steps
    rate = tokens / phase.median_ms * 1e3 if phase.median_ms else 0.0
    return replace(
        phase,
        details={"tokens": tokens, "tokens_per_s": rate, "reason": f"{tokens} tokens an item, {rate:.1f} a second"},
    )


@functools.cache
def _handover() -> float:
    """Seconds an item that `fp.Pipeline` takes where nothing is done with it."""
    pipeline, items = Pipeline(nn.Identity()), [torch.zeros(1)] * 200
    start = time.perf_counter()
    for _ in pipeline(items):
        pass
    return (time.perf_counter() - start) / len(items)


def _first_pass(
    request: Request, items: Sequence[Any], step: Callable[[], object]
) -> tuple[list[Any], list[Failed], list[str]]:
    """The items that run, those that do not, and what looks wrong with results."""
    good, failed, strange = [], [], []
    first: Exception | None = None
    for index, item in enumerate(items):
        value = item
        for phase, run in request.phases.items():
            try:
                value = run(value)
            except Exception as e:
                first = first or e
                failed.append(Failed(index, phase, f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"))
                break
            if phase in FORWARDS and any(t.is_floating_point() and t.isnan().any() for t in tensors(value)):
                strange.append(index)
        else:
            good.append(item)
        step()
    if not good:
        f = failed[0]
        raise ValueError(f"none of the {len(items)} items runs; the first fails in {f.phase}: {f.error}") from first
    warnings = (
        [f"NaN in the results of {len(strange)} of {len(items)} items, the first is item {strange[0]}"]
        if strange
        else []
    )
    return good, failed, warnings
