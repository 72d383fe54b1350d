"""A folder of save_pretrained opened by transformers itself, where forwardpass is imported before or after it, and where not."""

import contextlib
import copy
import json
import random
import shutil

import pytest
import torch
import transformers
from processes import fork
from rotation import in_turn
from small_models import batch, build, outputs
from stored_formats import llama
from transformers import AutoModel, AutoModelForCausalLM

import forwardpass as fp
from forwardpass.nn import GatedMLP

X = {"input_ids": torch.arange(3, 35).reshape(2, 16)}


@pytest.mark.every(2)
@pytest.mark.parametrize("precision", ["int8", "w8a16", "fp8", "bf16"])
@torch.inference_mode()
def test_bits_are_those_of_load_pretrained(precision, tmp_path):
    model = llama(hidden_size=200, num_attention_heads=5, num_key_value_heads=5)  # rows that are padded
    fp.swap(model, precision, include="**")
    fp.save_pretrained(model, tmp_path)
    loaded, about = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(about.values()), about  # it printed that it did not expect original_inv_freq
    assert "_keys_to_ignore_on_load_unexpected" not in vars(loaded) or not loaded._keys_to_ignore_on_load_unexpected
    assert isinstance(loaded.model.layers[0].mlp, GatedMLP) and not loaded.training
    assert torch.equal(outputs(loaded, X), outputs(fp.load_pretrained(tmp_path), X))
    assert not hasattr(loaded.config, "quantization_config") and not hasattr(loaded, "hf_quantizer")
    loaded.save_pretrained(tmp_path / "other")
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "other"), X), outputs(loaded, X))


@pytest.mark.every(2)
@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "t5", "mixtral"])
@torch.inference_mode()
def test_models(name, tmp_path):
    try:
        model, x = build(name), batch(name)
    except KeyError:
        pytest.skip(f"there is no small {name}")
    fp.swap(model, "int8", include="**", exclude="lm_head")
    fp.save_pretrained(model, tmp_path)
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path), x), outputs(fp.load_pretrained(tmp_path), x))


@torch.inference_mode()
def test_the_model_below_a_head(tmp_path):
    model = llama()
    fp.swap(model, "int8", include=["**", "lm_head"], kv_cache="int8")
    fp.save_pretrained(model, tmp_path)
    below = AutoModel.from_pretrained(tmp_path)
    assert type(below) is transformers.LlamaModel and isinstance(below.layers[1].mlp, GatedMLP)
    assert torch.equal(outputs(below, X), outputs(model.model, X))


@torch.inference_mode()
def test_other_dtypes_and_devices(tmp_path):
    model = llama().bfloat16()
    fp.swap(model, "int8", include="**")
    fp.save_pretrained(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    y, expected = outputs(loaded, X), outputs(model, X)
    assert (
        y.dtype == torch.bfloat16 and (y - expected).norm() < 0.02 * expected.norm()
    )  # rotary frequencies stay float32


@pytest.mark.every(2)
@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, torch.device("cpu"), "auto", "sequential"])
@torch.inference_mode()
def test_maps_of_one_device(device_map, tmp_path):
    model = llama()
    fp.swap(model, "int8", include="**")
    fp.save_pretrained(model, tmp_path, max_shard_size="300KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map, low_cpu_mem_usage=True)
    assert torch.equal(outputs(loaded, X), outputs(model, X)) and isinstance(loaded.model.layers[0].mlp, GatedMLP)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map, dtype="float16")
    y, expected = outputs(half, X), outputs(model, X)
    assert y.dtype == half.dtype == torch.float16 and 0 < (y - expected).norm() < 0.03 * expected.norm()
    assert half.model.layers[0].self_attn.q_proj.qweight.dtype == torch.int8
    assert half.model.layers[0].self_attn.q_proj.weight_scale.dtype == torch.float32


def test_maps_and_dtypes_that_are_refused(tmp_path):
    model = llama()
    fp.swap(model, "int8", include="**")
    fp.save_pretrained(model, tmp_path)
    options = {"device_map": "auto", "max_memory": {"cpu": 10**6}, "offload_folder": tmp_path / "disk"}
    with pytest.raises(ValueError, match="this device_map leaves weights on a disk"):
        AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    with pytest.raises(ValueError, match="not a floating-point dtype"):
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype="int8")
    with pytest.raises(ValueError, match="meta holds none"):
        fp.load_pretrained(tmp_path, device="meta")


@torch.inference_mode()
def test_the_dtype_is_the_models_and_not_what_its_config_said(tmp_path):
    model = llama(dtype="bfloat16")
    assert model.config.dtype == torch.bfloat16 and model.dtype == torch.float32
    fp.swap(model, "int8", include="**")
    fp.save_pretrained(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32 and torch.equal(outputs(loaded, X), outputs(model, X))


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q: q["layers"].pop(), r"down_proj\.weight is missing from the file"),
        (
            lambda q: q["layers"][0].update(fqn="model.nothing"),
            "no Linear layer, convolution or experts 'model.nothing'",
        ),
        (lambda q: q["layers"][0].update(module="os.system"), "unknown module"),
        (lambda q: q["layers"][0]["config"].update(in_features=2**50), "recorded as"),
        (lambda q: q["layers"][0]["config"].update(symmetric=True), "weight_sum' has no place in the layer"),
        (lambda q: q.update(weights="../../etc/passwd"), "the name of its weights"),
        (lambda q: q.update(schema="forwardpass.checkpoint/99"), "has the schema"),
        (lambda q: q["layers"][0].update(precision=3), r"layers\.0\.precision is '3', no str or null"),
    ],
)
def test_a_record_that_is_not_what_we_write(change, words, tmp_path):
    model = llama()
    fp.swap(model, "int8", include="**")
    fp.save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, RuntimeError), match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path)


CODE = """
import sys
{imports}
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp).__name__)
"""


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("imports", "expected"),
    in_turn(
        [
            ("import forwardpass; import transformers", "GatedMLP"),
            ("import transformers; import forwardpass", "GatedMLP"),
            ("import transformers; transformers.AutoModel; import forwardpass", "GatedMLP"),
            ("import transformers", None),
        ]
    ),
)
def test_whichever_is_imported_first(imports, expected, tmp_path):
    model = llama()
    fp.swap(model, "int8", include="**")
    fp.save_pretrained(model, tmp_path)
    ran = fork.run(CODE.format(imports=imports), tmp_path)
    if expected:
        assert ran.stdout.strip() == expected, ran.stderr
    else:  # and never a model of wrong numbers
        assert ran.returncode and "no file named" in ran.stderr and not ran.stdout


def test_importing_forwardpass_does_not_import_transformers():
    code = "import sys, forwardpass; print('transformers' in sys.modules, len(sys.meta_path))"
    plain = "import sys, torch; print('transformers' in sys.modules, len(sys.meta_path) + 1)"
    ours, without = (fork.run(c).stdout for c in (code, plain))
    assert ours == without and ours.startswith("False")


def mutated(content, rng):
    """JSON with one entry that is gone, doubled, or another value."""
    content = copy.deepcopy(content)
    places = [(content, key) for key in content]
    for parent, key in places:  # which grows meanwhile
        if isinstance(value := parent[key], dict | list):
            places += [(value, inner) for inner in (value if isinstance(value, dict) else range(len(value)))]
    parent, key = rng.choice(places)
    change = rng.randrange(3)
    if change == 0:
        del parent[key]
    elif change == 1 and isinstance(parent, list):
        parent.append(parent[key])
    else:
        values = [None, True, -1, 2**63, 1.5, "", "../x", "/etc/passwd", [], {}, "int8", [["x"]], "model.layers.0"]
        other, place = rng.choice(places)
        parent[key] = rng.choice([*values, copy.deepcopy(other[place])])
    return content


def damaged(data, rng):
    """A file of safetensors that is cut, or whose header says other things."""
    size = int.from_bytes(data[:8], "little")
    change = rng.randrange(4)
    if change == 0:
        return data[: rng.randrange(len(data))]
    if change == 1:
        return rng.choice([0, size - 1, size + 1, 2**40, 2**63]).to_bytes(8, "little") + data[8:]
    if change == 2:
        place = 8 + rng.randrange(size)
        return data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
    header = json.dumps(mutated(json.loads(data[8 : 8 + size]), rng)).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


@pytest.mark.every(2)
@pytest.mark.parametrize("seed", range(4))
@torch.inference_mode()
def test_mutations(seed, tmp_path, monkeypatch):
    """Of our part of config.json, and of files: the model that was saved, or a sentence; nothing is written or unpickled."""
    model, x = build("llama"), batch("llama")
    fp.swap(model, "int8", include="**")
    fp.save_pretrained(model, tmp_path / "whole", max_shard_size="40KB")
    expected, rng = outputs(model, x), random.Random(seed)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle is read"))
    for i in range(12):
        folder = tmp_path / str(i)
        shutil.copytree(tmp_path / "whole", folder)
        config = json.loads((folder / "config.json").read_text())
        if i % 2:
            path = folder / rng.choice(config["quantization_config"]["weights"])
            path.write_bytes(damaged(path.read_bytes(), rng))
        else:
            method = config["quantization_config"].pop("quant_method")  # transformers reads another one by itself
            config["quantization_config"] = {**mutated(config["quantization_config"], rng), "quant_method": method}
            (folder / "config.json").write_text(json.dumps(config))
        before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
        with contextlib.suppress(ValueError, OSError):
            assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(folder), x), expected)
        assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
