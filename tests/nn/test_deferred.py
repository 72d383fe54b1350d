"""Deferred results: which steps of a sum they remember, and that every other operation on one gives what it gives on the result."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import forwardpass as fp
from forwardpass.nn.deferred import Deferred
from forwardpass.nn.linear import quantized_linear

B, T, K, N = 2, 5, 64, 64


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Layers defer on a GPU alone. The CPU's operations compute the same sums."""
    monkeypatch.setattr(quantized_linear, "gpu_takes", lambda device: True)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = fp.nn.Int8Linear.from_torch(nn.Linear(K, N)).eval()
    layer.defers = True
    return layer


@pytest.fixture
def x():
    return torch.randn(B, T, K, generator=torch.Generator().manual_seed(1))


def gate_and_residual(dtype=torch.float32):
    g = torch.Generator().manual_seed(2)
    return torch.randn(B, 6 * N, generator=g).to(dtype).chunk(6, 1)[2], torch.randn(B, T, N, generator=g).to(dtype)


def deferred(layer, x):
    y = layer(x)
    assert isinstance(y, Deferred)
    return y


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gate_and_a_residual_are_one_operation(layer, x, dtype):
    x, (gate, r) = x.to(dtype), gate_and_residual(dtype)
    layer = layer.to(dtype)
    fused, product = layer.product(x, r, gate), layer.product(x)
    for y in (gate[:, None] * deferred(layer, x) + r, r + deferred(layer, x) * gate.unsqueeze(1)):
        assert type(y) is Tensor and torch.equal(y, fused)
    through = F.dropout(deferred(layer, x) / 1.0, 0.5, False)
    assert torch.equal(torch.add(r, torch.mul(through, gate[:, None])), fused)
    off = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(fused, gate[:, None] * product + r, rtol=off, atol=off)
    assert torch.equal(deferred(layer, x) + r, layer.product(x, r))
    one = gate[:1, None]  # of all samples
    assert torch.equal(one * deferred(layer, x) + r, layer.product(x, r, gate[:1].expand(B, N)))


@torch.inference_mode()
def test_questions_compute_nothing(layer, x, monkeypatch):
    y = deferred(layer, x)
    monkeypatch.setattr(type(layer), "product", lambda *_: pytest.fail("computed"))
    assert (y.shape, y.ndim, y.dim(), y.size(-1)) == ((B, T, N), 3, 3, N)
    assert (y.dtype, y.device.type, y.is_cuda, y.requires_grad) == (torch.float32, "cpu", False, False)
    assert y.is_floating_point() and y.numel() == B * T * N and isinstance(y, Tensor)


def without_torch_function(y):
    with torch._C.DisableTorchFunctionSubclass():
        return y + 1


OPERATIONS = {
    "below __torch_function__": lambda y, r, g: without_torch_function(y),
    "cat": lambda y, r, g: torch.cat([r, y], 1),
    "index": lambda y, r, g: y[:, 1:],
    "float": lambda y, r, g: y.double() + 1,
    "view": lambda y, r, g: y.view(-1, N).stride(),
    "scaled": lambda y, r, g: 2 * y + r,
    "subtracted": lambda y, r, g: r - g * y,
    "with alpha": lambda y, r, g: torch.add(r, y, alpha=2),
    "in place": lambda y, r, g: r.clone().add_(y),
    "gated twice": lambda y, r, g: g * (g * y) + r,
    "gate of rows": lambda y, r, g: torch.sigmoid(r) * y + r,
    "gate of another dtype": lambda y, r, g: g.bfloat16() * y + r,
    "residual of another dtype": lambda y, r, g: g * y + r.bfloat16(),
    "residual that is broadcast": lambda y, r, g: g * y + r[:, :1],
    "its own square": lambda y, r, g: y * y + y,
    "dropout in training": lambda y, r, g: F.dropout(y, 1.0, True),
    "halved": lambda y, r, g: y / 2 + r,
    "norm": lambda y, r, g: F.layer_norm(y, (N,)),
    "where": lambda y, r, g: torch.where(r > 0, y, r),
    "unbound": lambda y, r, g: y.unbind(0)[1],
    "list": lambda y, r, g: y.tolist(),
    "repr": lambda y, r, g: repr(y),
    "copies": lambda y, r, g: (copy.deepcopy(y), pickle.loads(pickle.dumps(y)), y.clone(), y.detach()),
    "numpy": lambda y, r, g: y.numpy().sum(),
    "pointer": lambda y, r, g: y.data_ptr() != 0,
}


@torch.no_grad()
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_other_operation_computes_the_result_first(layer, x, name):
    (gate, r), operation = gate_and_residual(), OPERATIONS[name]
    expected = operation(layer.product(x), r, gate[:, None])
    actual = operation(deferred(layer, x), r, gate[:, None])
    if isinstance(expected, Tensor | tuple):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        assert type(actual) is type(expected)
    else:
        assert actual == expected


@torch.no_grad()
def test_it_is_computed_once_and_then_stays(layer, x, monkeypatch):
    calls, product = [], type(layer).product
    monkeypatch.setattr(type(layer), "product", lambda *args: calls.append(args) or product(*args))
    y, (gate, r) = deferred(layer, x), gate_and_residual()
    first = y.clone()
    assert torch.equal(y + 0, first) and len(calls) == 1
    assert torch.equal(gate[:, None] * y + r, gate[:, None] * first + r) and len(calls) == 1


@torch.no_grad()
def test_an_input_that_was_written_into_raises(layer, x):
    gate, r = gate_and_residual()
    for use in (lambda y: y.clone(), lambda y: gate[:, None] * y + r):
        y = deferred(layer, x)
        x.mul_(2)
        with pytest.raises(RuntimeError, match="Int8Linear: its input was written into before its result was computed"):
            use(y)


def test_autograd_of_the_model_goes_on(layer, x):
    gate, r = gate_and_residual()
    (gate.requires_grad_()[:, None] * layer(x) + r).sum().backward()
    torch.testing.assert_close(gate.grad, layer.product(x).sum(1))
    with pytest.raises(RuntimeError, match="has no backward"):
        layer(x.clone().requires_grad_())


@torch.inference_mode()
def test_where_nothing_is_deferred(layer, x, monkeypatch):
    assert type(layer(x[0])) is Tensor  # rows without samples
    with torch.autocast("cpu", torch.bfloat16):
        assert type(layer(x)) is Tensor
    handle = layer.register_forward_hook(lambda module, args, y: y)
    assert type(layer(x)) is Tensor
    handle.remove()
    assert isinstance(layer(x), Deferred)
    monkeypatch.undo()  # on a CPU
    assert type(layer(x)) is Tensor


def test_compiled_code_has_no_deferred_results(layer, x):
    gate, r = gate_and_residual()
    compiled = torch.compile(lambda x: gate[:, None] * layer(x) + r, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), layer.product(x, r, gate))


@torch.inference_mode()
def test_a_norm_defers_for_kernels_of_a_gpu_alone(x):
    norm = nn.LayerNorm(K, elementwise_affine=False)
    instead = fp.nn.DeferringNorm(norm, "layer", norm.eps)
    assert type(instead(x)) is Tensor and torch.equal(instead(x), norm(x))
    assert not [*instead.parameters()] and not instead.state_dict()
    assert torch.equal(copy.deepcopy(instead)(x), norm(x))


@pytest.mark.interpreted
@torch.inference_mode()
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_norm_with_adaln_is_quantised_once_for_all_layers(kind, x, monkeypatch):
    torch.manual_seed(0)
    cls = nn.LayerNorm if kind == "layer" else nn.RMSNorm
    norm = cls(K, eps=1e-5, elementwise_affine=False)
    layers = [fp.nn.Int8Linear.from_torch(nn.Linear(K, N)).eval() for _ in range(3)]
    scale, shift = torch.randn(2, B, K, generator=torch.Generator().manual_seed(3)) / 4
    before = norm(x) * (1 + scale[:, None]) + shift[:, None]
    expected = [layer(before) for layer in layers]
    instead = fp.nn.DeferringNorm(norm, kind, norm.eps)
    with fp.interpret("sm_80"):
        y = instead(x) * (1 + scale[:, None]) + shift[:, None]
        assert isinstance(y, Deferred)
        monkeypatch.setattr(type(y), "alone", lambda *_: pytest.fail("the norm was computed by itself"))
        actual = [layer(y) for layer in layers]
        assert len(y.quantized) == 1
        monkeypatch.undo()
        torch.testing.assert_close(y + 0, before)
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).norm() < 0.01 * e.norm()
