"""A model that is loaded computes together what the one that was saved did, where a run does not disprove it."""

import json
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from small_models import MLPS, batch, build, outputs
from stored_formats import FORMATS, write
from torch import nn

import forwardpass as fp
from forwardpass.nn.mlp import TwoProducts
from forwardpass.proofs import inputs, rewritings

SIZE = 64


class Honest(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x):
        flat = x.view(-1)
        y = self.a(x)
        self.between(flat)
        z = self.b(x)
        return y * z

    def between(self, flat):
        pass


class ThroughAView(Honest):
    def between(self, flat):
        F.relu(flat, inplace=True)


class Model(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block()

    def forward(self, x):
        return self.block(x)


def products(model):
    return {m.joined for m in model.modules() if getattr(m, "joined", None) is not None}


def made(folder):
    return json.loads((folder / "forwardpass.json").read_text())["rewritten"]


def saved(block, folder):
    model = Model(block).eval()
    fp.swap(model, "w8a16", include="**")
    fp.save_pretrained(model, folder)
    return model


@torch.inference_mode()
def test_what_its_swap_disproved_is_not_made(tmp_path):
    """It was joined by the load, and off by .7 under inference mode."""
    model = saved(ThroughAView, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is another than it was
        loaded = fp.load_pretrained(tmp_path, model=Model(ThroughAView).eval())
    assert not products(model) and not products(loaded)
    x = torch.randn(3, 5, SIZE)
    assert torch.equal(loaded(x.clone()), model(x.clone())) and made(tmp_path) == []


class TheOtherFirst(Honest):
    def forward(self, x):
        z = self.b(x)
        return self.a(x) * z


@torch.inference_mode()
def test_layers_that_are_called_in_another_order_than_they_are_held(tmp_path):
    model = saved(TheOtherFirst, tmp_path)
    loaded, x = fp.load_pretrained(tmp_path, model=Model(TheOtherFirst).eval()), torch.randn(3, 5, SIZE)
    assert made(tmp_path) == ["block.b"] and len(products(model)) == len(products(loaded)) == 1
    assert torch.equal(loaded(x), model(x))


@torch.inference_mode()
@pytest.mark.parametrize("on", ["cpu", "meta"])
def test_a_class_that_has_changed_since(on, tmp_path):
    model = saved(Honest, tmp_path)
    assert products(model)
    with torch.device(on):
        same, other = Model(Honest).eval(), Model(ThroughAView).eval()
    assert products(fp.load_pretrained(tmp_path, model=same))
    with pytest.warns(UserWarning, match=r"this Model is not rewritten at block\.a, as the model that was saved was"):
        loaded = fp.load_pretrained(tmp_path, model=other)
    x = torch.randn(3, 5, SIZE)
    expected = model.block.a(x) * model.block.b(x.relu())
    assert not products(loaded) and torch.equal(loaded(x.clone()), expected) and made(tmp_path) == ["block.a"]


@torch.inference_mode()
@pytest.mark.parametrize("block", [Honest, ThroughAView])
def test_what_cannot_be_run_is_believed_as_it_was_saved(block, tmp_path, monkeypatch):
    """Its swap may have proven it by a batch to calibrate with."""
    model = saved(block, tmp_path)
    monkeypatch.setattr(inputs, "made_up", lambda model: [])
    monkeypatch.setattr(rewritings, "features_in", lambda *args: [])
    loaded, x = fp.load_pretrained(tmp_path, model=Model(block).eval()), torch.randn(3, 5, SIZE)
    assert len(products(loaded)) == len(products(model)) == (block is Honest)
    assert torch.equal(loaded(x.clone()), model(x.clone()))


@pytest.mark.every(2)
@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama", "phi3"])
@pytest.mark.filterwarnings("ignore:load_pretrained")
def test_models_of_transformers(name, tmp_path, monkeypatch):
    """By both readers. Where only one knows that a rewriting is wrong, it is not made."""
    model, x = build(name, MLPS), batch(name)
    fp.swap(model, "w8a16", include="**", exclude="lm_head")
    fp.save_pretrained(model, tmp_path)
    expected = outputs(model, x)
    readers = [fp.load_pretrained, getattr(transformers, type(model).__name__).from_pretrained]
    for read in readers:
        loaded = read(tmp_path)
        assert sum(isinstance(m, TwoProducts) for m in loaded.modules()) == 2 and torch.equal(
            outputs(loaded, x), expected
        )
    monkeypatch.setattr(rewritings._OneUnit, "forward", lambda self, x: 2 * self._block.module(x))
    for read in readers:
        loaded = read(tmp_path)
        assert not any(isinstance(m, TwoProducts) for m in loaded.modules())
        assert (outputs(loaded, x) - expected).norm() < 1e-2 * expected.norm()
    fp.save_pretrained(loaded, tmp_path / "again")
    monkeypatch.undo()
    for read in readers:  # of a folder that says so
        loaded = read(tmp_path / "again")
        assert not any(isinstance(m, TwoProducts) for m in loaded.modules())


@torch.inference_mode()
def test_what_another_library_stored(tmp_path, monkeypatch):
    """Nothing has proven it before."""
    write(tmp_path, next(iter(FORMATS)))
    x = {"input_ids": torch.arange(3, 35).reshape(2, 16)}
    loaded = fp.load_pretrained(tmp_path)
    assert sum(isinstance(m, TwoProducts) for m in loaded.modules()) == 2 and len(products(loaded)) == 2
    expected = outputs(loaded, x)
    monkeypatch.setattr(rewritings._OneUnit, "forward", lambda self, x: 2 * self._block.module(x))
    with pytest.warns(UserWarning, match=r"not rewritten at model\.layers\.0\.mlp\.gate_proj"):
        loaded = fp.load_pretrained(tmp_path)
    assert not any(isinstance(m, TwoProducts) for m in loaded.modules()) and len(products(loaded)) == 2
    assert (outputs(loaded, x) - expected).norm() < 0.05 * expected.norm()
