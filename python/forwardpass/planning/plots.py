"""Plots of what was measured. matplotlib is imported by whoever asks for one."""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any

FORMATS = (".png", ".svg", ".pdf")


def require(file: str) -> None:
    """ValueError, in one sentence, where a plot of this name cannot be made."""
    if pathlib.Path(file).suffix not in FORMATS:
        raise ValueError(f"a plot is a {', '.join(FORMATS)} file, and {file} is none: give it another name")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("plots need matplotlib: pip install 'forwardpass[cli]'")


def axes(title: str) -> tuple[Any, Any]:
    """A figure and its axes, which need no display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    drawn = figure.subplots()
    drawn.set_title(title, fontsize=10)
    drawn.grid(alpha=0.3)
    return figure, drawn


def plan(evidence: Mapping[str, Any], file: str) -> None:
    """Predicted error over the layers' cost: the frontier, uniform precisions, and the plans that were run."""
    require(file)
    unit = "ms" if evidence["target"] == "latency" else "bytes"
    figure, drawn = axes(evidence["result"])
    frontier = [(cost, error) for cost, error in evidence["frontier"] if error > 0]
    drawn.plot(*zip(*frontier), color="C0", label="frontier (predicted)") if frontier else None
    for name, (cost, error) in uniform(evidence).items():
        drawn.plot(cost, error, "s", label=f"{name} wherever it is a gain")
    for holds, mark, label in ((True, "o", "run: holds the budget"), (False, "x", "run: does not")):
        points = [(a["cost"], a["predicted"]) for a in evidence["attempts"] if a["holds"] is holds]
        if points:
            drawn.plot(*zip(*points), mark, color="C2" if holds else "C3", label=label)
    drawn.set_yscale("log")
    drawn.set_xlabel(f"{unit} of the layers ({evidence['predicted']['before']:.4g} as they are)")
    drawn.set_ylabel("predicted error of the output, mean")
    drawn.legend(fontsize=8)
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
