"""Requests sent to an open `fp.Pipeline` at given times, and when their results came."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .pipeline import Pipeline


@dataclass(frozen=True)
class Load:
    """Seconds: `latencies` from when a request was due to its result, `lateness` from when it was due to when it was sent."""

    latencies: list[float]
    lateness: list[float]


def run_load(pipeline: Pipeline, item: Any, arrivals: Sequence[float]) -> Load:
    """Sends `item` at each of the times, counted from now, whether or not the ones before have come back.

    Latency counts from when a request was due: one that this thread sends late has waited that long already. Raises the first
    ItemError.
    """
    ends = [0.0] * len(arrivals)
    lateness = []
    finished = threading.Semaphore(0)
    futures = []
    with pipeline:
        start = time.monotonic() + 0.01
        for i, arrival in enumerate(arrivals):
            if (wait := start + arrival - time.monotonic()) > 0:
                time.sleep(wait)
            lateness.append(time.monotonic() - start - arrival)

            def note(_: Any, i: int = i) -> None:
                ends[i] = time.monotonic()
                finished.release()

            future = pipeline.submit(item)
            future.add_done_callback(note)
            futures.append(future)
        for _ in arrivals:
            finished.acquire()
        for future in futures:
            future.result()
    return Load([end - start - arrival for end, arrival in zip(ends, arrivals)], lateness)
