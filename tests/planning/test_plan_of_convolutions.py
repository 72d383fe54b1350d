"""Plans of convolutions: stems are candidates like others, and what no kernel takes says why it stays."""

import pytest
import torch
from torch import nn

import forwardpass as fp
from forwardpass.common.timing import Timing
from forwardpass.planning import planner
from forwardpass.planning.candidates import measure
from forwardpass.proofs.siblings import in_floats


@pytest.fixture
def times(monkeypatch):
    table = {"before": 4.0, "after": 2.0, "int8": 1.0}

    def interleave(named, device, *, rounds, warmup, on_round=lambda: None):
        for call in named.values():
            call()
        return {n: Timing(table[n] * 1.01, table[n], table[n] * 1.02, rounds) for n in named}

    monkeypatch.setattr(measure, "interleave", interleave)
    monkeypatch.setattr(planner, "interleave", interleave)
    return table


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.ReLU(), nn.Conv2d(32, 16, 1),
        nn.Conv2d(16, 32, 3, groups=4), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    ).eval()  # fmt: skip


STEM, DEPTHWISE, NARROW, WIDE = "0", "2", "5", "7"


def rows(**options):
    batches = [torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))]
    plan = fp.plan(network(), batches, **{"min_cosine": 0.9, "candidates": ["int8"]} | options)
    return plan, {x["fqn"]: x for x in plan.evidence["layers"]}


def test_a_stem_is_measured_like_others(times):
    plan, found = rows()
    assert found[STEM]["choice"] == found[WIDE]["choice"] == "int8"
    assert found[STEM]["candidates"]["int8"]["error"] > 0 and found[STEM]["candidates"]["int8"]["output"]["mean"] > 0
    model, x = network(), torch.randn(2, 3, 20, 20)
    with torch.inference_mode():
        expected = model(x)
        report = fp.swap(model, plan=plan)
        assert STEM in {s.fqn for s in report.swapped} and (model(x) - expected).norm() < 0.1 * expected.norm()
    times["int8"] = 5.0
    plan, found = rows()
    assert found[STEM]["reason"] == "left alone: no candidate is faster than 4 ms (int8 5 ms)"


def test_depthwise_convolutions_are_measured_and_narrow_ones_say_why_they_stay(times):
    """On a CPU a kernel takes depthwise ones, the sensitive ones, and none takes other narrow groups."""
    plan, found = rows()
    assert found[DEPTHWISE]["candidates"]["int8"]["error"] > 0
    row = found[NARROW]
    assert row["choice"] is None and row["candidates"]["int8"]["refused"]["code"] == "narrow_groups"
    assert "these are of 4 and 8" in row["reason"] and "it stays in floats" in row["reason"]
    assert ".13, the most of its 49 layers" in row["reason"]
    printed = " ".join(str(plan).split())
    assert "left alone: it multiplies groups of at least 16 channels" in printed


def test_what_stays_computes_what_is_behind_it(times, monkeypatch):
    timed = []
    monkeypatch.setattr(measure, "in_floats", lambda leaf: timed.append(leaf.fqn) or in_floats(leaf))
    plan, _ = rows()
    assert {*timed} == {STEM, DEPTHWISE}  # no candidate is timed against the other
    chosen = {layer.fqn for layer in plan.layers}
    assert {*plan.folded} == {STEM, DEPTHWISE, NARROW} - chosen and NARROW in plan.folded
    model, x = network(), torch.randn(2, 3, 20, 20)
    with torch.inference_mode():
        expected = model(x)
        report = fp.swap(model, plan=plan)
        assert {layer.fqn for layer in report.folded} == {*plan.folded}
        assert (model(x) - expected).norm() < 0.1 * expected.norm()
    excluded, _ = rows(exclude=[NARROW])
    assert NARROW not in excluded.folded
