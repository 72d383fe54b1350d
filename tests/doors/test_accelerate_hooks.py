"""Models that accelerate dispatched: its hooks go on around swapped layers, and what it offloads stays."""

import copy

import pytest
import torch
from small_models import batch, build, outputs
from torch import nn

import forwardpass as fp
from forwardpass.nn.mlp import TwoProducts

accelerate = pytest.importorskip("accelerate")
hooks = accelerate.hooks

pytestmark = pytest.mark.filterwarnings("ignore")


def by_layer(model):
    """Every part of a GPT-2 on a device of its own, as `device_map` has several."""
    parts = [name for name, _ in model.named_children() if name != "transformer"]
    parts += [f"transformer.{name}" for name, _ in model.transformer.named_children() if name != "h"]
    return dict.fromkeys([*parts, *(f"transformer.h.{i}" for i in range(len(model.transformer.h)))], "cpu")


def by_module(model):
    """Every module that has weights."""
    return {name: "cpu" for name, m in model.named_modules() if m._parameters}


MAPS = {"one": lambda model: {"": "cpu"}, "layers": by_layer, "modules": by_module}


def dispatched(device_map, model=None):
    model = model or build("gpt2")
    return accelerate.dispatch_model(model, device_map(model), main_device="cpu", force_hooks=True)


def all_hooks(model):
    return {name: vars(m).get("_hf_hook") for name, m in model.named_modules()}


class Counts(hooks.AlignDevicesHook):
    """No AlignDevicesHook, to which it is alike."""


@pytest.mark.every(2)
@pytest.mark.parametrize("name", MAPS)
@torch.inference_mode()
def test_hooks_go_on_around_swapped_layers(name, monkeypatch):
    model, x, moved, send = dispatched(MAPS[name]), batch("gpt2"), [], hooks.send_to_device
    monkeypatch.setattr(hooks, "send_to_device", lambda t, *a, **k: moved.append(t) or send(t, *a, **k))
    before, were = outputs(model, x), all_hooks(model)
    moves = len(moved)
    plain = build("gpt2")
    plain.load_state_dict(model.state_dict())
    fp.swap(plain, "int8")
    report = fp.swap(model, "int8")
    assert len(report.swapped) == 8 and not [s for s in report.skipped if s.reason.code == "hooks"]
    assert {n: hook for n, hook in all_hooks(model).items() if n in were} == were
    moved.clear()
    torch.testing.assert_close(outputs(model, x), outputs(plain, x), rtol=0, atol=1e-5)
    assert len(moved) == moves > 0
    layer = model.transformer.h[1].mlp.c_fc
    assert isinstance(layer, fp.nn.Int8Linear) and vars(layer)["_old_forward"].__self__ is layer
    torch.testing.assert_close(outputs(copy.deepcopy(model), x), outputs(model, x), rtol=0, atol=0)
    fp.restore(model)
    assert all_hooks(model) == were
    assert torch.equal(outputs(model, x), before)
    hooks.remove_hook_from_submodules(model)
    assert torch.equal(outputs(model, x), before)
    fp.swap(model, "int8")  # forward is an attribute of each module now
    torch.testing.assert_close(outputs(model, x), outputs(plain, x), rtol=0, atol=1e-5)


@torch.inference_mode()
def test_hooks_that_are_put_on_swapped_layers():
    model, x = build("gpt2"), batch("gpt2")
    before = outputs(model, x)
    fp.swap(model, "int8")
    during = outputs(model, x)
    dispatched(MAPS["layers"], model)
    torch.testing.assert_close(outputs(model, x), during, rtol=0, atol=1e-5)
    with pytest.warns(UserWarning, match="hooks registered on"):
        fp.restore(model)
    assert torch.equal(outputs(model, x), before)


@pytest.mark.parametrize(("precision", "atol"), [(None, 1e-5), ("int8", 0.02)])
@torch.inference_mode()
def test_torch_attention_keeps_its_hook(precision, atol):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(64, 4, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    torch.manual_seed(0)
    model, x = dispatched(MAPS["one"], Model().eval()), torch.randn(2, 9, 64)
    before, were = model(x), all_hooks(model)
    fp.swap(model, precision, attention=True)
    assert isinstance(model.attention, fp.nn.MultiheadAttention)
    assert {name: hook for name, hook in all_hooks(model).items() if name in were} == were
    torch.testing.assert_close(model(x), before, rtol=0, atol=atol)
    fp.restore(model)
    assert torch.equal(model(x), before) and all_hooks(model) == were


@pytest.mark.parametrize("kind", ["other", "below", "torch", "within"])
def test_other_hooks_stay_refused(kind):
    layer = nn.Linear(64, 64)
    model = nn.Sequential(layer, nn.Linear(64, 64)).eval()
    if kind == "other":
        hooks.add_hook_to_module(layer, Counts(execution_device="cpu"))
    if kind == "below":  # a forward of its own, below accelerate's
        layer.forward = lambda x: x
    if kind == "torch":
        layer.register_forward_pre_hook(lambda *a: None)
    hook = hooks.ModelHook() if kind == "within" else hooks.AlignDevicesHook("cpu")
    hooks.add_hook_to_module(layer, hook, append=True)
    report = fp.swap(model, "int8")
    assert {s.fqn: s.reason.code for s in report.skipped} == {"0": "hooks"}
    assert [layer.fqn for layer in report.swapped] == ["1"]


@torch.inference_mode()
def test_offloaded_layers_stay_and_the_others_are_swapped(tmp_path):
    model, x = build("gpt2"), batch("gpt2")
    plain = copy.deepcopy(model)
    device_map = by_layer(model) | {"transformer.h.1": "disk"}
    accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    before = outputs(model, x)
    report = fp.swap(model, "int8")
    reasons = {s.fqn: s.reason for s in report.skipped if s.reason.code != "lm_head"}
    stay = [name for name, m in plain.named_modules() if name.startswith("transformer.h.1.") and hasattr(m, "nx")]
    assert stay and {reasons[name].code for name in stay} == {"offloaded"}
    assert "on disk between calls" in reasons[stay[0]].text
    assert {layer.fqn[:15] for layer in report.swapped} == {"transformer.h.0"}
    fp.swap(plain, "int8", exclude="transformer.h.1")
    torch.testing.assert_close(outputs(model, x), outputs(plain, x), rtol=0, atol=1e-5)
    fp.restore(model)
    assert torch.equal(outputs(model, x), before)


def test_a_model_that_is_offloaded_whole_is_refused():
    model = accelerate.cpu_offload(build("gpt2"), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"accelerate keeps the weight on the CPU or on disk.*without offloading"):
        fp.swap(model, "int8")


@torch.inference_mode()
def test_calibrated():
    model, x = dispatched(MAPS["layers"]), batch("gpt2")
    before, were = outputs(model, x), all_hooks(model)
    fp.swap(model, "int8", calibrate=[x])
    assert torch.nn.functional.cosine_similarity(outputs(model, x).flatten(), before.flatten(), dim=0) > 0.999
    fp.restore(model)
    assert torch.equal(outputs(model, x), before) and all_hooks(model) == were


@pytest.mark.every(2)
@pytest.mark.parametrize("device_map", ["cpu", "auto", by_layer, by_module])
@torch.no_grad()
def test_from_pretrained_with_a_device_map(device_map, tmp_path, monkeypatch):
    """Over several devices, which here are one, layers keep their activations and stay apart."""
    model, x = build("gpt2"), batch("gpt2")
    model.save_pretrained(tmp_path / "floats")
    devices = device_map
    if callable(device_map):  # transformers dispatches where there are several names
        devices = {name: ("cpu", torch.device("cpu"))[i % 2] for i, name in enumerate(device_map(model))}
        monkeypatch.setattr("transformers.integrations.accelerate.dispatch_model", _forced)
    loaded = type(model).from_pretrained(tmp_path / "floats", device_map=devices).eval()
    before, were = outputs(loaded, x), all_hooks(loaded)
    assert any(were.values()) == callable(device_map)
    fp.swap(loaded, "w8a16", include="**", exclude="lm_head")
    during = outputs(loaded, x)
    fp.restore(loaded)
    assert torch.equal(outputs(loaded, x), before) and all_hooks(loaded) == were
    fp.swap(model, "w8a16", include="**", exclude="lm_head")
    torch.testing.assert_close(during, outputs(model, x), rtol=0, atol=1e-5)
    fp.save_pretrained(model, tmp_path / "swapped")
    loaded = type(model).from_pretrained(tmp_path / "swapped", device_map=devices)
    hooked = any(all_hooks(loaded).values())
    assert hooked == callable(device_map) and any(isinstance(m, TwoProducts) for m in loaded.modules()) != hooked
    if hooked:
        assert loaded.transformer.h[1].mlp.c_fc.activation == "gelu_tanh"
    torch.testing.assert_close(outputs(loaded, x), outputs(model, x), rtol=0, atol=1e-5)


def _forced(model, device_map, **options):
    return accelerate.dispatch_model(model, device_map, main_device="cpu", **{**options, "force_hooks": True})
