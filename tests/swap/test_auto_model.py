"""A folder of save_pretrained opened by transformers itself, where forwardpass is imported before or after it, and where not."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from small_models import batch, build, outputs
from stored_formats import llama
from transformers import AutoModel, AutoModelForCausalLM

import forwardpass as fp
from forwardpass.nn import GatedMLP

X = {"input_ids": torch.arange(3, 35).reshape(2, 16)}


@pytest.mark.parametrize("precision", ["int8", "w8a16", "fp8", "bf16"])
@torch.inference_mode()
def test_bits_are_those_of_load_pretrained(precision, tmp_path):
    model = llama(hidden_size=200, num_attention_heads=5, num_key_value_heads=5)  # rows that are padded
    fp.swap(model, precision, include="**")
    fp.save_pretrained(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded.model.layers[0].mlp, GatedMLP) and not loaded.training
    assert torch.equal(outputs(loaded, X), outputs(fp.load_pretrained(tmp_path), X))
    assert not hasattr(loaded.config, "quantization_config") and not hasattr(loaded, "hf_quantizer")
    with pytest.raises(RuntimeError, match=r"fp\.save_pretrained"):
        loaded.save_pretrained(tmp_path / "other")


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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q: q["layers"].pop(), "has 8 bits in the file"),
        (lambda q: q["layers"][0].update(fqn="model.nothing"), "no Linear layer or experts 'model.nothing'"),
        (lambda q: q["layers"][0].update(module="os.system"), "unknown module"),
        (lambda q: q["layers"][0]["config"].update(in_features=2**50), "recorded as"),
        (lambda q: q.update(weights="../../etc/passwd"), "the name of its weights"),
        (lambda q: q.update(schema="forwardpass.checkpoint/99"), "has the schema"),
        (lambda q: q["layers"][0].update(precision=3), "layer 0"),
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


@pytest.mark.parametrize(
    ("imports", "expected"),
    [
        ("import forwardpass; import transformers", "GatedMLP"),
        ("import transformers; import forwardpass", "GatedMLP"),
        ("import transformers; transformers.AutoModel; import forwardpass", "GatedMLP"),
        ("import transformers", None),
    ],
)
def test_whichever_is_imported_first(imports, expected, tmp_path):
    model = llama()
    fp.swap(model, "int8", include="**")
    fp.save_pretrained(model, tmp_path)
    ran = subprocess.run(
        [sys.executable, "-c", CODE.format(imports=imports), str(tmp_path)], capture_output=True, text=True
    )
    if expected:
        assert ran.stdout.strip() == expected, ran.stderr
    else:  # and never a model of wrong numbers
        assert ran.returncode and "no file named" in ran.stderr and not ran.stdout


def test_importing_forwardpass_does_not_import_transformers():
    code = "import sys, forwardpass; print('transformers' in sys.modules, len(sys.meta_path))"
    plain = "import sys, torch; print('transformers' in sys.modules, len(sys.meta_path) + 1)"
    ours, without = (
        subprocess.run([sys.executable, "-c", c], capture_output=True, text=True).stdout for c in (code, plain)
    )
    assert ours == without and ours.startswith("False")
