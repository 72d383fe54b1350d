"""Precisions by hand: patterns and functions."""

import pytest
import torch
from small_models import outputs
from stored_formats import llama
from torch import nn

import forwardpass as fp

X = {"input_ids": torch.arange(3, 35).reshape(2, 16)}
HAND = {"layers.1.mlp": "w8a16", "*.mlp.*": "int8", "o_proj": "bf16", "lm_head": "w8a16"}


def precisions(report):
    return {s.fqn: s.precision for s in report.swapped}


def expected(fqn):
    if "mlp" in fqn:
        return "w8a16" if "layers.1" in fqn else "int8"
    return {"o_proj": "bf16", "lm_head": "w8a16"}.get(fqn.rpartition(".")[2])


@pytest.mark.parametrize("by", ["patterns", "function"])
@torch.inference_mode()
def test_each_layer_has_its_own(by):
    model = llama()
    linears = [fqn for fqn, m in model.named_modules() if isinstance(m, nn.Linear)]
    function = lambda fqn, module: expected(fqn)  # noqa: E731
    report = fp.swap(
        model, HAND if by == "patterns" else function, include=["**", "lm_head"] if by == "function" else ()
    )
    swapped = {fqn: expected(fqn) for fqn in linears if expected(fqn)}
    assert precisions(report) == swapped
    stay = {s.fqn: s.reason.code for s in report.skipped if s.fqn in linears}
    assert stay == {fqn: "no_precision" for fqn in linears if fqn not in swapped}
    y = outputs(model, X)
    fp.restore(model)
    fp.swap(model, plan=report.plan)
    assert torch.equal(outputs(model, X), y)


def test_function_is_given_the_layer():
    seen = []
    fp.swap(llama(), lambda fqn, module: seen.append((fqn, type(module))), dry_run=True)
    assert ("model.layers.0.mlp.up_proj", nn.Linear) in seen


def test_with_include_exclude_and_calibration():
    report = fp.swap(
        llama(), {"mlp": "int8", "self_attn": "w8a16"}, include="layers.0", exclude="q_proj", calibrate=[X]
    )
    swapped = precisions(report)
    assert {fqn.split(".")[2] for fqn in swapped} == {"0"} and not any("q_proj" in fqn for fqn in swapped)
    assert {layer.fqn for layer in report.plan.layers if layer.calibrated} == {
        f for f, p in swapped.items() if p == "int8"
    }


@pytest.mark.parametrize(
    ("precision", "error", "words"),
    [
        ({"mlp": "int9"}, ValueError, "no precision 'int9'"),
        (lambda fqn, module: "int9", ValueError, "no precision 'int9'"),
        ({3: "int8"}, TypeError, "precision: a pattern is a string"),
        (["int8"], TypeError, "a name, a preset, a dict of patterns and these, or a function"),
        ({"mlp": "w8a16"}, ValueError, "w8a16 takes no calibration"),
    ],
)
def test_refused_with_the_model_as_it_was(precision, error, words):
    model = llama()
    with pytest.raises(error, match=words):
        fp.swap(model, precision, calibrate=[X] if precision == {"mlp": "w8a16"} else None)
    assert all(type(m) is nn.Linear for fqn, m in model.named_modules() if "proj" in fqn)


def test_a_pattern_of_nothing_is_named():
    with pytest.warns(UserWarning, match="precision='decoder' matches none"):
        fp.swap(llama(), {"mlp": "int8", "decoder": "int8"})


@pytest.mark.parametrize("by", ["patterns", "function"])
def test_by_hand_means_by_hand_whatever_the_size(by, monkeypatch):
    """A layer that a pattern named was left for its size."""
    from forwardpass.swap import rules

    monkeypatch.setattr(rules, "LEAST_SIZES_ON_CPU", dict.fromkeys(rules.LEAST_SIZES_ON_CPU, rules.LeastSize(10**6, 1)))
    monkeypatch.setattr(rules, "LEAST_SIZE", rules.LeastSize(10**6, 1))
    hand = {"*.mlp.*": "int8", "**": "int8"} if by == "patterns" else lambda fqn, _: "int8" if ".mlp." in fqn else None
    report = fp.swap(llama(), hand)
    assert {"mlp" in s.fqn for s in report.swapped} == {True} and len(report.swapped) == 6
    small = {s.fqn for s in report.skipped if s.reason.code == "too_small"}
    assert bool(small) is (by == "patterns") and not any("mlp" in fqn for fqn in small)
    assert not fp.swap(llama(), "int8").swapped
