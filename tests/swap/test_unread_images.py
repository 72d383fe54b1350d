"""Outputs of convolutions that wait for their readers: int8 for the next convolution, additions and activations in the epilogue."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from conv_models import MODELS, WIDE, Block, build, picture, randomised
from torch import nn

import forwardpass as fp
from forwardpass.nn import Int8Conv2d, int8_conv2d
from forwardpass.nn.unread_image import Steps, UnreadImage
from forwardpass.swap import verdicts

pytestmark = pytest.mark.filterwarnings("ignore:swap. int8_conv2d has no kernel")


@pytest.fixture(autouse=True)
def whatever_pays(monkeypatch):
    monkeypatch.setattr(int8_conv2d, "LEAST_UNREAD", 0)
    monkeypatch.setattr(verdicts, "_gains_by_waiting", lambda layer: True)


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, Int8Conv2d)]


def without(model):
    """A copy whose layers compute what they return."""
    other = copy.deepcopy(model)
    for layer in layers_of(other):
        layer.then = ()
    return other


def swapped(model, include, x):
    fp.swap(model, "int8", include=include, calibrate=[x])
    return model


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_results_are_those_of_before(name):
    model, x = swapped(build(name), WIDE[name], picture(4)), picture()
    assert torch.equal(model(x), without(model)(x))


@torch.inference_mode()
def test_what_comes_behind_each_is_found():
    model = swapped(build("resnet"), WIDE["resnet"], picture(4))
    block = model.blocks[0]
    assert block.conv1.then == ("int8",) and block.conv2.then == ("add", "relu")
    assert model.blocks[1].downsample[0].then == ()  # it is added, as floats
    assert "then add, relu" in str(block.conv2)
    assert swapped(build("mobilenet"), WIDE["mobilenet"], picture(4)).block.conv[2].then == ("add",)


@pytest.mark.parametrize("calls", ["conv2d", "plain"])
@torch.inference_mode()
def test_the_epilogue_computes_it(monkeypatch, calls):
    """By the calls of the operation: which of them add, and which give int8."""
    model, x, seen = swapped(build("resnet"), WIDE["resnet"], picture(4)), picture(), []
    operation = int8_conv2d.OPERATION
    monkeypatch.setattr(int8_conv2d, "OPERATION", lambda *args: (seen.append(args), operation(*args))[1])
    (model if calls == "conv2d" else without(model))(x)
    kinds = [(a[9], a[10], a[12] is not None and a[13]) for a in seen]  # activation, out_dtype, residual first
    in_8_bits, added = ("relu", torch.int8, False), ("relu", torch.float32, True)
    floats = [("relu", torch.float32, False), (None, torch.float32, False)]
    assert kinds == (2 * [in_8_bits, added] if calls == "conv2d" else 2 * floats)


class Reads(nn.Module):
    """What is read twice, or looked at, is computed once, in floats."""

    def __init__(self, how):
        super().__init__()
        self.a, self.how = nn.Conv2d(32, 32, 3, padding=1), how
        self.b = nn.Conv2d(32, 32, 1) if how == "written" else nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x):
        y = self.a(x)
        if self.how == "kept":
            self.features = y
            return self.b(y)
        if self.how == "twice":
            return self.b(y) + y
        if self.how == "returned":
            return self.b(y), y
        if self.how == "written":
            z = self.b(x)
            x.add_(1)
            return z + y
        if self.how == "functions":
            return F.relu(self.b(F.relu6(y))) + x
        assert self.how == "alias"
        z = y
        y += x
        return self.b(z)


@pytest.mark.parametrize(
    ("how", "then"),
    [
        ("kept", [("int8",), ()]),
        ("twice", [(), ("add",)]),
        ("returned", [(), ()]),
        ("written", [(), ()]),
        ("functions", [("relu6", "int8"), ("relu", "add")]),
        ("alias", [("add",), ()]),
    ],
)
@torch.inference_mode()
def test_readers_that_want_floats_get_them(how, then):
    torch.manual_seed(0)
    x = torch.randn(2, 32, 6, 6)
    model = swapped(nn.Sequential(Reads(how)).eval(), ["0.a", "0.b"], x)
    assert [layer.then for layer in layers_of(model)] == then
    y, expected = model(x.clone()), without(model)(x.clone())
    for a, b in zip([y] if how != "returned" else y, [expected] if how != "returned" else expected):
        assert torch.equal(a, b) and type(a) is torch.Tensor
    if how == "kept":  # and read later, by code that no run has shown
        features, plain = model[0].features, without(model)[0].a(x)
        assert type(features) is UnreadImage and torch.equal(features, plain)
        assert (features.numpy() == plain.numpy()).all() and torch.equal(torch.cat([features, features])[:2], plain)
        assert torch.equal(copy.deepcopy(features), plain)
        assert torch.equal(pickle.loads(pickle.dumps(features)), plain) and str(features) == str(plain)
        torch.save(features, file := io.BytesIO())
        file.seek(0)
        assert type(torch.load(file)) is torch.Tensor
        assert features.shape == plain.shape and features.stride() == plain.stride() and features.dtype == plain.dtype


@torch.inference_mode()
def test_what_is_expected_and_does_not_come_changes_nothing():
    torch.manual_seed(0)
    x = torch.randn(2, 32, 6, 6)
    model = swapped(nn.Sequential(Reads("twice")).eval(), ["0.a", "0.b"], x)
    expected = without(model)(x)
    for then in (("int8",), ("add", "relu"), ("relu", "add"), ("silu", "int8"), ("relu6",)):
        for layer in layers_of(model):
            layer.then = then
        assert torch.equal(model(x), expected)


@torch.inference_mode()
def test_a_hook_sees_a_plain_tensor():
    model, x, seen = swapped(build("resnet"), WIDE["resnet"], picture(4)), picture(), []
    expected = without(model)(x)
    for module in (model.blocks[0].conv1, model.blocks[0].bn2, model.blocks[1]):
        module.register_forward_hook(lambda m, args, y: seen.append(y))
    y = model(x)
    assert [type(t) for t in seen] == 3 * [torch.Tensor] and torch.equal(y, expected)


def test_an_input_that_is_written_into_before_it_is_read_is_an_error():
    """Outside of inference mode, where torch counts that."""
    layer, x, r = Int8Conv2d.from_torch(nn.Conv2d(32, 32, 1)), torch.randn(1, 32, 4, 4), torch.randn(1, 32, 4, 4)
    layer.then = ("add",)
    with torch.no_grad():
        expected = layer(x, r)
        assert torch.equal(layer(x) + r, expected)
        y = layer(x)
        x.add_(1)
        with pytest.raises(RuntimeError, match="wrote into its input"):
            y + r


@torch.inference_mode()
def test_additions_that_no_epilogue_computes():
    layer, x = Int8Conv2d.from_torch(nn.Conv2d(32, 32, 3, padding=1)), torch.randn(2, 32, 4, 4)
    plain = layer(x)
    layer.then = ("add",)
    column = torch.randn(32, 1, 1)
    for other in (column, 2.0, plain.double()):
        assert torch.equal(layer(x) + other, plain + other)
    assert torch.equal(torch.add(layer(x), plain, alpha=2), torch.add(plain, plain, alpha=2))
    z = plain.clone()
    z += layer(x)
    assert torch.equal(z, plain + plain) and torch.equal(layer(x) + layer(x), plain + plain)


@torch.inference_mode()
def test_a_run_that_gives_something_else_leaves_all_as_it_was(monkeypatch):
    def add(self, residual, in_place):
        self._note("add")
        return self._result(None) + residual + 1

    monkeypatch.setattr(UnreadImage, "add", add)
    model = swapped(build("resnet"), WIDE["resnet"], picture(4))
    assert {layer.then for layer in layers_of(model)} == {()}
    monkeypatch.undo()
    assert verdicts.let_outputs_wait(model) is None and model.blocks[0].conv2.then == ("add", "relu")


@torch.inference_mode()
def test_on_a_cpu_products_of_1_x_1_do_not_wait(monkeypatch):
    monkeypatch.undo()
    model = swapped(build("mobilenet"), WIDE["mobilenet"], picture(4))
    assert {layer.then for layer in layers_of(model)} == {()}


@torch.inference_mode()
def test_copies_and_folders_keep_what_was_found(tmp_path):
    model, x = swapped(build("resnet"), WIDE["resnet"], picture(4)), picture()
    expected, found = model(x), [layer.then for layer in layers_of(model)]
    fp.save_pretrained(model, tmp_path / "folder")
    loaded = fp.load_pretrained(tmp_path / "folder", model=build("resnet"))
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [layer.then for layer in layers_of(other)] == found and torch.equal(other(x), expected)
    fp.restore(model)
    assert torch.equal(model(x), build("resnet")(x))


@pytest.mark.parametrize(
    "then", [("int8", "add"), ("relu", "silu"), ("add", "add"), ("add", "int8"), ("add", "relu", "int8"), ("x",)]
)
def test_steps_that_no_epilogue_has_are_refused(then):
    with pytest.raises(ValueError, match="then is"):
        Int8Conv2d(32, 32, 3, then=then)


def test_a_layer_that_is_called_twice_is_left_alone():
    notes = Steps(None, [((), "add"), ((), "add")])
    assert notes.chain() == () and Steps(None, [((), "int8"), ((), "int8")]).chain() == ("int8",)


@torch.inference_mode()
def test_blocks_of_torchvision_and_timm():
    from timm.models.resnet import BasicBlock
    from torchvision.models.resnet import Bottleneck

    torch.manual_seed(0)
    x = torch.randn(2, 64, 6, 6)
    model = randomised(nn.Sequential(Bottleneck(64, 16), BasicBlock(64, 64), Block(64)))
    include = ["0.conv3", "1.conv1", "1.conv2", "2.conv1", "2.conv2"]
    model = swapped(model, include, x)
    found = {n: m.then for n, m in model.named_modules() if isinstance(m, Int8Conv2d)}
    assert found == {n: ("int8",) if "conv1" in n else ("add", "relu") for n in include}
    assert torch.equal(model(x), without(model)(x))
