"""What a swap has rewritten goes back to the model's own code where that is another one now, or something has come in between."""

import copy
import functools
import pickle
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import forwardpass as fp
from forwardpass.common.printing import quiet
from forwardpass.integrations.transformers.norm_formulas import norm_formula
from forwardpass.nn.guard import code_guard
from forwardpass.nn.linear import quantized_linear as layers

WIDTH, INNER = 64, 96


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.act, self.down = nn.SiLU(), nn.Linear(INNER, WIDTH)

    def forward(self, states):
        return self.down(self.act(self.gate(states)) * self.up(states))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH)

    def forward(self, states):
        return self.down(self.act(self.up(states)))


class Fused(nn.Module):
    """An activation that a layer computes, in a module that does more."""

    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH)

    def forward(self, states):
        hidden = self.act(self.up(states))
        return self.down(hidden + 0.5)


class InSequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH))

    def forward(self, states):
        return self.net(states)


class Siblings(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, states):
        return self.q(states) - self.k(states)


class Model(nn.Module):
    def __init__(self, cls):
        super().__init__()
        self.block = cls()

    def forward(self, x):
        return self.block(x)


def part(block, name):
    return block.net[("up", "act").index(name)] if hasattr(block, "net") else getattr(block, name)


CLASSES = [Gated, Plain, Fused, InSequence, Siblings]


def built(cls, precision="w8a16"):
    """(the model of floats, the same swapped, whether something was rewritten)"""
    torch.manual_seed(0)
    floats = Model(type(cls.__name__, (cls,), {"forward": cls.forward})).eval()  # of a class of its own, to be patched
    model = copy.deepcopy(floats)
    report = fp.swap(model, precision, include="**", attention=False)
    return floats, model, bool(report.joined or report.mlps or any(s.activation for s in report.swapped))


def off(model, floats, rows=5):
    x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        y, expected = model(x.clone()), floats(x.clone())
    return float((y - expected).norm() / expected.norm())


@pytest.fixture(autouse=True)
def forget_warnings():
    quiet.warn_once.cache_clear()


def doubled(forward):
    @functools.wraps(forward)
    def wrapped(self, states):
        return 2 * forward(self, 3 * states)

    return wrapped


def of_another_kind(self, states):
    """As no kernel here computes it."""
    if hasattr(self, "q"):
        q = self.q(states)
        F.relu(states.view(-1), inplace=True)
        return q - self.k(states)
    if hasattr(self, "gate"):
        return self.down(torch.tanh(self.gate(states)) + self.up(states))
    if hasattr(self, "net"):
        return self.net[2](self.net[0](states).tanh())
    return self.down(self.up(states).tanh())


@pytest.mark.parametrize("put", [of_another_kind, doubled])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_class_that_is_patched_after_the_swap(cls, put):
    """As Liger and Unsloth do. Ignored before, or the activation was applied twice or not at all: off by .5 to 3."""
    floats, model, rewritten = built(cls)
    assert rewritten and off(model, floats) < 0.03
    owner = type(floats.block)
    forward = owner.forward
    owner.forward = doubled(forward) if put is doubled else put
    with pytest.warns(
        UserWarning, match=r"forward is another function than at the swap: its layers are called one by one"
    ):
        assert off(model, floats) < 0.03
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it says so once
        assert off(model, floats) < 0.03
        assert off(copy.deepcopy(model), floats) < 0.03
    owner.forward = forward
    copied = copy.deepcopy(model)
    owner.forward = doubled(forward) if put is doubled else put
    assert off(copied, floats) < 0.03  # a copy is guarded from when it was made
    owner.forward = forward
    assert off(copied, floats) < 0.03
    assert off(model, floats) < 0.03
    assert off(copy.deepcopy(model), floats) < 0.03
    fp.restore(model)
    assert off(model, floats) == 0


@pytest.mark.parametrize("cls", CLASSES)
def test_a_copy_of_a_model_whose_class_is_called_in_another_way_by_now(cls):
    """Its guard took the code of now for what was proven: off by 1 in silence."""
    floats, model, _ = built(cls)
    owner = type(floats.block)
    owner.__call__ = doubled(owner.__call__)
    with pytest.warns(UserWarning, match="__call__ is another function than at the swap"):
        assert off(model, floats) < 0.03
    assert off(copy.deepcopy(model), floats) < 0.03


@pytest.mark.parametrize("name", ["forward", "__call__"])
def test_what_is_pickled_is_not_proven_by_code_that_came_later(name, monkeypatch):
    guard, block = code_guard(Gated), Gated()
    assert pickle.loads(pickle.dumps(guard)).is_as_proven(block)
    monkeypatch.setattr(Gated, name, doubled(getattr(Gated, name)))
    with pytest.warns(UserWarning, match="is another function"):
        assert not pickle.loads(pickle.dumps(guard)).is_as_proven(block)


@pytest.mark.parametrize("cls", [Fused, InSequence, Siblings])
def test_an_instance_that_is_patched_after_the_swap(cls):
    floats, model, _ = built(cls)
    for m in (floats, model):
        m.block.forward = types.MethodType(of_another_kind, m.block)
    with pytest.warns(UserWarning, match="the forward of a"):
        assert off(model, floats) < 0.03


@pytest.mark.parametrize("cls", CLASSES)
def test_the_code_of_a_function_that_is_exchanged(cls):
    floats, model, _ = built(cls)
    owner = type(floats.block)
    owner.forward = types.FunctionType(owner.forward.__code__, globals(), "forward")
    floats, model = Model(owner).eval(), None
    model = copy.deepcopy(floats)
    fp.swap(model, "w8a16", include="**", attention=False)
    owner.forward.__code__ = of_another_kind.__code__
    with pytest.warns(UserWarning, match="another function than at the swap"):
        assert off(model, floats) < 0.03


HOOKS = {
    "pre": lambda m: m.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
    "post": lambda m: m.register_forward_hook(lambda m, args, y: y * 2 + args[0].mean()),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", ["up", "act"])
@pytest.mark.parametrize("cls", [Gated, Plain, Fused, InSequence])
def test_a_hook_between_a_layer_and_its_activation(cls, name, hook):
    """It saw, and changed, what the activation had been applied to already."""
    floats, model, _ = built(cls)
    handles = [HOOKS[hook](part(m.block, name)) for m in (floats, model)]
    assert off(model, floats) < 0.03
    for handle in handles:
        handle.remove()
    assert off(model, floats) < 0.03


def test_a_hook_that_writes_into_the_input_of_layers_of_one_product():
    floats, model, _ = built(Siblings)
    for m in (floats, model):
        m.block.k.register_forward_pre_hook(lambda m, args: (args[0].mul_(2), None)[1])
    assert off(model, floats) < 0.03


@pytest.mark.parametrize("cls", [Gated, Plain, Fused])
def test_another_activation_is_put_there(cls):
    """Applied to what the layer had activated already, or not at all."""
    floats, model, _ = built(cls)
    for m in (floats, model):
        m.block.act = nn.Tanh()
    assert off(model, floats) < 0.03


@pytest.mark.parametrize("cls", [Gated, Plain, Fused])
def test_another_layer_is_put_there(cls):
    floats, model, _ = built(cls)
    other = nn.Linear(WIDTH, INNER)
    for m in (floats, model):
        m.block.up = other
    assert off(model, floats) < 0.03


@pytest.mark.parametrize("cls", [Gated, Plain, Fused, InSequence])
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_class_of_an_activation_is_patched(cls, when, monkeypatch):
    floats, model, _ = built(cls)
    monkeypatch.setattr(type(part(floats.block, "act")), "forward", lambda self, x: 3 * x.tanh())
    if when == "before":
        fp.restore(model)
        assert not fp.swap(model, "w8a16", include="**", attention=False).mlps
        assert off(model, floats) < 0.03
        return
    with pytest.warns(UserWarning, match="another function than at the swap"):
        assert off(model, floats) < 0.03


def test_linears_forward_is_patched_before_the_swap(monkeypatch):
    """It was believed by the name of its class."""
    floats, model, _ = built(Plain)
    fp.restore(model)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * F.linear(x, self.weight, self.bias))
    with pytest.warns(UserWarning, match="no layer is swapped"):
        report = fp.swap(model, "w8a16", include="**")
    assert {s.reason.code for s in report.skipped} == {"subclass"} and not report.swapped
    assert "another function than in its library's file" in report.skipped[0].reason.text
    assert off(model, floats) == 0


def test_linears_forward_is_patched_after_the_swap(monkeypatch):
    """Swapped layers are no nn.Linear: it says so."""
    floats, model, _ = built(Plain)
    before = off(model, floats)
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda self, x: 2 * F.linear(x, self.weight, self.bias))
        with pytest.warns(UserWarning, match=r"nn\.Linear\.forward is another function"):
            model(torch.randn(2, WIDTH))
    assert off(model, floats) == before and nn.Linear.forward is layers._FORWARD


def test_a_bias_that_is_written_into_is_the_layers_or_refuses():
    """Of a gate it was a copy, and what was written was lost."""
    floats, model, _ = built(Gated)
    for name in ("gate", "up"):
        bias = getattr(model.block, name).bias
        assert torch.equal(bias.clone(), getattr(floats.block, name).bias)
        with torch.no_grad(), pytest.raises(RuntimeError, match="would write into"):
            bias.add_(1)
    with torch.no_grad():
        for m in (floats, model):
            m.block.down.bias.add_(1)
    assert off(model, floats) < 0.03


def test_layers_and_units_are_called_by_keyword():
    """As nn.Linear's `input` and as the module's own forward names it."""
    _, model, _ = built(Gated)
    x = torch.randn(3, WIDTH)
    with torch.inference_mode():
        assert torch.equal(model.block(states=x), model.block(x))
        assert torch.equal(model.block.down(input=model.block.up(input=x)), model.block.down(model.block.up(x)))


def test_a_decorator_that_takes_any_arguments():
    """The swap raised IndexError."""

    def twice(forward):
        def wrapped(*args, **kwargs):
            return 2 * forward(*args, **kwargs)

        return wrapped

    cls = type("Decorated", (Plain,), {"forward": twice(Plain.forward)})
    floats = Model(cls).eval()
    model = copy.deepcopy(floats)
    fp.swap(model, "w8a16", include="**")
    assert off(model, floats) < 0.03


class Parameters(Plain):
    def forward(self, states):
        return super().forward(states) * next(self.up.parameters()).norm()


class Iterated(Plain):
    def forward(self, states):
        return self.down(self.up(states)) + sum(p.abs().mean() for p in self.down.parameters())


class Filtered(Plain):
    def forward(self, states):
        y = super().forward(states)
        for name, p in self.named_parameters():
            if "lora_A" in name:
                y = y + p.sum()
        return y + sum(p.sum() for name, p in self.named_parameters() if name.endswith("n.weight"))


class Asked(Plain):
    def forward(self, states):
        states = states.to(next(self.parameters()).dtype)
        p = next(self.up.parameters())
        return self.down(self.up(states)).to(p.device) + sum(p.numel() for p in self.act.parameters())


@pytest.mark.parametrize(
    ("cls", "stays"), [(Parameters, ["up"]), (Iterated, ["down"]), (Filtered, ["down"]), (Asked, [])]
)
def test_values_that_are_read_from_parameters(cls, stays):
    """A quantised layer's are an empty tensor: the sum of nothing is no error."""
    floats = Model(cls).eval()
    model = copy.deepcopy(floats)
    report = fp.swap(model, "w8a16", include="**")
    assert [s.fqn for s in report.skipped if s.reason.code == "parameters_read"] == [f"block.{n}" for n in stays]
    assert off(model, floats) < 0.03


class OfAClass(Plain):
    def forward(self, states):
        states = self.up(states) if isinstance(self.up, nn.Linear) else -states.repeat(1, 1, 2)
        return self.down(self.act(states))


class OfAClassInALoop(Plain):
    def forward(self, states):
        for layer in (self.up, self.act, self.down):
            states = layer(states) if type(layer) is nn.Linear else 2 * layer(states)
        return states


class OfAClassInAMethod(Plain):
    def forward(self, states):
        return self.step(self.down, self.act(self.step(self.up, states)))

    def step(self, layer, states):
        return layer(states) * (2 if issubclass(layer.__class__, (nn.Conv1d, nn.Linear)) else 3)


LINEARS = (nn.Linear, nn.Bilinear)


class OfAClassInATuple(Plain):
    def forward(self, states):
        return super().forward(states) * (2 if isinstance(self.down, LINEARS) else 3)


class OfAClassByItsName(Plain):
    def forward(self, states):
        return super().forward(states) * (2 if type(self.up).__name__ in ("Linear", "Conv1D") else 3)


class OfAClassBelow(OfAClass):
    def forward(self, states):
        return 2 * super().forward(states)


class OfAnother(Plain):
    def forward(self, states):
        return super().forward(states) * (
            2 if isinstance(self.down, nn.Module) and isinstance(states, torch.Tensor) else 3
        )


@pytest.mark.parametrize(
    ("cls", "stays"),
    [
        (OfAClass, ["up"]),
        (OfAClassInALoop, ["up", "down"]),
        (OfAClassInAMethod, ["up", "down"]),
        (OfAClassInATuple, ["down"]),
        (OfAClassByItsName, ["up"]),
        (OfAClassBelow, ["up"]),
        (OfAnother, []),
    ],
)
def test_layers_of_which_code_asks_the_class(cls, stays):
    """A quantised layer is no nn.Linear: code that asks would go another way."""
    floats = Model(cls).eval()
    model = copy.deepcopy(floats)
    report = fp.swap(model, "w8a16", include="**")
    assert [s.fqn for s in report.skipped if s.reason.code == "class_read"] == [f"block.{n}" for n in stays]
    assert off(model, floats) < 0.03


def test_a_product_is_read_from_the_forward_that_is_there_now():
    """It was kept by the class."""
    floats, model, _ = built(Siblings)
    fp.restore(model)
    owner = type(floats.block)
    owner.forward = of_another_kind
    report = fp.swap(model, "w8a16", include="**")
    assert not report.joined and off(model, floats) < 0.03


@pytest.mark.every(2)
@pytest.mark.parametrize("cls", CLASSES)
def test_compiled(cls):
    _, model, _ = built(cls)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


def test_a_norm_of_torch_that_is_patched_is_not_taken_for_what_its_name_says(monkeypatch):
    norm = nn.LayerNorm(WIDTH)
    assert norm_formula(norm).kind == "layer"
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, x: 2 * x)
    assert norm_formula(norm) is None


def test_units_of_one_class_share_a_guard_and_those_of_other_code_have_another():
    cls = type("Own", (Gated,), {"forward": Gated.forward})
    guard = code_guard(cls)
    assert code_guard(cls) is guard and copy.deepcopy(guard) is guard
    cls.forward = doubled(cls.forward)
    block, other = cls(), code_guard(cls)
    assert other is not guard and other.is_as_proven(block)
    with pytest.warns(UserWarning, match="Own.forward is another function"):
        assert not guard.is_as_proven(block)
