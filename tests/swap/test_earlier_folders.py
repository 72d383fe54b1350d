"""Folders of `forwardpass.checkpoint/2`, whose integers have the name `weight`, give the same bits."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_models import batch, build, outputs

import forwardpass as fp
from forwardpass.checkpoints.record import EARLIER, names_now


def as_before(folder):
    """Writes a folder as the earlier version did."""
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    save_file({name.replace("qweight", "weight"): t for name, t in tensors.items()}, weights, metadata={"format": "pt"})
    for name in ("forwardpass.json", "config.json"):
        content = json.loads((folder / name).read_text())
        record = content if name == "forwardpass.json" else content["quantization_config"]
        record["schema"] = "forwardpass.checkpoint/2"
        for layer in record["layers"]:
            if layer["config"].get("bias") is False:
                layer["config"]["dtype"] = "float32"
        record["aliases"] = {
            a.replace("qweight", "weight"): b.replace("qweight", "weight") for a, b in record["aliases"].items()
        }
        (folder / name).write_text(json.dumps(content))
    assert not any("qweight" in name for name in load_file(weights))


@pytest.mark.every(2)
@pytest.mark.parametrize("precision", ["int8", "w8a16"])
@pytest.mark.parametrize("name", ["llama", "t5", "gpt2", "bert"])
@pytest.mark.filterwarnings("ignore")
def test_both_readers(name, precision, tmp_path):
    model = build(name)
    dtype = torch.float32 if name == "gpt2" else torch.bfloat16
    for p in model.parameters():  # and no buffers, which from_pretrained makes anew
        p.data = p.data.to(dtype)
    model.config.dtype = dtype
    fp.swap(model, precision, include="**", exclude="lm_head")
    fp.save_pretrained(model, tmp_path)
    as_before(tmp_path)
    expected = outputs(model, batch(name))
    dtypes = {n: p.dtype for n, p in model.named_parameters()}
    for again in (fp.load_pretrained(tmp_path), getattr(transformers, type(model).__name__).from_pretrained(tmp_path)):
        assert torch.equal(outputs(again, batch(name)), expected)
        assert {n: p.dtype for n, p in again.named_parameters()} == dtypes
        assert not any(t.is_meta for t in (*again.parameters(), *again.buffers()))


def test_names_are_found_in_one_look_at_the_layers():
    """All layers were looked through for each tensor."""
    looks = []

    class Layer(dict):
        def __getitem__(self, key):
            looks.append(key)
            return super().__getitem__(key)

    record = {"schema": EARLIER, "layers": [Layer(fqn=f"layers.{i}") for i in range(500)]}
    now = names_now(record)
    names = [now(f"layers.{i}.{name}") for i in range(500) for name in ("weight", "bias")]
    assert names[:2] == ["layers.0.qweight", "layers.0.bias"] and now("norm.weight") == "norm.weight"
    assert len(looks) == 500
