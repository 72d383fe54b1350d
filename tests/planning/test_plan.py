"""plan: what it chooses is the least cost within the budget, what it says it measured, and the model is as it was."""

import dataclasses
import html
import importlib.util
import json
import math
import pathlib
import re
import sys

import pytest
import torch
from command_line import refused, run
from processes import fork
from small_models import assert_same_objects, batch, block, build, inputs, objects, outputs
from torch import nn

import forwardpass as fp
from forwardpass.common.printing.plots import require
from forwardpass.common.printing.text import count
from forwardpass.common.timing import Timing
from forwardpass.planning import plan_plots as plots
from forwardpass.planning import planner as planning
from forwardpass.planning.candidates import measure
from forwardpass.swap import originals
from forwardpass.swap.plan import Plan

#: what a call costs in these tests, whatever it is
TIMES = {"before": 4.0, "after": 1.5, "fp8": 1.0, "int8": 1.0, "int8+calibrated": 1.1, "int8_rotated": 1.2, "w8a16": 5.0,
         "bf16": 2.0}  # fmt: skip
CANDIDATES = ("int8", "int8+calibrated", "w8a16", "bf16")


@pytest.fixture
def times(monkeypatch):
    """Timers that run each call twice and say what the table says."""
    table, calls = dict(TIMES), []

    def interleave(named, device, *, rounds, warmup, on_round=lambda: None):
        for name, call in named.items():
            calls.append(name)
            call(), call()
            on_round()
        return {name: Timing(table[name] * 1.01, table[name], table[name] * 1.02, rounds) for name in named}

    monkeypatch.setattr(measure, "interleave", interleave)
    monkeypatch.setattr(planning, "interleave", interleave)
    table["calls"] = calls
    return table


def batches(count=4):
    return [inputs(64, seed) for seed in range(10, 10 + count)]


def planned(model=None, **options):
    given = {"candidates": CANDIDATES, "calibrate": [inputs(256, 3)], "max_error": 0.02} | options
    return fp.plan(
        model or block(), options.get("batches") or batches(), **{k: v for k, v in given.items() if k != "batches"}
    )


def measured(plan):
    """How many candidates were put into their layers, alone."""
    return sum(c["output"] is not None for x in plan.evidence["layers"] for c in x["candidates"].values())


def choices(plan):
    return {x["fqn"]: x["choice"] for x in plan.evidence["layers"]}


def error_of(plan, model=None, calibrate=None):
    """The largest relative error of the output over the batches, by swap and not by plan."""
    model = model or block()
    exact = [outputs(model, b) for b in batches()]
    fp.swap(model, plan=plan, calibrate=calibrate if plan.calibrated else None)
    return max(float((outputs(model, b) - e).norm() / e.norm()) for b, e in zip(batches(), exact))


# the plan


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "exactly one criterion.*got none"),
        ({"max_error": 0.1, "min_cosine": 0.9}, "got max_error, min_cosine"),
        ({"metric": lambda *a: 0.0}, "metric= with tolerance="),
        ({"tolerance": 0.1}, "got tolerance"),
        ({"min_cosine": 1.1}, "min_cosine must be between -1 and 1, not 1.1"),
        ({"max_error": -0.1}, "max_error must be a finite number, 0 or more"),
        ({"max_error": math.nan}, "max_error must be"),
        ({"max_error": math.inf}, "max_error must be"),
        ({"metric": lambda *a: 0.0, "tolerance": -1}, "tolerance must be"),
        ({"min_cosine": "0.9"}, "not '0.9'"),
    ],
)
def test_exactly_one_criterion(given, words):
    with pytest.raises(ValueError, match=words):
        planned(**{"max_error": None, **given})


@pytest.mark.every(2)
def test_a_plan_holds_its_budget_and_leaves_the_model_alone(times):
    model = block()
    model.first.train()
    before, flags = objects(model), [m.training for m in model.modules()]
    costs = []
    for max_error in (0.03, 0.012, 0.005, 0.002):
        plan = planned(model, max_error=max_error)
        assert_same_objects(model, before)
        assert flags == [m.training for m in model.modules()]
        assert originals.find(model) is None
        assert error_of(plan, calibrate=[inputs(256, 3)]) <= max_error
        costs.append(plan.evidence["predicted"]["after"])
    assert costs == sorted(costs) and costs[0] < costs[-1]


def test_the_whole_plan_is_run_and_the_last_word(times):
    plan = planned(max_error=0.012)
    held = [a for a in plan.evidence["attempts"] if a["holds"]]
    assert error_of(plan, calibrate=[inputs(256, 3)]) == pytest.approx(held[-1]["value"], rel=1e-4)
    assert min(a["cost"] for a in held) == plan.evidence["predicted"]["after"]
    assert all((a["value"] <= 0.012) is a["holds"] for a in plan.evidence["attempts"])
    for a in plan.evidence["attempts"]:  # errors of layers add up: within what three layers may have in common
        assert a["predicted"] == pytest.approx(a["value"] ** 2, rel=0.25)


def test_a_prediction_that_is_far_off_is_backed_off_from(times, monkeypatch):
    """Where errors do not add up as they should, the search goes on until a plan holds."""
    real = measure.Measurer.output_error
    monkeypatch.setattr(measure.Measurer, "output_error", lambda *a: [e / 1000 for e in real(*a)])
    plan = planned(max_error=0.012)
    assert plan.layers and error_of(plan, calibrate=[inputs(256, 3)]) <= 0.012
    assert not plan.evidence["attempts"][0]["holds"]


def test_what_is_not_faster_is_left_alone_with_the_times(times):
    times.update({"int8": 4.5, "int8+calibrated": 4.6, "bf16": 4.0})
    model = block()
    plan = planned(model, max_error=1.0)
    assert plan.layers == () and plan.calibration is None
    assert "no candidate is a gain on any layer" in plan.evidence["result"]
    for x in plan.evidence["layers"]:
        assert x["reason"] == (
            "left alone: no candidate is faster than 4 ms (int8 4.5 ms, int8+calibrated 4.6 ms, w8a16 5 ms, bf16 4 ms)"
        )
        assert {c["refused"]["code"] for c in x["candidates"].values()} == {"slower"}
    assert re.search(r"^ +first +4 +4.5 +4.6 +5 +4$", str(plan), re.M)
    assert "error at the output" not in str(plan)  # of no candidate was one measured
    assert fp.swap(model, plan=plan).swapped == []


def test_a_plan_that_is_slower_as_a_whole_is_refused(times):
    times["after"] = 4.5
    plan = planned()
    assert plan.layers == ()
    assert "it takes 4.5 ms with the best plan and 4 without" in plan.evidence["result"]
    assert set(choices(plan).values()) == {None}


def test_small_layers_are_measured_not_presumed_small(times):
    assert choices(planned(max_error=1.0))["head"] == "int8"  # 3 x 64, which a swap leaves alone


@pytest.mark.parametrize("criterion", [{"max_error": 1e-9}, {"max_error": None, "min_cosine": 1.0}])
def test_a_budget_that_cannot_hold_gives_the_model_as_it_is(times, criterion):
    model = block()
    exact = outputs(model, inputs())
    plan = planned(model, **criterion)
    assert plan.layers == ()
    assert "no plan that was tried holds" in plan.evidence["result"]
    assert "the least error of any swap that gains" in str(plan)
    fp.swap(model, plan=plan)
    assert torch.equal(outputs(model, inputs()), exact)


def test_memory(times):
    times.update(dict.fromkeys(("int8", "bf16", "w8a16", "after"), 9.0))  # which is not asked for
    plan = planned(target="memory", max_error=0.01)
    rows = {x["fqn"]: x for x in plan.evidence["layers"]}
    assert rows["first"]["choice"] is not None
    chosen = rows["first"]["candidates"][rows["first"]["choice"]]
    assert chosen["bytes"] < rows["first"]["before"]["bytes"]
    assert rows["head"]["choice"] is None or rows["head"]["before"]["bytes"] > 0
    assert error_of(plan, calibrate=[inputs(256, 3)]) <= 0.01
    with pytest.raises(ValueError, match="target is one of latency, memory, not 'speed'"):
        planned(target="speed")


def test_a_metric_of_ones_own(times):
    seen = []

    def flips(output, reference, batch):
        seen.append(batch)
        return (output.argmax(1) != reference.argmax(1)).double().mean().item()

    plan = planned(max_error=None, metric=flips, tolerance=0.02)
    assert {id(b) for b in seen} and all(isinstance(b, torch.Tensor) for b in seen)
    assert plan.layers and plan.evidence["criterion"] == {"kind": "metric", "bound": 0.02}
    assert [a for a in plan.evidence["attempts"] if a["holds"]][-1]["value"] <= 0.02


def test_one_layer_is_replaced_at_a_time(times):
    held = []

    def forward(model, x):
        held.append(len(originals.quantised_layers(model)))
        return model(x)

    plan = planned(forward=forward)
    assert len(plan.layers) > 1
    # layers, candidates that are a gain; on one batch, which has samples enough
    first, count = held.index(1), measured(plan)
    assert held[first : first + count] == [1] * count and held.count(1) == count >= 6
    assert held[:first].count(3) == 4  # the fastest of each, together, on all batches


def test_a_candidate_that_another_one_beats_is_not_measured_at_the_output(times):
    """int8 and int8 calibrated take the same time, but for noise: only the one with the smaller error at the layer goes on."""
    times["int8+calibrated"] = TIMES["int8"] * 1.005
    plan = planned()
    for x in plan.evidence["layers"]:
        alike = (x["candidates"][name] for name in ("int8", "int8+calibrated"))
        better, beaten = sorted(alike, key=lambda c: c["error"])
        assert beaten["refused"]["code"] == "dominated" and beaten["output"] is None and beaten["ms"]
        assert better["refused"] is None and better["output"]
        slower = x["candidates"]["bf16"]
        assert (slower["output"] is None) is (better["error"] < slower["error"])


def test_kernel_error_is_apart_from_quantisation(times):
    plan = planned()
    for x in plan.evidence["layers"]:
        for name in ("int8", "int8+calibrated", "w8a16"):
            c = x["candidates"][name]
            assert c["kernel"] < 1e-6 < c["quantisation"] and c["error"] == pytest.approx(c["quantisation"], rel=1e-2)
        assert 1e-4 < x["candidates"]["bf16"]["kernel"] < 2**-8  # its product is rounded
        assert x["candidates"]["w8a16"]["output"] is None  # refused for its time: not put into the model


@pytest.mark.every(2)
def test_a_bert_by_mask_and_name(times):
    model, given = build("bert"), [batch("bert", seed) for seed in range(3)]
    plan = fp.plan(model, given, min_cosine=0.9999, candidates=["fp8", "int8", "bf16"], exclude="pooler.**")
    chosen = choices(plan)
    assert chosen["pooler.dense"] is None
    assert {"int8", "bf16"} >= set(chosen.values()) - {None}
    reasons = {x["fqn"]: x["reason"] for x in plan.evidence["layers"]}
    assert "exclude='pooler.**' names it" in reasons["pooler.dense"]
    fp.swap(model, plan=plan)
    assert fp.parity(model, given).output.cosine_min >= 0.9999
    blocks = plan.evidence["blocks"]
    assert set(blocks) == {"encoder.layer.0", "encoder.layer.1"}
    assert blocks["encoder.layer.0"]["before"] == 6 * 4.0 > blocks["encoder.layer.0"]["after"]
    assert sum(x["error"] for x in blocks.values()) == pytest.approx(plan.evidence["predicted"]["error"])
    assert blocks["encoder.layer.0"]["candidates"]["int8"] > blocks["encoder.layer.0"]["candidates"]["bf16"] > 0
    assert blocks["encoder.layer.0"]["candidates"]["fp8"] is None  # no kernel on a CPU
    assert "encoder.layer.1  " in str(plan)


def test_what_has_no_kernel_is_not_tried(times):
    plan = planned(candidates=["fp8", "int8"], calibrate=None)
    assert plan.evidence["layers"][0]["candidates"]["fp8"]["refused"]["code"] == "reference"
    plan = fp.plan(block(), batches(), max_error=0.1)
    # no calibrate=, no calibrated candidate
    assert plan.evidence["candidates"] == ["fp8", "int8", "int8_rotated", "w8a16", "bf16"]


def test_layers_that_no_batch_reaches(times):
    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

        def forward(self, x):
            return self.used(x)

    plan = planned(Half().eval(), max_error=1.0)
    assert choices(plan) == {"used": "int8", "unused": None}
    assert "no batch of `shapes` reaches it" in plan.evidence["layers"][1]["reason"]


# replaying


def test_json_round_trip(times, tmp_path):
    plan = planned()
    plan.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert read == plan
    assert str(read) == str(plan)
    assert read.to_json() == plan.to_json() == json.loads((tmp_path / "plan.json").read_text())
    evidence = plan.evidence
    assert {"versions", "device", "measured", "seconds"} <= set(evidence)
    assert "first" in str(dataclasses.replace(plan, evidence=None))


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: e.clear(), "it has no "),
        (lambda e: e.update(candidates="int8"), "candidates is no list"),
        (lambda e: e.update(target=None), "target is 'None', no str"),
        (lambda e: e.update(seconds="60"), "seconds is '60', no "),
        (lambda e: e["layers"].append(3), r"layers\.3 is no object"),
        (lambda e: e["layers"][0]["before"].update(ms={"low": "fast"}), r"layers\.0\.before\.ms\.low is 'fast'"),
        (lambda e: e["layers"][0]["candidates"].popitem(), r"layers\.0 has other candidates"),
        (lambda e: e["layers"][0]["candidates"]["int8"].update(output=0.5), r"layers\.0\.candidates\.int8\.output"),
        (lambda e: e["blocks"].update(x={"before": 1}), r"blocks\.x has no "),
        (lambda e: e["attempts"].append({}), r"attempts\.\d+ has no cost"),
        (lambda e: e.update(frontier=[[1.0]]), "a point of the frontier is no pair of cost and error"),
        (lambda e: e.update(predicted=True), "predicted is no object"),
    ],
)
def test_junk_in_the_place_of_evidence_is_refused(times, change, words):
    content = json.loads(json.dumps(planned().to_json()))
    assert str(Plan.load(content))
    change(content["evidence"])
    with pytest.raises(ValueError, match=f"is not a plan .its evidence: {words}") as e:
        Plan.load(content)
    assert "\n" not in str(e.value)


def test_calibration_is_asked_for_again_and_must_be_the_same(times):
    times["int8"] = 9.0  # leaves the calibrated one
    plan = planned(max_error=0.1)
    assert plan.calibrated and plan.calibration.startswith("sha256:")
    first, second, model = block(), block(), block()
    fp.swap(first, plan=plan, calibrate=[inputs(256, 3)])
    fp.swap(second, plan=plan, calibrate=(b for b in [inputs(256, 3)]))
    assert torch.equal(outputs(first, inputs()), outputs(second, inputs()))
    before = objects(model)
    with pytest.raises(ValueError, match="calibrated on other batches than calibrate= gives"):
        fp.swap(model, plan=plan, calibrate=[inputs(256, 4)])
    with pytest.raises(ValueError, match="pass calibrate=batches"):
        fp.swap(model, plan=plan)
    assert_same_objects(model, before)
    fp.swap(model, plan=dataclasses.replace(plan, calibration=None), calibrate=[inputs(256, 4)])


@pytest.mark.every(3)
def test_another_process_gets_the_same_outputs(times, tmp_path):
    times["int8"] = 9.0
    plan = planned(max_error=0.012)
    plan.save(tmp_path / "plan.json")
    model = block()
    fp.swap(model, plan=plan, calibrate=[inputs(256, 3)])
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1])\n"
        "from small_models import block, inputs, outputs\nimport forwardpass as fp\n"
        "model = block()\nfp.swap(model, plan=sys.argv[2], calibrate=[inputs(256, 3)])\n"
        "torch.save(outputs(model, inputs()), sys.argv[3])"
    )
    folder, out = str(tmp_path), tmp_path / "out.pt"
    here = str(pathlib.Path(__file__).parents[1] / "helpers")
    done = fork.run(code, here, f"{folder}/plan.json", out)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(out), outputs(model, inputs()))


# what goes wrong


def generator():
    yield from ()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"batches": []}, ValueError, "batches holds no batch"),
        ({"batches": generator()}, ValueError, "a generator that was read before is empty"),
        ({"batches": {"x": inputs()}}, TypeError, "batches is an iterable of batches, not a dict"),
        ({"batches": inputs()}, TypeError, "not a Tensor: pass .batch. for one"),
        ({"batches": 3}, TypeError, "not a int"),
        ({"calibrate": []}, ValueError, "calibrate holds no batch"),
        ({"shapes": []}, ValueError, "shapes holds no batch"),
        ({"candidates": []}, ValueError, "candidates names at least one"),
        ({"candidates": ["int3"]}, ValueError, "no precision 'int3'"),
        ({"candidates": ["fp8+calibrated"]}, ValueError, "fp8 takes no calibration"),
        ({"candidates": ["int8"]}, ValueError, "drop calibrate=, or add int8"),
        ({"calibrate": None}, ValueError, "pass calibrate="),
        ({"batches": [{"y": 1}]}, RuntimeError, "fails on batch 0 as it is.*unexpected keyword"),
        ({"batches": [inputs(), torch.ones(3, 5)]}, RuntimeError, "fails on batch 1 as it is"),
        ({"batches": [inputs(), inputs() * math.nan]}, ValueError, "output of batch 1 holds NaN"),
    ],
)
def test_refusals(times, options, error, words):
    model = block()
    before = objects(model)
    given = {"candidates": CANDIDATES, "calibrate": [inputs(256, 3)], "max_error": 0.02, "batches": batches()} | options
    with pytest.raises(error, match=words) as e:
        fp.plan(model, given.pop("batches"), **given)
    assert "\n" not in str(e.value)
    assert_same_objects(model, before)
    assert times["calls"] == []


def test_a_swapped_model_is_refused(times):
    model = block()
    fp.swap(model, "int8")
    with pytest.raises(RuntimeError, match="already holds 2 swapped layers"):
        planned(model)


def test_a_candidate_that_gives_nan_is_refused(times, monkeypatch):
    real = fp.nn.Int8Linear.forward
    monkeypatch.setattr(fp.nn.Int8Linear, "forward", lambda self, x: real(self, x) * math.nan)
    plan = planned(max_error=0.01)
    assert set(choices(plan).values()) <= {"bf16", None} and plan.layers
    first = plan.evidence["layers"][0]["candidates"]["int8"]
    assert first["refused"]["code"] == "not_finite" and first["error"] is None
    json.dumps(plan.to_json(), allow_nan=False)


@pytest.mark.every(2)
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_an_interrupt_keeps_what_was_measured(times, tmp_path, error):
    model, runs, file = block(), [], tmp_path / "partial.json"
    before = objects(model)

    def forward(model, x):
        runs.append(len(originals.quantised_layers(model)))
        if limit is not None and runs.count(1) > limit:
            raise error("enough")
        return model(x)

    count, limit = measured(planned()), 2
    times["calls"].clear()
    with pytest.raises(error) as e:
        planned(model, forward=forward, resume=file)
    assert_same_objects(model, before)
    if sys.version_info >= (3, 11):
        assert f"2 of {count} layers and candidates are in {file}" in e.value.__notes__[0]
    timed, limit = times["calls"].copy(), None
    runs.clear()
    resumed = planned(model, forward=forward, resume=file)
    assert runs.count(1) == count - 2
    assert times["calls"][len(timed) :] == ["before", "after"]  # layers are not timed again
    assert resumed == planned(forward=forward)
    again = planned(model, forward=forward, resume=file, max_error=0.005)  # for another budget
    assert again == planned(max_error=0.005)
    for options in (
        {"candidates": ["int8", "int8+calibrated"]},
        {"batches": batches(3)},
        {"calibrate": [inputs(9)]},
        {"exclude": "head"},
    ):
        with pytest.raises(ValueError, match="holds measurements of another model"):
            planned(model, resume=file, **options)
    with pytest.raises(ValueError, match="drop resume="):
        planned(model, resume=file, batches=[object()], calibrate=[object()], forward=lambda m, b: m(inputs()))


def test_a_layer_that_fails_is_named(times, monkeypatch):
    model = block()
    before = objects(model)

    def fail(self, x):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(fp.nn.Bf16Linear, "forward", fail)
    with pytest.raises(RuntimeError, match="no such kernel") as e:
        planned(model)
    assert_same_objects(model, before)
    if sys.version_info >= (3, 11):
        assert "while measuring the error of first in bf16; the model is as it was" in e.value.__notes__


# plots


def test_plot(times, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the extra cli is not installed")
    plan = planned(max_error=0.012)
    plots.plan(plan.evidence, str(tmp_path / "plan.png"))
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"
    found = plots.uniform(plan.evidence)
    assert set(found) == {"int8", "int8+calibrated", "bf16"}
    assert found["int8"][0] == 3.0 and found["bf16"][1] < found["int8"][1]
    with pytest.raises(ValueError, match=r"plan\.txt is none"):
        require("plan.txt")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install .* 'matplotlib>="):
        require("plan.png")


@pytest.mark.parametrize("times_of", [{"int8": 9.0, "int8+calibrated": 9.0, "bf16": 9.0}, {}])
def test_a_plot_says_why_there_is_nothing_in_it_and_its_title_fits(times, tmp_path, times_of):
    matplotlib = pytest.importorskip("matplotlib")
    times.update(times_of)
    evidence = planned(max_error=1e-9).evidence
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plots.plan(evidence, str(tmp_path / "plan.svg"))
    drawn = re.findall(r"<text[^>]*>([^<]*)", html.unescape((tmp_path / "plan.svg").read_text()).replace("<=", "≤"))
    assert any("there was nothing to choose" in line for line in drawn) is bool(times_of)
    assert max(map(len, drawn)) <= 72 and " ".join(drawn).count("the model as it is") == 1


# the command


def command(folder, *args, text=None):
    texts = ("--text", text) if text else ()
    return run("plan", folder, "--batch", 2, "--length", 16, *texts, *args)


@pytest.mark.every(3)
@pytest.mark.usefixtures("fewer_texts")
def test_the_command_writes_a_plan_that_swap_replays(times, folder, tmp_path):
    file = tmp_path / "plan.json"
    done = command(folder, "--min-cosine", 0.99995, "--json", file, "--plot", tmp_path / "plan.svg")
    assert done.exit_code == 0, done.output
    written = json.loads(file.read_text())
    assert written["schema"] == "forwardpass.plan/2"
    evidence = written["evidence"]
    assert evidence["texts"] == 32 and evidence["batches"]["calibrated"] == 2
    assert [tuple(c) for c in evidence["layers"][0]["calls"]["forward"]] == [(2, 16, 96)]  # of the timed batch
    assert len(written["layers"]) > 2 and f"{count(len(evidence['attempts']), 'plan')} verified" in " ".join(
        done.stdout.split()
    )
    assert "<svg" in (tmp_path / "plan.svg").read_text()
    args = ("swap", folder, "--batch", 2, "--length", 16, "--min-cosine", 0.99995, "--json", "-", "--plan", file)
    replayed = run(*args)
    assert replayed.exit_code == 0, replayed.output
    found = json.loads(replayed.stdout)
    assert [s["fqn"] for s in found["swapped"]] == [x["fqn"] for x in written["layers"]]
    held = [a["value"] for a in evidence["attempts"] if a["holds"]][-1]
    assert found["parity"]["cosine_min"] == pytest.approx(held, abs=1e-7)
    if written["calibration"]:
        text = tmp_path / "texts.txt"
        text.write_text("another text\n")
        assert "calibrated on other batches" in run(*args, "--calibrate", text).stderr


@pytest.mark.every(3)
def test_the_command_prints_json_alone(times, folder, tmp_path):
    text = tmp_path / "texts.txt"
    text.write_text("one text\nanother\n")
    done = command(folder, "--max-error", 0.05, "--candidates", "bf16", "--json", "-", text=text)
    written = json.loads(done.stdout)
    assert {x["precision"] for x in written["layers"]} == {"bf16"} and written["calibration"] is None
    assert "times as fast" in done.stderr
    done = command(folder, "--max-error", 0.05, "--calibrate", "none", "--json", "-", text=text)
    assert json.loads(done.stdout)["evidence"]["candidates"] == ["fp8", "int8", "int8_rotated", "w8a16", "bf16"]


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "either --min-cosine or --max-error"),
        (("--min-cosine", 0.9, "--max-error", 0.1), "either --min-cosine or --max-error"),
        (("--min-cosine", 2), "--min-cosine is a number above 0 and at most 1"),
        (("--min-cosine", 0.9, "--target", "speed"), "target is one of"),
        (("--min-cosine", 0.9, "--candidates", "int3"), "no precision 'int3'"),
        (("--min-cosine", 0.9, "--candidates", "int8", "--calibrate", "builtin"), "drop calibrate="),
        (("--min-cosine", 0.9, "--plot", "plan.txt"), "plan.txt is none"),
        (("--min-cosine", 0.9, "--json", "/no/such/folder/plan.json"), "its folder does not exist"),
        (("--min-cosine", 0.9, "--resume", "/no/such/folder/x.json"), "its folder does not exist"),
    ],
)
def test_the_command_refuses(times, folder, args, words):
    refused(command(folder, *args), words)


@pytest.mark.every(2)
def test_an_interrupted_command_says_what_it_kept(times, folder, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure.Measurer, "output_error", interrupt)
    file = tmp_path / "measurements.json"
    done = command(folder, "--min-cosine", 0.99, "--candidates", "bf16", "--resume", file)
    assert done.exit_code == 130
    assert "interrupted" in done.stderr.splitlines()[-1]
    if sys.version_info >= (3, 11):
        assert f"0 of 13 layers and candidates are in {file}" in done.stderr
    assert file.exists()


# the real thing


@pytest.mark.slow
@pytest.mark.alone
def test_small_layers_at_batch_1_are_left_alone():
    plan = fp.plan(block(), [inputs(1)], max_error=1.0, calibrate=[inputs()])
    assert plan.layers == ()
    assert "no candidate is faster than" in plan.evidence["layers"][0]["reason"]


def test_a_model_without_parameters_is_planned_as_it_is():
    plan = fp.plan(nn.Sequential(nn.GELU()), [torch.ones(2, 3)], max_error=0.1)
    assert plan.layers == () and "no candidate is a gain" in str(plan)
