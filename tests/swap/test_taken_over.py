"""Models that other libraries have loaded in 8 bits: their layers' bytes taken over."""

import pytest
import torch
import transformers
from rotation import in_turn
from small_models import objects, outputs
from stored_formats import layers_of, llama, write_compressed
from torch import nn
from transformers.integrations.compressed_tensors import CompressedTensorsFP8Linear
from transformers.integrations.finegrained_fp8 import FP8Linear

import forwardpass as fp
from forwardpass.nn.linear.quantized_linear import quantize_weight
from forwardpass.ops.common.quantized_rows import E4M3

X = {"input_ids": torch.arange(3, 35).reshape(2, 16)}


def fine_grained(linear, block=(128, 128), scheme="dynamic"):
    new = FP8Linear(linear.in_features, linear.out_features, block, scheme)
    q, s = quantize_weight(linear.weight.detach(), E4M3, "block" if block else "tensor")
    new.weight.data, new.weight_scale_inv.data = q.contiguous(), s if block else s[0]
    if scheme == "static":
        new.activation_scale.data.fill_(0.03125)
    return new, q.double() * (
        s.repeat_interleave(128, 0).repeat_interleave(128, 1)[: q.shape[0], : q.shape[1]] if block else s
    )


def compressed(linear):
    new = CompressedTensorsFP8Linear(linear.in_features, linear.out_features)
    q, s = quantize_weight(linear.weight.detach(), E4M3)
    new.weight.data, new.weight_scale.data = q.contiguous(), s[None]
    return new, q.double() * s[:, None]


def bitsandbytes(linear):
    module = pytest.importorskip("bitsandbytes.nn.modules")
    new = module.Linear8bitLt(
        linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=6.0
    )
    q, s = quantize_weight(linear.weight.detach())
    new.weight = module.Int8Params(q.contiguous(), requires_grad=False, CB=q.contiguous(), SCB=s * 127)
    return new, q.double() * (s * 127 / 127)[:, None]


KINDS = {
    "blocks": fine_grained,
    "one scale": lambda m: fine_grained(m, None),
    "static": lambda m: fine_grained(m, None, "static"),
    "compressed": compressed,
    "bitsandbytes": bitsandbytes,
}


def model_of(make):
    """A Llama whose projections are such layers, and their weights."""
    model, weights = llama(), {}
    for fqn, m in [*model.named_modules()]:
        if isinstance(m, nn.Linear) and fqn != "lm_head":
            new, weights[fqn] = make(m)
            model.set_submodule(fqn, new)
    return model.eval(), weights


@pytest.mark.every(2)
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_taken_over(kind, tmp_path):
    model, weights = model_of(KINDS[kind])
    before = objects(model)
    storages = {
        m.weight.data_ptr() for m in model.modules() if type(m).__name__ in ("FP8Linear", "CompressedTensorsFP8Linear")
    }
    report = fp.swap(model)
    assert any("outliers" in w for w in report.warnings) == (kind == "bitsandbytes")
    assert {s.fqn for s in report.swapped} == weights.keys() and {s.precision for s in report.swapped} == {"stored"}
    assert [s.fqn for s in report.skipped if s.reason.code != "attention_on_cpu"] == ["lm_head"]
    for fqn, layer in layers_of(model).items():
        torch.testing.assert_close(layer._dequantized_weight(), weights[fqn], rtol=1e-6, atol=0)
    assert model.model.layers[0].self_attn.o_proj.qweight.data_ptr() in storages or kind == "bitsandbytes"  # no copy
    y, expected = outputs(model, X), outputs(llama(), X)
    assert (y - expected).norm() < 0.1 * expected.norm()
    fp.save_pretrained(model, tmp_path)
    assert torch.equal(outputs(fp.load_pretrained(tmp_path), X), y)
    fp.restore(model)
    assert objects(model)[0] == before[0]
    assert torch.equal(outputs_after(model, report), y)


def outputs_after(model, report):
    fp.swap(model, plan=report.plan)
    return outputs(model, X)


@torch.inference_mode()
def test_other_layers_are_swapped_beside_them():
    model, _ = model_of(compressed)
    report = fp.swap(model, "int8", include=["**", "lm_head"])
    assert {s.precision for s in report.swapped} == {"stored", "int8"}
    assert [s.fqn for s in report.swapped if s.precision == "int8"] == ["lm_head"]
    fp.restore(model)
    assert (
        fp.swap(model, "stored", dry_run=True).to_json()["swapped"]
        and type(model.model.layers[0].mlp.up_proj) is not nn.Linear
    )


def test_a_model_of_floats_needs_a_precision():
    with pytest.raises(ValueError, match="either precision= or plan="):
        fp.swap(llama())
    model = llama()
    report = fp.swap(model, "stored")
    assert not report.swapped and {s.reason.code for s in report.skipped if "proj" in s.fqn} == {"floats"}


def test_what_has_no_kernels_stays_with_the_reason():
    model, _ = model_of(compressed)
    odd = model.model.layers[0].mlp.up_proj
    odd.weight_scale.data = torch.full((3, 5), 0.1)
    broken = model.model.layers[1].mlp.up_proj
    broken.weight_scale.data = torch.full_like(broken.weight_scale, torch.nan)
    modules = {fqn: id(m) for fqn, m in model.named_modules()}
    with pytest.raises(ValueError, match="no scales"):
        fp.swap(model)
    assert {fqn: id(m) for fqn, m in model.named_modules()} == modules  # as it was
    report = fp.swap(model, exclude="model.layers.1.mlp.up_proj")
    (skipped,) = [s for s in report.skipped if s.fqn == "model.layers.0.mlp.up_proj"]
    assert skipped.reason.code == "stored" and "[3, 5]" in str(skipped.reason)


@pytest.mark.every(3)
@pytest.mark.parametrize("preset", in_turn(["W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK"]))
@torch.no_grad()
def test_what_compressed_tensors_has_not_decompressed_yet(preset, tmp_path):
    """It does at a model's first call: to layers that come back after it, then."""
    pytest.importorskip("compressed_tensors")
    write_compressed(tmp_path, preset)
    load = transformers.AutoModelForCausalLM.from_pretrained
    reference, model = load(tmp_path).eval(), load(tmp_path).eval()
    expected, loaded = outputs(reference, X), fp.load_pretrained(tmp_path)
    report = fp.swap(model)
    assert {s.precision for s in report.swapped} == {"stored"} and len(report.swapped) == 14
    for (fqn, layer), other in zip(layers_of(model).items(), layers_of(loaded).values(), strict=True):
        assert torch.equal(layer._dequantized_weight(), other._dequantized_weight()), fqn
    fp.restore(model)  # before the first call
    fp.swap(model)
    y = outputs(model, X)
    assert (y - outputs(loaded, X)).norm() < 0.02 * y.norm() and (y - expected).norm() < 0.06 * y.norm()
    fp.restore(model)
    assert torch.equal(outputs(model, X), expected)


@pytest.mark.every(3)
def test_what_is_packed_says_how_it_is_read(tmp_path):
    pytest.importorskip("compressed_tensors")
    write_compressed(tmp_path, "W8A16")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no layer is swapped"):
        report = fp.swap(model, "int8", attention=False)
    assert "load the folder with fp.load_pretrained" in str(report.skipped[0].reason)
