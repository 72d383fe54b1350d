"""FloatConv2d: a convolution in floats that computes the norm and the activation behind it."""

import copy
import pickle

import pytest
import torch
from torch import nn

import forwardpass as fp
from forwardpass.nn import float_conv2d
from forwardpass.ops.common.activations import PLAIN, activate

LAST = torch.channels_last


def made(activation=None, dtype=torch.float32, bias=True, **options):
    """(the layer, what it stands for, an input)"""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, bias=bias, **{"padding": 1, "groups": 8, **options})
    norm = nn.BatchNorm2d(8, eps=1e-3)
    nn.init.uniform_(norm.weight, -8, 8)  # so that outputs are beyond 6
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.3, 3)
    conv, norm = conv.to(dtype).eval(), norm.to(dtype).eval()
    layer = fp.nn.FloatConv2d(conv, activation)
    layer.fold(norm)
    return layer, lambda x: activate(activation, norm(conv(x))), torch.randn(2, 8, 11, 9).to(dtype)


@pytest.fixture
def onednn(monkeypatch):
    """Whether a call went to oneDNN's own operation: one entry each."""
    calls = []
    is_for = float_conv2d._is_for_onednn

    def noted(*args):
        calls.append(is_for(*args))
        return calls[-1]

    monkeypatch.setattr(float_conv2d, "_is_for_onednn", noted)
    return calls


@pytest.mark.parametrize("activation", [None, *PLAIN])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_it_gives_what_the_three_give(onednn, activation, bias):
    layer, expected, x = made(activation, bias=bias)
    for images in (x, x.contiguous(memory_format=LAST), x[:, :, ::2]):
        torch.testing.assert_close(layer(images), expected(images), rtol=1e-5, atol=1e-4)
    assert layer(x).is_contiguous(memory_format=LAST) and torch.equal(layer(x[0]), layer(x[:1])[0])
    assert onednn == 6 * [True]
    with torch.backends.mkldnn.flags(enabled=False):
        torch.testing.assert_close(layer(x), expected(x), rtol=1e-5, atol=1e-4)
    assert onednn[-1] is False


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2},
        {"padding": "same", "kernel_size": 4},
        {"padding": "valid", "dilation": 2},
        {"padding": (0, 2), "stride": (1, 2)},
        {"groups": 1},
    ],
)
@torch.inference_mode()
def test_windows(options):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, **{"kernel_size": 3, "groups": 8, **options}).eval()
    x = torch.randn(2, 8, 11, 10).contiguous(memory_format=LAST)
    torch.testing.assert_close(fp.nn.FloatConv2d(conv)(x), conv(x), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_classes_that_pad_one_side_more():
    from timm.layers import Conv2dSame

    conv = Conv2dSame(8, 8, 3, stride=2).eval()
    for size in (8, 9, 11):
        x = torch.randn(1, 8, size, size + 1)
        torch.testing.assert_close(fp.nn.FloatConv2d(conv)(x), conv(x), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_other_numbers_of_images_after_the_first():
    layer, expected, x = made("relu6")
    layer(x)
    for images in (x[:1], x.repeat(3, 1, 2, 1), x[:0]):
        torch.testing.assert_close(layer(images), expected(images), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3), (torch.float64, 1e-6)])
@torch.inference_mode()
def test_other_dtypes(dtype, tolerance):
    layer, expected, x = made("silu", dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert (y.double() - expected(x).double()).norm() < tolerance * expected(x).double().norm()


@torch.no_grad()
def test_what_is_written_into_a_tensor_counts():
    layer, expected, x = made("relu")
    norm, conv = layer.norm[0], layer
    for tensor in (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var):
        layer(x)
        tensor.mul_(1.5)
        torch.testing.assert_close(layer(x), expected(x), rtol=1e-5, atol=1e-4)
    layer.load_state_dict({name: 2 * t for name, t in layer.state_dict().items()})
    torch.testing.assert_close(layer(x), expected(x), rtol=1e-5, atol=2e-4)
    nn.Sequential(layer, norm).double()
    assert layer(x.double()).dtype == torch.float64


def test_gradients_are_those_of_the_three(onednn):
    layer, expected, x = made("silu")
    layer(x.clone().detach().requires_grad_()).square().sum().backward()
    got = [p.grad.clone() for p in (*layer.parameters(), *layer.norm[0].parameters())]
    layer.zero_grad(), layer.norm[0].zero_grad()
    expected(x).square().sum().backward()
    for a, p in zip(got, (*layer.parameters(), *layer.norm[0].parameters()), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-4)
    assert not any(onednn)


@torch.inference_mode()
def test_copies_pickles_and_compiled_code():
    layer, _, x = made("relu6")
    y = layer(x)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), y) and copied.weight is not layer.weight
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), y, rtol=1e-5, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_it_is_the_convolution_by_its_names():
    conv = nn.Conv2d(8, 16, 3, stride=2)
    layer = fp.nn.FloatConv2d(conv, "relu")
    assert layer.weight is conv.weight and {*layer.state_dict()} == {"weight", "bias"} and layer.in_channels == 8
    assert "8, 16, kernel_size=(3, 3), stride=(2, 2), relu" in str(layer)
    with pytest.raises(ValueError, match="activation must be one of"):
        fp.nn.FloatConv2d(conv, "tanh")
    for other in (
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv1d(8, 8, 3),
        type("Own", (nn.Conv2d,), {})(8, 8, 3),
    ):
        with pytest.raises(ValueError, match=r"takes an nn.Conv2d that pads with zeros"):
            fp.nn.FloatConv2d(other)


@torch.inference_mode()
def test_an_input_that_does_not_fit_is_refused():
    layer = fp.nn.FloatConv2d(nn.Conv2d(8, 16, 3, stride=2), "relu")
    with pytest.raises(RuntimeError, match="to have 8 channels"):
        layer(torch.randn(1, 4, 9, 9))
    with pytest.raises(RuntimeError, match="Expected"):
        layer(torch.randn(9, 9))
    with pytest.raises(RuntimeError):
        layer(torch.randn(1, 8, 2, 2))
