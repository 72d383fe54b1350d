"""Images of what was found, by matplotlib (extra `cli`), which is imported when one is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def image(path: str | os.PathLike[str], columns: int = 1, width: float = 8.0, height: float = 5.0) -> Iterator[Any]:
    """Axes to draw on, an array of them for several columns; written to `path`, of the kind that its ending says.

    Raises RuntimeError without matplotlib, ValueError for an ending that it does not know.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise RuntimeError(
            "plots are drawn by matplotlib, which is not installed: pip install 'forwardpass[cli]'"
        ) from e
    figure = Figure(figsize=(width, height), layout="constrained")  # pyplot would choose a window, and keep it
    FigureCanvasAgg(figure)
    yield figure.subplots(1, columns)
    figure.savefig(os.fspath(path), dpi=120)
