"""`fp.size_batch`: the batches that meet a latency objective at the least cost, from measured times and a simulated queue."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import math
import operator
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from ..common import environment
from ..common.batches import Forward, device_of, evaluating, main_output, run
from ..common.files.json_files import write_json
from ..common.memory import give_back_freed
from ..common.models.modules import plain_module
from ..common.printing.printed import Block, Printed, Table
from ..common.printing.text import count
from ..common.timing import Track, untracked
from .load_generator import Load, run_load
from .pipeline import Pipeline
from .queueing import Arrivals, Policy, ServiceTimes, Simulated, Spread, percentile, poisson, served, simulate, spread

SCHEMA = "forwardpass.size_batch/1"
#: requests of one replica that are simulated for a policy; of a recorded trace all
ARRIVALS = 10_000
#: waits that are tried, as shares of the latency objective
WAITS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5)
#: share of the objective that the simulated latency stays below it: a simulation is no measurement
MARGIN = 0.1
#: of two sizes in a row one has to raise the rate by this share, or larger ones are not measured
LEAST_GAIN = 0.03
MAX_BATCH = 4096
#: seconds of a run whose percentile the objective is about
RUN_SECONDS = 20.0
#: replicas that are tried at most
MAX_REPLICAS = 1024
#: of a measurement: rounds at least, samples of a size in each, batches that wait behind the first one of a sample, and the
#: longest rest before it, in seconds
LEAST_ROUNDS, VISIT, CHAIN, MOST_REST = 3, 3, 2, 0.2
#: shares of the saturation rate, and waits as shares of the latency objective, under which batches are timed; requests at least
LOADS, LOAD_WAITS, LEAST_REQUESTS = (0.4, 0.8), (0.0, 0.05), 20
#: share of a batch's time after which the requests of the next one are there
ARRIVED = 0.7


@dataclass(frozen=True)
class Point:
    """A batch size: median milliseconds from a free server to the result, and from one result to the next under load."""

    batch: int
    first_ms: float
    next_ms: float
    samples: int
    memory_bytes: int | None  #: the most that was in use beyond the idle model; None where it cannot be told

    @property
    def rate(self) -> float:
        """Requests a second."""
        return 1e3 * self.batch / self.next_ms


@dataclass(frozen=True)
class Candidate:
    """A policy and what the simulation says of it, at the arrival rate of one replica."""

    max_batch: int
    max_wait_ms: float
    replicas: int
    latency_ms: dict[str, float]  #: percentile -> simulated
    busy: float  #: share of the time that a replica computes
    mean_batch: float
    cost_per_million: float | None


@dataclass(repr=False)
class BatchSizing(Printed):
    """What `fp.size_batch` found; `policy` is None where no policy holds the objective, and `reason` says why."""

    policy: Candidate | None
    spread: Spread | None  #: of the policy's percentile, simulated
    reason: str | None
    latency_slo_ms: float
    percentile: float
    arrival_rate: float  #: requests a second, of all replicas together
    points: list[Point]
    frontier: list[Candidate]  #: no other policy is better in both the latency and the share of the time computed
    saturation_rate: float  #: requests a second of one replica with the largest batch that was measured
    fixed_ms: float  #: least squares over the points: a batch of n takes fixed_ms + n * per_item_ms, neither below 0
    per_item_ms: float
    price_per_hour: float | None
    memory_limit: int | None
    ended: str  #: why no larger batch was measured
    device: str
    seconds: float
    service: ServiceTimes = field(repr=False)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        content = {k: v for k, v in vars(self).items() if k != "service"}
        return {
            "schema": SCHEMA,
            "versions": environment.versions(),
            **content,
            "device": environment.device(self.device),
            "policy": self.policy and asdict(self.policy),
            "spread": self.spread and asdict(self.spread),
            "points": [{**asdict(p), "rate": p.rate} for p in self.points],
            "frontier": [asdict(c) for c in self.frontier],
            "measured": ["points", "saturation_rate"],
            "simulated": ["policy", "spread", "frontier"],
            "fitted": ["fixed_ms", "per_item_ms"],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        write_json(path, self.to_json())

    def _blocks(self) -> Sequence[Block]:
        goal = f"p{self.percentile:g} within {self.latency_slo_ms:g} ms at {self.arrival_rate:g} requests a second"
        if self.policy is None or self.spread is None:
            sentences = [f"no policy holds {goal}: {self.reason}"]
        else:
            p, spread = self.policy, self.spread
            simulated = ", ".join(f"{name} {ms:.1f} ms" for name, ms in p.latency_ms.items())
            sentences = [
                f"{goal}: max_batch={p.max_batch}, max_wait_ms={p.max_wait_ms:g}, {count(p.replicas, 'replica')}"
                + ", which take turns with the requests" * (p.replicas > 1),
                f"simulated: {simulated}; {p.busy:.0%} of the time computing, {p.mean_batch:.1f} requests a batch",
                f"in 95% of runs of {count(spread.requests, 'request')} {_name(self.percentile)} is {spread.low_ms:.1f} to "
                f"{spread.high_ms:.1f} ms",
            ]
            if p.cost_per_million is not None:
                sentences.append(f"{p.cost_per_million:.2f} per million predictions at {self.price_per_hour:g} an hour")
        terms = [f"{self.fixed_ms:.2f}"] * (self.fixed_ms > 0) + [f"{self.per_item_ms:.3f} n"] * (self.per_item_ms > 0)
        sentences += [
            f"one replica saturates at {self.saturation_rate:.1f} requests a second",
            f"a batch of n takes about {' + '.join(terms)} ms; {self.ended}",
            *self.notes,
        ]
        rows: list[tuple[str, ...]] = [("batch", "first ms", "next ms", "requests/s", "memory MB")]
        for x in self.points:
            memory = "-" if x.memory_bytes is None else f"{x.memory_bytes / 1e6:.1f}"
            rows.append((str(x.batch), f"{x.first_ms:.2f}", f"{x.next_ms:.2f}", f"{x.rate:.1f}", memory))
        means = "medians; first: from a free server to the result, next: from one result to the next under load"
        return [*sentences, "", Table(rows, right=range(5)), "", means]

    def save_plot(self, path: str | os.PathLike[str]) -> None:
        """The frontier and the measured points, as an image; needs matplotlib (extra `cli`)."""
        from . import latency_plot as plots

        plots.size_batch(self, os.fspath(path))


class _Server:
    """The pipeline that is measured: a request is nothing, and a batch of them is make_batch(how many)."""

    def __init__(self, model: nn.Module, make_batch: Callable[[int], Any], forward: Forward | None):
        self.model, self.make_batch, self.forward = model, make_batch, forward
        self.batches: list[int] = []  # how many requests each had

    def pipeline(self, policy: Policy) -> Pipeline:
        return Pipeline(
            self.model, forward=self.forward, output=main_output, collate=self._collate,
            max_batch=policy.max_batch, max_wait_ms=policy.max_wait_ms, max_pending=1 << 20,
        )  # fmt: skip

    def _collate(self, items: list[Any]) -> Any:
        self.batches.append(len(items))
        return self.make_batch(len(items))

    def loaded(self, policy: Policy, arrivals: Sequence[float]) -> list[tuple[int, bool, float]]:
        """What `served` sees of a run of these arrivals; not of its first batch, which warms up."""
        self.batches.clear()
        load = run_load(self.pipeline(policy), None, arrivals)
        ends = [arrival + latency for arrival, latency in zip(arrivals, load.latencies)]
        return list(served(arrivals, ends, self.batches, policy))[1:]

    @contextlib.contextmanager
    def full_batches(self, n: int) -> Iterator[Callable[[int], list[float]]]:
        """An open pipeline; the function sends it so many batches of n, and gives the seconds from a free server to the first
        one's result, and from each result to the next.

        The requests of a batch come while the one before it is computed, as they do in a server: each wakes threads on the cores
        that compute. They are there some time before it ends.
        """
        seconds = 0.0
        with self.pipeline(Policy(n, 60_000.0)) as pipeline:

            def times(batches: int) -> list[float]:
                nonlocal seconds
                ends = [0.0] * (1 + batches)

                def note(_: Any, i: int) -> None:  # where results are made: this thread may see them late
                    ends[i] = time.monotonic()

                futures: list[Future[Any]] = []
                for i in range(batches):
                    if i > 1:
                        futures[-n - 1].result()  # the batch before this one begins
                    for k in range(n):
                        if i == 0 and k == n - 1:
                            ends[0] = time.monotonic()
                        elif i > 0:
                            time.sleep(ARRIVED * seconds / n)
                        futures.append(pipeline.submit(None))
                    futures[-1].add_done_callback(functools.partial(note, i=1 + i))
                for future in futures:
                    future.result()
                periods = [b - a for a, b in itertools.pairwise(ends)]
                seconds = periods[0]
                return periods

            yield times

    def check_batch(self, n: int) -> None:
        """ValueError where the output is not one row a request, or is not finite."""
        with evaluating(self.model):
            output = main_output(run(self.model, self.make_batch(n), self.forward))
        if output.dim() == 0 or len(output) != n:
            raise ValueError(f"make_batch({n}) gave an output of shape {tuple(output.shape)}, which has not {n} rows")
        if not output.isfinite().all():
            raise ValueError(f"the output for make_batch({n}) has NaN or infinity: make batches as real requests are")


def size_batch(
    model: nn.Module,
    make_batch: Callable[[int], Any],
    *,
    latency_slo_ms: float,
    percentile: float = 99,
    arrival_rate: float | None = None,
    arrivals: Iterable[float] | None = None,
    memory_limit: int | None = None,
    price_per_hour: float | None = None,
    forward: Forward | None = None,
    max_batch: int = MAX_BATCH,
    run_seconds: float = RUN_SECONDS,
    seconds: float = 30.0,
    seed: int = 0,
    progress: Track = untracked,
) -> BatchSizing:
    """The policy, max_batch and max_wait_ms of an `fp.Pipeline`, that holds a latency objective at the least cost.

    Measures times and memory of batches of 1, 2, 4, … on this device, in a pipeline, until larger ones gain less than 3 % or
    one is too slow, too large or fails; simulates a queue before one server for each policy, drawing from the measured times;
    and adds replicas, which take turns with the requests, until the objective holds with 10 % to spare, also in the slower ones
    of the runs of `run_seconds`: in 97.5 % of them. Replicas are the cost: of the policies that hold it with the fewest, it
    takes the one of the lowest latency, which is the surest to hold. Those of the frontier that compute less of the time pay
    with latency for what a shared device, or its power, costs.

    Args:
        model: as `fp.Pipeline` takes it; eval mode while it is measured.
        make_batch: n -> a batch of n requests (see `forwardpass.common.batches`) with as many rows in its output; its time counts.
        latency_slo_ms, percentile: the objective: this percentile of the latencies, from arrival to result, is within it.
        arrival_rate: requests a second, that arrive independently of each other (Poisson); or
        arrivals: their times in seconds, ascending: a recorded trace, as long as it is representative.
        memory_limit: bytes that a batch may use beyond the idle model. On a GPU what torch's allocator gave out, on a CPU the
            process's resident memory, where the system tells (Linux).
        price_per_hour: of one replica, in any currency.
        max_batch: no larger batch is tried.
        run_seconds: how long a run is that the percentile is taken of; the shorter, the more it varies from run to run.
        seconds: how long times are gathered, after each size was tried once; half of it under load.
        progress: progress(what, steps or None) -> called after each step.

    Raises:
        TypeError: `model` is no nn.Module, or `make_batch` cannot be called.
        ValueError: neither or both of arrival_rate and arrivals are given, or a number is out of its bounds.
        A batch of 1 that fails raises what it raised; a larger one ends the measurement, with what was found until then.
    """
    plain_module("size_batch", model)
    requests = _arrivals(arrival_rate, arrivals)
    for name, value in (("latency_slo_ms", latency_slo_ms), ("run_seconds", run_seconds), ("seconds", seconds)):
        if not (isinstance(value, int | float) and 0 < value < math.inf):
            raise ValueError(f"{name} is a number above 0, not {value!r}")
    if not 0 < percentile < 100:
        raise ValueError(f"percentile is between 0 and 100, e.g. 99, not {percentile!r}")
    if price_per_hour is not None and not 0 <= price_per_hour < math.inf:
        raise ValueError(f"price_per_hour is a number of 0 or more, not {price_per_hour!r}")
    for name, number in (("max_batch", max_batch), ("memory_limit", 1 if memory_limit is None else memory_limit)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} is a number of 1 or more, not {number!r}")
    begin = time.monotonic()
    server = _Server(model, make_batch, forward)
    memory, ended = _grow(server, latency_slo_ms / 1e3, memory_limit, max_batch, progress)
    service = _measure(server, list(memory), latency_slo_ms, seconds, seed, progress)
    points = [
        Point(n, 1e3 * statistics.median(service.first[n]), 1e3 * statistics.median(service.next[n]),
              len(service.next[n]), memory[n])
        for n in service.sizes
    ]  # fmt: skip
    progress("simulating", None)
    policy, varies, frontier, reason = _choose(
        service, requests, latency_slo_ms, percentile, price_per_hour, run_seconds, seed
    )
    fixed, per_item = _line(points)
    notes = []
    if memory_limit is not None and None in memory.values():
        notes.append("memory_limit was not applied: this system does not tell how much memory a batch takes")
    return BatchSizing(
        policy, varies, reason, float(latency_slo_ms), float(percentile), requests.rate, points, frontier,
        service.saturation_rate, fixed, per_item, price_per_hour, memory_limit, ended,
        str(device_of(model)), time.monotonic() - begin, service, notes,
    )  # fmt: skip


def try_policy(
    model: nn.Module,
    make_batch: Callable[[int], Any],
    policy: Policy | Candidate,
    arrivals: Sequence[float],
    *,
    forward: Forward | None = None,
) -> Load:
    """A real run: an `fp.Pipeline` with this policy, and a request at each of the times, in seconds."""
    replica_policy = Policy(policy.max_batch, policy.max_wait_ms)
    return run_load(_Server(model, make_batch, forward).pipeline(replica_policy), None, arrivals)


def _arrivals(rate: float | None, trace: Iterable[float] | None) -> Arrivals:
    if (rate is None) == (trace is None):
        clause = "neither was" if rate is None else "both were"
        raise ValueError(f"size_batch takes either arrival_rate= or arrivals=, and {clause} given")
    if rate is not None:
        if not 0 < rate < math.inf:
            raise ValueError(f"arrival_rate is a number of requests a second above 0, not {rate!r}")
        return Arrivals(float(rate))
    times = [float(t) for t in trace or ()]
    if len(times) < 2 or times[0] == times[-1]:
        raise ValueError(f"arrivals are the times in seconds of at least two requests, not {len(times)}")
    if any(not math.isfinite(t) for t in times) or any(b < a for a, b in itertools.pairwise(times)):
        raise ValueError("arrivals are finite and ascending: sort them, and leave out what is NaN")
    return Arrivals(len(times) / (times[-1] - times[0]), times)


def _grow(
    server: _Server, slo: float, limit: int | None, most: int, progress: Track
) -> tuple[dict[int, int | None], str]:
    """Batch size -> bytes, of those that are worth measuring; and why there are no larger ones."""
    memory: dict[int, int | None] = {}
    best, n, without_gain, advance = 0.0, 1, 0, progress("trying batch sizes", None)
    while n <= most:
        advance()
        try:
            peak, seconds = _try(server, n)
        except Exception as e:
            if n == 1:
                raise
            torch.cuda.empty_cache()
            return memory, f"a batch of {n} failed: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
        if limit is not None and peak is not None and peak > limit:
            if n == 1:
                raise ValueError(f"a batch of 1 takes {peak} bytes, more than the memory_limit of {limit}: raise it")
            return memory, f"a batch of {n} takes {peak / 1e6:.0f} MB, more than the limit"
        memory[n] = peak
        if n > 1 and seconds > slo:
            return memory, f"a batch of {n} takes longer than the objective"
        without_gain = without_gain + 1 if n / seconds < best * (1 + LEAST_GAIN) else 0
        if without_gain == 2:
            return memory, f"batches of {n // 2} and {n} raise the rate by less than {LEAST_GAIN:.0%}"
        best = max(best, n / seconds)
        n *= 2
    return memory, f"no batch larger than {most} was asked for"


def _try(server: _Server, n: int) -> tuple[int | None, float]:
    """Bytes, and seconds: the least of three after one that warms up."""
    server.check_batch(n)
    with server.full_batches(n) as times:
        times(1)
        with peak_memory(device_of(server.model)) as peak:
            seconds = min(times(1)[0] for _ in range(3))
    return peak(), seconds


def _measure(
    server: _Server, sizes: list[int], slo_ms: float, seconds: float, seed: int, progress: Track
) -> ServiceTimes:
    """Each size in full batches, and then as they take their turns under load.

    With the times of full batches alone p50 was simulated 16 to 36 % too long at 70 % of the saturation rate (MiniLM, 32 tokens,
    two cores), where 6 % of a batch's time make so much. With times drawn independently p95 was 17 to 47 % too short there, on
    a machine that takes 0.8 to 1.2 times as long for seconds.
    """
    alone = _full_batches(server, sizes, seconds / 2, progress)
    largest, samples = max(sizes, key=alone.saturation), []
    runs = list(itertools.product(LOAD_WAITS, LOADS))
    saturated, lasts, advance = (
        alone.saturation_rate,
        seconds / 2 / len(runs),
        progress("timing batches under load", len(runs)),
    )
    for wait, share in runs:
        rate = share * saturated
        arrivals = poisson(rate, max(LEAST_REQUESTS, int(rate * lasts)), f"load {seed}")
        samples += server.loaded(Policy(largest, wait * slo_ms), arrivals)
        advance()
    return alone.under_load(samples)


def _full_batches(server: _Server, sizes: list[int], seconds: float, progress: Track) -> ServiceTimes:
    """In turn, so that what slows the machine for a while slows all sizes; a free server first rests as long as a batch takes,
    as its threads do between requests.
    """
    first: dict[int, list[float]] = {n: [] for n in sizes}
    following: dict[int, list[float]] = {n: [] for n in sizes}
    until, rounds, advance = time.monotonic() + seconds, 0, progress("timing batches in turn", None)
    while rounds < LEAST_ROUNDS or time.monotonic() < until:
        rounds += 1
        advance()
        for n in sizes:
            # One pipeline at a time, as in a server: with the threads of several GNU OpenMP no longer spins at its barriers, and
            # a batch of one takes 40 ms in place of 27 (MiniLM, 128 tokens).
            with server.full_batches(n) as send:
                send(1)
                for _ in range(VISIT):
                    if first[n]:
                        time.sleep(min(first[n][-1], MOST_REST))
                    period = send(1 + CHAIN)
                    first[n].append(period[0])
                    following[n] += period[1:]
    return ServiceTimes({n: sorted(t) for n, t in first.items()}, {n: sorted(t) for n, t in following.items()})


def _choose(
    service: ServiceTimes,
    requests: Arrivals,
    slo_ms: float,
    p: float,
    price: float | None,
    run_seconds: float,
    seed: int,
) -> tuple[Candidate | None, Spread | None, list[Candidate], str | None]:
    """The policy, how its percentile differs from run to run, the frontier of those with as many replicas, and why there is no
    policy.
    """
    most, name = (1 - MARGIN) * slo_ms, _name(p)
    if (fastest := 1e3 * percentile(service.first[1], p)) > most:
        why = f"a batch of 1 on a free server takes {fastest:.1f} ms at this percentile ({MARGIN:.0%} are spare)"
        return None, None, [], why
    replicas = max(1, math.ceil(requests.rate / service.saturation_rate))
    while replicas <= MAX_REPLICAS:
        times = requests.of_replica(replicas, ARRIVALS, seed)
        candidates = [_candidate(service, times, n, w * slo_ms, p, price, requests.rate, replicas, seed)
                 for n in service.sizes for w in (WAITS if n > 1 else WAITS[:1])
                 if service.saturation(n) * replicas > requests.rate]  # fmt: skip
        surest = min(candidates, key=lambda c: (c.latency_ms[name], c.busy), default=None)
        if surest is not None and surest.latency_ms[name] <= most:
            policy = Policy(surest.max_batch, surest.max_wait_ms)
            varies = spread(requests.runs(replicas, run_seconds), policy, service, p)
            if varies.high_ms <= most:
                frontier = [c for c in candidates if not any(
                    d.latency_ms[name] <= c.latency_ms[name] and d.busy <= c.busy
                    and (d.latency_ms[name], d.busy) != (c.latency_ms[name], c.busy) for d in candidates)]  # fmt: skip
                return surest, varies, sorted(frontier, key=lambda c: c.latency_ms[name]), None
        replicas = max(replicas + 1, math.ceil(replicas * 1.1))
    return None, None, [], f"{MAX_REPLICAS} replicas are not enough"


def _candidate(
    service: ServiceTimes, times: Sequence[float], n: int, wait_ms: float, p: float, price: float | None, rate: float,
    replicas: int, seed: int,
) -> Candidate:  # fmt: skip
    simulated: Simulated = simulate(times, Policy(n, wait_ms), service, seed)
    latency = {_name(x): 1e3 * simulated.percentile(x) for x in sorted({50.0, 95.0, float(p)})}
    cost = None if price is None else price * replicas / (rate * 3600) * 1e6
    return Candidate(n, round(wait_ms, 3), replicas, latency, simulated.busy, simulated.mean_batch, cost)


def _name(p: float) -> str:
    return f"p{p:g}"


def _line(points: list[Point]) -> tuple[float, float]:
    """Least squares of next_ms over the batch size, neither part below 0, as a machine that changed its speed would have it;
    through the origin where there is one size.
    """
    sizes, times = [float(p.batch) for p in points], [p.next_ms for p in points]
    slope, fixed = statistics.linear_regression(sizes, times) if len(points) > 1 else (0.0, -1.0)
    if slope < 0:
        return statistics.fmean(times), 0.0
    return (fixed, slope) if fixed >= 0 else (0.0, sum(map(operator.mul, sizes, times)) / sum(n * n for n in sizes))


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Within it, of what the process uses; the function tells afterwards how much more that was at most than before."""
    peaks: list[int | None] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: peaks[0]
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
        return
    gc.collect()
    give_back_freed()  # what is kept would be used again unseen
    before_kb = _status("VmRSS") if _reset_peak() else None
    yield lambda: peaks[0]
    after_kb = _status("VmHWM")
    peaks.append(None if before_kb is None or after_kb is None else max(0, after_kb - before_kb) * 1024)


def _reset_peak() -> bool:
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again, proc_pid_clear_refs(5)
    except OSError:
        return False
    return True


def _status(name: str) -> int | None:
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
