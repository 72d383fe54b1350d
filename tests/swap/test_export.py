"""Swapped models written as compressed-tensors has them: read back by us, and by that library within transformers."""

import json

import pytest
import torch
import transformers
from command_line import NO_MINILM
from small_models import build, outputs
from stored_formats import layers_of, llama, mixture

import forwardpass as fp
from forwardpass.checkpoints import export, smoothing
from forwardpass.cli import embedding

X = {"input_ids": torch.arange(3, 35).reshape(2, 16)}


def swapped(precision, **options):
    model = llama(**options)
    fp.swap(model, precision, include="**")
    return model


@pytest.mark.every(2)
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


@pytest.mark.every(2)
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


@pytest.mark.every(3)
@pytest.mark.skipif(NO_MINILM, reason="the extra demo is not installed")
@torch.inference_mode()
def test_a_plan_of_minilm(tmp_path):
    """Of three precisions, as a measured one has them: read back to the bit, and by compressed-tensors within kernel error."""
    pytest.importorskip("compressed_tensors")
    model, tokenizer = embedding.load(embedding.find_model("minilm"))
    by_hand = {"**.attention.self.*": "w8a16", "**.intermediate.dense": "int8", "pooler.dense": "bf16", "**": "w8a16"}
    plan = fp.swap(model, by_hand, dry_run=True).plan
    assert len(fp.swap(model, plan=plan).swapped) == 37
    fp.export_pretrained(model, tmp_path)
    batch = dict(tokenizer(embedding.builtin_texts()[1][:4], padding=True, return_tensors="pt"))
    tokens = batch["attention_mask"].bool()
    y, again = (m(**batch).last_hidden_state[tokens] for m in (model, fp.load_pretrained(tmp_path)))
    assert torch.equal(y, again)
    reference = transformers.AutoModel.from_pretrained(tmp_path).eval()
    theirs = reference(**batch).last_hidden_state[tokens]
    assert torch.nn.functional.cosine_similarity(theirs, y, dim=-1).min() > 0.998
    stored = {fqn: m for fqn, m in layers_of(model).items() if not isinstance(m, fp.nn.Bf16Linear)}
    assert len(stored) == 36
    for fqn, layer in stored.items():
        weight = reference.get_submodule(fqn).weight.double()
        torch.testing.assert_close(weight, layer._dequantized_weight(), rtol=2e-7, atol=0)


def rescaled_norms(model):
    """Norms as trained models have them: channels of other loudness, which calibration smooths."""
    g = torch.Generator().manual_seed(3)
    for p in model.parameters():
        if p.dim() == 1:
            p.data.mul_(torch.randn(p.shape, generator=g).exp())
    return model


@pytest.mark.every(2)
@pytest.mark.parametrize("heads", [2, 4], ids=["shared", "own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_a_calibrated_model(heads, dtype, tmp_path):
    """Scales of q, k and v go into the norm, o_proj's into the rows of v, down_proj's into those of up; within a rounding."""
    model = rescaled_norms(llama(num_key_value_heads=heads)).to(dtype)
    exact = outputs(model, X).float()
    fp.swap(model, "int8", include="**", calibrate=[X])
    before, y = layers_of(model), outputs(model, X).float()
    smoothed = {fqn: layer.channel_scale.clone() for fqn, layer in before.items()}
    fp.export_pretrained(model, tmp_path)
    assert torch.equal(outputs(model, X).float(), y)
    assert all(torch.equal(layer.channel_scale, smoothed[fqn]) for fqn, layer in layers_of(model).items())
    again = fp.load_pretrained(tmp_path)
    after = layers_of(again)
    assert after.keys() == before.keys() and all(layer.channel_scale is None for layer in after.values())
    down = "model.layers.1.mlp.down_proj"
    assert torch.equal(after[down].qweight, before[down].qweight) and torch.equal(
        after[down].weight_scale, before[down].weight_scale
    )
    if heads == 4:
        o = "model.layers.1.self_attn.o_proj"
        assert torch.equal(after[o].qweight, before[o].qweight)
    error = (outputs(again, X).float() - exact).norm() / exact.norm()
    assert error < 2 * (y - exact).norm() / exact.norm()
    pytest.importorskip("compressed_tensors")
    reference = outputs(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), X).float()
    assert (reference - outputs(again, X).float()).norm() < 0.05 * exact.norm()  # its weights are in the dtype


def test_what_is_written_is_a_config_of_compressed_tensors(tmp_path, monkeypatch):
    """Its own class is asked before anything is written."""
    pytest.importorskip("compressed_tensors")
    model = llama()
    fp.swap(model, "int8", include="**")
    scheme = export._scheme

    def static_by_token(fqn, layer):
        of_layer = scheme(fqn, layer)
        return {**of_layer, "input_activations": {**of_layer["input_activations"], "dynamic": False}}

    monkeypatch.setattr(export, "_scheme", static_by_token)
    with pytest.raises(fp.Unsupported, match="compressed-tensors does not read its quantization_config"):
        fp.export_pretrained(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.every(2)
@torch.inference_mode()
def test_a_rounding_that_changes_more_than_one_is_refused(tmp_path, monkeypatch):
    model = rescaled_norms(llama())
    fp.swap(model, "int8", include="**", calibrate=[X])
    monkeypatch.setattr(smoothing, "ROUNDING", 1e-4)
    with pytest.raises(fp.Unsupported, match=r"the output of model\.layers\.0\.\S+ would be another"):
        fp.export_pretrained(model, tmp_path / "new")


@pytest.mark.parametrize(
    ("include", "words"),
    [
        ("**", r"attention\.output\.dense multiplies its input by a scale .* no norm and no layer of its own module"),
        (["**.query", "**.key", "**.value"], r"attention\.self\.query multiplies .* as other code reads the norm"),
    ],
    ids=["elsewhere", "residual"],
)
def test_a_scale_that_has_no_place_is_refused(include, words, tmp_path):
    """Of BERT, whose norms the residual reads too."""
    model = rescaled_norms(build("bert"))
    excluded = () if include == "**" else ["**.dense"]
    fp.swap(model, "int8", include=include, exclude=excluded, calibrate=[{"input_ids": torch.arange(64).view(2, 32)}])
    y = outputs(model, {"input_ids": torch.arange(3, 23).reshape(2, 10)})
    with pytest.raises(fp.Unsupported, match=words) as e:
        fp.export_pretrained(model, tmp_path / "new")
    assert "\n" not in str(e.value) and not (tmp_path / "new").exists()
    assert torch.equal(outputs(model, {"input_ids": torch.arange(3, 23).reshape(2, 10)}), y)


@torch.inference_mode()
def test_smoothing_of_a_gated_mlps_last_layer_is_folded(tmp_path):
    """Into the scales of the layer before it; the model itself stays as it is."""
    by_hand = {"**.down_proj": "int8", "**.mlp.*": "w8a16"}
    model = llama(mlp_bias=True)
    for i, layer in enumerate(model.model.layers):
        layer.mlp.up_proj.bias.copy_(torch.linspace(-0.1, 0.1, 384))
        layer.mlp.up_proj.weight[7 + i] *= 40  # an outlier, without which there is nothing to smooth
    fp.swap(model, by_hand, calibrate=[X])
    smoothed = layers_of(model)
    downs = [fqn for fqn in smoothed if fqn.endswith("down_proj")]
    assert len(smoothed) == 6 and all((smoothed[fqn].channel_scale != 1).any() for fqn in downs)
    y = outputs(model, X)
    fp.export_pretrained(model, tmp_path)
    assert torch.equal(outputs(model, X), y) and all(layers_of(model)[fqn].channel_scale is not None for fqn in downs)
    again = fp.load_pretrained(tmp_path)
    assert all(layers_of(again)[fqn].channel_scale is None for fqn in downs)
    assert (outputs(again, X) - y).norm() < 2e-3 * y.norm()  # a value between two steps may go to the other one
    pytest.importorskip("compressed_tensors")
    reference = outputs(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), X)
    assert (reference - y).norm() < 0.02 * y.norm()


@torch.inference_mode()
def test_names_are_those_of_the_hub(tmp_path):
    """Where transformers has others in a model."""
    from safetensors.torch import load_file

    model = mixture("MixtralForCausalLM")
    fp.swap(model, {"**.q_proj": "int8", "**.self_attn.*": "w8a16"})
    y = outputs(model, X)
    fp.export_pretrained(model, tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    hub = "model.layers.1.block_sparse_moe"
    assert {
        f"{hub}.experts.gate_up_proj",
        f"{hub}.gate.weight",
        "model.layers.0.self_attn.q_proj.weight_scale",
    } <= names
    again = fp.load_pretrained(tmp_path)
    assert len(layers_of(again)) == 8 and torch.equal(outputs(again, X), y)
    pytest.importorskip("compressed_tensors")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (outputs(reference, X) - y).norm() < 0.05 * y.norm()


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
    with pytest.raises(ValueError, match="holds no quantised layer"):
        fp.export_pretrained(llama(), folder)
    with pytest.raises(ValueError, match="writes compressed-tensors, comfyui, not 'gguf'"):
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
