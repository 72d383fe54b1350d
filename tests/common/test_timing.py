"""What measures time: it tells fast from slow, and says what a busy GPU does, and at which clock."""

import itertools
import time

import torch

from forwardpass.common import timing
from forwardpass.common.timing import interleave, sustained


def test_timing_tells_fast_from_slow():
    told = []
    timings = interleave(
        {"slow": lambda: time.sleep(0.01), "fast": lambda: torch.ones(4).sum()},
        rounds=3,
        warmup=1,
        on_round=lambda: told.append(1),
    )
    assert timings["fast"].median < 5 < 9 < timings["slow"].median
    assert len(told) == 4


def test_sustained_time_of_a_cpu():
    result = sustained(lambda: time.sleep(0.002), seconds=0.1)
    assert 2 <= result.milliseconds < 6 and result.sm_mhz is None


def test_sustained_time_is_of_the_second_half_and_has_its_clock(monkeypatch):
    """A GPU's clock falls until its power is within the limit."""
    clocks = itertools.chain([1980, 1980, 1900], itertools.repeat(1590))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(timing.environment, "sm_clock", lambda device: next(clocks))
    monkeypatch.setattr(timing, "LEAST_CHUNK_MS", 2.0)
    calls = []
    result = sustained(lambda: calls.append(time.sleep(0.001)), "cuda", seconds=0.1)
    assert result.sm_mhz == 1590 and 1 <= result.milliseconds < 5 and len(calls) > 10


def test_a_cpu_has_no_clock_of_multiprocessors():
    assert timing.environment.sm_clock("cpu") is None


class Event:
    """torch.cuda.Event where the host does the work."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.seconds = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return (end.seconds - self.seconds) * 1e3


def test_rounds_are_planned_from_the_last_untimed_one():
    planned, told = [], []
    result = interleave(
        {"": lambda: time.sleep(0.01)},
        rounds=lambda seconds: planned.append(seconds) or 2,
        warmup=2,
        on_round=lambda: told.append(len(planned)),
    )[""]
    assert result.rounds == 2 and told == [0, 0, 1, 1]
    assert 0.02 <= planned[0] < 0.2  # a sample is two calls, of which the first is untimed
