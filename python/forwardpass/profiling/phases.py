"""The four phases of a request, measured in a plain loop, and what overlapping them would give.

The loop is what everybody writes: preprocess, move to the device, forward, postprocess, the next item. Each phase ends
before the next begins (a GPU is waited for), so their sum is the loop's wall time but for the clock's own cost.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..common.batches import Forward, map_tensors, run, tensors
from ..common.models import decoding
from ..serving.transfer import bytes_of, named

PHASES = ("input", "transfer", "forward", "output")
#: what the forward is, by name: of a decoder that generates it is two phases
FORWARDS = ("forward", *decoding.PHASES)

#: shorter phases are too short for the clock of CPU time
_LEAST_S = 1e-3
#: after which a thread that waits for the next parallel region sleeps: GNU's OpenMP spins 300 000 times, some 5 ms
_SPIN_S = 0.03

wall_clock, cpu_clock, thread_clock, sleep = time.perf_counter, time.process_time, time.thread_time, time.sleep


@dataclass(frozen=True)
class Request:
    """How an item becomes a result; the arguments of `fp.profile` and `fp.Pipeline`."""

    model: nn.Module
    device: torch.device
    preprocess: Callable[[Any], Any] | None = None
    postprocess: Callable[[Any], Any] | None = None
    forward: Forward | None = None
    output: Callable[[Any], Any] | None = None
    steps: int | None = None  #: of a decoder, that it generates

    @property
    def phases(self) -> dict[str, Callable[[Any], Any]]:
        """Each takes what the one before it gave."""
        forward: dict[str, Callable[[Any], Any]] = {"forward": self.run}
        if self.steps is not None:
            forward = {"prefill": self.prefill, "decode": self.decode}
        return {"input": self.input, "transfer": self.transfer, **forward, "output": self.finish}

    def input(self, item: Any) -> Any:
        return item if self.preprocess is None else self.preprocess(item)

    def transfer(self, batch: Any) -> Any:
        return map_tensors(batch, lambda t: t.to(self.device)) if self.device.type == "cuda" else batch

    def prefill(self, batch: Any) -> tuple[decoding.Generation, torch.Tensor]:
        ids = batch["input_ids"] if isinstance(batch, Mapping) else batch
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        generation = decoding.Generation(self.model, ids, mask)
        return generation, generation.prefill()

    def decode(self, prompts: tuple[decoding.Generation, torch.Tensor]) -> torch.Tensor:
        """The tokens that were generated, [batch, steps + 1]."""
        generation, token = prompts
        tokens = [token]
        for _ in range(self.steps or 0):
            tokens.append(generation.step(tokens[-1]))
        return torch.cat(tokens, 1)

    def run(self, batch: Any) -> Any:
        if self.steps is not None:
            return self.decode(self.prefill(batch))
        result = run(self.model, batch, self.forward)
        return result if self.output is None else self.output(result)

    def finish(self, result: Any) -> Any:
        if self.device.type == "cuda":
            result = map_tensors(result, lambda t: t.cpu())
        return result if self.postprocess is None else self.postprocess(result)


@dataclass(frozen=True)
class Sample:
    """One item in the plain loop: seconds of each phase by the clock, of all cores of this process, on a GPU by events."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]
    cuda: tuple[float, ...]  #: of transfer, forward and output; empty without a GPU
    bytes_in: int
    bytes_out: int
    pinned: bool


@dataclass(frozen=True)
class Loop:
    """What the plain loop took."""

    rounds: list[list[Sample]]
    seconds: float  #: from the first item to the last result of all rounds
    others: float  #: cores that other processes used meanwhile

    @property
    def samples(self) -> list[Sample]:
        return [sample for samples in self.rounds for sample in samples]

    def typical(self, quantity: Callable[[Sample], Sequence[float]]) -> list[float]:
        """Per item, of each phase: the mean over the items of the median over the rounds."""
        items = [[statistics.median(values) for values in zip(*map(quantity, item))] for item in zip(*self.rounds)]
        return [statistics.fmean(values) for values in zip(*items)]

    @property
    def cores(self) -> float:
        """That this process could have: those it may run on, less what others used; no fewer than a phase had."""
        available = float(len(os.sched_getaffinity(0)))
        wall, cpu = self.typical(lambda s: s.wall), self.typical(lambda s: s.cpu)
        had = max((c / w for w, c in zip(wall, cpu) if w >= _LEAST_S), default=0.0)
        return min(available, max(1.0, available - self.others, had))


def measure(
    request: Request,
    items: Sequence[Any],
    rounds: int,
    on_item: Callable[[], object] = lambda: None,
) -> Loop:
    """Runs the plain loop over the items, `rounds` times."""
    idle = _Idle(_spinning(request, items[0]))
    by_round, seconds, loop_start, usage = [], 0.0, wall_clock(), _usage()
    for _ in range(rounds):
        samples, round_start = [], wall_clock()
        for item in items:
            samples.append(sample(request, item, idle))
        seconds += wall_clock() - round_start
        by_round.append(samples)
        for _ in items:  # behind the clock: a progress bar takes longer than a small model's item may
            on_item()
    elapsed, after = wall_clock() - loop_start, _usage()
    others = (after[0] - usage[0] - (after[1] - usage[1])) / elapsed if usage and after and elapsed else 0.0
    return Loop(by_round, seconds, max(0.0, others))


class _Idle:
    """Tells what threads compute from what they spend waiting, after a forward, for the next one."""

    def __init__(self, after_forward: float):
        self.after_forward, self.idle_time = after_forward, 0.0

    def computed(self, phase: str, process: float, thread: float) -> float:
        """The seconds of computing in a phase, without waiting. process, thread: CPU seconds of all threads, and of this one."""
        if phase in FORWARDS:
            self.idle_time = self.after_forward
            return process
        waited = min(self.idle_time, max(0.0, process - thread))
        self.idle_time -= waited
        return process - waited


def _spinning(request: Request, item: Any) -> float:
    """CPU seconds that OpenMP's threads spend after a forward in waiting for the next, before they sleep."""
    request.run(request.transfer(request.input(item)))
    if request.device.type == "cuda":
        torch.cuda.synchronize(request.device)
    process, thread = cpu_clock(), thread_clock()
    sleep(_SPIN_S)
    return max(0.0, cpu_clock() - process - (thread_clock() - thread))


def sample(
    request: Request,
    item: Any,
    idle: _Idle | None = None,
    around: Callable[[str], AbstractContextManager[Any]] = lambda phase: nullcontext(),
) -> Sample:
    """One item through the plain loop. `around(phase)` is entered around each phase."""
    idle = idle or _Idle(0.0)
    cuda = request.device.type == "cuda"
    value, passed, events, cpu = item, [], [], []
    wall, process, thread = [wall_clock()], cpu_clock(), thread_clock()
    for phase, step in request.phases.items():
        if phase == "transfer" and not cuda:  # nothing, and not the clock's cost either
            passed.append(value)
            wall.append(wall[-1])
            cpu.append(0.0)
            continue
        with named(phase, request.device), around(phase):
            if cuda:
                events.append(_event(request.device))
            value = step(value)
            if cuda:
                events.append(_event(request.device))
                torch.cuda.synchronize(request.device)
        passed.append(value)
        before, process, thread = (process, thread), cpu_clock(), thread_clock()
        wall.append(wall_clock())
        cpu.append(idle.computed(phase, process - before[0], thread - before[1]))
    batch, result = passed[0], passed[-2]
    return Sample(
        tuple(b - a for a, b in itertools.pairwise(wall)),
        tuple(cpu),
        tuple(a.elapsed_time(b) / 1e3 for a, b in zip(events[2::2], events[3::2])),
        bytes_of(batch),
        bytes_of(result),
        cuda and all(t.is_pinned() for t in tensors(batch)),
    )


def _event(device: torch.device) -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _usage() -> tuple[float, float] | None:
    """Seconds that the CPUs of this process were busy so far, and those of them that were its own; None without Linux."""
    try:
        lines = pathlib.Path("/proc/stat").read_text().splitlines()
    except OSError:
        return None
    own_cpus = {f"cpu{n}" for n in os.sched_getaffinity(0)}
    rows = [line.split() for line in lines if line.split(" ", 1)[0] in own_cpus]
    # user nice system idle iowait irq softirq steal; guest time is in user's
    ticks = sum(int(n) for row in rows for n in (*row[1:4], *row[6:9]))
    return ticks / os.sysconf("SC_CLK_TCK"), cpu_clock()


@dataclass(frozen=True)
class Overlap:
    """What `fp.Pipeline` would give: modelled from the phases of the plain loop, per item, in milliseconds."""

    plain_ms: float
    period_ms: float  #: from one result to the next
    bound_by: str  #: the longest phase; "cores" where the phases compute more than they can; "handover" between threads
    cores: float
    workers: int

    @property
    def reason(self) -> str:
        """What sets the period, in words."""
        if self.bound_by == "cores":
            return f"the phases share {self.cores:.1f} cores, and compute on all of them"
        if self.bound_by == "handover":
            return "handing an item from thread to thread takes longer than what is done with it"
        return f"the longest phase is {self.bound_by}, and {self.cores:.1f} cores are enough for the others beside it"

    @property
    def speedup(self) -> float:
        return self.plain_ms / self.period_ms if self.period_ms else 1.0

    def speedup_of(self, items: int) -> float:
        """The speedup over so many items, with the first one's way through all stages, during which nothing overlaps."""
        total = self.plain_ms + (items - 1) * self.period_ms
        return items * self.plain_ms / total if total else 1.0


def predict(
    wall: Sequence[float], cpu: Sequence[float], cores: float, workers: int = 1, handover: float = 0.0
) -> Overlap:
    """What overlapping the phases would give, where they share `cores` cores.

    Args:
        wall, cpu: seconds of each phase of one item: by the clock, and of all cores.
        workers: threads of the input phase.
        handover: seconds that a pipeline takes for an item with which nothing is done.

    A period is no shorter than the longest phase, and no shorter than what all phases compute divided by the cores. Input
    and output run on the cores that forward leaves free. What they compute beyond that takes cores from forward: its
    parallel regions end with their last thread, so a core-second taken from one of its threads delays it by a second.
    """
    stages = [wall[0] / workers, *wall[1:]]
    longest = max(stages)
    forward, computed = wall[2], cpu[2]
    beside = cpu[0] + cpu[3]
    excess = max(0.0, beside - max(0.0, cores * forward - computed))
    parallel = computed > 1.2 * forward
    shared = max(sum(cpu) / cores, forward + (excess if parallel else excess / cores))
    # at the worst the phases take turns
    period = min(max(longest, shared), max(sum(wall), longest)) + handover
    bound = PHASES[stages.index(longest)] if longest >= shared else "cores"
    if handover > longest:
        bound = "handover"
    return Overlap(sum(wall) * 1e3, period * 1e3, bound, cores, workers)


@dataclass(frozen=True)
class Phase:
    """One of them, per item. `waiting` is the share of its time in which none of this process's threads computed."""

    name: str
    share: float
    total_ms: float
    median_ms: float
    p99_ms: float
    cpu_ms: float
    waiting: float
    details: dict[str, Any] = field(default_factory=dict)  #: of transfer and output

    def to_json(self) -> dict[str, Any]:
        values = dict(vars(self))
        del values["name"]
        return values | values.pop("details")


def whole_forward(phases: Sequence[float]) -> list[float]:
    """The four phases of an item, where its forward is in two."""
    return [*phases[:2], sum(phases[2:-1]), phases[-1]]


def summarise(loop: Loop, device: torch.device, names: Iterable[str] = PHASES) -> list[Phase]:
    """The phases of a loop."""
    samples = loop.samples
    phases = []
    for i, name in enumerate(names):
        wall, cpu = [s.wall[i] * 1e3 for s in samples], [s.cpu[i] * 1e3 for s in samples]
        total = sum(wall)
        details: dict[str, Any] = {}
        if name == "transfer":
            details = _transfer_details(samples, device)
        elif name == "output" and device.type == "cuda":
            details = {"bytes": statistics.fmean(s.bytes_out for s in samples)}
        waiting = max(0.0, 1 - sum(cpu) / total) if total else 0.0
        phases.append(
            Phase(name, total / 1e3 / loop.seconds if loop.seconds else 0.0, total, statistics.median(wall),
                  _p99(wall), statistics.fmean(cpu), waiting, details)
        )  # fmt: skip
    return phases


def _p99(values: Sequence[float]) -> float:
    """Between the two nearest ranks, linearly."""
    return statistics.quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else values[0]


def _transfer_details(samples: Sequence[Sample], device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {
            "bytes": 0,
            "pinned": None,
            "overlapped": None,
            "reason": "nothing is transferred: the model is on the CPU, in whose memory the batches are made",
        }
    events = statistics.median(s.cuda[0] for s in samples) * 1e3
    moved = statistics.fmean(s.bytes_in for s in samples)
    pinned = all(s.pinned for s in samples)
    return {
        "bytes": moved,
        "pinned": pinned,
        "overlapped": False,
        "gpu_ms": events,
        "bytes_per_s": moved / events * 1e3 if events else 0.0,
        "reason": f"from {'pinned' if pinned else 'pageable'} memory, and the plain loop waits for it",
    }
