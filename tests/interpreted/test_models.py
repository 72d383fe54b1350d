"""Whole models swapped to each precision, on the kernels as compiled for an H100: each layer beside its exact result."""

import pytest
import torch
from every_backend import cuda_and_triton
from rotation import paired
from small_models import batch, build

import forwardpass as fp
from forwardpass import dispatch
from forwardpass.cli import embedding

pytestmark = pytest.mark.interpreted

#: precision -> (dtype of the model, operation of its layers, the most that a kernel's result may be off, relative L2)
PRECISIONS = {
    "int8": (torch.float32, "int8_linear", 2e-7),
    "fp8": (torch.float16, "fp8_linear", 6e-4),
    "w8a16": (torch.float16, "w8a16_gemm", 5e-4),
}


def minilm():
    """all-MiniLM-L6-v2 and two sentences, where the extra `demo` is installed."""
    try:
        source = embedding.find_model("minilm")
    except (ValueError, OSError) as e:
        pytest.skip(str(e))
    model, tokenizer = embedding.load(source, "cpu")
    texts = ["A kernel is only as fast as its memory.", "Two cats sat on a warm stone wall."]
    return model, next(iter(embedding.tokenize(tokenizer, texts, model, "cpu")))


def models(name):
    return minilm() if name == "minilm" else (build(name), batch(name))


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("implementation", "name", "precision"),
    cuda_and_triton(paired(["bert", "llama", "minilm"], PRECISIONS), ["bert", "llama", "minilm"], every=3),
)
def test_swapped(implementation, name, precision):
    dtype, operation, most = PRECISIONS[precision]
    if implementation not in dispatch.operations[operation].compiled:
        pytest.skip(f"{operation} has no {implementation} kernel")
    model, inputs = models(name)
    model = model.to(dtype)
    expected = model(**inputs)[0]
    with fp.interpret("sm_90a", truncating=True) as device:
        report = fp.swap(model, precision)
        assert not any("reference" in w for w in report.warnings)
        with fp.use_backend(implementation):
            launched = device.counters["launches"]
            with torch.inference_mode():
                got = model(**inputs)[0]
            together = sum(len(names) - 1 for names in report.joined)  # layers that are one product
            assert device.counters["launches"] - launched >= len(report.swapped) - together
            parity = fp.parity(model, [inputs])
    assert device.findings == []
    for layer in parity.layers:
        # a product's error may be rounded to the next of e4m3's few values before the next product, and adds up
        gated = precision == "fp8" and isinstance(model.get_submodule(layer.fqn), fp.nn.GatedMLP)
        assert layer.kernel.relative_error < (20 if gated else 1) * most, layer
        assert layer.total.relative_error < (0.08 if gated else 0.06), layer
    tokens = inputs["attention_mask"].bool()  # encoders give zero at padding
    assert (got - expected)[tokens].norm() < 0.1 * expected[tokens].norm()
    assert parity.output.cosine_min > 0.99
