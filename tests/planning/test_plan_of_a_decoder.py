"""Plans of decoders: prefill and steps are weighed apart, a slower step is refused, perplexity is bounded over all batches."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from small_models import ATTENTION, build

import forwardpass as fp
from forwardpass.common.timing import Timing
from forwardpass.planning import planner as planning
from forwardpass.planning.candidates import caches, measure
from forwardpass.planning.criterion import Criterion

DECODING = fp.Decoding(batch=2, prompt=6, steps=4)


@pytest.fixture
def times(monkeypatch):
    """A timer that says what the table does, of layers by phase: a prefill and a step take turns."""
    turns = itertools.cycle(("prefill", "decode"))
    table = {"prefill": {}, "decode": {}, "model": {"before": 4.0, "after": 2.0}}

    def interleave(named, device, *, rounds, warmup, on_round=lambda: None):
        for call in named.values():
            call()
            call()
        of_model = set(named) <= {"before", "after"}
        ms = table["model"] if of_model else {"before": 2.0} | table[next(turns)]
        return {n: Timing(ms[n] * 1.01, ms[n], ms[n] * 1.02, rounds) for n in named}

    monkeypatch.setattr(measure, "interleave", interleave)
    monkeypatch.setattr(planning, "interleave", interleave)
    monkeypatch.setattr(planning, "_is_slower", lambda latency, phases: False)
    monkeypatch.setattr(planning, "time_pairs", lambda pairs, measurer, track: [{} for _ in pairs])
    return table


def rows(*seeds):
    return [{"input_ids": torch.randint(100, (2, 16), generator=torch.Generator().manual_seed(s))} for s in seeds]


def planned(model, **options):
    given = {"candidates": ["int8", "w8a16"], "max_perplexity_increase": 0.5, "shapes": [DECODING]} | options
    return fp.plan(model, rows(0, 1), **given)


def by_name(plan):
    return {x["fqn"]: x for x in plan.evidence["layers"]}


@pytest.mark.every(2)
def test_a_phase_counts_as_often_as_there_is_it_and_a_slower_step_is_refused(times):
    times["prefill"] |= {"int8": 3.0, "w8a16": 0.1}
    times["decode"] |= {"int8": 1.0, "w8a16": 2.5}
    plan = planned(build("llama_tied"))
    assert {x.precision for x in plan.layers} == {"int8"}
    found = by_name(plan)["model.layers.0.mlp.up_proj"]
    assert found["calls"] == {"prefill": [[2, 6, 64]], "decode": [[2, 1, 64]]}
    assert found["before"]["ms"]["low"] == 2.0 + 4 * 2.0 and found["candidates"]["int8"]["ms"]["low"] == 3.0 + 4 * 1.0
    refused = found["candidates"]["w8a16"]["refused"]
    assert refused["code"] == "slower" and "10.1 ms" in refused["text"]  # 0.1 + 4 * 2.5
    times["prefill"]["w8a16"], times["decode"]["w8a16"] = 0.1, 2.2
    found = by_name(planned(build("llama_tied")))["model.layers.0.mlp.up_proj"]
    refused = found["candidates"]["w8a16"]["refused"]  # 8.9 ms in all are a gain, and a step of 2.2 is none
    assert refused == {"code": "slower_step", "text": "it makes a step slower: 2.2 ms, 2 as it is"}
    text = str(plan)
    assert "\n    prefill " in text and "\n    decode " in text


@pytest.mark.every(2)
def test_a_tied_head_is_a_choice_of_the_plan(times):
    times["prefill"] |= {"int8": 1.0, "w8a16": 1.0}
    times["decode"] |= {"int8": 3.0, "w8a16": 1.0}
    model = build("llama_tied")
    plan = planned(model)
    assert ("lm_head", "w8a16") in {(x.fqn, x.precision) for x in plan.layers}
    embedding = model.get_input_embeddings().weight.clone()
    report = fp.swap(model, plan=plan)
    assert type(model.lm_head) is fp.nn.W8A16Linear and torch.equal(model.get_input_embeddings().weight, embedding)
    assert [x.fqn for x in report.swapped if x.tied_to] == ["lm_head"]
    alone = planned(build("llama_tied"), exclude="lm_head")
    assert "lm_head" not in {x.fqn for x in alone.layers}


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("steps", "chosen"), [((0.8, 0.7, 0.6), "fp8"), ((0.8, 0.7, 0.75), "int8"), ((0.8, 0.8, 0.9), None)]
)
def test_a_cache_whose_steps_are_fastest_is_planned(times, monkeypatch, steps, chosen):
    times["prefill"] |= {"int8": 1.0}
    times["decode"] |= {"int8": 1.0}
    left = iter(steps)
    monkeypatch.setattr(caches, "_step", lambda phases: next(left))
    model = build("llama", ATTENTION)
    plan = planned(model, candidates="int8", kv_cache=["int8", "fp8"])
    results = plan.evidence["kv_cache"]
    assert plan.kv_cache == chosen and [n for n, x in results.items() if x["chosen"]] == ([chosen] if chosen else [])
    assert all(x["holds"] and x["without"] == 0.8 for x in results.values())
    assert len({x["value"] for x in results.values()}) == 2  # what steps see through the one and the other
    assert ("cache fp8, planned: perplexity" in str(plan)) == (chosen == "fp8")
    assert fp.Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    report = fp.swap(model, plan=plan)
    assert report.kv_cache == chosen and len(report.attention) == (2 if chosen else 0)


@pytest.mark.every(2)
def test_a_cache_that_perplexity_forbids(times, monkeypatch):
    times["prefill"] |= {"int8": 1.0}
    times["decode"] |= {"int8": 1.0}
    monkeypatch.setattr(caches, "_step", lambda phases: 1.0)
    plan = planned(build("llama", ATTENTION), candidates="int8", kv_cache="fp8", max_perplexity_increase=1e-9)
    (result,) = plan.evidence["kv_cache"].values()
    assert plan.kv_cache is None and result["step"] is None and not result["holds"]
    assert "cache fp8, not within the budget" in str(plan)


@pytest.mark.every(2)
def test_refusals_of_caches(times):
    times["prefill"] |= {"int8": 1.0, "w8a16": 1.0}
    times["decode"] |= {"int8": 1.0, "w8a16": 1.0}
    model = build("llama", ATTENTION)
    for options, message in (
        ({"kv_cache": "int4"}, "kv_cache names at least one of auto, int8, fp8"),
        ({"kv_cache": "int8", "max_perplexity_increase": None, "min_cosine": 0.9}, "chosen by perplexity"),
        ({"kv_cache": "int8", "shapes": rows(3)}, "a Decoding among shapes="),
        ({"kv_cache": "int8", "exclude": "model.layers.*.self_attn"}, "needs swapped attention"),
    ):
        with pytest.raises(ValueError, match=message):
            planned(model, **options)
    padded = [{**rows(0)[0], "attention_mask": torch.tensor([[1] * 16, [0] + [1] * 15])}]
    with pytest.raises(ValueError, match="without padding"):
        fp.plan(model, padded, candidates=["int8"], max_perplexity_increase=0.5, shapes=[DECODING], kv_cache="int8")
    assert not model._forward_pre_hooks


@pytest.mark.every(2)
def test_several_lengths_and_batches_are_phases_of_their_own(times):
    times["prefill"] |= {"int8": 1.0}
    times["decode"] |= {"int8": 1.0}
    draft = dataclasses.replace(DECODING, batch=1, tokens=3)
    plan = planned(build("llama"), candidates="int8", shapes=[rows(3)[0], DECODING, draft])
    calls = by_name(plan)["model.layers.0.mlp.up_proj"]["calls"]
    assert calls == {
        "forward": [[2, 16, 64]],
        "prefill, 2 x 6 tokens, then 4 steps": [[2, 6, 64]],
        "decode, 2 x 6 tokens, then 4 steps": [[2, 1, 64]],
        "prefill, 1 x 6 tokens, then 4 steps of 3 tokens": [[1, 6, 64]],
        "decode, 1 x 6 tokens, then 4 steps of 3 tokens": [[1, 3, 64]],
    }


@pytest.mark.every(2)
def test_a_decoder_is_timed_as_one_without_being_told(times):
    times["prefill"] |= {"int8": 1.0}
    times["decode"] |= {"int8": 1.0}
    plan = fp.plan(build("llama"), rows(0), candidates="int8", max_error=0.5)
    assert by_name(plan)["lm_head"]["calls"] == {"prefill": [[1, 1, 64]], "decode": [[1, 1, 64]]}
    assert set(plan.evidence["phases_ms"]["before"]) == {"prefill", "decode"}


def test_the_whole_model_may_not_decode_slower():
    def at(ms):
        return Timing(ms, ms, ms, 5)

    latency = {"before": at(10.0), "after": at(8.0)}
    for step, slower in ((0.9, False), (1.1, True)):
        phases = {"before": {"prefill": at(1.0), "decode": at(1.0)}, "after": {"prefill": at(2.0), "decode": at(step)}}
        assert planning._is_slower(latency, phases) is slower
    assert planning._is_slower({"before": at(1.0), "after": at(1.0)}, {"before": {}, "after": {}})


@pytest.mark.every(2)
def test_perplexity_is_bounded_over_all_batches_together(times):
    times["prefill"] |= {"int8": 1.0}
    times["decode"] |= {"int8": 1.0}
    model = build("llama")
    plan = planned(model, candidates="int8")
    assert plan.layers and plan.evidence["attempts"][-1]["batches"] == 2
    value = next(a["value"] for a in reversed(plan.evidence["attempts"]) if a["holds"])
    before, after = [], []
    with torch.inference_mode():
        for losses, plan_of in ((before, None), (after, plan)):
            if plan_of is not None:
                fp.swap(model, plan=plan_of)
            losses += [model(**b, labels=b["input_ids"]).loss.item() for b in rows(0, 1)]
    assert value == pytest.approx(math.exp(sum(after) / 2 - sum(before) / 2) - 1, abs=1e-5)
    empty = planned(build("llama"), candidates="int8", max_perplexity_increase=0)
    assert not empty.layers or all(a["value"] <= 0 for a in empty.evidence["attempts"] if a["holds"])


def test_criterion_of_perplexity():
    criterion = Criterion.of(None, None, None, None, 0.01)
    assert criterion.budget == pytest.approx(math.log(1.01)) and criterion.shown(criterion.budget) == pytest.approx(
        0.01
    )
    batch, logits = {"input_ids": torch.tensor([[1, 2, 0]])}, torch.zeros(1, 3, 4)
    losses = criterion.compared(logits, batch)
    assert losses.shape == (2, 1) and torch.allclose(losses, torch.tensor(math.log(4)))
    padded = batch | {"attention_mask": torch.tensor([[1, 1, 0]])}
    assert criterion.compared(logits, padded).shape == (1, 1)
    assert criterion.worst(torch.zeros(1), losses + 0.25, losses, batch) == pytest.approx(0.25)
    assert criterion.together([0.1, 0.4], [3, 1]) == pytest.approx(0.175)
    assert not criterion.fails(9.0) and Criterion("max_error", 0.1).fails(math.nan)
    with pytest.raises(ValueError, match="max_perplexity_increase must be a finite number"):
        Criterion.of(None, None, None, None, -1.0)
    with pytest.raises(ValueError, match="logits"):
        criterion.compared(torch.zeros(3, 4), batch)


@pytest.mark.parametrize("given", [{"batch": 0}, {"prompt": 1.5}, {"steps": True}, {"tokens": -1}])
def test_a_decoding_is_of_whole_numbers(given):
    with pytest.raises(ValueError, match=f"{next(iter(given))} of a Decoding is a whole number of 1 or more"):
        fp.Decoding(**given)


def test_a_decoding_takes_a_decoder_and_no_more_tokens_than_it_does(times):
    with pytest.raises(ValueError, match="sequences of 65 tokens, and the model takes 64"):
        planned(build("llama"), shapes=[fp.Decoding(prompt=60, steps=5)])
    with pytest.raises(ValueError, match="has no config with a vocab_size"):
        fp.plan(torch.nn.Sequential(torch.nn.Linear(8, 8)), [torch.ones(2, 8)], max_error=0.1, shapes=[DECODING])
    with pytest.raises(TypeError, match=r"not a Decoding: pass \[batch\] for one"):
        planned(build("llama"), shapes=DECODING)


@pytest.mark.parametrize("precision", [None, "int8", "w8a16", "bf16"])
def test_twins_compute_the_same_with_weights_of_their_own(precision, monkeypatch):
    monkeypatch.setattr(measure, "beyond_caches", lambda: 1_000_000)
    model, x = torch.nn.Sequential(torch.nn.Linear(100, 96)).eval(), torch.randn(1, 100)  # rows of int8 are padded
    with torch.inference_mode():
        if precision:
            fp.swap(model, precision, include=["0"])
        module = model[0]
        first, *others = measure.twins(module, x)
        assert first is module and len(others) == 1_000_000 // sum(
            t.untyped_storage().nbytes() for t in (*module.parameters(), *module.buffers())
        )
        name = "qweight" if precision else "weight"
        weights = [getattr(m, name) for m in (module, *others)]
        assert len({w.data_ptr() for w in weights}) == len(weights) and len({w.stride() for w in weights}) == 1
        assert all(torch.equal(m(x), module(x)) for m in others[:3])
        weights[1].zero_()
        assert weights[0].any() and weights[2].any()
