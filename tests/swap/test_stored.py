"""8-bit checkpoints of other libraries: each format read into layers of forwardpass, and what is refused."""

import contextlib
import json
import random

import pytest
import torch
import transformers
from rotation import in_turn
from small_models import outputs
from stored_formats import FORMATS, edit, layers_of, llama, write, write_compressed

import forwardpass as fp
from forwardpass.nn import QuantizedModule

X = {"input_ids": torch.arange(3, 35).reshape(2, 16)}


@pytest.mark.every(2)
@pytest.mark.parametrize("name", FORMATS)
@torch.inference_mode()
def test_formats(name, tmp_path):
    """Weights are those of the file to the last bit, the model's output near that of the floats, and again when stored by us."""
    weights = write(tmp_path / "theirs", name)
    model = fp.load_pretrained(tmp_path / "theirs")
    layers = layers_of(model)
    assert layers.keys() == weights.keys() and {type(m).__name__ for m in layers.values()} == {FORMATS[name][2]}
    for fqn, layer in layers.items():
        assert torch.equal(layer._dequantized_weight(), weights[fqn]), fqn
    assert not model.training and not hasattr(model, "hf_quantizer") and type(model.lm_head) is torch.nn.Linear
    y, expected = outputs(model, X), outputs(llama(), X)
    assert (y - expected).norm() < (0.2 if "static" in name or "asym" in name else 0.08) * expected.norm()
    fp.save_pretrained(model, tmp_path / "ours")
    assert torch.equal(outputs(fp.load_pretrained(tmp_path / "ours"), X), y)


@pytest.mark.every(2)
@pytest.mark.parametrize("preset", ["W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "W8A16"])
@torch.inference_mode()
def test_what_compressed_tensors_writes(preset, tmp_path):
    """Weights equal those that it decompresses within transformers, and outputs its own but for activations in 8 bits."""
    pytest.importorskip("compressed_tensors")
    write_compressed(tmp_path, preset)
    model = fp.load_pretrained(tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = outputs(reference, X).float()  # which decompresses
    layers = layers_of(model)
    assert len(layers) == 14
    for fqn, layer in layers.items():
        assert torch.equal(layer._dequantized_weight().bfloat16(), reference.get_submodule(fqn).weight), fqn
    assert (outputs(model, X).float() - expected).norm() < 0.05 * expected.norm()


@torch.inference_mode()
def test_a_group_that_is_named_after_a_preset(tmp_path):
    """As the library's own configs have it, which it resolves; one that has no such name is refused in its words."""
    pytest.importorskip("compressed_tensors")
    write_compressed(tmp_path, "W8A8")
    expected = outputs(fp.load_pretrained(tmp_path), X)
    config = json.loads((tmp_path / "config.json").read_text())
    targets = config["quantization_config"]["config_groups"].pop("group_0")["targets"]
    for preset in ("W8A8", "W8A9"):
        config["quantization_config"]["config_groups"] = {preset: targets}
        (tmp_path / "config.json").write_text(json.dumps(config))
        if preset == "W8A8":
            assert torch.equal(outputs(fp.load_pretrained(tmp_path), X), expected)
        else:
            with pytest.raises(
                ValueError, match=r"compressed-tensors does not read its quantization_config .*W8A9"
            ) as e:
                fp.load_pretrained(tmp_path)
            assert "\n" not in str(e.value)


AO = {
    "int8": ("Int8DynamicActivationInt8WeightConfig", {"version": 2}, "Int8Linear"),
    "weights": ("Int8WeightOnlyConfig", {"version": 2}, "W8A16Linear"),
    "fp8 weights": ("Float8WeightOnlyConfig", {}, "W8A16Linear"),
}


@pytest.mark.every(2)
@pytest.mark.parametrize("name", AO)
@torch.no_grad()
def test_what_torchao_writes(name, tmp_path):
    """Weights equal those that it dequantises, outputs are near its own, and taken over from its model the same to the bit."""
    quantization = pytest.importorskip("torchao.quantization")
    config, options, cls = AO[name]
    llama().bfloat16().save_pretrained(tmp_path / "floats")
    quantised = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "floats",
        quantization_config=transformers.TorchAoConfig(getattr(quantization, config)(**options)),
        dtype=torch.bfloat16,
    )
    quantised.save_pretrained(tmp_path / "theirs")
    model = fp.load_pretrained(tmp_path / "theirs")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    expected, y = outputs(reference, X).float(), outputs(model, X)
    layers = layers_of(model)
    assert len(layers) == 14 and {type(m).__name__ for m in layers.values()} == {cls}
    for fqn, layer in layers.items():
        assert torch.equal(layer._dequantized_weight().bfloat16(), reference.get_submodule(fqn).weight.dequantize()), (
            fqn
        )
    assert (y.float() - expected).norm() < 0.05 * expected.norm()
    with torch.inference_mode(), pytest.raises(ValueError, match="call it outside"):
        fp.swap(reference)
    report = fp.swap(reference)
    assert len(report.swapped) == 14 and len(report.mlps) == 2
    assert torch.equal(outputs(reference, X), y)
    fp.restore(reference)
    assert torch.equal(outputs(reference, X).float(), expected)


AO_BROKEN = {
    "no header": (lambda t, h: h.clear(), "header does not say"),
    "no JSON": (lambda t, h: h.update({f"{LAYER}.weight": "{"}), "header does not say"),
    "4 bits": (lambda t, h: h.update({f"{LAYER}.weight": '{"_type": "Int4Tensor", "_data": {}}'}), "its weight is a Int4Tensor"),
    "lies": (lambda t, h: h.update({f"{LAYER}.weight": '{"_type": "Float8Tensor"}'}), "_weight_qdata is torch.int8"),
    "zero points": (lambda t, h: t[f"{LAYER}._weight_zero_point"].fill_(1), "zero points"),
    "no data": (lambda t, h: t.pop(f"{LAYER}._weight_qdata"), "its _weight_qdata is missing"),
    "groups": (lambda t, h: t.update({f"{LAYER}._weight_scale": torch.ones(384, 2)}), "scales by group"),
    "unknown": (lambda t, h: t.update({f"{LAYER}._weight_more": torch.ones(1)}), "'_weight_more', of which nothing"),
}  # fmt: skip
LAYER = "model.layers.1.mlp.up_proj"


@pytest.mark.every(2)
@pytest.mark.parametrize("name", AO_BROKEN)
def test_broken_torchao(name, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    change, words = AO_BROKEN[name]
    write(tmp_path, "torchao")
    tensors = load_file(tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        header = file.metadata()
    change(tensors, header)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"} | header)
    with pytest.raises(ValueError, match=words) as e:
        fp.load_pretrained(tmp_path)
    assert "\n" not in str(e.value)


@torch.inference_mode()
def test_activations_are_as_the_file_says(tmp_path):
    write(tmp_path / "a", "int8_asymmetric")
    layer = fp.load_pretrained(tmp_path / "a").model.layers[0].self_attn.o_proj
    assert not layer.symmetric and layer.input_scale == 0.03125 and layer.input_zero_point == 3
    write(tmp_path / "b", "modelopt_int8")
    layer = fp.load_pretrained(tmp_path / "b").model.layers[0].self_attn.o_proj
    assert layer.symmetric and layer.input_scale is None and layer.channel_scale[0] == 0.5
    write(tmp_path / "c", "fp8_static")
    with fp.interpret("sm_89"):
        layer = fp.load_pretrained(tmp_path / "c").model.layers[0].self_attn.o_proj
    assert isinstance(layer, fp.nn.Fp8Linear) and layer.scales == "tensor" and layer.input_scale == 0.03125


@torch.inference_mode()
def test_modelopts_config_may_be_a_file_of_its_own(tmp_path):
    write(tmp_path, "modelopt")
    y = outputs(fp.load_pretrained(tmp_path), X)
    edit(tmp_path, quantization_config=None)
    (tmp_path / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}})
    )
    assert torch.equal(outputs(fp.load_pretrained(tmp_path), X), y)


@pytest.mark.parametrize(("name", "words"), [("bitsandbytes", "outliers"), ("fbgemm", "input_scale_ub")])
def test_what_is_done_in_another_way_is_said(name, words, tmp_path):
    write(tmp_path, name)
    with pytest.warns(UserWarning, match=words):
        fp.load_pretrained(tmp_path)


@torch.inference_mode()
def test_sharded(tmp_path):
    write(tmp_path / "one", "int8_token")
    write(tmp_path / "three", "int8_token", shards=3)
    assert torch.equal(*(outputs(fp.load_pretrained(tmp_path / n), X) for n in ("one", "three")))


def test_a_version_of_transformers_that_cannot_read_them(tmp_path, monkeypatch):
    """Of 5.20 the method has another signature."""
    from transformers.quantizers.base import HfQuantizer

    write(tmp_path, "int8_token")
    monkeypatch.setattr(HfQuantizer, "update_weight_conversions", lambda self, weight_conversions: weight_conversions)
    with pytest.raises(ImportError, match=r"needs transformers 5\.24 or later: pip install"):
        fp.load_pretrained(tmp_path)


@torch.inference_mode()
def test_tied_and_generating(tmp_path):
    write(tmp_path, "int8_token", llama(tie_word_embeddings=True))
    model = fp.load_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generate(**X, max_new_tokens=4, do_sample=False).shape == (2, 20)


def test_scales_of_caches_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    write(tmp_path, "fp8_token")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {f"model.layers.{i}.self_attn.{n}_scale": torch.ones(1) for i in range(2) for n in "kv"}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"scales of caches .* are not used"):
        fp.load_pretrained(tmp_path)


BROKEN = {
    "missing scale": (lambda t, c: t.pop("model.layers.0.mlp.up_proj.weight_scale"), "up_proj: its weight_scale is missing"),
    "unknown tensor": (lambda t, c: t.update({"model.layers.0.mlp.up_proj.extra": torch.ones(1)}), "'extra', of which nothing"),
    "nan": (lambda t, c: t["model.layers.1.mlp.up_proj.weight_scale"].fill_(torch.nan), "up_proj: its weight_scale holds values"),
    "zero": (lambda t, c: t["model.layers.1.mlp.up_proj.weight_scale"].zero_(), "up_proj: its weight_scale holds values"),
    "infinite": (lambda t, c: t["model.layers.1.mlp.up_proj.weight_scale"].fill_(torch.inf), "weight_scale holds values"),
    "integers": (lambda t, c: t.update({"model.layers.1.mlp.up_proj.weight_scale": torch.ones(384, 1).byte()}), "uint8"),
    "shape of scale": (lambda t, c: t.update({"model.layers.0.mlp.up_proj.weight_scale": torch.ones(7)}), r"weight_scale is \[7\]"),
    "shape of weight": (lambda t, c: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(8, 8).char()}), "in the file, and"),
    "4 bits": (lambda t, c: c["config_groups"]["group_0"]["weights"].update(num_bits=4), "it has 4 bits"),
    "asymmetric": (lambda t, c: c["config_groups"]["group_0"]["weights"].update(symmetric=False), "zero points"),
    "no group": (lambda t, c: c["config_groups"]["group_0"].update(targets=["re:.*q_proj"]), "no group of config_groups"),
    "inputs": (lambda t, c: c["config_groups"]["group_0"]["input_activations"].update(num_bits=4), "inputs have 4 bits"),
    "static": (lambda t, c: c["config_groups"]["group_0"]["input_activations"].update(dynamic=False), "static"),
    "method": (lambda t, c: c.update(quant_method="awq"), "quantised by 'awq'"),
    "layer missing": (lambda t, c: [t.pop(n) for n in [*t] if "layers.1.mlp.up" in n], "is missing from the file"),
    "layer left over": (lambda t, c: t.update({"model.layers.7.weight": torch.ones(2)}), "has no place in the model"),
}  # fmt: skip


@pytest.mark.every(2)
@pytest.mark.parametrize("name", BROKEN)
def test_broken(name, tmp_path):
    from safetensors.torch import load_file, save_file

    change, words = BROKEN[name]
    write(tmp_path, "int8_token")
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    change(tensors, config)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    edit(tmp_path, quantization_config=config)
    with pytest.raises(ValueError, match=words):
        fp.load_pretrained(tmp_path)


@pytest.mark.parametrize("format", ["int8_packed", "gptq"])
def test_packed_weights_of_another_size(format, tmp_path):
    write(tmp_path, format)
    edit(tmp_path, intermediate_size=256)
    with pytest.raises(
        ValueError, match=r"proj: its weight is \[\d+, \d+\] in the file, and \[\d+, \d+\] in the model"
    ):
        fp.load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", 7, "gone.safetensors"]
)
def test_an_index_names_files_of_its_folder_alone(file, tmp_path):
    write(tmp_path, "int8_token", shards=2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = file
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"no file of safetensors|no weight_map"):
        fp.load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"architectures": ["Nothing"]}, "no model class 'Nothing'"),
        ({"architectures": None}, "no model class"),
        ({"num_hidden_layers": 2**40}, "it asks for num_hidden_layers"),
        ({"_attn_implementation": "user/kernel"}, "names code"),
        ({"quantization_config": ["fp8"]}, "quantised by 'None'"),
    ],
)
def test_configs_that_are_refused(entries, words, tmp_path):
    write(tmp_path, "int8_token")
    edit(tmp_path, **entries)
    with pytest.raises(ValueError, match=words):
        fp.load_pretrained(tmp_path)


def test_no_code_is_run_and_no_model_is_filled(tmp_path):
    write(tmp_path, "int8_token")
    edit(tmp_path, auto_map={"AutoModelForCausalLM": "evil.Model"})
    (tmp_path / "evil.py").write_text("raise SystemExit")
    assert any(isinstance(m, QuantizedModule) for m in fp.load_pretrained(tmp_path).modules())
    with pytest.raises(ValueError, match="without model="):
        fp.load_pretrained(tmp_path, model=llama())
    with pytest.raises(ValueError, match="meta holds none"):
        fp.load_pretrained(tmp_path, device="meta")
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="damaged"):
        fp.load_pretrained(tmp_path)


def test_a_hub_id_is_downloaded_without_code(tmp_path, monkeypatch):
    import huggingface_hub

    write(tmp_path / "snapshot", "int8_token")
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert layers_of(fp.load_pretrained("some-org/some-model.v1"))
    assert asked == [("some-org/some-model.v1", ["*.json", "*.safetensors"])]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: 1 / 0)
    with pytest.raises(FileNotFoundError, match="the hub gives none of that name"):
        fp.load_pretrained("some-org/none")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint|there is no"):
        fp.load_pretrained(tmp_path / "nothing" / "here")


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "name", in_turn(["int8_token", "fp8_block", "gptq", "int8_packed", "bitsandbytes", "modelopt_int8", "torchao"], 3)
)
def test_damaged_files(name, tmp_path):
    """60 of each: a sentence, or a model of what is still whole; 10 400 of them were tried."""
    small = {"num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2,
             "num_key_value_heads": 1}  # fmt: skip
    write(tmp_path, name, llama(**small))
    rng, loaded = random.Random(name), 0
    for _ in range(60):
        file = tmp_path / rng.choice(["config.json", "model.safetensors"])
        whole = file.read_bytes()
        header = len(whole) if file.suffix == ".json" else 8 + int.from_bytes(whole[:8], "little")
        at, letters = rng.randrange(header), bytes(rng.choices(b'0123456789{}[]":,.eEI8F4n-', k=rng.choice([1, 3, 12])))
        file.write_bytes(whole[:at] + letters + whole[at + rng.choice([0, 1, len(letters), 9]) :])
        with contextlib.suppress(ValueError, FileNotFoundError):
            loaded += isinstance(fp.load_pretrained(tmp_path), torch.nn.Module)
        file.write_bytes(whole)
    assert loaded < 20


_OUTPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}


def test_what_compressed_tensors_would_compute_besides_is_refused(tmp_path):
    write(tmp_path, "int8_asymmetric")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    harmless, config = (
        {**config, "config_groups": {"group_0": {**group, "output_activations": x}}, "sparsity_config": {}}
        for x in (None, _OUTPUTS)
    )
    edit(tmp_path, quantization_config=harmless)
    fp.load_pretrained(tmp_path)
    edit(tmp_path, quantization_config=config)
    words = r"model\.layers\.0\.\S+: output_activations .*load it with transformers instead"
    with pytest.raises(ValueError, match=words) as e:
        fp.load_pretrained(tmp_path)
    assert "\n" not in str(e.value)
