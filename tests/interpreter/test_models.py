"""Whole models swapped to each precision, on the kernels as compiled for an H100: each layer beside its exact result."""

import pytest
import torch
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


@pytest.mark.parametrize("implementation", ["cuda", "triton"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["bert", "llama", "minilm"])
def test_swapped(name, precision, implementation):
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
            assert device.counters["launches"] - launched >= len(report.swapped)
            parity = fp.parity(model, [inputs])
    assert device.findings == []
    for layer in parity.layers:
        assert layer.kernel.relative_error < most, layer
        assert layer.total.relative_error < 0.06, layer
    tokens = inputs["attention_mask"].bool()  # encoders give zero at padding
    assert (got - expected)[tokens].norm() < 0.1 * expected[tokens].norm()
    assert parity.output.cosine_min > 0.99
