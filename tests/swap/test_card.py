"""The model card beside a checkpoint: what it says is what was measured, its code runs, and nobody else's is lost."""

import copy
import importlib.util
import re

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from small_models import batch, block, build, outputs
from stored_formats import llama

import forwardpass as fp

X = {"input_ids": torch.arange(3, 35).reshape(2, 16)}


def swapped(precision="int8", source="someone/llama-tiny", **options):
    model = llama()
    model.config._name_or_path = source
    return model, fp.swap(model, precision, include="**", **options)


def card(folder):
    text = (folder / "README.md").read_text()
    return text, huggingface_hub.ModelCard(text).data.to_dict()


def run(text, folder, monkeypatch):
    """What the card's code calls the model."""
    (code,) = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    assert len(code.splitlines()) <= 3
    monkeypatch.chdir(folder)
    names = {"build": block}
    exec(code, names)
    return names["model"]


@torch.inference_mode()
def test_a_model_of_transformers(tmp_path, monkeypatch):
    model, report = swapped({"mlp": "int8", "o_proj": "w8a16"})
    fp.save_pretrained(model, tmp_path, max_shard_size="300KB")
    text, data = card(tmp_path)
    assert data == {
        "library_name": "transformers",
        "base_model": "someone/llama-tiny",
        "base_model_relation": "quantized",
        "tags": ["forwardpass", "w8a16", "int8"],
    }
    assert torch.equal(outputs(run(text, tmp_path, monkeypatch), X), outputs(model, X))
    for precision, layers in (("int8", 6), ("w8a16", 2)):
        members = [x for x in report.swapped if x.precision == precision]
        before, after = sum(x.bytes_before for x in members), sum(x.bytes_after for x in members)
        assert f"| {precision} v1 | {layers} | {before:,} -> {after:,} |" in text
    in_files = sum(t.nbytes for path in tmp_path.glob("*.safetensors") for t in load_file(path).values())
    assert f"The files hold {in_files:,} bytes of tensors." in text
    assert f"The model had {report.weight_bytes.before:,} bytes of parameters and buffers before." in text
    assert "`model.layers.{0-1}.self_attn.q_proj`" in text and "`lm_head`" in text and "no precision was given" in text
    assert "Nothing is calibrated" in text and f"forwardpass {fp.__version__}, torch {torch.__version__}" in text
    assert str(tmp_path) not in text


def test_metadata_are_written_by_huggingface_hub(tmp_path, monkeypatch):
    """Whatever a precision or a model is called; without that library there are none, and the text is the same."""
    model, _ = swapped(source="someone/yes")
    for layer in model.modules():
        if "precision" in vars(layer):
            vars(layer)["precision"] = 'a: "b" #c'
    fp.save_pretrained(model, tmp_path / "with")
    text, data = card(tmp_path / "with")
    assert data["tags"] == ["forwardpass", "a:"] and data["base_model"] == "someone/yes"
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "huggingface_hub" else find(name, *a)
    )
    fp.save_pretrained(model, tmp_path / "without")
    without = (tmp_path / "without" / "README.md").read_text()
    assert not without.startswith("---") and text.endswith(without)
    fp.save_pretrained(model, tmp_path / "without")  # which is still known as written here


def test_what_is_not_known_is_not_said(tmp_path):
    """Of a copy, and of a model that was loaded, there is no report; of a folder, no id."""
    model, _ = swapped(source=str(tmp_path))
    fp.save_pretrained(copy.deepcopy(model), tmp_path / "copy")
    fp.save_pretrained(fp.load_pretrained(tmp_path / "copy"), tmp_path / "again")
    for folder in (tmp_path / "copy", tmp_path / "again"):
        text, data = card(folder)
        assert data.keys() == {"library_name", "tags"} and str(tmp_path) not in text
        assert (
            "bytes before" not in text
            and "0 -> " not in text
            and "calibrated" not in text
            and "left as it is" not in text
        )
        assert re.search(r"\| int8 v1 \| \d+ \| [\d,]+ \|", text)


@pytest.mark.every(2)
def test_calibration(tmp_path):
    model, report = swapped(calibrate=[X])
    fp.save_pretrained(model, tmp_path)
    assert f"Layers are calibrated, on batches of the fingerprint {report.plan.calibration}." in card(tmp_path)[0]
    fp.save_pretrained(fp.load_pretrained(tmp_path), tmp_path)
    assert "Layers are calibrated.\n" in card(tmp_path)[0]


def test_a_model_of_ones_own(tmp_path, monkeypatch):
    model, x = block(), torch.randn(4, 64)
    fp.swap(model, "int8")
    fp.save_pretrained(model, tmp_path)
    text, data = card(tmp_path)
    assert data == {"tags": ["forwardpass", "int8"]}
    assert torch.equal(outputs(run(text, tmp_path, monkeypatch), x), outputs(model, x))


@torch.inference_mode()
def test_an_export(tmp_path, monkeypatch):
    model, _ = swapped()
    fp.export_pretrained(model, tmp_path)
    text, data = card(tmp_path)
    assert data["tags"] == ["forwardpass", "compressed-tensors", "int8"]
    assert torch.equal(outputs(run(text, tmp_path, monkeypatch), X), outputs(model, X))
    in_files = sum(t.nbytes for t in load_file(tmp_path / "model.safetensors").values())
    assert f"The files hold {in_files:,} bytes of tensors." in text


def test_a_part_that_was_swapped_by_itself(tmp_path):
    model = build("llama")
    fp.swap(model.model, "int8", exclude="mlp")
    fp.save_pretrained(model, tmp_path)
    text, _ = card(tmp_path)
    assert "`model.layers.{0-1}.mlp.gate_proj`" in text and " -> " in text
    assert outputs(fp.load_pretrained(tmp_path), batch("llama")).isfinite().all()


def test_somebodys_own_card_stays(tmp_path):
    model, _ = swapped()
    for i, content in enumerate([b"# mine\n", b"", b"\xff\xfe"]):
        folder = tmp_path / str(i)
        fp.save_pretrained(model, folder, model_card=False)
        assert not (folder / "README.md").exists()
        (folder / "README.md").write_bytes(content)
        fp.save_pretrained(model, folder)
        assert (folder / "README.md").read_bytes() == content
    fp.save_pretrained(model, tmp_path / "ours")
    text, _ = card(tmp_path / "ours")
    other, _ = swapped("w8a16")
    fp.save_pretrained(other, tmp_path / "ours")
    assert "int8" not in card(tmp_path / "ours")[0]
    (line,) = [line for line in text.splitlines() if "Written by forwardpass, and" in line]
    (tmp_path / "ours" / "README.md").write_text(kept := text.replace(line, "Mine."))
    fp.save_pretrained(other, tmp_path / "ours")
    assert (tmp_path / "ours" / "README.md").read_text() == kept
    (tmp_path / "link").mkdir()
    (tmp_path / "mine").write_text(text)
    fp.save_pretrained(model, tmp_path / "link", model_card=False)
    (tmp_path / "link" / "README.md").symlink_to(tmp_path / "mine")
    fp.save_pretrained(other, tmp_path / "link")
    assert (tmp_path / "mine").read_text() == text and "w8a16" in card(tmp_path / "link")[0]


def test_the_report_of_a_model():
    model, report = swapped()
    assert fp.report(model) is report
    for other in (copy.deepcopy(model), llama(), model.model):
        with pytest.raises(RuntimeError, match="this model has no report"):
            fp.report(other)
    fp.restore(model)
    with pytest.raises(RuntimeError, match="this model has no report"):
        fp.report(model)
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module"):
        fp.report(report)
