"""size_batch: the queue against what queueing theory knows, the choice on made-up times, and a real pipeline."""

import contextlib
import dataclasses
import itertools
import json
import math
import random
import statistics

import pytest
import torch
from torch import nn

from forwardpass.serving import size_batch as module
from forwardpass.serving.load_generator import run_load
from forwardpass.serving.queueing import (
    Arrivals,
    Policy,
    ServiceTimes,
    bootstrap,
    percentile,
    poisson,
    served,
    settled,
    simulate,
    spread,
)
from forwardpass.serving.size_batch import peak_memory, size_batch, try_policy


def constant(times):
    """Batch size -> seconds."""
    return ServiceTimes({n: [t] for n, t in times.items()}, {n: [t] for n, t in times.items()})


def test_arrivals_are_poisson():
    times = poisson(50.0, 20_000, seed=3)
    gaps = [b - a for a, b in itertools.pairwise([0.0, *times])]
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.03)  # of an exponential distribution the mean
    assert times == poisson(50.0, 20_000, seed=3) != poisson(50.0, 20_000, seed=4)


def test_replicas_take_turns_with_the_arrivals():
    """Which makes gaps of one replica more even than those of independent arrivals: a queue half as long."""
    times, drawn = poisson(20.0, 40_000, seed=1)[::2], Arrivals(20.0).of_replica(2, 20_000, seed=2)
    for of_one in (times, drawn):
        gaps = [b - a for a, b in itertools.pairwise(of_one)]
        assert statistics.mean(gaps) == pytest.approx(2 / 20, rel=0.03)
        assert statistics.stdev(gaps) == pytest.approx(2**0.5 / 20, rel=0.03)
    service, policy = constant({1: 0.028}), Policy(1, 0.0)
    turns, drawn_turns, apart = (simulate(a, policy, service) for a in (times, drawn, poisson(10.0, 20_000)))
    for p in (95, 99):
        assert drawn_turns.percentile(p) == pytest.approx(turns.percentile(p), rel=0.05)
        assert apart.percentile(p) > 1.25 * turns.percentile(p)
    assert Arrivals(1.0, [5.0, 6.0, 7.0, 9.0]).of_replica(2, 1) == [0.0, 2.0]


@pytest.mark.every(2)
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_run_is_within_the_spread_of_such_runs(replicas):
    """95 of 100 are, and the percentile of a long simulation alone is no bound for any."""
    times = [0.02 + 0.001 * i for i in range(20)] + [0.06]
    service, policy, requests = ServiceTimes({1: times}, {1: times}), Policy(1, 0.0), Arrivals(12.0 * replicas)
    found = spread(requests.runs(replicas, 20.0), policy, service, 99)
    assert found.requests == 240
    runs = [
        1e3 * simulate(requests.of_replica(replicas, 240, i), policy, service, f"{i}").percentile(99)
        for i in range(400)
    ]
    assert 0.9 <= sum(found.low_ms <= p99 <= found.high_ms for p99 in runs) / 400 <= 0.98
    assert found.high_ms > 1.2e3 * simulate(requests.of_replica(replicas, 50_000), policy, service).percentile(99)


def test_the_runs_of_a_trace_are_its_sections():
    requests = Arrivals(2.0, [0.5 * i for i in range(400)])
    runs = list(requests.runs(2, 20.0))
    assert {len(r) for r in runs} == {20} and runs[0][0] == 0 and runs[-1][-1] == 398 * 0.5
    assert [len(r) for r in Arrivals(2.0, [0.0, 0.5, 1.0]).runs(1, 20.0)] == [3] * 200
    assert {len(r) for r in Arrivals(1e4).runs(1, 20.0)} == {1000}


@pytest.mark.every(2)
@pytest.mark.parametrize("load", [0.3, 0.7, 0.9])
def test_one_at_a_time_with_constant_service_is_m_d_1(load):
    """Pollaczek and Khinchine: the mean wait is load / (2 (1 - load)) of a service."""
    found = simulate(poisson(load, 150_000), Policy(1, 0.0), constant({1: 1.0}))
    assert statistics.mean(settled(found.latencies)) == pytest.approx(1 + load / (2 * (1 - load)), rel=0.05)
    assert found.busy == pytest.approx(load, rel=0.02) and found.mean_batch == 1


@pytest.mark.every(2)
def test_one_at_a_time_with_exponential_service_is_m_m_1():
    """Latencies are exponential, of mean 1 / (1 - load), so the percentiles are known too."""
    quantiles = [-math.log(1 - (i + 0.5) / 2000) for i in range(2000)]
    service = ServiceTimes({1: quantiles}, {1: quantiles})
    found = simulate(poisson(0.6, 150_000), Policy(1, 0.0), service)
    for p in (50, 95, 99):
        assert found.percentile(p) == pytest.approx(-math.log(1 - p / 100) / 0.4, rel=0.06)


def test_batches_begin_when_they_are_full_or_the_first_has_waited():
    service = constant({1: 10.0, 4: 10.0})
    # the third is there when the first has waited 2 s; the next three wait for the server, with the one at its end
    found = simulate([0.0, 1.0, 1.5, 3.0, 5.0, 12.0, 30.0], Policy(4, 2000.0), service)
    assert found.latencies == pytest.approx([12.0, 11.0, 10.5, 19.0, 17.0, 10.0, 12.0])
    full = simulate([0.0, 1.0, 1.5, 1.75, 9.0], Policy(4, 1e6), service)
    assert full.latencies[:4] == pytest.approx([11.75, 10.75, 10.25, 10.0])
    greedy = simulate([0.0, 1.0, 1.5, 1.75, 9.0, 9.5], Policy(4, 0.0), service)
    assert greedy.latencies == pytest.approx([10.0, 19.0, 18.5, 18.25, 11.0, 20.5])
    assert greedy.mean_batch == 2 and greedy.busy == 1


def test_service_between_measured_sizes_is_between_their_quantiles():
    service = ServiceTimes({1: [1.0, 2.0], 4: [4.0, 8.0]}, {1: [0.5], 4: [2.0]})
    assert [service.draw(1, False, u) for u in (0.0, 0.4, 0.5, 0.99)] == [1.0, 1.0, 2.0, 2.0]
    assert service.draw(2, False, 0.9) == 4.0 and service.draw(2, True, 0.9) == 1.0
    assert service.saturation(4) == 2.0
    with pytest.raises(ValueError, match="at most 4"):
        service.draw(5, False, 0.1)


def test_the_tail_of_what_was_measured_is_in_what_is_simulated():
    slow = ServiceTimes({1: [1.0] * 95 + [10.0] * 5}, {1: [1.0] * 95 + [10.0] * 5})
    found = simulate([20.0 * i for i in range(4000)], Policy(1, 0.0), slow)
    assert found.percentile(90) == 1 and found.percentile(99) == 10


def test_a_run_tells_the_times_that_simulate_it_again():
    """Times that are twice as long under load as alone, and as long again for every third batch: seen in a run, and drawn."""
    alone = constant({1: 1.0, 2: 1.2, 4: 1.6})
    quantiles = {n: [2 * t, 2 * t, 4 * t] for n, t in {1: 1.0, 2: 1.2, 4: 1.6}.items()}
    loaded, policy = ServiceTimes(quantiles, quantiles), Policy(4, 500.0)
    arrivals = poisson(0.4, 20_000, seed=1)
    real = simulate(arrivals, policy, loaded, seed=2)
    ends = [round(at + latency, 6) for at, latency in zip(arrivals, real.latencies)]
    batches = [len(list(together)) for _, together in itertools.groupby(ends)]
    seen = list(served(arrivals, ends, batches, policy))
    assert sum(took for _, _, took in seen) == pytest.approx(real.busy * (ends[-1] - arrivals[0]))
    again = simulate(poisson(0.4, 20_000, seed=3), policy, alone.under_load(seen), seed=4)
    for p in (50, 95, 99):
        assert again.percentile(p) == pytest.approx(real.percentile(p), rel=0.05)
    assert simulate(arrivals, policy, alone).percentile(50) < real.percentile(50) / 2


def test_slow_times_stay_together():
    """A machine that is slow for 200 batches of 800, and then as fast as before: the queue grows meanwhile."""
    alone, policy = constant({1: 1.0}), Policy(1, 0.0)
    seen = [(1, waited, 1.0 + 0.5 * (200 <= i < 400)) for waited in (False, True) for i in range(800)]
    slowed = alone.under_load(seen)
    assert slowed.first == slowed.next == {1: [1.0] * 600 + [1.5] * 200}
    mixed = ServiceTimes(slowed.first, slowed.next)
    arrivals = [1.2 * i for i in range(8000)]
    together, apart = (simulate(arrivals, policy, s) for s in (slowed, mixed))
    assert together.busy == pytest.approx(apart.busy, rel=0.03)
    assert together.percentile(99) > 10 * apart.percentile(99)
    assert simulate(arrivals, policy, slowed).latencies == together.latencies
    assert simulate(arrivals, policy, slowed, seed=1).latencies != together.latencies


def test_times_that_were_hardly_seen_are_those_of_all_or_as_before():
    alone = constant({1: 1.0, 4: 2.0})
    few = alone.under_load([(4, True, 3.0)] * 29)
    assert few == alone
    found = alone.under_load([(4, True, 3.0)] * 25 + [(1, True, 1.0)] * 25 + [(2, False, 9.0)])
    assert found.first == alone.first
    assert found.next == {1: [1.0] * 25 + [1.5] * 25, 4: [2.0] * 25 + [3.0] * 25}
    own = alone.under_load([(4, True, 3.0)] * 30 + [(1, True, 1.0)])
    assert own.next == {1: [1.0] + [1.5] * 30, 4: [3.0] * 30}


def test_percentile_and_bootstrap():
    assert [percentile([3, 1, 2, 4], p) for p in (1, 25, 26, 50, 99)] == [1, 1, 2, 2, 4]
    draw = random.Random(0)
    values = [draw.gauss(100, 10) for _ in range(3000)]
    low, high = bootstrap(values, 50)
    assert low < percentile(values, 50) < high and high - low == pytest.approx(4 * 1.2533 * 10 / 3000**0.5, rel=0.5)
    # ten in a row are alike: as many values know less
    rows = [v for v in values[:300] for _ in range(10)]
    wide = bootstrap(rows, 50)
    assert wide[1] - wide[0] > 2 * (high - low)


class Sleeper(nn.Module):
    """Takes 2 ms and 1 ms a row, whatever else the machine does, and none of its cores."""

    def forward(self, x):
        module.time.sleep(0.002 + 0.001 * len(x))
        return x


def make_batch(n):
    return torch.ones(n, 4)


@pytest.fixture
def exact(monkeypatch):
    """exact(batch size -> seconds): what batches take then; to begin with what Sleeper sleeps. No time passes."""

    def set_times(seconds):
        monkeypatch.setattr(
            module._Server,
            "full_batches",
            lambda self, n: contextlib.nullcontext(lambda batches: [seconds(n)] * batches),
        )

    monkeypatch.setattr(module._Server, "loaded", lambda self, policy, arrivals: [])
    monkeypatch.setattr(module, "MOST_REST", 0.0)
    set_times(lambda n: 0.002 + 0.001 * n)
    return set_times


def sized(model=None, make=make_batch, **options):
    defaults = {"latency_slo_ms": 200.0, "arrival_rate": 100.0, "seconds": 0.2, "max_batch": 8}
    return size_batch(model or Sleeper(), make, **{**defaults, **options})


@pytest.mark.every(3)
def test_a_sleeping_model_is_sized():
    found = sized()
    assert [p.batch for p in found.points] == [1, 2, 4, 8] and "larger than 8" in found.ended
    for p in found.points:  # sleeps are never shorter
        assert p.next_ms >= 2 + p.batch and p.first_ms >= 2 + p.batch and p.samples >= 10
    assert found.policy is not None and found.policy.replicas == 1 and found.policy.latency_ms["p99"] <= 200
    assert found.policy.max_batch > 1  # alone, requests compute longer
    assert 100 < found.saturation_rate <= 800
    assert found.frontier == sorted(found.frontier, key=lambda c: c.latency_ms["p99"])
    assert [c.busy for c in found.frontier] == sorted((c.busy for c in found.frontier), reverse=True)
    kept = json.loads(json.dumps(found.to_json()))
    assert kept["policy"]["max_batch"] == found.policy.max_batch and kept["policy"]["max_wait_ms"] >= 0
    assert kept["schema"] == "forwardpass.size_batch/1" and kept["measured"] == ["points", "saturation_rate"]
    assert f"max_batch={found.policy.max_batch}" in str(found)
    assert kept["spread"]["requests"] == 1000 and "in 95% of runs of 1000 requests p99 is" in str(found)
    load = try_policy(Sleeper(), make_batch, found.policy, poisson(100.0, 50))
    assert len(load.latencies) == len(load.lateness) == 50 and min(load.latencies) > 0.002


def chosen(times, rate, slo, p=99.0, price=None):
    policy, varies, frontier, reason = module._choose(constant(times), Arrivals(rate), slo, p, price, 20.0, 0)
    assert (policy is None) == (varies is None)
    assert varies is None or varies.low_ms <= varies.high_ms <= 0.9 * slo
    return policy, frontier, reason


@pytest.mark.every(2)
def test_the_policy_is_the_surest_of_those_that_hold_the_objective():
    times = {1: 0.010, 2: 0.011, 4: 0.013, 8: 0.017}
    policy, frontier, reason = chosen(times, 50.0, 200.0)
    assert reason is None and policy.latency_ms["p99"] == min(c.latency_ms["p99"] for c in frontier)
    assert policy.max_wait_ms == 0 and policy.max_batch > 1  # alone, requests would wait for one another
    least = min(frontier, key=lambda c: c.busy)  # full batches
    assert least.max_batch == 8 and least.max_wait_ms > 0 and least.busy < policy.busy
    assert all(not (d.latency_ms["p99"] <= c.latency_ms["p99"] and d.busy < c.busy) for c in frontier for d in frontier)


@pytest.mark.every(2)
def test_replicas_share_what_one_cannot_serve():
    times = {1: 0.010, 2: 0.012}  # 167 a second at most
    policy, _, reason = chosen(times, 500.0, 60.0, price=3.6)
    assert reason is None and policy.replicas >= 4 and policy.latency_ms["p99"] <= 60
    assert policy.cost_per_million == pytest.approx(policy.replicas * 0.001 / 500 * 1e6)
    none, frontier, why = chosen(times, 10.0, 9.0)
    assert none is None and frontier == [] and "10.0 ms" in why


@pytest.mark.every(2)
def test_short_runs_need_more_to_spare():
    """One replica holds 99 ms at 1000 requests in a row, and at 40 in a row not often enough."""

    def replicas(run_seconds):
        found = module._choose(constant({1: 0.028}), Arrivals(10.0), 110.0, 99.0, None, run_seconds, 0)
        return found[0].replicas, found[1].requests

    assert [replicas(t) for t in (100.0, 4.0)] == [(1, 1000), (2, 20)]


@pytest.mark.every(3)
def test_an_objective_that_cannot_hold_keeps_what_was_measured():
    found = sized(latency_slo_ms=1.0)
    assert found.policy is None and "free server" in found.reason and found.points[0].batch == 1
    assert "no policy holds p99 within 1 ms" in str(found) and found.to_json()["policy"] is None


@pytest.mark.every(2)
def test_what_is_printed_fits_and_its_line_is_not_below_0(exact):
    found = dataclasses.replace(sized(price_per_hour=1.0), notes=["because " * 40], ended="because " * 40)
    text = str(found)
    assert max(map(len, text.splitlines())) <= 100 and ", 1 replica\n" in text
    points = [module.Point(n, ms, ms, 9, None) for n, ms in ((1, 30.0), (2, 40.0), (4, 150.0))]
    fixed, each = module._line(points)  # by least squares -27.5 + 43.2 n
    assert fixed == 0 and each == pytest.approx((30 + 80 + 600) / 21)
    slower_alone = [module.Point(n, ms, ms, 9, None) for n, ms in ((1, 50.0), (2, 30.0))]
    assert module._line(slower_alone) == (40.0, 0.0)
    text = str(dataclasses.replace(found, fixed_ms=40.0, per_item_ms=0.0))
    assert "takes about 40.00 ms" in text


@pytest.mark.every(3)
def test_the_plot_says_why_there_is_no_policy(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        sized(latency_slo_ms=1.0).save_plot(tmp_path / "size.svg")
    assert "no policy holds the objective" in (tmp_path / "size.svg").read_text()


@pytest.mark.every(2)
def test_larger_batches_are_tried_while_they_gain(exact):
    ms = {1: 1.0, 2: 2.1, 4: 3.0, 8: 6.0, 16: 12.0}
    exact(lambda n: ms[n] / 1e3)
    found = sized(max_batch=64)
    assert [p.batch for p in found.points] == [1, 2, 4, 8, 16] and "batches of 8 and 16" in found.ended
    for p in found.points:
        assert p.first_ms == pytest.approx(ms[p.batch]) and p.rate == pytest.approx(1e3 * p.batch / ms[p.batch])


@pytest.mark.every(2)
def test_a_batch_that_fails_ends_the_measurement_with_what_there_is(exact):
    class Small(Sleeper):
        def forward(self, x):
            if len(x) > 2:
                raise torch.OutOfMemoryError("out of memory: tried to allocate 2 GiB")
            return super().forward(x)

    found = sized(Small())
    assert [p.batch for p in found.points] == [1, 2] and "batch of 4 failed: OutOfMemoryError" in found.ended
    assert found.policy is not None

    class Never(nn.Module):
        def forward(self, x):
            raise ArithmeticError("no")

    model = Never().train()
    with pytest.raises(ArithmeticError, match="no"):
        sized(model)
    assert model.training


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda n: torch.full((n, 4), torch.nan), "NaN"), (lambda n: torch.ones(n + 1, 4), "not 1 rows")],
)
def test_outputs_that_say_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        sized(make=make)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arrivals": [0.0, 1.0]}, "both were"),
        ({"arrival_rate": None}, "neither was"),
        ({"arrival_rate": 0}, "above 0"),
        ({"arrival_rate": None, "arrivals": [1.0]}, "at least two"),
        ({"arrival_rate": None, "arrivals": [2.0, 1.0]}, "ascending"),
        ({"arrival_rate": None, "arrivals": [0.0, math.nan, 1.0]}, "NaN"),
        ({"latency_slo_ms": -1}, "latency_slo_ms"),
        ({"run_seconds": 0}, "run_seconds"),
        ({"percentile": 100}, "percentile"),
        ({"price_per_hour": -1}, "price_per_hour"),
        ({"max_batch": 0}, "max_batch"),
        ({"memory_limit": 0}, "memory_limit"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sized(**options)


@pytest.mark.every(3)
def test_memory_ends_the_measurement(exact, monkeypatch):
    tried = []
    monkeypatch.setattr(module._Server, "check_batch", lambda self, n: tried.append(n))
    monkeypatch.setattr(module, "peak_memory", lambda device: contextlib.nullcontext(lambda: tried[-1] << 24))
    found = sized(memory_limit=50 << 20)
    assert [p.memory_bytes for p in found.points] == [1 << 24, 2 << 24] and "more than the limit" in found.ended
    monkeypatch.setattr(module, "peak_memory", lambda device: contextlib.nullcontext(lambda: None))
    assert "memory_limit was not applied" in str(sized(memory_limit=1))
    monkeypatch.setattr(module, "peak_memory", lambda device: contextlib.nullcontext(lambda: 2))
    with pytest.raises(ValueError, match="a batch of 1 takes"):
        sized(memory_limit=1)


def test_a_recorded_trace_is_replayed(exact):
    bursts = [i + j * 1e-4 for i in range(40) for j in range(8)]  # eight at once, a second apart
    found = sized(arrival_rate=None, arrivals=bursts, latency_slo_ms=100.0)
    assert found.arrival_rate == pytest.approx(8, rel=0.03)
    assert found.policy.max_batch == 8 and found.policy.mean_batch == 8


def test_load_counts_from_when_a_request_was_due():
    """Of a generator that is late as of a server that is."""
    pipeline = module._Server(Sleeper(), make_batch, None).pipeline(Policy(4, 0.0))
    load = run_load(pipeline, None, [0.0] * 8)
    assert len(load.latencies) == 8 and min(load.lateness) >= 0
    assert max(load.latencies) >= 2 * (0.002 + 0.001 * 4) - 1e-3


def test_peak_memory_of_the_cpu():
    with peak_memory(torch.device("cpu")) as used:
        torch.ones(8 << 20)  # 32 MB, gone at once
    if used() is not None:
        assert 30e6 < used() < 60e6


def test_the_benchmark_of_the_simulation_ends_in_a_verdict(monkeypatch, capsys, tmp_path):
    """Its runs of a model replaced by figures."""
    from benchmarks import bench, size_batch

    figures = {
        "simulated_ms": 1.0,
        "measured_ms": 1.0,
        "interval_ms": [1.0, 1.0],
        "error": 0.15,
        "within_interval": False,
    }
    row = {"load": 0.3, "rate": 1.0, "saturation_rate": 3.0, "policy": {"max_batch": 8, "max_wait_ms": 10.0},
           "lateness_ms": {"p50": 0.1, "p99": 1.0}, "percentiles": {f"p{p}": figures for p in size_batch.BARS}}  # fmt: skip
    monkeypatch.setattr(size_batch, "run", lambda *args: row)
    monkeypatch.setattr(size_batch.embedding, "load", lambda *args: (None, None))
    monkeypatch.setattr(size_batch.embedding, "full_batch", lambda *args: {})
    monkeypatch.setattr(size_batch.embedding, "find_model", lambda name: None)
    monkeypatch.setattr(bench, "header", lambda *args: {})
    monkeypatch.setattr("sys.argv", ["size_batch", "--runs", "1", "--loads", "0.3", "--json", str(tmp_path / "f.json")])
    size_batch.main()
    assert "p50 15.0% of 10% MISSED, p95 15.0% of 20% ok" in capsys.readouterr().out
    assert json.loads((tmp_path / "f.json").read_text())["verdicts"]["0.3"]["p50"]["ok"] is False
