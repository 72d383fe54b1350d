"""plan: a rotated candidate, in the layers where outliers show."""

import pytest
import torch
from torch import nn

import forwardpass as fp
from forwardpass.common.timing import Timing
from forwardpass.planning import planner as planning
from forwardpass.planning.candidates import measure

TIMES = {"before": 4.0, "int8_rotated": 1.2, "int8_rotated+calibrated": 1.2}


@pytest.fixture
def timed(monkeypatch):
    """The names of what was timed; each takes 1 ms but for those of the table."""
    seen = []

    def interleave(named, device, *, rounds, warmup, on_round=lambda: None):
        seen.append(set(named))
        for call in named.values():
            call(), on_round()
        return {n: Timing(t := TIMES.get(n, 1.0), t * 0.99, t * 1.01, rounds) for n in named}

    for module in (measure, planning):
        monkeypatch.setattr(module, "interleave", interleave)
    return seen


class Net(nn.Module):
    """One layer sees channels a hundred times as large as others, the other none."""

    def __init__(self):
        super().__init__()
        self.outliers, self.even = nn.Linear(256, 192), nn.Linear(192, 64)

    def forward(self, x):
        return self.even(nn.functional.layer_norm(self.outliers(x), (192,)))


def net():
    torch.manual_seed(0)
    return Net().eval()


def batches(count=3, start=0):
    generator = torch.Generator().manual_seed(start)
    x = [torch.randn(64, 256, generator=generator) for _ in range(count)]
    return [b.index_copy(1, torch.tensor([3, 100]), 100 * b[:, [3, 100]]) for b in x]


def planned(**options):
    model = net()
    plan = fp.plan(model, batches(), max_error=0.012, shapes=batches(1), **options)
    return model, plan, {x["fqn"]: x for x in plan.evidence["layers"]}


def test_where_outliers_show(timed):
    model, plan, rows = planned(candidates=["int8", "int8_rotated"])
    assert rows["outliers"]["choice"] == "int8_rotated" and rows["even"]["choice"] == "int8"
    plain, rotated = (rows["outliers"]["candidates"][name] for name in ("int8", "int8_rotated"))
    assert rotated["error"] < plain["error"] / 2 and rotated["output"]["mean"] < plain["output"]["mean"] / 4
    assert rotated["ms"]["low"] > plain["ms"]["low"]
    refused = rows["even"]["candidates"]["int8_rotated"]
    assert refused["refused"]["code"] == "no_outliers" and refused["ms"] is None and refused["error"] > 0
    assert {"before", "int8"} in timed  # the even layer's rotated form takes no time to measure
    table = str(plan)
    assert "int8_rotated: 3.33 times as fast" in table and "no_outliers" not in table
    report = fp.swap(model, plan=plan)
    assert {x.fqn: x.precision for x in report.swapped} == {"outliers": "int8_rotated", "even": "int8"}
    assert (model.outliers.rotate, model.even.rotate) == (256, None)


def test_by_default(timed):
    """Without calibration the uncalibrated form, with it the calibrated one."""
    assert planned()[1].evidence["candidates"] == ["fp8", "int8", "int8_rotated", "w8a16", "bf16"]
    _, plan, rows = planned(calibrate=batches(4, 1))
    names = ["fp8", "int8", "int8+calibrated", "int8_rotated+calibrated", "w8a16", "bf16"]
    assert plan.evidence["candidates"] == names
    errors = {n: rows["outliers"]["candidates"][n]["error"] for n in names[1:4]}
    assert errors["int8_rotated+calibrated"] < errors["int8"] / 2


def test_a_calibrated_plan_replays(timed, tmp_path):
    """Both calibrated forms are in it, each with its own rounding of the weight."""
    calibration = batches(4, 1)
    both = ["int8+calibrated", "int8_rotated+calibrated"]
    for name in both:
        _, plan, _ = planned(candidates=[name], calibrate=calibration)
        plan.save(tmp_path / "plan.json")
        again = net()
        fp.swap(again, plan=str(tmp_path / "plan.json"), calibrate=calibration)
        by_name = net()
        fp.swap(by_name, name.partition("+")[0], calibrate=calibration, include=["outliers", "even"])
        x = batches(1, 5)[0]
        with torch.inference_mode():
            assert torch.equal(again(x), by_name(x)) and (again(x) - net()(x)).norm() < 0.02 * net()(x).norm()


def test_alone_it_is_tried_everywhere(timed):
    _, _, rows = planned(candidates=["int8_rotated"])
    assert all(x["candidates"]["int8_rotated"]["ms"] for x in rows.values())
