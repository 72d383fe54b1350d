"""load_state_dict into a swapped model: a refusal comes before any change, and restore says what it cannot bring."""

import copy
import warnings

import pytest
import torch
from small_models import batch, block, build, outputs
from torch import nn

import forwardpass as fp

IDS = ["gated", "block", "llama", "mixtral"]
REFUSED = r"load_state_dict: .*load it into the original model \(fp\.restore\(model\) brings it back\)"


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(64, 128), nn.Linear(64, 128), nn.Linear(128, 64)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Tower(nn.Module):
    """Norms and gated MLPs: after a swap nothing else is in it."""

    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(64), Gated()

    def forward(self, x):
        return self.mlp(self.norm(x))


def values(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_unchanged(model, before):
    now = model.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(t, before[name]) for name, t in now.items())


def changed(state):
    return {name: t + 1 if t.is_floating_point() else t for name, t in state.items()}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("make", [Tower, block, lambda: build("llama"), lambda: build("mixtral")], ids=IDS)
def test_floats_are_refused_before_anything_changes(make, strict):
    model = make().eval()
    floats = changed(model.state_dict())
    fp.swap(model, "int8", include="**")
    before = values(model)
    with pytest.raises(RuntimeError, match=REFUSED):
        model.load_state_dict(floats, strict=strict)
    assert_unchanged(model, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.restore(model)
    model.load_state_dict(floats)  # as the sentence says
    assert not model._load_state_dict_pre_hooks


def test_a_gated_mlp_alone_refuses_floats():
    model = Tower().eval()
    floats = changed(model.state_dict())
    fp.swap(model, "int8", include="**")
    assert isinstance(model.mlp, fp.nn.GatedMLP)
    with pytest.raises(
        RuntimeError, match=r"gate\.qweight holds torch\.int8 with .*, and the state dict has torch\.float32"
    ):
        model.mlp.load_state_dict({n.removeprefix("mlp."): t for n, t in floats.items() if "mlp" in n}, strict=False)
    names = {f"mlp.{n}.weight": torch.ones(2, 2) for n in ("gate", "up")}
    with pytest.raises(RuntimeError, match=r"mlp\.gate\.qweight holds torch\.int8"):
        model.load_state_dict(names, strict=False)
    model.load_state_dict({"norm.weight": torch.ones(64)}, strict=False)  # a part without it


def test_restore_says_that_loaded_values_are_not_the_originals():
    """Norms then have those of the file, and Linears the old ones."""
    ours, theirs, x = build("llama"), build("llama"), batch("llama")
    theirs.load_state_dict(changed(theirs.state_dict()))
    for model in (ours, theirs):
        fp.swap(model, "int8", include="**")
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(outputs(ours, x), outputs(theirs, x))
    with pytest.warns(
        UserWarning, match=r"load_state_dict gave other values to 10 replaced layers .* load the float state"
    ):
        fp.restore(ours)


@pytest.mark.parametrize("precision", ["int8", "w8a16", "bf16"])
def test_restore_is_silent_after_the_same_values(precision):
    model = block()
    fp.swap(model, precision)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.restore(model)


def test_a_copy_checks_too():
    model = Tower().eval()
    floats = changed(model.state_dict())
    fp.swap(model, "int8", include="**")
    other = copy.deepcopy(model)
    before = values(other)
    with pytest.raises(RuntimeError, match=REFUSED):
        other.load_state_dict(floats, strict=False)
    assert_unchanged(other, before)
