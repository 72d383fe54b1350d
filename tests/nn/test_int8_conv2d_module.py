"""Int8Conv2d: nn.Conv2d's shapes and attributes, its weight, copies and state dicts; what it refuses."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import forwardpass as fp
from forwardpass.nn import Int8Conv2d
from forwardpass.ops.common.activations import PLAIN

X = torch.randn(2, 32, 13, 9, generator=torch.Generator().manual_seed(0))


def off(y, expected):
    return ((y - expected).norm() / expected.norm()).item()


def conv(*args, **options):
    torch.manual_seed(0)
    return nn.Conv2d(*args, **options).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 1, "stride": 2},
        {"padding": (2, 1), "dilation": (2, 1), "stride": (1, 2)},
        {"groups": 2, "bias": False},
        {"groups": 32},
        {"padding": "same"},
        {"padding": "valid"},
    ],
    ids=str,
)
@torch.inference_mode()
def test_it_computes_what_the_convolution_does(options):
    module = conv(32, 32, 3, **options)
    layer = Int8Conv2d.from_torch(module)
    for x in (X, X.contiguous(memory_format=torch.channels_last), X[:, :, ::2].transpose(2, 3), X[:0]):
        y, expected = layer(x), module(x)
        assert y.shape == expected.shape and y.dtype == x.dtype
        assert y.permute(0, 2, 3, 1).is_contiguous()
        assert not len(x) or off(y, expected) < 0.02
        assert not len(x) or off(y, layer.exact(x)) < 1e-5
    assert layer(X[0]).shape == module(X[0]).shape and off(layer(X[0]), module(X[0])) < 0.02
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "dilation",
        "groups",
        "padding_mode",
        "transposed",
    ):
        assert getattr(layer, name) == getattr(module, name)


@pytest.mark.parametrize("activation", PLAIN)
@torch.inference_mode()
def test_activations_and_residuals(activation):
    module, residual = conv(32, 32, 1), torch.randn(2, 32, 13, 9)
    layer = Int8Conv2d.from_torch(module, activation=activation)
    of = {"gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "hard_swish": F.hardswish}.get(activation) or getattr(
        F, activation
    )
    assert off(layer(X), of(module(X))) < 0.03
    assert off(layer(X, residual), of(module(X)) + residual) < 0.03
    assert off(layer(X, residual, residual_first=True), of(module(X) + residual)) < 0.03


@torch.inference_mode()
def test_one_of_1_x_1_has_a_scale_a_pixel_and_a_zero_point():
    module = conv(32, 32, 1, stride=2)
    x = X.abs() * torch.logspace(-3, 3, 9)  # every column of pixels of another size, and one-sided
    layer = Int8Conv2d.from_torch(module)
    assert layer.is_pointwise and not Int8Conv2d.from_torch(conv(32, 32, 1, padding=1)).is_pointwise
    for column in range(5):
        assert off(layer(x)[..., column], module(x)[..., column]) < 0.01
    q, scale = torch.ones(32, 32, dtype=torch.int8), torch.ones(32)
    given = Int8Conv2d.from_torch(module, channel_scale=torch.full((32,), 2.0), quantized=(q, scale))
    assert torch.equal(given.weight.clone(), torch.full((32, 32, 1, 1), 2.0))
    assert off(given(X), layer.exact(X)) > 1 and off(given(X), given.exact(X)) < 1e-5
    for options in ({"channel_scale": torch.ones(32)}, {"quantized": (q, scale)}):
        with pytest.raises(ValueError, match="goes with a kernel of 1 x 1"):
            Int8Conv2d.from_torch(conv(32, 32, 3), **options)


@torch.inference_mode()
def test_a_sample_has_a_scale_of_its_own_and_a_static_one_is_for_all():
    module, x = conv(32, 32, 3), torch.cat([X[:1], 100 * X[:1]])
    y = Int8Conv2d.from_torch(module)(x)
    assert off(y[:1], module(x[:1])) < 0.02
    largest = x.abs().max() / 127
    static = Int8Conv2d.from_torch(module, input_scale=largest)
    assert static.input_scale.shape == (1,) and off(static(x)[1:], module(x[1:])) < 0.02
    assert off(static(x)[:1], module(x[:1])) > 0.1  # what one scale costs


def copies(layer):
    yield copy.deepcopy(layer)
    yield pickle.loads(pickle.dumps(layer))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)
    empty = Int8Conv2d(**layer.config())
    empty.load_state_dict(layer.state_dict())
    yield empty
    empty = Int8Conv2d(**layer.config(), device="meta")
    empty.load_state_dict({name: t.contiguous() for name, t in layer.state_dict().items()}, assign=True)
    yield empty
    yield layer.to("meta").to_empty(device="cpu")


@torch.inference_mode()
def test_copies_and_state_dicts():
    layer = Int8Conv2d.from_torch(conv(32, 48, 3), input_scale=torch.tensor([0.03]), activation="relu6").eval()
    y = layer(X)
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    for other in copies(layer):
        if other is layer:
            other.load_state_dict(state)
        assert other.qweight.permute(0, 2, 3, 1).is_contiguous()
        assert torch.equal(other(X), y) and other.config() == layer.config()
    with pytest.raises(RuntimeError, match="load it into the original model"):
        layer.load_state_dict(conv(32, 48, 3).state_dict())


@torch.inference_mode()
def test_casts_keep_integers_and_scales():
    layer = Int8Conv2d.from_torch(conv(32, 48, 3))
    for dtype in (torch.float16, torch.bfloat16):
        cast = copy.deepcopy(layer).to(dtype)
        assert (cast.qweight.dtype, cast.weight_scale.dtype, cast.bias.dtype) == (torch.int8, torch.float32, dtype)
        assert cast.weight.dtype == dtype and next(cast.parameters()).dtype == dtype
        assert cast(X.to(dtype)).dtype == dtype
        assert off(cast(X.to(dtype)).float(), layer(X)) < 0.02
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(X).dtype == torch.bfloat16


def test_its_weight_is_for_reading():
    module = conv(32, 48, 3)
    layer = Int8Conv2d.from_torch(module)
    assert layer.weight.shape == module.weight.shape and layer.weight.dtype == torch.float32
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # once in a process it says what reading costs
        assert off(layer.weight.clone(), module.weight) < 0.01
        assert off(F.conv2d(X, layer.weight, layer.bias), module(X)) < 0.02
    with pytest.raises(AttributeError, match="restore the layer"):
        layer.weight = module.weight
    with pytest.raises(RuntimeError, match="would write into the weight"):
        layer.weight.data.zero_()


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (lambda: nn.Linear(4, 4), "not an nn.Conv2d"),
        (lambda: type("Own", (nn.Conv2d,), {})(4, 4, 1), "may compute something else"),
        (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "pads with reflect"),
        (lambda: nn.Conv2d(4, 4, 2, padding="same"), "pads one side more"),
        (lambda: nn.Conv2d(4, 4, 1, dtype=torch.float64), "float64"),
        (lambda: nn.Conv2d(4, 4, 1, device="meta"), "meta"),
        (lambda: nn.Conv2d(131072, 1, 1, dtype=torch.float16), "the limit is 131071"),
    ],
)
def test_what_it_is_not_made_from(module, why):
    with pytest.raises(ValueError, match=why):
        Int8Conv2d.from_torch(module())


def test_the_deepest_is_computed():
    module = conv(131071, 1, 1, bias=False)
    x = torch.ones(1, 131071, 1, 1)
    with torch.inference_mode():
        layer = Int8Conv2d.from_torch(module)
        assert off(layer(x), layer.exact(x)) < 1e-5


def test_refusals_say_what_to_do():
    layer = Int8Conv2d.from_torch(conv(32, 32, 1))
    with torch.inference_mode():
        with pytest.raises(ValueError, match=r"\[N, 32, H, W\]"):
            layer(X[:, :16])
        with pytest.raises(ValueError, match=r"\[N, 32, H, W\]"):
            layer(X[None])
    with pytest.raises(RuntimeError, match="inference_mode"):
        layer(X.clone().requires_grad_())
    with pytest.raises(ValueError, match="kernel_size must be an integer from 1 on"):
        Int8Conv2d(4, 4, 0)
    with pytest.raises(ValueError, match="groups must divide"):
        Int8Conv2d(4, 4, 1, groups=3)
    with pytest.raises(ValueError, match="activation must be one of"):
        Int8Conv2d(4, 4, 1, activation="silu_mul")
    with pytest.raises(ValueError, match="must have 1 elements"):
        Int8Conv2d.from_torch(conv(32, 32, 1), input_scale=torch.ones(32))
    with pytest.raises(TypeError, match="tensor of floats"):
        Int8Conv2d.from_torch(conv(32, 32, 1), input_scale=1.0)
    assert fp.nn.Int8Conv2d is Int8Conv2d
