"""Requests that arrive, wait and are computed in batches: simulated from service times that were measured.

One server, which is one `fp.Pipeline` with `max_batch` and `max_wait_ms`: when it is free and requests wait, a batch begins as
soon as max_batch of them are there or the first is max_wait_ms old, with all that are there by then. Times are in seconds.
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

#: of the requests, simulated or sent: they find a queue that is still filling
WARM_UP = 0.05
#: batches of a size that tell how long it takes under load
LEAST_SEEN = 30
#: runs that are simulated to see how they differ, and the most requests of one
RUNS, MOST_OF_A_RUN = 200, 1000


@dataclass(frozen=True)
class Policy:
    """How requests become batches."""

    max_batch: int
    max_wait_ms: float


@dataclass(frozen=True)
class ServiceTimes:
    """Measured, by batch size: `first` from a free server to the result, `next` from one result to the next one while batches
    wait. Each ascending, and both of the same sizes. `quantiles`: which of its size's times each of some batches took that came
    one after the other: a machine that is slow is slow for seconds, and the queue grows.
    """

    first: Mapping[int, Sequence[float]]
    next: Mapping[int, Sequence[float]]
    quantiles: Sequence[float] = ()

    @property
    def sizes(self) -> list[int]:
        return sorted(self.first)

    def draw(self, n: int, waited: bool, u: float) -> float:
        """The quantile u of what was measured for n; between two sizes, between their quantiles."""
        times, sizes = self.next if waited else self.first, self.sizes
        above = bisect.bisect_left(sizes, n)
        if above == len(sizes):
            raise ValueError(f"batches of at most {sizes[-1]} were measured, not of {n}")
        high = _pick(times[sizes[above]], u)
        if sizes[above] == n or above == 0:
            return high
        low, share = _pick(times[sizes[above - 1]], u), (n - sizes[above - 1]) / (sizes[above] - sizes[above - 1])
        return low + share * (high - low)

    def under_load(self, samples: Iterable[tuple[int, bool, float]]) -> ServiceTimes:
        """These times, measured in other conditions, as they are where `served` saw some.

        What was seen goes to the nearest size, as a multiple of the median here: a size between two has few of its own. A size
        that was hardly seen gets the multiples of all.
        """
        multiples: dict[tuple[bool, int], list[float]] = {(w, n): [] for w in (False, True) for n in self.sizes}
        in_order = []
        for n, waited, seconds in samples:
            nearest = min(self.sizes, key=lambda size: abs(math.log(n / size)))
            in_order.append(((waited, nearest), seconds / self.draw(n, waited, 0.5)))
            multiples[waited, nearest].append(in_order[-1][1])
        for waited in (False, True):
            pool = [x for (w, _), values in multiples.items() if w == waited for x in values]
            for n in self.sizes:
                if len(multiples[waited, n]) < LEAST_SEEN:
                    multiples[waited, n] = pool
        ascending = {key: sorted(values) for key, values in multiples.items()}

        def times(waited: bool, n: int) -> Sequence[float]:
            ordered = ascending[waited, n]
            if len(ordered) < LEAST_SEEN:
                return (self.next if waited else self.first)[n]
            return [x * self.draw(n, waited, 0.5) for x in ordered]

        def quantile(key: tuple[bool, int], x: float) -> float:
            ordered = ascending[key]
            return (bisect.bisect_left(ordered, x) + bisect.bisect_right(ordered, x)) / (2 * len(ordered))

        return ServiceTimes(
            {n: times(False, n) for n in self.sizes}, {n: times(True, n) for n in self.sizes},
            tuple(quantile(key, x) for key, x in in_order if len(ascending[key]) >= LEAST_SEEN),
        )  # fmt: skip

    def order(self, seed: int) -> Iterator[float]:
        """Quantiles of batches one after the other: as they were measured, from one of them on; without any, independent."""
        draw = random.Random(f"service {seed}")  # of the plain seed it would repeat what poisson() drew
        if not self.quantiles:
            return iter(draw.random, None)
        start = draw.randrange(len(self.quantiles))
        return itertools.cycle([*self.quantiles[start:], *self.quantiles[:start]])

    def saturation(self, max_batch: int) -> float:
        """Requests a second of a server that always has a full batch waiting."""
        times = [self.draw(max_batch, True, (i + 0.5) / 100) for i in range(100)]
        return max_batch * len(times) / sum(times)

    @property
    def saturation_rate(self) -> float:
        """`saturation` of the size that gives the most."""
        return max(map(self.saturation, self.sizes))


def _pick(ascending: Sequence[float], u: float) -> float:
    return ascending[min(int(u * len(ascending)), len(ascending) - 1)]


def poisson(rate: float, count: int, seed: int | str = 0, replicas: int = 1) -> list[float]:
    """Times of arrivals that do not know of each other, `rate` of them a second on average; of several replicas those of one,
    which gets each so many-th: sums of so many gaps, which are more even than the gaps of as few independent arrivals.
    """
    draw, now, times = random.Random(seed), 0.0, []
    for _ in range(count):
        now += draw.gammavariate(replicas, 1 / rate)
        times.append(now)
    return times


@dataclass(frozen=True)
class Arrivals:
    """Requests that do not know of each other, or those of a trace, at a rate a second. Replicas take turns with them."""

    rate: float
    trace: Sequence[float] | None = None

    def of_replica(self, replicas: int, count: int, seed: int | str = 0) -> list[float]:
        """The times of so many requests that one of them gets; of a trace all."""
        if self.trace is not None:
            return [t - self.trace[0] for t in self.trace[::replicas]]
        return poisson(self.rate, count, seed, replicas)

    def runs(self, replicas: int, seconds: float) -> Iterator[list[float]]:
        """What one of them gets in so many seconds, RUNS times: of a trace its sections, which overlap where it is short."""
        count = min(max(1, round(seconds * self.rate / replicas)), MOST_OF_A_RUN)
        if self.trace is None:
            yield from (poisson(self.rate, count, f"run {i}", replicas) for i in range(RUNS))
            return
        times = self.of_replica(replicas, 0)
        last = max(0, len(times) - count)
        yield from (times[i * last // (RUNS - 1) :][:count] for i in range(RUNS))


@dataclass(frozen=True)
class Simulated:
    latencies: list[float]  #: of each request, from its arrival to its result
    busy: float  #: share of the time that the server computes
    mean_batch: float

    def percentile(self, p: float) -> float:
        return percentile(settled(self.latencies), p)


def simulate(arrivals: Sequence[float], policy: Policy, service: ServiceTimes, seed: int = 0) -> Simulated:
    """What each of the requests, at ascending times, waits for its result."""
    quantiles = service.order(seed)
    latencies: list[float] = []
    free, i, batches, computed = -math.inf, 0, 0, 0.0
    while i < len(arrivals):
        start = _begins(arrivals, i, policy, free)
        n = max(1, bisect.bisect_right(arrivals, start, i, min(i + policy.max_batch, len(arrivals))) - i)
        service_time = service.draw(n, start == free, next(quantiles))
        free = start + service_time
        latencies += [free - t for t in arrivals[i : i + n]]
        i, batches, computed = i + n, batches + 1, computed + service_time
    return Simulated(latencies, computed / (free - arrivals[0]), len(arrivals) / batches)


@dataclass(frozen=True)
class Spread:
    """What a percentile of the latencies is in 95 % of runs of so many requests: the few slowest of a run decide it, and these
    come together, as they share a queue.
    """

    requests: int
    low_ms: float
    high_ms: float


def spread(runs: Iterable[Sequence[float]], policy: Policy, service: ServiceTimes, p: float) -> Spread:
    """The percentile of runs that are simulated apart, each from an empty queue on, as a real one is."""
    count, percentiles = 0, []
    for seed, arrivals in enumerate(runs):
        percentiles.append(1e3 * simulate(arrivals, policy, service, seed).percentile(p))
        count = len(arrivals)
    return Spread(count, percentile(percentiles, 2.5), percentile(percentiles, 97.5))


def _begins(arrivals: Sequence[float], i: int, policy: Policy, free: float) -> float:
    """When the batch begins whose first request is the i-th, on a server that is free from `free` on."""
    last = i + policy.max_batch
    full = arrivals[last - 1] if last <= len(arrivals) else math.inf
    return max(free, min(full, arrivals[i] + policy.max_wait_ms / 1e3))


def served(
    arrivals: Sequence[float], ends: Sequence[float], batches: Sequence[int], policy: Policy
) -> Iterator[tuple[int, bool, float]]:
    """(requests, whether it waited for the server, seconds) of each batch of a real run: what `simulate` would have had to draw
    for the ends that there were.
    """
    free, i = -math.inf, 0
    for n in batches:
        start, end = _begins(arrivals, i, policy, free), ends[i + n - 1]
        yield n, start == free, end - start
        free, i = end, i + n


def settled(latencies: list[float]) -> list[float]:
    """Without the first ones, which found an empty queue."""
    return latencies[int(WARM_UP * len(latencies)) :]


def percentile(values: Sequence[float], p: float) -> float:
    """The least value that p percent of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(p / 100 * len(ordered)) - 1)]


def bootstrap(
    latencies: Sequence[float], p: float, *, block: int = 100, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the percentile p, resampled in blocks of consecutive requests, which share a queue (moving-block
    bootstrap of Künsch, 1989).
    """
    values = torch.tensor(latencies, dtype=torch.float64)
    block = min(block, len(values))
    blocks = values.unfold(0, block, 1)
    g = torch.Generator().manual_seed(seed)
    percentiles = []
    for _ in range(resamples):
        indices = torch.randint(len(blocks), (math.ceil(len(values) / block),), generator=g)
        again = blocks[indices].flatten()[: len(values)]
        percentiles.append(again.kthvalue(max(1, math.ceil(p / 100 * len(again)))).values.item())
    return percentile(percentiles, 2.5), percentile(percentiles, 97.5)
