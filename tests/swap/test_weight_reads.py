"""Code of a model that reads a layer's weight, in ways that no reading of its text sees, gets numbers that are right to the
quantisation; what would write there is refused."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import forwardpass as fp

SIZE = 256


class Holder(nn.Module):
    """Two layers, of which the second is used by its weight; how: of each class below."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x):
        return self.use(F.relu(self.first(x)))


class Helper(Holder):
    def _project(self, x, layer):
        return F.linear(x, layer.weight, layer.bias)

    def use(self, x):
        return self._project(x, self.second)


class Alias(Holder):
    def use(self, x):
        layer = self.second
        return x @ layer.weight.t() + layer.bias


class Getattr(Holder):
    def use(self, x):
        return F.linear(x, getattr(self.second, "weight"), self.second.bias)  # noqa: B009


class Data(Holder):
    def use(self, x):
        layer = self.second
        return F.linear(x, layer.weight.data, layer.bias.data)


class Rows(Holder):
    def use(self, x):
        layer = self.second
        return torch.cat(
            [F.linear(x, layer.weight[i : i + 64], layer.bias[i : i + 64]) for i in range(0, SIZE, 64)], -1
        )


class Views(Holder):
    def use(self, x):
        layer = self.second
        return torch.cat([x @ w.T for w in layer.weight.chunk(4)], -1) + layer.bias


class Einsum(Holder):
    def use(self, x):
        layer = self.second
        return torch.einsum("...k,nk->...n", x, layer.weight) + layer.bias


class Normed(Holder):
    def use(self, x):
        layer = self.second
        return layer(x) / layer.weight.norm(dim=1)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x):
        return F.relu(self.first(x))


class Grandparent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, x):
        y = self.inner(x)
        return F.linear(y, self.inner.second.weight, self.inner.second.bias)


READERS = [Helper, Alias, Getattr, Data, Rows, Views, Einsum, Normed, Grandparent]


def build(cls=Helper, dtype=torch.float32, **bias):
    torch.manual_seed(0)
    return cls(**bias).eval().to(dtype)


def error(y, expected):
    return float((y.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.every(2)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("precision", ["int8", "fp8", "w8a16", "bf16"])
@pytest.mark.parametrize("cls", READERS)
@pytest.mark.filterwarnings("ignore")
def test_reading_gives_the_weight(cls, precision, mode):
    """Off by factors of thousands while `weight` was the integers."""
    model, x = build(cls), torch.randn(5, SIZE)
    with mode():
        expected = model(x)
        report = fp.swap(model, precision, include="**")
        assert {s.fqn.rpartition(".")[2] for s in report.swapped} == {"first", "second"}
        assert error(model(x), expected) < (0.06 if precision == "fp8" else 0.02)  # e4m3 inputs and weights, twice: .05


@pytest.mark.filterwarnings("ignore")
def test_smoothed_and_transposed():
    from transformers.pytorch_utils import Conv1D

    linear, scale = nn.Linear(64, 96), torch.rand(64) + 0.5
    smoothed = fp.nn.Int8Linear.from_torch(linear, channel_scale=scale)
    assert error(smoothed.weight.clone(), linear.weight) < 0.01
    conv = Conv1D(96, 64)
    model = nn.Sequential(conv)
    fp.swap(model, "int8", include="0")
    assert model[0].weight.shape == conv.weight.shape == (64, 96)
    assert error(model[0].weight.clone(), conv.weight) < 0.01
    block = fp.nn.Fp8Linear.from_torch(nn.Linear(200, 300).bfloat16(), scales="block")
    assert block.weight.dtype == torch.bfloat16 and block.weight.shape == (300, 200)


WRITES = {
    "mul_": lambda m: m.weight.mul_(2),
    "data.mul_": lambda m: m.weight.data.mul_(2),
    "iadd": lambda m: m.weight.__iadd__(1),
    "a row": lambda m: m.weight[0].zero_(),
    "setitem": lambda m: m.weight.__setitem__(0, 1.0),
    "of a view": lambda m: m.weight.view(-1)[3:].add_(1),
    "of a transposed": lambda m: m.weight.t().copy_(torch.zeros(64, 64)),
    "of a chunk": lambda m: m.weight.chunk(2)[1].fill_(0),
    "detached": lambda m: m.weight.detach().zero_(),
    "out=": lambda m: torch.mul(torch.ones(64, 64), 2, out=m.weight),
    "foreach": lambda m: torch._foreach_mul_([m.weight], 2.0),
    "init": lambda m: nn.init.normal_(m.weight),
    "data =": lambda m: setattr(m.weight, "data", torch.zeros(64, 64)),
    "tensor": lambda m: setattr(m, "weight", torch.zeros(64, 64)),
    "parameter": lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(64, 64))),
    "None": lambda m: setattr(m, "weight", None),
    "grad": lambda m: m.weight.requires_grad_(),
    "numpy": lambda m: m.weight.numpy().fill(0),
    "pointer": lambda m: m.weight.data_ptr(),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.filterwarnings("ignore")
def test_writing_is_refused(write, mode):
    with mode():
        layer, x = fp.nn.Int8Linear.from_torch(nn.Linear(64, 64)), torch.randn(3, 64)
        before = layer(x)
        with pytest.raises((RuntimeError, AttributeError, ValueError)) as e:
            WRITES[write](layer)
        assert "\n" not in str(e.value)
        assert torch.equal(layer(x), before)


@pytest.mark.filterwarnings("ignore")
def test_values_follow_the_layer():
    layer, other = (fp.nn.Int8Linear.from_torch(nn.Linear(64, 64)) for _ in range(2))
    weight = layer.weight
    assert layer.weight is weight  # it costs nothing to ask again
    layer.load_state_dict(other.state_dict())
    assert torch.equal(weight.clone(), other.weight.clone()) and torch.equal(layer.weight.clone(), other.weight.clone())
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), again(layer)):
        copied.load_state_dict(fp.nn.Int8Linear.from_torch(nn.Linear(64, 64)).state_dict())
        assert not torch.equal(copied.weight.clone(), layer.weight.clone())
    half = copy.deepcopy(layer).half()
    assert half.weight.dtype == torch.float16 and half.weight_scale.dtype == torch.float32
    assert layer.to("meta").weight.is_meta


def again(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_it_warns_once_of_the_cost():
    from forwardpass.nn.linear import dequantized_weight

    layer = fp.nn.Int8Linear.from_torch(nn.Linear(64, 64))
    dequantized_weight._warned = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            layer.weight.dtype == torch.float32 and layer.weight.shape == (64, 64) and layer.weight.device.type == "cpu"
        )
        assert isinstance(layer.weight, torch.Tensor) and not layer.weight.requires_grad and "64" in repr(layer.weight)
    with pytest.warns(UserWarning, match=r"reads the weight of a quantised layer \(64 x 64\)"):
        layer.weight.sum()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.weight.sum()


@pytest.mark.every(2)
@pytest.mark.filterwarnings("ignore")
def test_compiled_and_exported():
    model, x = build(), torch.randn(5, SIZE)
    fp.swap(model, "int8", include="**")
    with torch.no_grad():
        expected = model(x)
        assert error(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected) < 1e-5
        assert error(torch.export.export(model, (x,)).module()(x), expected) < 1e-5


# ---- what else nn.Linear answers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["int8", "fp8", "w8a16"])
@pytest.mark.filterwarnings("ignore")
def test_a_model_of_layers_alone_has_a_parameter_that_says_where_it_is(precision, dtype):
    """`next(model.parameters())` raised StopIteration."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64)).to(dtype)
    names = {*model.state_dict()}
    fp.swap(model, precision, include="**")
    p = next(model.parameters())
    assert p.dtype == dtype and p.device.type == "cpu" and p.requires_grad and p.numel() == 0
    assert {name for name in names if name.endswith("bias")} == {n for n in model.state_dict() if n.endswith("bias")}
    assert {n for n, t in model.state_dict().items() if not t.numel()} == {"0.anchor", "1.anchor"}
    assert next(model.half().parameters()).dtype == torch.float16 == model[0].weight.dtype
    assert next(model.to("meta").parameters()).is_meta


@pytest.mark.parametrize("precision", ["int8", "fp8", "w8a16", "bf16"])
@pytest.mark.filterwarnings("ignore")
def test_autocast_gives_the_dtype_that_linear_gives(precision):
    """float32 before."""
    model, x = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)), torch.randn(3, 64)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(x)
        fp.swap(model, precision, include="**")
        y = model(x)
        assert y.dtype == expected.dtype == torch.bfloat16 and error(y, expected) < 0.06
    with torch.no_grad():
        assert model(x).dtype == torch.float32


@pytest.mark.filterwarnings("ignore")
def test_state_dicts_of_an_earlier_version():
    """Their integers have the name `weight`."""
    layer, other = (fp.nn.Int8Linear.from_torch(nn.Linear(64, 64)) for _ in range(2))
    earlier = {"weight" if name == "qweight" else name: t for name, t in other.state_dict().items() if name != "anchor"}
    layer.load_state_dict(earlier)
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in layer.state_dict().items())
    assert "weight" in earlier  # the caller's is as it was
    layer.load_state_dict({name: t.clone() for name, t in other.state_dict().items()}, assign=True)
    assert layer.weight.shape == (64, 64)
