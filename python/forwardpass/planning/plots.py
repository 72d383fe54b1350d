"""Plots of what was measured. matplotlib is imported by whoever asks for one."""

from __future__ import annotations

import importlib.util
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..text import wrapped

if TYPE_CHECKING:
    from .parity import LayerParity
    from .size_batch import BatchSizing

FORMATS = (".png", ".svg", ".pdf")
#: Columns of a title of 10 points above axes five inches wide.
_TITLE = 72


def require(file: str) -> None:
    """ValueError, in one sentence, where a plot of this name cannot be made."""
    if pathlib.Path(file).suffix not in FORMATS:
        raise ValueError(f"a plot is a {', '.join(FORMATS)} file, and {file} is none: give it another name")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("plots need matplotlib: pip install 'forwardpass[cli]'")


def axes(*titles: str) -> tuple[Any, Any]:
    """A figure, which needs no display, and its axes: for more than one title an array of them, side by side. A long title
    goes on in the next line: the figure would cut it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 + 5 * len(titles), 5), layout="constrained")
    drawn = figure.subplots(1, len(titles), squeeze=False)[0]
    for one, title in zip(drawn, titles):
        one.set_title("\n".join(wrapped(title, "", _TITLE)), fontsize=10)
        one.grid(alpha=0.3)
    return figure, drawn if len(titles) > 1 else drawn[0]


def _empty(drawn: Any, why: str) -> None:
    """Says in the middle of axes why there is nothing in them."""
    drawn.text(0.5, 0.5, "\n".join(wrapped(why, "", _TITLE // 2)), transform=drawn.transAxes, ha="center", va="center")


def plan(evidence: Mapping[str, Any], file: str) -> None:
    """Predicted error over the layers' cost: the frontier, uniform precisions, and the plans that were run."""
    require(file)
    unit = "ms" if evidence["target"] == "latency" else "bytes"
    figure, drawn = axes(evidence["result"])
    frontier = [(cost, error) for cost, error in evidence["frontier"] if error > 0]
    if frontier:
        drawn.plot(*zip(*frontier), color="C0", label="frontier (predicted)")
    uniforms = uniform(evidence)
    for name, (cost, error) in uniforms.items():
        drawn.plot(cost, error, "s", label=f"{name} wherever it is a gain")
    for holds, mark, label in ((True, "o", "run: holds the budget"), (False, "x", "run: does not")):
        points = [(a["cost"], a["predicted"]) for a in evidence["attempts"] if a["holds"] is holds]
        if points:
            drawn.plot(*zip(*points), mark, color="C2" if holds else "C3", label=label)
    if frontier or uniforms:
        drawn.set_yscale("log")
        drawn.legend(fontsize=8)
    else:
        _empty(drawn, "there was nothing to choose from: no candidate is a gain on any layer")
    drawn.set_xlabel(f"{unit} of the layers ({evidence['predicted']['before']:.4g} as they are)")
    drawn.set_ylabel("predicted error of the output, mean")
    figure.savefig(file)


def uniform(evidence: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Of each candidate, put wherever it is a gain: cost and predicted error."""
    key = "ms" if evidence["target"] == "latency" else "bytes"

    def cost(x: Mapping[str, Any]) -> float:
        value = x[key]
        return float(value["low"] if key == "ms" else value) if value else 0.0

    found = {}
    for name in evidence["candidates"]:
        taken = [
            (cost(c), c["output"]["mean"]) if c["output"] and not c["refused"] else (cost(x["before"]), 0.0)
            for x in evidence["layers"]
            for c in [x["candidates"][name]]
        ]
        if error := sum(e for _, e in taken):
            found[name] = (sum(c for c, _ in taken), error)
    return found


def parity(layers: Sequence[LayerParity], file: str) -> None:
    """Errors by depth, and a map of them: a column a block, a row a layer of a block."""
    require(file)
    seen = [x for x in layers if x.total.samples and math.isfinite(x.total.relative_error)]
    figure, (depth, heat) = axes("error by depth, relative L2", "log10 of the error")
    for part, line in (("quantisation", "-"), ("kernel", "-"), ("total", "--")):  # it often lies on quantisation
        errors = [getattr(x, part).relative_error for x in seen]
        depth.plot(range(len(seen)), [e if e > 0 else math.nan for e in errors], line, marker=".", label=part)
    if any(x.total.relative_error > 0 for x in seen):
        depth.set_yscale("log")
        depth.legend(fontsize=8)
    else:
        _empty(depth, "no layer has an error above 0" if seen else "no layer has a finite error: see the table")
    depth.set_xlabel("layer, in the model's order")
    blocks: dict[str, dict[int, float]] = {}  # layer of a block -> block -> error
    for x in seen:
        numbers = [part for part in x.fqn.split(".") if part.isdigit()]
        within = ".".join("*" if part.isdigit() else part for part in x.fqn.split("."))
        blocks.setdefault(within, {})[int(numbers[0]) if numbers else 0] = x.total.relative_error
    columns = 1 + max((b for row in blocks.values() for b in row), default=0)
    values = [
        [math.log10(row[b]) if row.get(b, 0.0) > 0 else math.nan for b in range(columns)] for row in blocks.values()
    ]
    heat.grid(False)
    shown = heat.imshow(values or [[math.nan]], aspect="auto", cmap="viridis")
    heat.set_yticks(range(len(blocks)), list(blocks), fontsize=7)
    heat.set_xlabel("block")
    figure.colorbar(shown, ax=heat)
    figure.savefig(file)


def size_batch(found: BatchSizing, file: str) -> None:
    """What was measured of each batch size, and the policies of which no other is better."""
    require(file)
    figure, (measured, simulated) = axes("measured, medians", f"simulated, {found.arrival_rate:g} requests a second")
    sizes = [p.batch for p in found.points]
    measured.plot(sizes, [p.next_ms for p in found.points], "o-", label="from one result to the next, under load")
    measured.plot(sizes, [p.first_ms for p in found.points], "o--", label="from a free server")
    measured.set_xscale("log", base=2)
    measured.set_xticks(sizes, [str(n) for n in sizes])
    measured.set_xlabel("requests in a batch")
    measured.set_ylabel("ms")
    measured.legend(fontsize=8)
    name = f"p{found.percentile:g}"
    if not found.frontier:
        _empty(simulated, f"no policy holds the objective: {found.reason}")
    simulated.plot(
        [c.latency_ms[name] for c in found.frontier], [100 * c.busy for c in found.frontier], "o-", label="frontier"
    )
    if (chosen := found.policy) is not None:
        label = f"max_batch={chosen.max_batch}, max_wait_ms={chosen.max_wait_ms:g}"
        simulated.plot([chosen.latency_ms[name]], [100 * chosen.busy], "*", markersize=14, label=label)
    simulated.axvline(found.latency_slo_ms, linestyle=":", color="gray", label="objective")
    simulated.set_xlabel(f"{name} of the latency, ms")
    simulated.set_ylabel("% of the time computing")
    simulated.legend(fontsize=8)
    figure.savefig(file)
