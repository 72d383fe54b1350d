"""What users add: classes that compute what nn.Linear computes, and precisions of their own."""

import pytest
import torch
from small_models import outputs
from torch import nn

import forwardpass as fp
from forwardpass.nn.linear import quantized_linear as layer
from forwardpass.swap import precision


class NamedLinear(nn.Linear):
    """Differs from nn.Linear in its name."""


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setattr(layer, "_LINEAR", set(layer._LINEAR))
    monkeypatch.setattr(precision, "PRECISIONS", list(precision.PRECISIONS))


def model():
    torch.manual_seed(0)
    return nn.Sequential(NamedLinear(128, 128), nn.GELU(), nn.Linear(128, 128)).eval()


def test_a_subclass_of_linear_is_swapped_once_it_is_registered():
    left = fp.swap(model(), "int8", dry_run=True)
    assert [s.fqn for s in left.swapped] == ["2"] and [s.reason.code for s in left.skipped] == ["subclass"]
    fp.register_linear(NamedLinear)
    assert [s.fqn for s in fp.swap(model(), "int8", dry_run=True).swapped] == ["0", "2"]


@pytest.mark.parametrize("cls", [nn.Conv1d, NamedLinear(4, 4), "Linear"], ids=["class", "module", "name"])
def test_what_is_no_subclass_of_linear_is_refused(cls):
    with pytest.raises(TypeError, match=r"a subclass of torch\.nn\.Linear"):
        fp.register_linear(cls)


def test_a_precision_of_ones_own_is_swapped_planned_saved_and_loaded(tmp_path):
    fp.register_linear(NamedLinear)
    fp.register_precision(fp.Precision("int8_symmetric", 1, fp.nn.Int8Linear, {"symmetric": True}))
    original, x = model(), torch.randn(4, 128)
    expected = original(x)
    report = fp.swap(original, "int8_symmetric")
    assert {(s.precision, s.version) for s in report.swapped} == {("int8_symmetric", 1)}
    assert original[0].symmetric and not fp.nn.Int8Linear.from_torch(nn.Linear(8, 8), symmetric=False).symmetric
    result = outputs(original, x)
    assert 0 < (result - expected).norm() / expected.norm() < 0.02
    report.plan.save(tmp_path / "plan.json")
    again = model()
    fp.swap(again, plan=tmp_path / "plan.json")
    assert torch.equal(outputs(again, x), result)
    fp.save_pretrained(original, tmp_path / "checkpoint")
    assert torch.equal(outputs(fp.load_pretrained(tmp_path / "checkpoint", model=model()), x), result)


def test_a_plan_of_a_precision_that_is_not_registered_is_refused(monkeypatch):
    fp.register_precision(fp.Precision("int8_symmetric", 1, fp.nn.Int8Linear, {"symmetric": True}))
    plan = fp.swap(model(), "int8_symmetric", dry_run=True).plan.to_json()
    monkeypatch.setattr(precision, "PRECISIONS", [p for p in precision.PRECISIONS if p.name != "int8_symmetric"])
    with pytest.raises(ValueError, match="there is no precision 'int8_symmetric' version 1"):
        fp.swap(model(), plan=plan)


class Int8Linear(fp.nn.Fp8Linear):
    """Of a name that a checkpoint takes for another class."""


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (("int8", 1, fp.nn.Int8Linear), ValueError, "'int8' of version 1 already"),
        (("mine", 1, fp.nn.Int8Linear, {}, False, "int4"), ValueError, "no kind 'int4' of fp.nn.Experts"),
        (("mine", 1, nn.Linear), TypeError, r"derives from fp\.nn\.QuantizedLinear"),
        (("mine", 1, Int8Linear), ValueError, "another module class Int8Linear already"),
    ],
    ids=["name", "experts", "base", "module"],
)
def test_what_is_no_new_precision_is_refused(given, error, words):
    with pytest.raises(error, match=words):
        fp.register_precision(fp.Precision(*given))
