"""Plots of what was measured. matplotlib is imported by whoever asks for one."""

from __future__ import annotations

import importlib.util
import pathlib
from typing import Any

from ..extras import pip_install
from .text import wrapped

FORMATS = (".png", ".svg", ".pdf")
#: Columns of a title of 10 points above axes five inches wide.
_TITLE = 72


def require(file: str) -> None:
    """ValueError, in one sentence, where a plot of this name cannot be made."""
    if pathlib.Path(file).suffix not in FORMATS:
        raise ValueError(f"a plot is a {', '.join(FORMATS)} file, and {file} is none: give it another name")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"plots need matplotlib: {pip_install('cli')}")


def axes(*titles: str) -> tuple[Any, Any]:
    """A figure, which needs no display, and its axes: for more than one title an array of them, side by side. A long title
    goes on in the next line: the figure would cut it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 + 5 * len(titles), 5), layout="constrained")
    panels = figure.subplots(1, len(titles), squeeze=False)[0]
    for panel, title in zip(panels, titles):
        panel.set_title("\n".join(wrapped(title, "", _TITLE)), fontsize=10)
        panel.grid(alpha=0.3)
    return figure, panels if len(titles) > 1 else panels[0]


def empty(panel: Any, why: str) -> None:
    """Says in the middle of axes why there is nothing in them."""
    panel.text(0.5, 0.5, "\n".join(wrapped(why, "", _TITLE // 2)), transform=panel.transAxes, ha="center", va="center")
