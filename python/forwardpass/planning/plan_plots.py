"""Plots of plans and of parity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..common.printing.plots import axes, empty, require

if TYPE_CHECKING:
    from .parity import LayerParity


def plan(evidence: Mapping[str, Any], file: str) -> None:
    """Predicted error over the layers' cost: the frontier, uniform precisions, and the plans that were run."""
    require(file)
    unit = "ms" if evidence["target"] == "latency" else "bytes"
    figure, panel = axes(evidence["result"])
    frontier = [(cost, error) for cost, error in evidence["frontier"] if error > 0]
    if frontier:
        panel.plot(*zip(*frontier), color="C0", label="frontier (predicted)")
    uniforms = uniform(evidence)
    for name, (cost, error) in uniforms.items():
        panel.plot(cost, error, "s", label=f"{name} wherever it is a gain")
    for holds, mark, label in ((True, "o", "run: holds the budget"), (False, "x", "run: does not")):
        points = [(a["cost"], a["predicted"]) for a in evidence["attempts"] if a["holds"] is holds]
        if points:
            panel.plot(*zip(*points), mark, color="C2" if holds else "C3", label=label)
    if frontier or uniforms:
        panel.set_yscale("log")
        panel.legend(fontsize=8)
    else:
        empty(panel, "there was nothing to choose from: no candidate is a gain on any layer")
    panel.set_xlabel(f"{unit} of the layers ({evidence['predicted']['before']:.4g} as they are)")
    panel.set_ylabel("predicted error of the output, mean")
    figure.savefig(file)


def uniform(evidence: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Candidate -> (cost, predicted error) if it were used in every layer where it is a gain."""
    key = "ms" if evidence["target"] == "latency" else "bytes"

    def cost(x: Mapping[str, Any]) -> float:
        value = x[key]
        return float(value["low"] if key == "ms" else value) if value else 0.0

    by_candidate = {}
    for name in evidence["candidates"]:
        options = [
            (cost(c), c["output"]["mean"]) if c["output"] and not c["refused"] else (cost(x["before"]), 0.0)
            for x in evidence["layers"]
            for c in [x["candidates"][name]]
        ]
        if error := sum(e for _, e in options):
            by_candidate[name] = (sum(c for c, _ in options), error)
    return by_candidate


def parity(layers: Sequence[LayerParity], file: str) -> None:
    """Errors by depth, and a map of them: a column a block, a row a layer of a block."""
    require(file)
    finite = [x for x in layers if x.total.samples and math.isfinite(x.total.relative_error)]
    figure, (depth, heat) = axes("error by depth, relative L2", "log10 of the error")
    for part, line in (("quantisation", "-"), ("kernel", "-"), ("total", "--")):  # it often lies on quantisation
        errors = [getattr(x, part).relative_error for x in finite]
        depth.plot(range(len(finite)), [e if e > 0 else math.nan for e in errors], line, marker=".", label=part)
    if any(x.total.relative_error > 0 for x in finite):
        depth.set_yscale("log")
        depth.legend(fontsize=8)
    else:
        empty(depth, "no layer has an error above 0" if finite else "no layer has a finite error: see the table")
    depth.set_xlabel("layer, in the model's order")
    blocks: dict[str, dict[int, float]] = {}  # layer of a block -> block -> error
    for x in finite:
        numbers = [part for part in x.fqn.split(".") if part.isdigit()]
        within = ".".join("*" if part.isdigit() else part for part in x.fqn.split("."))
        blocks.setdefault(within, {})[int(numbers[0]) if numbers else 0] = x.total.relative_error
    columns = 1 + max((b for row in blocks.values() for b in row), default=0)
    values = [
        [math.log10(row[b]) if row.get(b, 0.0) > 0 else math.nan for b in range(columns)] for row in blocks.values()
    ]
    heat.grid(False)
    image = heat.imshow(values or [[math.nan]], aspect="auto", cmap="viridis")
    heat.set_yticks(range(len(blocks)), list(blocks), fontsize=7)
    heat.set_xlabel("block")
    figure.colorbar(image, ax=heat)
    figure.savefig(file)
