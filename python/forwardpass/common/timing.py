"""Timing that can be repeated: candidates take turns in one process, so what slows the machine slows them all."""

from __future__ import annotations

import ctypes
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from . import environment

#: progress: (what is being done, steps if known) -> called after each step
Track = Callable[[str, int | None], Callable[[], object]]
#: A sample lasts at least this long: calls are repeated within it, and the clock and the loop cost nothing beside them.
LEAST_SAMPLE_MS = 2.0
#: Of `sustained`: the GPU works for so long between two looks at its clock.
LEAST_CHUNK_MS = 50.0
#: Larger than any L2 cache so far (H100 50 MiB, B200 126): written before each sample, so that inputs come from memory.
FLUSH_BYTES = 256 << 20


def untracked(label: str, steps: int | None) -> Callable[[], object]:
    """The Track of whoever shows no progress."""
    return lambda: None


def keep_freed_memory() -> str:
    """Tells glibc to keep what the process frees, as allocators of servers do, and says in words what was done.

    By default it hands large blocks back to the system between layers and faults them in again, in states that differ from
    run to run: all-MiniLM-L6-v2 at 32 x 128 tokens takes 490 or 540 ms in fp32, 140 or 180 in INT8 (two EPYC 9005 cores).
    Without a restart, MALLOC_TRIM_THRESHOLD_=1073741824 MALLOC_MMAP_THRESHOLD_=1073741824 in the environment does the same.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_… of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    success = mallopt is not None and mallopt(trim_threshold, 1 << 30) == 1 and mallopt(mmap_threshold, 1 << 30) == 1
    return "glibc, told to keep freed memory" if success else "as it is"


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: median and quartiles over `rounds` samples."""

    median: float
    low: float
    high: float
    rounds: int

    @staticmethod
    def of(samples: Sequence[float]) -> Timing:
        quartiles = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [*samples] * 3
        low, median, high = quartiles
        return Timing(median, low, high, len(samples))

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def _cpu_sample(call: Callable[[], object], repeats: int) -> float:
    """An untimed call first: caches and threads are then this candidate's own, as in a stream of requests."""
    call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) * 1e3 / repeats


def beyond_caches() -> int:
    """Bytes, twice what the last cache of the CPU holds, at most 128 MiB; 64 MiB where the system does not say."""
    try:
        text = pathlib.Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text()
        return min(2 * int(text.strip().removesuffix("K")) << 10, 128 << 20)
    except (OSError, ValueError):
        return 64 << 20


def _cuda_sample(call: Callable[[], object], flush: torch.Tensor) -> float:
    """One call from cold L2; the write before it keeps the GPU busy while the host launches."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def interleave(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device | str = "cpu",
    *,
    rounds: int | Callable[[float], int] = 15,
    warmup: int = 3,
    on_round: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Times each call once a round, in turn, after `warmup` untimed rounds; `on_round` is told after every round.

    rounds: their number, or what says it of the seconds that the last untimed round took.
    """
    cuda = torch.device(device).type == "cuda"
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if cuda else torch.empty(0)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    repeats = dict.fromkeys(calls, 1)

    def one_round(sampled: Callable[[str, float], object]) -> float:
        start = time.perf_counter()
        for name, call in calls.items():
            sampled(name, _cuda_sample(call, flush) if cuda else _cpu_sample(call, repeats[name]))
        on_round()
        return time.perf_counter() - start

    def fill_sample(name: str, ms: float) -> None:
        repeats[name] = 1 if cuda else max(1, min(1000, round(LEAST_SAMPLE_MS / max(ms, 1e-6))))

    seconds = [one_round(fill_sample) for _ in range(warmup)]
    for _ in range(rounds if isinstance(rounds, int) else rounds(seconds[-1])):
        one_round(lambda name, ms: samples[name].append(ms))
    return {name: Timing.of(times) for name, times in samples.items()}


@dataclass(frozen=True)
class Sustained:
    """Milliseconds per call of a device that is kept busy, and a GPU's clock meanwhile in MHz (None where NVML does not say).

    A GPU under load lowers its clock to stay within its power. Published figures are mostly of such loops; a single call after a
    pause runs at the highest clock, 10 to 20 % above.
    """

    milliseconds: float
    sm_mhz: float | None

    def to_json(self) -> dict[str, float | None]:
        return asdict(self)


def sustained(call: Callable[[], object], device: torch.device | str = "cpu", seconds: float = 1.0) -> Sustained:
    """Calls follow one another for so long, without a flush of L2; counted is the second half, when the clock has settled.

    Short kernels show the host's time per call, as nothing hides it.
    """
    repeats = max(1, round(LEAST_CHUNK_MS / max(_chunk(call, 1, device)[0], 1e-3)))
    chunks: list[tuple[float, int | None]] = []
    end = time.perf_counter() + seconds
    while not chunks or time.perf_counter() < end:
        chunks.append(_chunk(call, repeats, device))
    late = chunks[len(chunks) // 2 :]
    clocks = [mhz for _, mhz in late if mhz is not None]
    return Sustained(statistics.median(ms for ms, _ in late), statistics.median(clocks) if clocks else None)


def _chunk(call: Callable[[], object], repeats: int, device: torch.device | str) -> tuple[float, int | None]:
    """Milliseconds per call, and the clock, asked for while the GPU works."""
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) * 1e3 / repeats, None
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    clock = environment.sm_clock(device)
    end.synchronize()
    return begin.elapsed_time(end) / repeats, clock
