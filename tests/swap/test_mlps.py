"""MLPs of two layers, and of three in several lines, as one module: which are, and that everything around a swap knows them."""

import copy

import pytest
import torch
from rotation import in_turn
from small_models import MLPS, assert_same_objects, batch, build, objects, of_tokens, outputs
from small_models import TwoLayers as Mlp
from torch import nn

import forwardpass as fp
from forwardpass.nn import MLP, GatedMLP
from forwardpass.nn.mlp import TwoProducts
from forwardpass.proofs import mlp_formulas as mlps
from forwardpass.proofs import walker

WIDTH = 64


class Lines(Mlp):
    def forward(self, x):
        """In lines, with a variable for each."""
        y = self.fc1(x)
        z = self.act(y)
        z = self.fc2(z)
        return z


class Dropouts(Mlp):
    def __init__(self):
        super().__init__()
        self.between, self.behind, self.norm = nn.Dropout(0.9), nn.Dropout(0.9), nn.Identity()

    def forward(self, x):
        x = self.between(self.act(self.fc1(x)))
        return self.behind(self.fc2(self.norm(x)))


class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.both, self.down, self.act = nn.Linear(WIDTH, 256), nn.Linear(128, WIDTH), nn.SiLU()

    def forward(self, x):
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.down(up * self.act(gate))


class Residual(Mlp):
    def forward(self, x):
        return x + self.fc2(self.act(self.fc1(x)))


class InBranch(Mlp):
    def forward(self, x):
        x = self.fc1(x)
        x = self.act(x)
        if x.dim() > 2:
            x = x * 2
        return self.fc2(x)


class Twice(Mlp):
    def forward(self, x):
        self.fc2(self.act(self.fc1(x)))
        return x


class InPlaceTwice(Mlp):
    def __init__(self):
        super().__init__()
        self.act = nn.SiLU(inplace=True)

    def forward(self, x):
        x = self.fc1(x)
        y = self.act(x)
        y = self.act(x)
        return self.fc2(y)


class Left(Dropouts):
    """With a dropout that no epilogue has in front of its activation, and one that is not used."""

    def forward(self, x):
        x = self.act(self.fc1(self.between(x)))
        return self.fc2(x)


class NormBetween(Mlp):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(128)

    def forward(self, x):
        x = self.fc1(x)
        x = self.act(x)
        x = self.norm(x)
        return self.fc2(x)


class Training(Mlp):
    """A dropout that is a function of its own."""

    def forward(self, x):
        x = self.fc1(x)
        x = self.act(x)
        x = nn.functional.dropout(x, 0.5, self.training)
        return self.fc2(x)


class Conditional(Mlp):
    """As T5 converts what its last layer is called with, but of weights that are there."""

    def forward(self, x):
        x = self.fc1(x)
        x = self.act(x)
        if isinstance(self.fc2.weight, torch.Tensor) and x.shape[0] < 7:
            x = 2 * x
        return self.fc2(x)


class Thirds(Halves):
    def forward(self, x):
        gate, up = self.both(x).split(128, -1)
        return self.down(up * self.act(gate))


class Exchanged(Halves):
    def forward(self, x):
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.down(gate * self.act(up))


class OneHalf(Halves):
    def forward(self, x):
        gate, _ = self.both(x).chunk(2, dim=-1)
        return self.down(gate * self.act(gate))


class OtherDimension(Halves):
    def __init__(self):
        super().__init__()
        self.both = nn.Linear(WIDTH, 128)

    def forward(self, x):
        gate, up = self.both(x).chunk(2, dim=0)
        return self.down(up * self.act(gate))


class Config(Mlp):
    """Whose layer's name the new module has for something else."""

    def __init__(self):
        super().__init__()
        self.layers, self.fc1 = self.fc1, None
        del self.fc1

    def forward(self, x):
        return self.fc2(self.act(self.layers(x)))


class Holder(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        y = self.mlp(x)
        return x[: len(y)] + y


def model_of(cls, precision="w8a16", **options):
    torch.manual_seed(0)
    model = Holder(cls()).eval()
    return model, fp.swap(model, precision, include="**", **options)


def original_of(cls):
    torch.manual_seed(0)
    return Holder(cls()).eval()


@pytest.fixture
def x():
    return torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("cls", [Mlp, Lines, Dropouts, Halves])
def test_one_module(cls, x):
    model, report = model_of(cls)
    assert isinstance(model.mlp, GatedMLP if cls is Halves else MLP)
    layers = ("mlp.both", "mlp.down") if cls is Halves else ("mlp.fc1", "mlp.fc2")
    assert report.mlps == [layers] and not report.apart and not report.joined
    assert "one MLP" in str(report) and report.to_json()["mlps"] == [[*layers]]
    with torch.no_grad():
        torch.testing.assert_close(model(x), original_of(cls)(x), rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("cls", "code"),
    [
        (Residual, "other_code"),
        (InBranch, "other_code"),
        (Twice, "other_code"),
        (Left, "other_code"),
        (NormBetween, "other_code"),
        (Training, "other_code"),
        (Conditional, "other_code"),
        (Config, "other_code"),
        (lambda: nn.Sequential(nn.Linear(WIDTH, 128), nn.GELU(), nn.Linear(128, WIDTH)), "sequential"),
        *((cls, None) for cls in (InPlaceTwice, Thirds, Exchanged, OneHalf, OtherDimension)),
    ],
)
def test_what_computes_something_else_keeps_its_layers(cls, code, x):
    model, report = model_of(cls)
    assert not any(isinstance(m, TwoProducts) for m in model.modules()) and not report.mlps
    assert [s.reason.code for s in report.apart] == ([code] if code else [])
    assert ("stay apart" in str(report)) == bool(code)
    with torch.no_grad():
        torch.testing.assert_close(model(x), original_of(cls)(x), rtol=0, atol=2e-2)


def test_apart_for_other_reasons():
    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.act = nn.Linear(WIDTH, WIDTH), nn.ReLU()

        def forward(self, x):
            return self.act(self.fc(x))

    def code(model, **options):
        return [s.reason.code for s in fp.swap(model.eval(), "w8a16", **options).apart]

    assert code(Holder(Alone())) == ["other_module"]
    assert code(Mlp()) == ["in_model"]
    assert code(Holder(Mlp()), include=["mlp.fc1"]) == ["layer_stays"]
    model = Holder(Mlp())
    model.mlp.fc2.register_forward_hook(lambda *_: None)
    assert code(model) == ["reached"]
    model = Holder(Halves())
    model.mlp.act = nn.ReLU()
    assert code(model) == ["unlike"] and type(model.mlp) is Halves


def test_a_dropout_drops_while_the_model_trains(x):
    """It is the very module, with the flags that it has."""
    model = original_of(Dropouts)
    dropout = model.mlp.between.train()
    fp.swap(model, "w8a16")
    assert model.mlp.between is dropout and dropout.training and not model.mlp.training
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))
        dropout.eval()
        assert torch.equal(model(x), model(x))
        model.train()
        zeros = model.mlp(x) == 0
    assert zeros.float().mean() > 0.8 and model.mlp.behind.training
    model.eval()
    dropout.train()
    fp.restore(model)
    assert model.mlp.between is dropout and dropout.training and not model.mlp.training


@pytest.mark.parametrize("cls", [Dropouts, Halves])
def test_restored_compared_and_planned(cls, x):
    model = original_of(cls)
    before = objects(model)
    report = fp.swap(model, "w8a16")
    (layer,) = fp.parity(model, [x]).layers
    assert (layer.fqn, layer.precision) == ("mlp", "w8a16")
    assert layer.kernel.relative_error < 1e-6 < 1e-3 < layer.quantisation.relative_error < 1e-2
    y = outputs(model, x)
    fp.restore(model)
    assert_same_objects(model, before)
    assert [layer.fqn for layer in report.plan.layers] == [*report.mlps[0]]
    fp.swap(model, plan=report.plan)
    assert isinstance(model.mlp, TwoProducts) and torch.equal(outputs(model, x), y)


@pytest.mark.parametrize("precision", ["int8", "w8a16", "fp8", "bf16"])
@pytest.mark.parametrize("cls", [Dropouts, Halves])
def test_stored_layer_by_layer(cls, precision, x, tmp_path):
    model, _ = model_of(cls, precision)
    y = outputs(model, x)
    for step, stored in enumerate((model, copy.deepcopy(model))):
        fp.save_pretrained(stored, tmp_path / str(step))
        loaded = fp.load_pretrained(tmp_path / str(step), model=Holder(cls()).eval())
        assert isinstance(loaded.mlp, TwoProducts) and torch.equal(outputs(loaded, x), y)
    from safetensors import safe_open

    (weights,) = (tmp_path / "0").glob("*.safetensors")
    with safe_open(weights, "pt") as file:
        assert {f"mlp.{name}.qweight" for name in (("both", "down") if cls is Halves else ("fc1", "fc2"))} <= {
            *file.keys()
        }


def test_timm(x):
    mlp = pytest.importorskip("timm.layers").Mlp
    cls = lambda: mlp(WIDTH, 128, drop=0.5)  # noqa: E731
    model, report = model_of(cls)
    assert isinstance(model.mlp, MLP) and report.mlps == [("mlp.fc1", "mlp.fc2")]
    assert [type(model.mlp.get_submodule(name)) for name in ("drop1", "norm", "drop2")] == [
        nn.Dropout,
        nn.Identity,
        nn.Dropout,
    ]
    with torch.no_grad():
        torch.testing.assert_close(model(x), original_of(cls)(x), rtol=0, atol=1e-2)


# ---- models of transformers

EXPECTED = {name: (2, {"phi3", "llama", "gemma3", "modernbert"}) for name in MLPS} | {"t5": (4, ()), "t5_gated": (4, {"t5_gated"}),
                                                                                      "siglip": (3, ())}  # fmt: skip


@pytest.mark.every(2)
@pytest.mark.parametrize("name", MLPS)
def test_models(name, tmp_path, monkeypatch):
    """One module for each MLP computes what its layers do one by one, saved, loaded, copied, compiled, and restored."""
    model, x = build(name, MLPS), batch(name)
    before, untouched = outputs(model, x), objects(model)
    report = fp.swap(model, "w8a16", exclude="lm_head")
    count, gated = EXPECTED[name]
    kind = GatedMLP if name in gated else MLP
    assert (
        [type(m) for m in model.modules() if isinstance(m, TwoProducts)] == [kind] * count == [kind] * len(report.mlps)
    )
    assert not report.apart
    after = outputs(model, x)
    assert 0 < (of_tokens(after, x) - of_tokens(before, x)).norm() < 0.03 * of_tokens(before, x).norm()
    fp.save_pretrained(model, tmp_path / "checkpoint")
    for again in (fp.load_pretrained(tmp_path / "checkpoint"), copy.deepcopy(model)):
        assert [type(m) for m in again.modules() if isinstance(m, TwoProducts)] == [kind] * count
        assert torch.equal(outputs(again, x), after)
    fp.restore(model)
    assert_same_objects(model, untouched)
    monkeypatch.setattr(walker, "block_of", lambda *_: None)
    fp.swap(model, "w8a16", exclude="lm_head")
    assert not any(isinstance(m, TwoProducts) for m in model.modules())
    torch.testing.assert_close(outputs(model, x), after, rtol=0, atol=1e-4)


@pytest.mark.every(3)
@pytest.mark.parametrize("name", in_turn(["gpt2", "t5_gated", "phi3"]))
def test_compiled_models(name):
    model, x = build(name, MLPS), batch(name)
    fp.swap(model, "w8a16", exclude="lm_head", attention=False)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(outputs(compiled, x), outputs(model, x), rtol=0, atol=1e-5)


@pytest.mark.every(2)
@pytest.mark.parametrize("precision", ["int8", "fp8", "w8a16"])
@pytest.mark.parametrize("kept", [False, True])
def test_t5_converts_to_the_dtype_of_its_last_layer(precision, kept):
    """transformers keeps that in float32 in a model of 16 bits: such an MLP stays in parts, as float32 comes of it."""
    model, x = build("t5", MLPS).bfloat16(), batch("t5")
    for name, m in model.named_modules():
        if kept and name.endswith(".wo"):
            m.float()
    before, units = outputs(model, x), [m for n, m in model.named_modules() if n.endswith("DenseReluDense")]
    h = torch.randn(3, units[0].wi.in_features, dtype=torch.bfloat16)
    with torch.inference_mode():
        dtype = units[0](h).dtype
        report = fp.swap(model, precision, exclude="lm_head")
        assert bool(report.mlps) is not kept and {s.reason.code for s in report.apart} == (
            {"unlike"} if kept else set()
        )
        assert dtype == (torch.float32 if kept else torch.bfloat16)
        assert next(m for n, m in model.named_modules() if n.endswith("DenseReluDense"))(h).dtype == dtype
    assert (outputs(model, x) - before).norm() < 0.1 * before.norm()


@pytest.mark.parametrize(("name", "code"), [("bert", "other_module"), ("whisper", "other_code")])
def test_layers_that_are_no_module_of_their_own(name, code):
    report = fp.swap(build(name), "w8a16")
    assert report.apart and {s.reason.code for s in report.apart} == {code} and not report.mlps


CONVERTS = (
    "if x.dtype != self.fc2.weight.dtype and self.fc2.weight.dtype != torch.int8:\n  x = x.to(self.fc2.weight.dtype)"
)


@pytest.mark.parametrize(
    "statement",
    [CONVERTS.replace("x.dtype != self.fc2.weight.dtype and ", "self.fc2 and "), CONVERTS.replace("x = x", "x = 2 * x"),
     CONVERTS.replace("x = x", "x = y"), CONVERTS.replace("x.dtype !=", "x.dtype =="), CONVERTS.replace("if ", "if (x := x) and "),
     CONVERTS.replace("if ", "if len(x) > 1 and "), CONVERTS.replace("(self.fc2.weight.dtype)", "(self.fc1.weight.dtype)"),
     CONVERTS.replace(" and ", " or "), CONVERTS + "\n  x = 1", CONVERTS + "\n else:\n  x = 1"],
)  # fmt: skip
def test_other_statements_than_t5s(statement):
    import ast

    code = f"def forward(self, x):\n x = self.fc1(x)\n {CONVERTS}\n return self.fc2(x)"
    (function,) = ast.parse(code.replace(CONVERTS, statement)).body
    with pytest.raises(mlps._Other):
        mlps._value(function)
    (function,) = ast.parse(code).body
    assert mlps._value(function) == (("call", "fc2", ("call", "fc1", ("input",))), {"fc2"})


@pytest.mark.parametrize("cls", [Mlp, Halves])
def test_one_unit_on_a_gpu(cls, monkeypatch):
    """A precision with block scales: by the interpreter, three launches, 8 bits between the two products."""
    from forwardpass.swap import precision

    monkeypatch.setattr(precision, "PRECISIONS", list(precision.PRECISIONS))
    fp.register_precision(fp.Precision("fp8_block", 1, fp.nn.Fp8Linear, {"scales": "block"}))
    model = original_of(cls).to(torch.bfloat16)
    x = torch.randn(6, WIDTH, dtype=torch.bfloat16)
    before = outputs(model, x)
    with fp.interpret("sm_90a") as device, fp.use_backend("cuda"):
        fp.swap(model, "fp8_block", include="**")
        launched, between = device.counters["launches"], []
        model.mlp.layers[1].register_forward_pre_hook(lambda m, args: between.append(args[0].values))
        after = outputs(model, x)
        assert device.counters["launches"] - launched == 3 and device.findings == []
    assert between[0].dtype == torch.float8_e4m3fn and between[0].shape == (6, 128)
    assert (after - before).norm() < 0.05 * before.norm()
