"""Activations that a swapped layer computes itself: which ones it takes over, that nothing else changes, and the way back."""

import json
import types

import pytest
import torch
from fusion_models import WIDTH, AlsoUsed, Mlp, behind
from small_models import assert_same_objects, batch, build, objects, of_tokens, outputs
from torch import nn

import forwardpass as fp
from forwardpass.ops.common.activations import PLAIN, activate
from forwardpass.proofs import activation as fusion
from forwardpass.swap import swapping


class Nested(Mlp):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)) * self.skip(x))


class Returned(Mlp):
    def forward(self, x):
        if x.dim() == 2:
            y = self.fc1(x)
            return self.act(y)
        return None


class BoundAnew(Mlp):
    """The variable between the two is another's before it is read again."""

    def forward(self, x):
        y = self.fc1(x)
        z = self.act(y)
        y = self.skip(x)
        return self.fc2(z + y)


class ReadAgain(Mlp):
    def forward(self, x):
        y = self.fc1(x)
        z = self.act(y)
        y = y + z
        return self.fc2(y)


class InBranchAgain(Mlp):
    def forward(self, x):
        y = self.fc1(x)
        z = self.act(y)
        if x.dim() > 2:
            y = self.skip(x)
        return self.fc2(z + y)


class ReadByFunction(Mlp):
    def forward(self, x):
        later = lambda: y  # noqa: E731
        y = self.fc1(x)
        z = self.act(y)
        read = later()
        y = self.skip(x)
        return self.fc2(z + read)


class Between(Mlp):
    def forward(self, x):
        x = self.fc1(x)
        x = x * 2
        x = self.act(x)
        return self.fc2(x)


class Twice(Mlp):
    def forward(self, x):
        x = self.fc1(x)
        x = self.act(x)
        return self.act(self.fc2(x))


class Elsewhere(Mlp):
    def forward(self, x):
        x = self.fc1(x)
        x = self.act(x)
        return self.fc2(x)

    def features(self, x):
        return self.fc1(x)


class Derived(Elsewhere):
    pass


class ThroughSuper(Mlp):
    def forward(self, x):
        x = self.fc1(x)
        x = self.act(x)
        return super().forward(x)


class Either(Mlp):
    def forward(self, x):
        x = self.fc1(x) if x.sum() > 0 else self.skip(x)
        x = self.act(x)
        return self.fc2(x)


class Scaled(nn.GELU):
    pass


def hooked():
    model = Mlp()
    model.act.register_forward_hook(lambda m, args, y: None)
    return model


def patched(name):
    model = Mlp()
    module = model if name == "" else getattr(model, name)
    module.forward = types.MethodType(type(module).forward, module)
    return model


def shared():
    first = Mlp()
    return nn.Sequential(first, Mlp(first.act))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Mlp, {"fc1": "gelu"}),
        (lambda: Mlp(nn.GELU("tanh")), {"fc1": "gelu_tanh"}),
        (lambda: Mlp(nn.ReLU(inplace=True)), {"fc1": "relu"}),
        (lambda: Mlp(nn.SiLU()), {"fc1": "silu"}),
        (lambda: Mlp(nn.ReLU6()), {"fc1": "relu6"}),
        (lambda: Mlp(nn.Hardswish()), {"fc1": "hard_swish"}),
        (Nested, {"fc1": "gelu"}),
        (Returned, {"fc1": "gelu"}),
        (BoundAnew, {"fc1": "gelu"}),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), {"0": "relu"}),
        (lambda: nn.Sequential(Mlp(), nn.Sequential(nn.Linear(4, 4), nn.SiLU())), {"0.fc1": "gelu", "1.0": "silu"}),
        *[(m, {}) for m in (AlsoUsed, Between, Twice, Elsewhere, Derived, ThroughSuper, Either, hooked, shared)],
        *[(m, {}) for m in (ReadAgain, InBranchAgain, ReadByFunction)],
        (lambda: Mlp(nn.Tanh()), {}),
        (lambda: Mlp(Scaled()), {}),
        (lambda: Mlp(nn.Identity()), {}),
        (lambda: patched(""), {}),
        (lambda: patched("act"), {}),
        (lambda: nn.ModuleList([nn.Linear(4, 4), nn.ReLU()]), {}),
    ],
)  # fmt: skip
def test_what_is_behind_a_layer(model, expected):
    assert behind(model()) == expected


def test_code_that_is_not_at_hand_says_nothing():
    scope = {"Mlp": Mlp}
    exec("class Hidden(Mlp):\n    def forward(self, x):\n        return self.fc2(self.act(self.fc1(x)))", scope)
    assert behind(scope["Hidden"]()) == {}


def test_formulas_are_those_of_transformers():
    from transformers import activations

    x = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    for name, formula in fusion._TRANSFORMERS.items():
        module = getattr(activations, name)()
        assert fusion.formula_of(module) == formula
        assert torch.allclose(module(x), activate(formula, x), rtol=0, atol=1e-12)
    assert {fusion.formula_of(activations.ACT2FN[n]) for n in ("gelu_fast", "quick_gelu", "mish", "relu2")} == {None}


@pytest.mark.parametrize("cls", [fp.nn.Bf16Linear, fp.nn.Int8Linear, fp.nn.Fp8Linear, fp.nn.W8A16Linear])
@pytest.mark.parametrize("activation", PLAIN)
def test_a_layer_computes_its_activation(cls, activation):
    torch.manual_seed(0)
    x = torch.randn(5, WIDTH)
    layer = cls.from_torch(nn.Linear(WIDTH, 32), activation=activation)
    with torch.inference_mode():
        rounded = 2**-8 if cls is fp.nn.Bf16Linear else 1e-5  # which rounds its product
        assert torch.allclose(layer(x).double(), layer.exact(x), rtol=rounded, atol=rounded)
        plain = cls.from_torch(nn.Linear(WIDTH, 32))
        plain.load_state_dict(layer.state_dict())
        assert torch.allclose(layer(x), activate(activation, plain(x)), rtol=1e-5, atol=1e-5)
    assert f"activation={activation}" in repr(layer) and "activation=" not in repr(plain)
    assert cls(**json.loads(json.dumps(layer.config()))).activation == activation
    with pytest.raises(ValueError, match="activation must be one of"):
        cls(4, 4, activation="swish")
    with pytest.raises(ValueError, match="a multiple of 16"):
        cls(4, 40, activation="silu_mul")


@torch.inference_mode()
def other_roundings(model, x):
    """How far apart outputs may be that have fc2's input from two fp32 formulas: where a value lies between two of fc2's input
    type, one may round it up and the other down; then a bfloat16 product may round the other way too, and sums differ in fp32.
    """
    y, w = model.fc1(x), model.fc2._dequantized_weight().abs().t()
    h, fp32 = model.act(y), 2**-23
    below, above = (model.fc2._quantized(h + e * fp32 * y.abs()) for e in (-8, 8))  # eight units in y's last place
    moved = (above - below).abs() @ w
    bound = moved + w.shape[0] * fp32 * (h.abs().double() @ w)
    if isinstance(model.fc2, fp.nn.Bf16Linear):
        product = (model.fc2(h) - model.fc2.bias).abs() + moved
        bound += 2**-7 * product * (moved > 0)  # one unit in the last place, at most
    return bound


@pytest.mark.parametrize("precision", ["int8", "fp8", "w8a16", "bf16"])
def test_a_swap_takes_it_over_and_gives_it_back(precision, monkeypatch):
    model, x = Mlp().eval(), torch.randn(30, WIDTH)
    before = objects(model)
    with monkeypatch.context() as m:
        m.setattr(swapping, "_fused", lambda leaf: {})
        report = fp.swap(model, precision)
    with report:
        apart = outputs(model, x)
        bound = other_roundings(model, x)
        assert [s.activation for s in report.swapped] == [None] * len(report.swapped)
    with fp.swap(model, precision) as report:
        assert [s.activation for s in report.swapped] == ["gelu", None, None]
        assert isinstance(model.act, nn.Identity) and not model.act.training
        together = outputs(model, x)
        assert ((together - apart).abs() <= bound).all()
        found = fp.parity(model, [x])
        assert all(layer.kernel.relative_error < (2**-8 if precision == "bf16" else 1e-5) for layer in found.layers)
        assert found.layers[0].total.relative_error < 0.1
    assert_same_objects(model, before)


def test_a_layer_that_stays_keeps_its_activation():
    model = Mlp().eval()
    fp.swap(model, "int8", exclude="fc1")
    assert type(model.act) is nn.GELU


@pytest.mark.every(2)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit", "whisper"])
def test_transformers(name):
    model, inputs = build(name), batch(name)
    expected, exact = behind(model), of_tokens(outputs(model, inputs), inputs)
    report = fp.swap(model, "int8")
    fused = {s.fqn: s.activation for s in report.swapped if s.activation}
    assert fused == expected and len(fused) >= 2 and behind(model) == {}
    off = (of_tokens(outputs(model, inputs), inputs) - exact).norm() / exact.norm()
    assert 0 < off < 0.05


def test_a_checkpoint_whose_activation_is_not_there_is_refused(tmp_path):
    model = Mlp().eval()
    fp.swap(model, "int8")
    fp.save_pretrained(model, tmp_path)
    other = Mlp(nn.ReLU()).eval()
    before = objects(other)
    with pytest.raises(ValueError, match="fc1 computes gelu, and relu is behind it"):
        fp.load_pretrained(tmp_path, model=other)
    assert_same_objects(other, before)
    loaded = fp.load_pretrained(tmp_path, model=Mlp(nn.GELU()).eval())
    x = torch.randn(3, WIDTH)
    assert isinstance(loaded.act, nn.Identity) and torch.equal(outputs(loaded, x), outputs(model, x))


def test_an_activation_that_was_replaced_since_is_left():
    model = Mlp().eval()
    fp.swap(model, "int8")
    model.act = nn.Dropout()
    with pytest.raises(RuntimeError, match="act is no longer the InEpilogue"):
        fp.restore(model)
    assert type(model.fc1) is fp.nn.Int8Linear


def test_compiles_whole():
    model, x = Mlp().eval(), torch.randn(4, WIDTH)
    fp.swap(model, "int8")
    with torch.inference_mode():
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


class Sequence(nn.Sequential):
    """As torchvision's MLP is written."""

    _version = 2

    def __init__(self, width=WIDTH):
        super().__init__(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)


class Halfway(Sequence):
    def half(self, x):
        return self[0](x)


class Doubled(Sequence):
    def forward(self, x):
        return 2 * self[2](self[0](x))


@pytest.mark.parametrize(("cls", "fused"), [(Sequence, True), (Halfway, False), (Doubled, False)])
def test_a_class_that_derives_from_sequential(cls, fused):
    """The MLPs of torchvision's transformers, whose activation stayed apart."""

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = cls()

        def forward(self, x):
            return x + self.mlp(x)

    model, x = Holder().eval(), torch.randn(3, WIDTH)
    before = outputs(model, x)
    report = fp.swap(model, "w8a16", include="**")
    assert [s.activation for s in report.swapped] == (["gelu", None] if fused else [None, None])
    assert (outputs(model, x) - before).norm() < 0.02 * before.norm()
