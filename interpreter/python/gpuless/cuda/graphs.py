"""torch.cuda.CUDAGraph: the operations and launches of a capture, not done before the replay, on the memory that they had then.

That memory stays as long as the graph. What a capture prohibits is an error as on a GPU; what it does not notice is listed in
docs/testing.md. torch's own `graph` and `make_graphed_callables` do the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from ..capture import Capture
from .torch_cuda import refuse

INDUCTORS = 'a CUDA graph of torch.compile\'s (its mode may be "max-autotune-no-cudagraphs", its backend "eager")'
_pools = itertools.count(1)


def graph_pool_handle() -> tuple[int, int]:
    return 0, next(_pools)


class CUDAGraph:
    """Memory is not shared between graphs, so a pool is a name alone."""

    def __init__(self, keep_graph: bool = False):
        self._steps: list[Callable[[], Any]] | None = None
        self._capture: Capture | None = None
        self._pool = graph_pool_handle()

    def capture_begin(
        self, pool: Any = None, capture_error_mode: str = "global", check_input_liveness: bool = False
    ) -> None:
        if check_input_liveness:
            refuse("torch.cuda.CUDAGraph's check_input_liveness")
        if Capture.running:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing: another capture")
        if self._steps is not None:
            raise RuntimeError(
                "This CUDAGraph instance already owns a captured graph. To capture a new graph, create a new instance."
            )
        self._pool = pool or self._pool
        self._capture = Capture.running = Capture()

    def capture_end(self) -> None:
        if self._capture is None or self._capture is not Capture.running:
            raise RuntimeError("CUDA error: no capture of this graph is under way")
        capture, self._capture = self._capture, None
        self._steps = capture.finish()

    def instantiate(self) -> None:
        pass

    def replay(self) -> None:
        if self._steps is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        if Capture.running:
            Capture.running.prohibit("the replay of another graph, which the interpreted GPU has not within graphs")
        for step in self._steps:
            step()

    def reset(self) -> None:
        self._steps = None

    def pool(self) -> tuple[int, int]:
        return self._pool

    def debug_dump(self, debug_path: str) -> NoReturn:
        refuse("torch.cuda.CUDAGraph.debug_dump")

    def raw_cuda_graph(self) -> NoReturn:
        refuse("torch.cuda.CUDAGraph.raw_cuda_graph")


def is_current_stream_capturing() -> bool:
    return Capture.running is not None


def install() -> None:
    """For the functions of torch.cuda.graphs, which are torch's own."""
    names = {
        "CUDAGraph": CUDAGraph,
        "graph_pool_handle": graph_pool_handle,
        "is_current_stream_capturing": is_current_stream_capturing,
    }
    for module in (torch.cuda, torch.cuda.graphs):
        for name, value in names.items():
            setattr(module, name, value)
    raw: dict[str, Callable[..., Any]] = {
        "_host_emptyCache": lambda: None,
        "_cuda_isCurrentStreamCapturing": is_current_stream_capturing,
        "_set_cached_tensors_enabled": lambda on: on and refuse(INDUCTORS),
    }
    for name, value in raw.items():
        setattr(torch._C, name, value)
