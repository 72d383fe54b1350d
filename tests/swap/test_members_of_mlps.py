"""Code that gets at the parts of an MLP which is one unit now finds them by their names, and what they give together is right."""

import copy
import pickle

import pytest
import torch
from small_models import batch, build, outputs
from torch import nn

import forwardpass as fp

WIDTH, INNER = 64, 96


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(WIDTH, INNER, bias=False)
        self.down_proj, self.act_fn = nn.Linear(INNER, WIDTH, bias=False), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(WIDTH, 2 * INNER), nn.Linear(INNER, WIDTH)
        self.activation_fn = nn.SiLU()

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * self.activation_fn(gate))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def by_parts(mlp, x):
    """What code elsewhere would write."""
    if hasattr(mlp, "gate_proj"):
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    if hasattr(mlp, "gate_up_proj"):
        gate, up = mlp.gate_up_proj(x).chunk(2, -1)
        return mlp.down_proj(mlp.activation_fn(gate) * up)
    return mlp.fc2(mlp.act(mlp.fc1(x)))


def swapped(cls, precision="int8"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(WIDTH), cls()).eval()
    floats = copy.deepcopy(model)
    fp.swap(model, precision, include="**")
    assert isinstance(model[1], fp.nn.MLP if cls is Plain else fp.nn.GatedMLP)
    return floats, model


@pytest.mark.parametrize("precision", ["int8", "fp8", "w8a16"])
@pytest.mark.parametrize("cls", [Gated, Halves, Plain])
@pytest.mark.filterwarnings("ignore")
@torch.inference_mode()
def test_parts_give_what_the_unit_gives(cls, precision):
    floats, model = swapped(cls, precision)
    x = torch.randn(5, WIDTH)
    torch.testing.assert_close(by_parts(model[1], x), model[1](x), rtol=1e-5, atol=1e-5)
    for name, module in floats[1].named_children():
        part = getattr(model[1], name)
        if not isinstance(module, nn.Linear):
            continue
        assert (part.in_features, part.out_features) == (module.in_features, module.out_features)
        assert part.weight.shape == module.weight.shape and part.weight.dtype == module.weight.dtype
        assert (part.weight - module.weight).norm() < 0.05 * module.weight.norm()
        assert (part.bias is None) == (module.bias is None)
        if part.bias is not None:
            assert torch.equal(part.bias, module.bias)


@pytest.mark.parametrize("cls", [Gated, Halves, Plain])
@pytest.mark.parametrize("assign", [False, True])
@torch.inference_mode()
def test_state_dict_has_the_names_of_the_layers(cls, assign):
    floats, model = swapped(cls)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    named = {name.rpartition(".")[0] for name in floats.state_dict()}
    assert named <= {name.rpartition(".")[0] for name in state}
    alone = nn.Sequential(nn.LayerNorm(WIDTH), cls()).eval()
    fp.swap(alone, "int8", include="**", plan=None)
    other = swapped(cls)[1]
    for t in other.buffers():
        if t.dtype == torch.int8:
            t.neg_()
    x = torch.randn(5, WIDTH)
    expected = model(x)
    assert not torch.equal(other(x), expected)
    for name, t in other.state_dict().items():
        assert t.shape == state[name].shape and t.dtype == state[name].dtype
    other.load_state_dict(state, assign=assign)
    assert torch.equal(other(x), expected) and torch.equal(by_parts(other[1], x), by_parts(model[1], x))
    other[1].load_state_dict(model[1].state_dict(), assign=assign)
    assert torch.equal(other(x), expected)


def test_scales_of_gate_and_up_that_differ_are_refused():
    """They are one product, with one scale for its input."""
    model, layers = swapped(Gated)[1], []
    for scale in (1.0, 2.0):
        layers.append(
            fp.nn.Int8Linear.from_torch(
                nn.Linear(WIDTH, INNER), channel_scale=torch.full((WIDTH,), scale), activation="silu"
            )
        )
    up = fp.nn.Int8Linear.from_torch(nn.Linear(WIDTH, INNER), channel_scale=torch.ones(WIDTH))
    mlp = fp.nn.GatedMLP.from_layers(layers[0], up, model[1].down_proj)
    state = mlp.state_dict() | {f"gate_proj.{n}": t for n, t in layers[1].state_dict().items()}
    before = {n: t.clone() for n, t in mlp.state_dict().items()}
    with pytest.raises(RuntimeError, match="channel_scale differs between a gate and an up projection"):
        mlp.load_state_dict(state)
    assert all(torch.equal(t, before[n]) for n, t in mlp.state_dict().items())


@pytest.mark.parametrize("change", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copied", "pickled"])
@torch.inference_mode()
def test_parts_of_a_copy_are_its_own(change):
    _, model = swapped(Gated)
    other, x = change(model), torch.randn(5, WIDTH)
    before = other[1].gate_proj(x)
    for t in model.buffers():
        t.zero_()
    assert torch.equal(other[1].gate_proj(x), before)


@pytest.mark.parametrize(
    ("cls", "name"), [(Gated, "gate_proj"), (Gated, "act_fn"), (Halves, "gate_up_proj"), (Plain, "fc1")]
)
@torch.inference_mode()
def test_hooks_on_parts_are_called(cls, name):
    """And what they change is what comes of it."""
    _, model = swapped(cls)
    x, seen = torch.randn(5, WIDTH), []
    before = model(x)
    hook = getattr(model[1], name).register_forward_hook(lambda *call: seen.append(call[-1]))
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1
    hook.remove()
    hook = getattr(model[1], name).register_forward_hook(lambda module, args, y: y * 0)
    assert not torch.allclose(model(x), before)
    hook.remove()
    assert torch.equal(model(x), before)


@torch.inference_mode()
def test_llama(tmp_path):
    model, x = build("llama"), batch("llama")
    names = {name for name, _ in model.named_modules()}
    fp.swap(model, "int8", include="**")
    assert names <= {name for name, _ in model.named_modules()}
    expected = outputs(model, x)
    fp.save_pretrained(model, tmp_path)
    other = fp.load_pretrained(tmp_path)
    assert torch.equal(outputs(other, x), expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(outputs(other, x), expected)
