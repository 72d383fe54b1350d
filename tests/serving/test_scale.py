"""The arithmetic of docs/scale.md."""

import pathlib

import pytest
import torch

import forwardpass as fp
from gpuless.rates import rates

scale = pytest.importorskip("examples.scale", reason="examples are in the checkout only; run pytest from its root")
transformers = pytest.importorskip("transformers")
ROOT = pathlib.Path(scale.__file__).parents[1]


def test_the_document_has_what_the_example_prints():
    document = (ROOT / "docs/scale.md").read_text()
    h100, l40s = scale.GPUS
    for table in (scale.one_model(h100, 4096), scale.one_model(l40s, 4096), scale.eight_gpus(h100, 4096, 2.0)):
        assert len(table) > 10 and "\n".join(table) in document


def test_gpus_are_those_of_the_interpreter():
    for gpu, arch, multiprocessors in zip(scale.GPUS, ("sm_90a", "sm_89"), (132, 142)):
        rate = rates(arch)
        assert gpu.bandwidth == rate["DRAM"] * 1e9
        assert gpu.flops == pytest.approx(2 * multiprocessors * rate["clock"] * 1e6 * rate["mma f16"], rel=2e-3)


def test_bytes_are_those_of_a_model():
    """A small one of transformers, swapped, and its cache."""
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=100, dtype=torch.bfloat16,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    sizes = scale.Model("small", 2, 64, 128, 4, 2, 32, 100)
    norms = 2 * 5 * 64
    assert sizes.weight_bytes(2) == sum(p.numel() * 2 for p in model.parameters()) - norms
    cache = fp.KVCache(config, "int8")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    fp.swap(model, {f"*.{name}": "w8a16" for name in names}, attention=True)
    quantised = [m for m in model.modules() if isinstance(m, fp.nn.QuantizedLinear)]
    assert sum(m.weight.numel() for m in quantised) == sizes.linears
    ids = torch.arange(10)[None]
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    a_token = sum(t.numel() * t.itemsize // t.shape[2] for layer in cache.layers for t in (layer.keys, layer.values))
    assert a_token + 2 * 2 * 2 * 4 == sizes.cache_bytes(1)  # and a scale for K and V of each layer and head


def test_what_the_formulas_say():
    model, gpu = scale.MODELS[0], scale.GPUS[0]
    assert scale.communication(model, gpu, 1, 100) == 0
    even = scale.even_latency(model, gpu, 4, 1)
    slow = scale.Gpu("even", gpu.memory, gpu.bandwidth, gpu.flops, float("inf"), even)
    alone = scale.Gpu("alone", gpu.memory, gpu.bandwidth, gpu.flops, 1.0, 0.0)
    assert scale.step(model, slow, 4, 1, 1, 0) == pytest.approx(scale.step(model, alone, 1, 1, 1, 0))
    assert scale.sequences(model, gpu, 1, 1, 4096) > 2 * scale.sequences(model, gpu, 1, 2, 4096)
