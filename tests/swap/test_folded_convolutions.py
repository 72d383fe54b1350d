"""Convolutions that stay in floats and compute the norm and the activation behind them."""

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from conv_models import MODELS, build, picture, randomised
from torch import nn

import forwardpass as fp
from forwardpass.nn import FloatConv2d
from forwardpass.nn.folded import FoldedNorm
from forwardpass.proofs import convolution
from forwardpass.swap import rules

pytestmark = pytest.mark.filterwarnings("ignore:swap. ")


@pytest.fixture(autouse=True)
def whatever_size(monkeypatch):
    monkeypatch.setattr(rules, "LEAST_CONVOLUTIONS_ON_CPU", {})
    monkeypatch.setattr(rules, "LEAST_SIZE", rules.LeastSize(0, 1))


def off(y, expected):
    return ((y - expected).norm() / expected.norm()).item()


def swapped(name="mobilenet", precision="int8", **options):
    """(the model; a picture; what the model gave for it; the report)"""
    model, x = build(name), picture()
    with torch.inference_mode():
        expected = model(x)
        report = fp.swap(model, precision, **{"calibrate": [picture(4)], **options})
    return model, x, expected, report


def folded(report):
    return {x.fqn: x.computes for x in report.folded}


@torch.inference_mode()
def test_a_depthwise_convolution_and_a_stem_compute_what_is_behind_them():
    model, x, expected, report = swapped()
    assert folded(report) == {"block.conv.1.0": "batch norm + relu6"}
    assert {s.fqn: s.reason.code for s in report.skipped}["block.conv.1.0"] == "depthwise"
    assert isinstance(model.block.conv[1][0], FloatConv2d) and isinstance(model.block.conv[1][1], FoldedNorm)
    assert off(model(x), expected) < 0.03
    assert "in floats       computes too" in str(report) and "block.conv.1.0  batch norm + relu6" in str(report)
    assert report.to_json()["folded"] == [{"fqn": "block.conv.1.0", "activation": "relu6", "norm": True}]
    assert {m.module for m in report.other_layers} == set()
    assert folded(swapped("resnet")[3]) == {"stem.0": "batch norm + relu6"}
    assert folded(swapped("yolo")[3]) == {"stem.conv": "batch norm + silu"}
    assert folded(swapped("plain")[3]) == {"first": "relu"}


@torch.inference_mode()
def test_alone_it_gives_the_same_but_for_the_order_of_sums():
    model, x = build("mobilenet"), picture()
    expected, report = model(x), fp.swap(model, "int8", include=["block.conv.1.*"])
    assert folded(report) == {"block.conv.1.0": "batch norm + relu6"} and not report.swapped
    assert 0 < off(model(x), expected) < 1e-6


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_restore_brings_the_same_objects_back(name):
    model, x = build(name), picture()
    expected, modules = model(x), {n: id(m) for n, m in model.named_modules()}
    state = {n: t.clone() for n, t in model.state_dict().items()}
    assert fp.swap(model, "int8", calibrate=[picture(4)]).folded
    fp.restore(model)
    assert torch.equal(model(x), expected) and {n: id(m) for n, m in model.named_modules()} == modules
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


@pytest.mark.every(2)
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_folders_plans_and_copies_give_the_same_bits(name, tmp_path):
    model, x, _, report = swapped(name)
    y = model(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), y)
    fp.save_pretrained(model, tmp_path / "folder")
    for loaded in (MODELS[name]().eval(), MODELS[name]().eval().to("meta")):
        fp.load_pretrained(tmp_path / "folder", model=loaded)
        assert {n for n, m in loaded.named_modules() if isinstance(m, FloatConv2d)} == {*folded(report)}
        assert torch.equal(loaded(x), y)
        assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in model.state_dict().items())
    report.save_plan(tmp_path / "plan.json")
    fp.restore(model)
    again = fp.swap(model, plan=tmp_path / "plan.json", calibrate=[picture(4)])
    assert torch.equal(model(x), y) and folded(again) == folded(report)


@pytest.mark.every(2)
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_a_load_onto_meta_proves_with_values(name, tmp_path, monkeypatch):
    """torch convolves a picture with a weight on the meta device, and gives memory that nobody wrote: now and then of numbers that
    disproved the folding."""
    model, x, _, report = swapped(name)
    y = model(x)
    fp.save_pretrained(model, tmp_path / "folder")
    convolve, on_meta = F.conv2d, []

    def noting(x, weight, *others):
        on_meta.append(weight.is_meta)
        return convolve(x, weight, *others)

    monkeypatch.setattr(F, "conv2d", noting)
    for seed in range(20):  # the weights of a model that is built, freed before the load, are in its memory
        torch.manual_seed(seed)
        loaded = fp.load_pretrained(tmp_path / "folder", model=MODELS[name]().eval().to("meta"))
        assert {n for n, m in loaded.named_modules() if isinstance(m, FloatConv2d)} == {*folded(report)}
        assert torch.equal(loaded(x), y)
    assert on_meta and not any(on_meta)


def test_a_plan_that_says_nothing_of_it_folds_nothing(tmp_path):
    model, _, _, report = swapped()
    fp.restore(model)
    plan = report.plan.to_json()
    del plan["folded"]
    assert not fp.swap(model, plan=plan, calibrate=[picture(4)]).folded
    fp.restore(model)
    for fqn, text in (
        ("nowhere", "it has no convolution nowhere"),
        ("stem", "neither a norm nor an activation behind stem"),
    ):
        with pytest.raises(ValueError, match=text):
            fp.swap(model, plan={**plan, "folded": [fqn]}, calibrate=[picture(4)])
    with pytest.raises(ValueError, match="folded"):
        fp.swap(model, plan={**plan, "folded": "stem"}, calibrate=[picture(4)])


def test_a_folder_of_another_model_is_refused(tmp_path):
    model, x, *_ = swapped()
    fp.save_pretrained(model, tmp_path / "folder")
    path = tmp_path / "folder" / "forwardpass.json"
    record = json.loads(path.read_text())
    assert record.pop("folded") == ["block.conv.1.0"]
    path.write_text(json.dumps(record))  # as versions wrote it that folded nothing
    loaded = fp.load_pretrained(tmp_path / "folder", model=build("mobilenet"))
    assert not any(isinstance(m, FloatConv2d) for m in loaded.modules())
    with torch.inference_mode():
        assert off(loaded(x), model(x)) < 1e-2
    for fqn in ("stem", "nowhere"):
        path.write_text(json.dumps({**record, "folded": [fqn]}))
        with pytest.raises(ValueError, match=f"no convolution '{fqn}' with a norm or an activation"):
            fp.load_pretrained(tmp_path / "folder", model=build("mobilenet"))


# ---- what stays as it is


def test_what_is_excluded_waits_or_is_of_another_precision_is_not_folded():
    assert not swapped(exclude=["block.conv.1.*"])[3].folded
    assert {*folded(swapped(calibrate=None)[3])} == {"block.conv.1.0"}  # the others wait for calibration
    assert not swapped(precision="bf16", calibrate=None)[3].folded
    assert not swapped(include=["block.conv.0.0"])[
        3
    ].folded  # nobody is asked for the others where include= names layers
    model, x, expected, report = swapped("yolo", calibrate=None)
    assert {*folded(report)} == {"stem.conv"}
    second = fp.swap(model, "int8", calibrate=[x])
    with torch.inference_mode():
        assert second.swapped and off(model(x), expected) < 0.05
        assert [(x.first, x.reason.code) for x in second.other_layers if x.module == "FloatConv2d"] == [
            ("stem.conv", "folded")
        ]
        fp.restore(model)
        assert torch.equal(model(x), expected)


def test_a_model_that_needs_the_layer_as_it_is_keeps_it():
    model = build("mobilenet")
    model.block.conv[1][0].register_forward_hook(lambda *_: None)
    assert not fp.swap(model, "int8", calibrate=[picture()]).folded
    model = build("mobilenet")
    model.block.conv[1][0] = torch.nn.utils.parametrizations.weight_norm(model.block.conv[1][0])
    assert not fp.swap(model, "int8", calibrate=[picture()]).folded
    model = build("mobilenet")
    model.block.conv[1][0].padding_mode = "reflect"
    assert not fp.swap(model, "int8", calibrate=[picture()]).folded


class Forwards(nn.Module):
    """Torchvision's ResNet calls its layers in a method that its forward calls."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)
        self.also = nn.Conv2d(32, 3, 1)

    def forward(self, x):
        return self._forward_impl(x)

    def _forward_impl(self, x):
        x = self.conv(x)
        x = self.bn(x)
        x = self.relu(x)
        return self.also(x)


class Leaks(Forwards):
    def _forward_impl(self, x):
        return super()._forward_impl(x) + self._sum(x)

    def _sum(self, x):
        return self.conv(x).sum()


@torch.inference_mode()
@pytest.mark.parametrize(("cls", "expected"), [(Forwards, {"conv": "batch norm + relu"}), (Leaks, {})])
def test_a_method_that_forward_calls_is_read_too(cls, expected):
    model = randomised(cls())
    y = model(picture())
    assert folded(fp.swap(model, "int8", calibrate=[picture(4)], exclude=["also"])) == expected
    assert off(model(picture()), y) < 1e-6


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 32, 1), nn.BatchNorm2d(32), nn.ReLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x) + 1))


@torch.inference_mode()
def test_what_was_misread_is_run_and_stays(monkeypatch):
    model, x = randomised(Shifted()), picture()
    assert not fp.swap(model, "int8", calibrate=[x]).folded
    read = {"conv": ("bn", True), "bn": ("act", True)}
    monkeypatch.setattr(convolution, "called_next", lambda methods, name: read.get(name, (None, False)))
    model = randomised(Shifted())
    expected = model(x)
    report = fp.swap(model, "int8", calibrate=[x])
    assert not report.folded and [(s.fqn, s.reason.code) for s in report.apart] == [("conv", "disproved")]
    assert torch.equal(model(x), expected)


# ---- what comes between after the swap


@torch.inference_mode()
def test_hooks_training_and_other_modules_count():
    plain, x = build("mobilenet"), picture()

    def layers(model):
        return model.block.conv[1]

    def hooked(model):
        seen = []
        layers(model)[0].register_forward_hook(lambda m, i, o: seen.append(o.clone()))
        model(x)
        return seen[0]

    model, *_ = swapped()
    assert off(hooked(model), hooked(build("mobilenet"))) < 0.03
    for change in (
        lambda m: layers(m)[1].train(),
        lambda m: layers(m).__setitem__(1, nn.Identity()),
        lambda m: layers(m).__setitem__(2, nn.Tanh()),
    ):
        model, plain = swapped()[0], build("mobilenet")
        change(model), change(plain)
        assert off(model(x), plain(x)) < 0.05


@torch.no_grad()
def test_weights_that_are_loaded_or_cast_count():
    model, x, *_ = swapped()
    plain = build("mobilenet")
    model(x)
    state = {
        n: 1.5 * t for n, t in plain.state_dict().items() if n.startswith("block.conv.1") and t.is_floating_point()
    }
    for m in (model, plain):
        assert not m.load_state_dict(state, strict=False).unexpected_keys
    assert off(model(x), plain(x)) < 0.03
    model.to(torch.bfloat16)
    assert off(model(x.to(torch.bfloat16)).float(), plain(x)) < 0.05
