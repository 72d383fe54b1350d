"""A whole model, swapped, with the package's kernels interpreted in every layer: the bits of its CPU kernels."""

import pytest
import torch

import forwardpass as fp
from forwardpass import dispatch
from forwardpass.cli import embedding
from forwardpass.nn import Int8Linear
from forwardpass.swap import swapping

pytestmark = pytest.mark.interpreted


def swapped():
    """(all-MiniLM-L6-v2 in int8, a padded batch of real text)."""
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    try:
        model, tokenizer = embedding.load(embedding.find_model("minilm"))
    except ValueError as e:
        pytest.skip(str(e))
    fp.swap(model, precision="int8", keep=False, encoder=False)
    assert sum(isinstance(m, Int8Linear) for m in model.modules()) > 30
    texts = embedding.builtin_texts()[1]
    (batch,) = embedding.tokenize(tokenizer, sorted(texts, key=len)[:2], model)
    return model, batch


@pytest.fixture(scope="module")
def minilm():
    """Activations apart, as torch computes them: then all bits are equal."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(swapping, "_fused", lambda leaf: {})
        return swapped()


def by_its_parts(layer, x):
    """An Int8Linear from the operations within int8_linear: two have CUDA and Triton kernels, and the product is torch's."""
    q, scale, zero_point = fp.ops.quantize(
        x,
        torch.int8,
        scale=layer.input_scale,
        zero_point=layer.input_zero_point,
        symmetric=layer.symmetric,
        channel_scale=layer.channel_scale,
    )
    acc = torch._int_mm(q.flatten(0, -2).contiguous(), layer.qweight.t()).unflatten(0, q.shape[:-1])
    shift = {} if layer.symmetric else {"a_zero_point": zero_point, "b_sum": layer.weight_sum}
    return fp.ops.dequant_activation(acc, scale, layer.weight_scale, bias=layer.bias, out_dtype=x.dtype, **shift)


@pytest.mark.every(2)
@torch.inference_mode()
def test_as_it_is(minilm):
    """auto takes a layer's CUDA kernel where it has one, and the CPU's elsewhere."""
    model, batch = minilm
    expected = model(**batch).last_hidden_state
    with fp.interpret("sm_80", seed=1) as device:
        got = model(**batch).last_hidden_state
        may_run = dispatch.interpreter().why_not("cuda") is None
    assert torch.equal(got, expected)
    has_kernel = "cuda" in dispatch.operations["int8_linear"].compiled and may_run
    assert (device.counters["launches"] > 0) == has_kernel


@pytest.mark.every(2)
@torch.inference_mode()
def test_with_its_activations_in_its_layers():
    """GELU may differ in the last bits, and a value that was about to be rounded the other way then is by a step of 8 bits."""
    model, batch = swapped()
    assert sum(getattr(m, "activation", None) == "gelu" for m in model.modules()) == 6
    expected = model(**batch).last_hidden_state
    with fp.interpret("sm_80", seed=1):
        if reason := fp.dispatch.interpreter().why_not("cuda"):
            pytest.skip(str(reason))
        got = model(**batch).last_hidden_state
    off = (got - expected).norm() / expected.norm()
    assert 0 < off < 5e-4


@pytest.mark.every(2)
@pytest.mark.parametrize("implementation", ["cuda", "triton"])
@torch.inference_mode()
def test_every_layer_by_its_kernels(minilm, implementation, monkeypatch):
    """INT8 without an activation behind it has equal bits on all backends: then so has the output of the model."""
    model, batch = minilm
    expected = model(**batch).last_hidden_state
    layers = [m for m in model.modules() if isinstance(m, Int8Linear)]
    with fp.interpret("sm_80", seed=1) as device:
        if reason := fp.dispatch.interpreter().why_not(implementation):
            pytest.skip(str(reason))

        def forward(layer, x):
            with fp.use_backend(implementation):
                return by_its_parts(layer, x)

        monkeypatch.setattr(Int8Linear, "forward", forward)
        got = model(**batch).last_hidden_state
    assert device.counters["launches"] == 2 * len(layers)
    assert device.findings == []
    assert torch.equal(got, expected)
    layers[7].weight_sum += 1  # of one layer, one step of 127 is seen
    with fp.interpret("sm_80", seed=1):
        got = model(**batch).last_hidden_state
    layers[7].weight_sum -= 1
    assert not torch.equal(got, expected)
