"""What is put into a CUDA graph of torch's, where its cuda device is interpreted: kept, and done when the graph is replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from . import core


class Capture:
    """A capture under way: of all that this process puts into streams, by whatever thread, as autograd has its own."""

    running: Capture | None = None

    def __init__(self) -> None:
        self.steps: list[Callable[[], Any]] = []
        self.broken_by = ""
        self._launches = core.counters()["launches"]

    def prohibit(self, what: str) -> NoReturn:
        self.broken_by = self.broken_by or what
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {what}")

    def finish(self) -> list[Callable[[], Any]]:
        Capture.running = None
        if self.broken_by:
            raise RuntimeError(f"CUDA error: operation failed due to a previous error during capture: {self.broken_by}")
        if launched := core.counters()["launches"] - self._launches:
            raise RuntimeError(
                f"{launched} kernels ran while the interpreted GPU captured a graph, and are not in it: torch's operations and "
                "Triton's kernels can be captured, launches of compiled code cannot"
            )
        return self.steps


def prohibit_in_capture(what: str) -> None:
    """For what waits for the GPU, or needs what it has computed."""
    if Capture.running:
        Capture.running.prohibit(what)
