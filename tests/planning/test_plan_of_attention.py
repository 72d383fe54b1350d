"""Plans that weigh attention in 8 bits: each module's is a row of the table, with its time and its error beside the layers'."""

import itertools
import json

import pytest
import torch
from small_models import ATTENTION, VisionTransformer, assert_same_objects, build, objects
from torch import nn

import forwardpass as fp
from forwardpass.common.timing import Timing
from forwardpass.dispatch.calls import Calls, counted
from forwardpass.nn.eight_bits import EightBits
from forwardpass.planning import planner as planning
from forwardpass.planning.candidates import attention_rows as attention
from forwardpass.planning.candidates import measure


@pytest.fixture
def times(monkeypatch):
    """A timer that says what the table does, of layers and of attention."""
    table = {
        "layers": {"before": 2.0},
        "attention": {"before": 2.0, "int8": 1.0},
        "model": {"before": 4.0, "after": 2.0},
    }

    def timer(of):
        def interleave(named, device, *, rounds, warmup, on_round=lambda: None):
            for call in named.values():
                call()
                call()
            return {n: Timing(table[of][n] * 1.01, table[of][n], table[of][n] * 1.02, rounds) for n in named}

        return interleave

    for module, of in ((measure, "layers"), (attention, "attention"), (planning, "model")):
        monkeypatch.setattr(module, "interleave", timer(of))
    monkeypatch.setattr(planning, "_is_slower", lambda latency, phases: False)
    monkeypatch.setattr(planning, "time_pairs", lambda pairs, measurer, track: [{} for _ in pairs])
    return table


def rows(*seeds, length=16):
    return [{"input_ids": torch.randint(100, (2, length), generator=torch.Generator().manual_seed(s))} for s in seeds]


def llama():
    return build("llama", ATTENTION)


NAMES = [f"model.layers.{i}.self_attn" for i in (0, 1)]


def planned(model=None, batches=None, **options):
    given = {"candidates": ["int8", "w8a16"], "min_cosine": 0.99, "shapes": rows(5), "attention": "int8"} | options
    return fp.plan(model or llama(), batches or rows(0, 1), **given)


def by_name(plan):
    return {x["fqn"]: x for x in plan.evidence["layers"]}


@pytest.mark.every(2)
def test_attention_is_a_row_of_the_table(times):
    times["layers"] |= {"int8": 1.5, "w8a16": 3.0}
    model = llama()
    before = objects(model)
    plan = planned(model)
    assert_same_objects(model, before)
    found = by_name(plan)
    assert len(found) == 15 + 2 and set(found) >= set(NAMES)
    row = found[NAMES[0]]
    assert (
        row["choice"] == "int8" and row["before"]["ms"]["low"] == 2.0 and row["candidates"]["int8"]["ms"]["low"] == 1.0
    )
    assert row["reason"] == "2.00 times as fast: 1 ms, 2 as it is" and row["crossover"] == 16
    assert row["calls"] == {"forward": [[2, 16, 4, 32, 16]]} and (row["in_features"], row["out_features"]) == (128, 64)
    assert 0 < row["candidates"]["int8"]["error"] < 0.02
    assert 0 < row["candidates"]["int8"]["output"]["mean"] < 1e-3
    assert row["candidates"]["w8a16"]["refused"]["code"] == "no_weights"
    assert [(x.fqn, x.dtype, x.crossover) for x in plan.attention_8bit] == [(name, "int8", 16) for name in NAMES]
    assert set(plan.attention) == set(NAMES)
    assert "model.layers.{0-1}.self_attn" in str(plan)


@pytest.mark.every(2)
def test_it_replays(times, tmp_path):
    """From its file, with what it says; and the least keys are those of the calls that were timed."""
    times["layers"] |= {"int8": 1.5, "w8a16": 3.0}
    plan = planned()
    plan.save(tmp_path / "plan.json")
    assert fp.Plan.load(tmp_path / "plan.json") == plan
    model = llama()
    report = fp.swap(model, plan=tmp_path / "plan.json")
    assert {s.bits for s in report.attention} == {"int8 from 16 keys on"}
    for length, name in ((16, "LlamaAttention in int8"), (15, "LlamaAttention")):
        with counted(Calls()) as calls, torch.inference_mode():
            model(**rows(3, length=length)[0])
        assert calls.kernel_calls == {name: 2}


@pytest.mark.every(2)
def test_what_is_not_faster_stays(times):
    times["layers"] |= {"int8": 1.5, "w8a16": 3.0}
    times["attention"]["int8"] = 2.5
    plan = planned()
    row = by_name(plan)[NAMES[0]]
    assert row["choice"] is None and row["candidates"]["int8"]["refused"]["code"] == "slower"
    assert plan.layers and not plan.attention_8bit
    assert "int8 2.5 ms" in row["reason"]


def test_attention_alone_may_be_all_that_a_plan_changes(times):
    times["layers"] |= {"int8": 3.0, "w8a16": 3.0}
    plan = planned()
    assert not plan.layers and len(plan.attention_8bit) == 2
    assert "after" in plan.evidence["latency_ms"]
    model = llama()
    assert not fp.swap(model, plan=plan).swapped
    assert len({id(m) for m in model.modules()}) == len({id(m) for m in llama().modules()})


def test_a_budget_that_allows_none(times):
    times["layers"] |= {"int8": 3.0, "w8a16": 3.0}
    plan = planned(min_cosine=1 - 1e-12)
    assert not plan.attention_8bit and "the model as it is" in plan.evidence["result"]


def test_a_budget_is_spent_layer_by_layer(times, monkeypatch):
    """One module's attention is chosen, the other's is not."""
    times["layers"] |= {"int8": 3.0, "w8a16": 3.0}
    run = EightBits.run
    wrong = []

    def worse(self, arguments):
        o = run(self, arguments)
        return -o if wrong and wrong[-1] else o

    model = llama()
    for i in (0, 1):
        layer = model.get_submodule(NAMES[i])
        layer.register_forward_pre_hook(lambda m, args, i=i: wrong.append(i == 1))
    monkeypatch.setattr(EightBits, "run", worse)
    plan = planned(model, min_cosine=0.999)
    assert [x.fqn for x in plan.attention_8bit] == NAMES[:1]
    found = by_name(plan)
    errors = [found[name]["candidates"]["int8"]["output"]["mean"] for name in NAMES]
    assert errors[0] < 1e-4 < 1e-3 < errors[1]


@pytest.mark.every(3)
def test_a_crossover_that_is_given(times):
    """What is shorter is not in 8 bits, and not measured: a plan of it would hold nothing to the budget."""
    times["layers"] |= {"int8": 1.5, "w8a16": 3.0}
    plan = planned(crossover=8)
    assert {x.crossover for x in plan.attention_8bit} == {8}
    row = by_name(planned(crossover=20, shapes=rows(5, length=24)))[NAMES[0]]
    refused = row["candidates"]["int8"]["refused"]
    assert (
        refused["code"] == "not_reached"
        and "have 16 keys or rows at most, and it is planned from 20 on" in refused["text"]
    )
    row = by_name(planned(crossover=20))[NAMES[0]]  # and takes what it takes as it is
    assert row["candidates"]["int8"]["refused"]


def test_the_crossover_is_measured(times, monkeypatch):
    """Where short calls gain nothing, 8 bits begin above them."""
    times["layers"] |= {"int8": 3.0, "w8a16": 3.0}
    timings = attention._timings

    def by_size(arguments, names):
        keys, found = arguments[1].shape[1], timings(arguments, names)
        return (
            found
            if keys > 12
            else {name: {**x, "low": {"before": 1.0, "int8": 1.5}[name]} for name, x in found.items()}
        )

    monkeypatch.setattr(attention, "_timings", by_size)
    shapes = [batch for n in (10, 12, 14, 16) for batch in rows(5, length=n)]
    plan = planned(shapes=shapes)
    assert {x.crossover for x in plan.attention_8bit} == {14}
    row = by_name(plan)[NAMES[0]]
    assert row["before"]["ms"]["low"] == 1 + 1 + 2 + 2 and row["candidates"]["int8"]["ms"]["low"] == 1 + 1 + 1 + 1


@pytest.mark.every(2)
def test_a_decoders_steps_are_as_they_are(times):
    """They read a cache."""
    times["layers"] |= {"int8": 1.5, "w8a16": 3.0}
    shapes = [fp.Decoding(batch=2, prompt=12, steps=4)]
    plan = planned(shapes=shapes, min_cosine=None, max_perplexity_increase=0.05, candidates=["int8"])
    row = by_name(plan)[NAMES[0]]
    assert row["calls"] == {"prefill": [[2, 12, 4, 32, 12]]} and row["choice"] == "int8"


def test_torchs_attention(times):
    times["layers"] |= {"int8": 1.5, "w8a16": 3.0}
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = [torch.randn(2, n, 64, generator=torch.Generator().manual_seed(n)) for n in (20, 24)]
    before = objects(model)
    plan = planned(model, x, shapes=None)
    assert_same_objects(model, before)
    assert [(x.fqn, x.crossover) for x in plan.attention_8bit] == [(f"layers.{i}.self_attn", 20) for i in (0, 1)]
    fp.swap(model, plan=plan)
    with counted(Calls()) as calls, torch.inference_mode():
        model(x[0])
    assert calls.kernel_calls == {"MultiheadAttention in int8": 2}


@pytest.mark.every(3)
def test_measurements_are_resumed(times, tmp_path):
    times["layers"] |= {"int8": 1.5, "w8a16": 3.0}
    file = tmp_path / "measured.json"
    plan = planned(resume=file)
    kept = json.loads(file.read_text())
    times["attention"] |= {"int8": 5.0}
    again = planned(resume=file)
    assert again == plan and by_name(again)[NAMES[0]]["candidates"] == by_name(plan)[NAMES[0]]["candidates"]
    assert json.loads(file.read_text()) == kept
    with pytest.raises(ValueError, match="measurements of another model"):
        planned(resume=file, crossover=3)
    plain = tmp_path / "plain.json"
    planned(resume=plain, attention="auto")
    with pytest.raises(ValueError, match="measurements of another model"):
        planned(resume=plain)


@pytest.mark.every(2)
def test_without_being_asked_no_attention_is_weighed(times):
    times["layers"] |= {"int8": 1.5, "w8a16": 3.0}
    for choice in ("auto", True, False):
        plan = planned(attention=choice)
        assert not set(NAMES) & set(by_name(plan)) and not plan.attention_8bit
        assert len(plan.attention) == (2 if choice is True else 0 if choice is False else len(plan.attention))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention": "int9"}, "one or several of 'int8'.*not 'int9'"),
        ({"attention": ["int8", 3]}, "not \\['int8', 3\\]"),
        ({"attention": []}, "not \\[\\]"),
        ({"attention": "auto", "crossover": 0}, "crossover=0 is for attention in 8 bits"),
        ({"crossover": -1}, "not -1"),
    ],
)
def test_refusals(times, options, words):
    with pytest.raises(ValueError, match=words):
        planned(**options)


class OwnAttention(nn.Module):
    """Which nothing can swap."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def test_a_model_without_attention_to_weigh_is_refused(times):
    with pytest.raises(ValueError, match=r"this Sequential has none: OwnAttention computes attention in its own code"):
        planned(nn.Sequential(OwnAttention()), [torch.randn(2, 5, 64)], shapes=None)
    with pytest.raises(ValueError, match=r"this Sequential has none: it has none"):
        planned(nn.Sequential(nn.Linear(64, 64)), [torch.randn(2, 64)], shapes=None)


def test_attention_that_calls_torchs_function_itself(times):
    times["layers"] |= {"int8": 1.5, "w8a16": 3.0}
    model, x = VisionTransformer().eval(), torch.randn(2, 3, 32, 32)
    plan = planned(model, [x], shapes=None)
    names = [f"blocks.{i}.attn" for i in (0, 1)]
    assert [x.fqn for x in plan.attention_8bit] == names and {by_name(plan)[n]["choice"] for n in names} == {"int8"}
    fp.swap(model, plan=plan)
    with counted(Calls()) as calls, torch.inference_mode():
        model(x)
    assert calls.kernel_calls == {"Attention in int8": 2}


def test_several_candidates(times, monkeypatch):
    """Of the operation's dtypes; one that errs more and takes no less time is refused."""
    from forwardpass.ops.attention_8bit import DTYPES

    times["layers"] |= {"int8": 1.5, "w8a16": 3.0}
    times["attention"] |= dict(zip(DTYPES, itertools.chain([1.0], itertools.repeat(1.5))))
    plan = planned(attention=list(DTYPES))
    assert {x.dtype for x in plan.attention_8bit} == {"int8"}
    assert set(plan.evidence["candidates"]) == {"int8", "w8a16", *DTYPES}


@pytest.mark.every(3)
@pytest.mark.usefixtures("fewer_texts")
def test_the_command(times, folder, tmp_path):
    """Plans it, and swap replays that."""
    from command_line import refused, run

    times["layers"] |= {"w8a16": 3.0}
    file = tmp_path / "plan.json"
    args = (folder, "--batch", 2, "--length", 16, "--min-cosine", 0.99)
    weighed = ("--candidates", "w8a16", "--attention", "int8", "--crossover", 0)
    done = run("plan", *args, *weighed, "--json", file)
    assert done.exit_code == 0, done.output
    written = json.loads(file.read_text())
    assert [x["dtype"] for x in written["attention_8bit"]] == ["int8", "int8"] and not written["layers"]
    assert "attention.self" in done.stdout
    done = run("swap", *args, "--plan", file, "--json", "-")
    assert done.exit_code == 0, done.output
    assert [x["bits"] for x in json.loads(done.stdout)["attention"]] == ["int8", "int8"]
    refused(run("plan", *args, "--attention", "int9"), "one or several of 'int8'")
    refused(run("plan", *args, "--crossover", 3), "crossover=3 is for attention in 8 bits")
    refused(run("swap", *args, "--plan", file, "--attention", "int8"), "does not go with plan=")
