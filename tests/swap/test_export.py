"""Swapped models written as compressed-tensors has them: read back by us, and by that library within transformers."""

import json

import pytest
import torch
import transformers
from small_models import build, outputs
from stored_formats import layers_of, llama

import forwardpass as fp

X = {"input_ids": torch.arange(3, 35).reshape(2, 16)}


def swapped(precision, **options):
    model = llama(**options)
    fp.swap(model, precision, include="**")
    return model


@pytest.mark.parametrize("precision", ["int8", "w8a16", "fp8"])
@torch.inference_mode()
def test_read_back(precision, tmp_path):
    model = swapped(precision)
    fp.export_pretrained(model, tmp_path)
    again = fp.load_pretrained(tmp_path)
    layers, before = layers_of(again), layers_of(model)
    assert layers.keys() == before.keys()
    for fqn, layer in layers.items():
        assert torch.equal(layer._dequantized_weight(), before[fqn]._dequantized_weight()), fqn
    if precision != "fp8":  # whose inputs stay floats on a CPU
        assert torch.equal(outputs(again, X), outputs(model, X))


@pytest.mark.parametrize("precision", ["int8", "w8a16", "fp8"])
@torch.inference_mode()
def test_read_by_compressed_tensors(precision, tmp_path):
    pytest.importorskip("compressed_tensors")
    model = swapped(precision)
    fp.export_pretrained(model, tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    got = outputs(reference, X)  # decompresses
    for fqn, layer in layers_of(model).items():
        torch.testing.assert_close(
            reference.get_submodule(fqn).weight.double(), layer._dequantized_weight(), rtol=2e-7, atol=0
        )
    assert (got - outputs(model, X)).norm() < 0.05 * got.norm()


@torch.inference_mode()
def test_a_plan_of_several_precisions(tmp_path):
    plan = fp.swap(llama(), "int8", include="**").plan.to_json()
    for i, layer in enumerate(plan["layers"]):
        layer["precision"] = ("int8", "w8a16", "bf16")[i % 3]
    model = llama()
    fp.swap(model, plan=plan)
    fp.export_pretrained(model, tmp_path, max_shard_size="300KB")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision" and len(config["config_groups"]) == 2
    assert len([*tmp_path.glob("*.safetensors")]) > 2
    again = fp.load_pretrained(tmp_path)
    assert {type(m).__name__ for m in layers_of(again).values()} == {"Int8Linear", "W8A16Linear"}
    assert (outputs(again, X) - outputs(model, X)).norm() < 0.02 * outputs(model, X).norm()
    if pytest.importorskip("compressed_tensors"):
        reference = outputs(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), X)
        assert (reference - outputs(model, X)).norm() < 0.05 * reference.norm()


@torch.inference_mode()
def test_a_head_of_its_own(tmp_path):
    model = llama(tie_word_embeddings=True)
    fp.swap(model, "w8a16", include=["**", "lm_head"])
    fp.export_pretrained(model, tmp_path)
    again = fp.load_pretrained(tmp_path)
    assert not again.config.tie_word_embeddings and torch.equal(outputs(again, X), outputs(model, X))
    model = swapped("int8", tie_word_embeddings=True)
    fp.export_pretrained(model, tmp_path, overwrite=True)
    again = fp.load_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight and torch.equal(outputs(again, X), outputs(model, X))


def test_refused_before_anything_is_written(tmp_path):
    folder = tmp_path / "new"
    calibrated = llama()
    fp.swap(calibrated, "int8", include="**", calibrate=[X])
    with pytest.raises(fp.Unsupported, match=r"layers.0.self_attn.q_proj multiplies its input .* without calibrate"):
        fp.export_pretrained(calibrated, folder)
    with pytest.raises(ValueError, match="holds no quantised layer"):
        fp.export_pretrained(llama(), folder)
    with pytest.raises(ValueError, match="writes compressed-tensors, not 'gguf'"):
        fp.export_pretrained(swapped("int8"), folder, "gguf")
    plain = torch.nn.Sequential(torch.nn.Linear(256, 256))
    fp.swap(plain, "int8", include="**")
    with pytest.raises(ValueError, match="Sequential is none"):
        fp.export_pretrained(plain, folder)
    assert not folder.exists()
    (tmp_path / "other.txt").write_text("x")
    with pytest.raises(ValueError, match="overwrite=True"):
        fp.export_pretrained(swapped("int8"), tmp_path)


@torch.inference_mode()
def test_encoders(tmp_path):
    model = build("bert")
    fp.swap(model, "int8", include="**", attention=False)
    inputs = {"input_ids": torch.arange(3, 23).reshape(2, 10)}
    y = outputs(model, inputs)
    fp.export_pretrained(model, tmp_path)
    torch.testing.assert_close(outputs(fp.load_pretrained(tmp_path), inputs), y, rtol=0, atol=1e-5)  # in another order
