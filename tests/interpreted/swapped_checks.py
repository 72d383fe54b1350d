"""Tests of a user of forwardpass that say device="cuda": swapped models run this package's own kernels on the interpreted GPU."""

import copy

import pytest
import torch
from torch import nn

import forwardpass as fp
from forwardpass.cli.doctor import examine


def mlp(dtype):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128))
    return layers.to("cuda", dtype).eval()


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(128, 2, 256, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).to("cuda", torch.bfloat16).eval()


def error(y, expected):
    assert y.is_cuda and y.dtype == expected.dtype and y.shape == expected.shape
    return float((y.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("backend", ["auto", "cuda", "triton"])
@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.02), ("fp8", 0.06), ("w8a16", 0.02)])
@torch.inference_mode()
def test_layers(precision, bound, backend):
    model = mlp(torch.bfloat16)
    x = torch.randn(3, 128, device="cuda", dtype=torch.bfloat16)
    expected = model(x)
    report = fp.swap(model, precision)
    assert len(report.swapped) == 2
    with fp.use_backend(backend):
        assert 0 < error(model(x), expected) < bound
    fp.restore(model)
    assert torch.equal(model(x), expected)


@torch.inference_mode()
def test_the_same_as_on_the_cpu():
    """Sums of int8 are exact."""
    x = torch.randn(5, 128)
    model = mlp(torch.float32)
    fp.swap(model, "int8")
    torch.testing.assert_close(model(x.cuda()).cpu(), model.cpu()(x), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_attention_and_its_projections():
    model = encoder()
    x = torch.randn(2, 9, 128, device="cuda", dtype=torch.bfloat16)
    expected = model(x)
    report = fp.swap(model, "int8")
    assert [s.fqn for s in report.attention] == ["layers.0.self_attn"]
    assert {s.fqn for s in report.swapped} >= {"layers.0.self_attn.in_proj", "layers.0.self_attn.out_proj"}
    assert 0 < error(model(x), expected) < 0.05


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
@torch.inference_mode()
def test_decoding(dtype):
    """append_kv writes into the cache that attention_decode reads."""
    k, v, q = (torch.randn(2, 4, heads, 64, device="cuda").bfloat16() for heads in (2, 2, 4))
    lens = torch.full((2,), 4, device="cuda", dtype=torch.int32)
    shape, scales = (2, 32, 2, 64), {}
    caches = [torch.zeros(shape, device="cuda", dtype=dtype) for _ in range(2)]
    if dtype == torch.int8:
        scales = {name: torch.zeros(shape[:3], device="cuda") for name in ("k_scale", "v_scale")}
    fp.ops.append_kv(k, v, *caches, lens, **scales)
    o = fp.ops.attention_decode(q, *caches, lens, **scales)
    assert error(o, fp.ops.attention(q, k, v, causal=True)) < 0.03


@torch.inference_mode()
def test_graphs_and_compile():
    model = mlp(torch.bfloat16)
    fp.swap(model, "int8")
    x, graph = torch.randn(3, 128, device="cuda", dtype=torch.bfloat16), torch.cuda.CUDAGraph()
    expected = model(x)
    static = torch.zeros_like(x)
    with torch.cuda.graph(graph):
        y = model(static)
    static.copy_(x)
    graph.replay()
    assert torch.equal(y, expected)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)


def test_what_is_said_of_it():
    x = torch.randn(2, 64)
    on_gpu, on_cpu = fp.explain("quantize", x.cuda(), torch.int8), fp.explain("quantize", x, torch.int8)
    assert on_gpu.backend == "cuda" and on_gpu["triton"] is None and on_gpu["cpu"].code == "device"
    assert on_cpu.backend == "cpu" and on_cpu["cuda"].code == on_cpu["triton"].code == "device"
    assert fp.ops.quantize(x, torch.int8)[0].device.type == "cpu"


def test_doctor(monkeypatch):
    names = ("int8_gemm", "append_kv")
    monkeypatch.setattr("forwardpass.dispatch.operations", {name: fp.dispatch.operations[name] for name in names})
    found = examine()
    assert not found["problems"], found["problems"]
    rows = {(k["operation"], k["backend"]): k for k in found["kernels"]}
    assert all(rows[name, backend]["parity"]["ok"] for name in names for backend in ("cuda", "triton", "cpu"))
