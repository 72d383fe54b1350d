"""MLPs with a gate as one module: which are, by their code, and that everything around a swap knows them."""

import copy

import pytest
import torch
from small_models import build
from torch import nn

import forwardpass as fp
from forwardpass.nn import GatedMLP

WIDTH = 64


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, 96, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(96, WIDTH, bias=False), nn.SiLU()

    def forward(self, x):
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj


class Returned(Mlp):
    def forward(self, x):
        "In one line."
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Scaled(Mlp):
    def forward(self, x):
        return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Added(Mlp):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


class OfAnother(Mlp):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x * 2))


class WithOption(Mlp):
    def forward(self, x, scale=1):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class WithDropout(Mlp):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class WithMethod(Mlp):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    def halves(self, x):
        return self.up_proj(x)


class Holder(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return x + self.mlp(x)


class Peeking(Holder):
    def forward(self, x):
        return x + self.mlp(x) + self.mlp.up_proj(x).sum()


def model_of(cls=Mlp, holder=Holder, precision="w8a16", **options):
    torch.manual_seed(0)
    model = holder(cls()).eval()
    layers = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    return model, fp.swap(model, precision, include=layers, **options)


@pytest.mark.parametrize("cls", [Mlp, Returned])
def test_one_module(cls):
    x = torch.randn(5, WIDTH)
    torch.manual_seed(0)
    original = Holder(cls()).eval()
    model, report = model_of(cls)
    assert isinstance(model.mlp, GatedMLP) and report.joined == [("mlp.gate_proj", "mlp.up_proj")]
    assert [s.fqn for s in report.swapped] == ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    with torch.no_grad():
        torch.testing.assert_close(model(x), original(x), rtol=0, atol=1e-2)


@pytest.mark.parametrize("cls", [Scaled, Added, OfAnother, WithOption, WithDropout, WithMethod])
def test_what_computes_something_else_keeps_its_layers(cls):
    x = torch.randn(5, WIDTH)
    torch.manual_seed(0)
    original = Holder(cls()).eval()
    model, _ = model_of(cls)
    assert type(model.mlp) is cls and isinstance(model.mlp.down_proj, fp.nn.W8A16Linear)
    with torch.no_grad():
        torch.testing.assert_close(model(x), original(x), rtol=0, atol=2e-2)


def test_layers_that_others_use_stay():
    model, _ = model_of(holder=Peeking)
    assert type(model.mlp) is Mlp
    model = nn.Sequential(Holder(Mlp()))
    model.also = model[0].mlp.up_proj
    fp.swap(model, "w8a16", include=["0.mlp.gate_proj", "0.mlp.down_proj"])
    assert type(model[0].mlp) is Mlp


def test_hooks_keep_the_layers():
    model = Holder(Mlp()).eval()
    model.mlp.register_forward_hook(lambda *_: None)
    fp.swap(model, "w8a16", include="mlp.*")
    assert type(model.mlp) is Mlp


def test_a_layer_that_stays_keeps_the_others():
    model = Holder(Mlp()).eval()
    fp.swap(model, "w8a16", include=["mlp.gate_proj", "mlp.up_proj"])
    assert type(model.mlp) is Mlp


def test_restored():
    torch.manual_seed(0)
    model = Holder(Mlp()).eval()
    mlp, parts = model.mlp, dict(model.mlp.named_modules())
    fp.swap(model, "int8", include="mlp.*")
    assert isinstance(model.mlp, GatedMLP)
    fp.restore(model)
    assert model.mlp is mlp and all(dict(mlp.named_modules())[name] is m for name, m in parts.items())


def test_an_error_leaves_the_model(monkeypatch):
    model = Holder(Mlp()).eval()
    mlp = model.mlp
    monkeypatch.setattr(GatedMLP, "from_layers", lambda *_, **options: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        fp.swap(model, "int8", include="mlp.*")
    assert model.mlp is mlp and isinstance(mlp.up_proj, nn.Linear)


@pytest.mark.parametrize("precision", ["int8", "w8a16", "fp8", "bf16"])
def test_stored_layer_by_layer(precision, tmp_path):
    model, _ = model_of(precision=precision)
    fp.save_pretrained(model, tmp_path / "checkpoint")
    loaded = fp.load_pretrained(tmp_path / "checkpoint", model=Holder(Mlp()).eval())
    assert isinstance(loaded.mlp, GatedMLP)
    x = torch.randn(5, WIDTH)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    from safetensors import safe_open

    (weights,) = (tmp_path / "checkpoint").glob("*.safetensors")
    with safe_open(weights, "pt") as file:
        names = set(file.keys())
    assert {"mlp.gate_proj.qweight", "mlp.up_proj.qweight", "mlp.down_proj.qweight"} <= names
    again = copy.deepcopy(loaded)
    fp.save_pretrained(again, tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(fp.load_pretrained(tmp_path / "again", model=Holder(Mlp()).eval())(x), model(x))


def test_compared_with_the_module_that_it_replaced():
    model, _ = model_of()
    batch = torch.randn(2, 5, WIDTH)
    result = fp.parity(model, [batch])
    (layer,) = result.layers
    assert (layer.fqn, layer.precision) == ("mlp", "w8a16")
    assert layer.kernel.relative_error < 1e-6 < 1e-3 < layer.quantisation.relative_error < 1e-2
    other = fp.parity(copy.deepcopy(model), [batch], reference=Holder(Mlp()).eval())
    assert [layer.fqn for layer in other.layers] == ["mlp"]


def test_plans_name_the_layers():
    model, report = model_of()
    assert [layer.fqn for layer in report.plan.layers] == ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    torch.manual_seed(0)
    other = Holder(Mlp()).eval()
    fp.swap(other, plan=report.plan)
    x = torch.randn(5, WIDTH)
    with torch.no_grad():
        assert isinstance(other.mlp, GatedMLP) and torch.equal(other(x), model(x))


@pytest.mark.parametrize("precision", ["int8", "w8a16"])
def test_decoders(precision):
    model = build("llama")
    ids = torch.randint(3, 90, (2, 7))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        fp.swap(model, precision, include="**", exclude="lm_head")
        assert sum(isinstance(m, GatedMLP) for m in model.modules()) == 2
        assert torch.cosine_similarity(model(input_ids=ids).logits, before, dim=-1).min() > 0.999
