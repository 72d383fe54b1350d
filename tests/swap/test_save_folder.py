"""Checkpoints: where they may be saved to, one step from the old one to the new, and what other programs make of them."""

import copy
import json
import os
import pickle
import shutil

import pytest
import torch
from rotation import in_turn
from saving_processes import killed_after
from small_models import CONFIGS, batch, block, build, outputs, transformers
from transformers.quantizers import auto

import forwardpass as fp

pytest.importorskip("safetensors.torch")


def weights(folder):
    """The file of the weights."""
    return folder / json.loads((folder / "forwardpass.json").read_text())["weights"]


def files(folder):
    """The names of the files of the weights."""
    names = json.loads((folder / "forwardpass.json").read_text())["weights"]
    return {names} if isinstance(names, str) else {*names}


@pytest.fixture
def saved(tmp_path):
    """A folder with a swapped block, an input and its output."""
    model, x = block(), torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    fp.swap(model, "int8")
    fp.save_pretrained(model, tmp_path / "saved")
    return tmp_path / "saved", x, outputs(model, x)


def original(folder, name="bert"):
    """A swapped model, loaded from `folder`, where its original is."""
    build(name).save_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    fp.swap(model, "int8")
    return model


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_models_own_folder_is_never_written_to(tmp_path, monkeypatch):
    source = tmp_path / "model"
    model = original(source)
    before = contents(source)
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in (source, "model", "link", "other/../model", "none/../model", tmp_path / "link" / "."):
        for overwrite in (False, True):
            with pytest.raises(ValueError, match="is where the model was loaded from"):
                fp.save_pretrained(model, path, overwrite=overwrite)
    fp.save_pretrained(model, tmp_path / "other")
    (source / "forwardpass.json").write_bytes((tmp_path / "other" / "forwardpass.json").read_bytes())
    with pytest.raises(ValueError, match="is where the model was loaded from"):  # a checkpoint is there too
        fp.save_pretrained(model, source)
    (source / "forwardpass.json").unlink()
    assert contents(source) == before


def test_a_folder_of_others_is_asked_for(tmp_path):
    model, x = block(), torch.randn(4, 64)
    fp.swap(model, "int8")
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(ValueError, match=r"no checkpoint of forwardpass \(model.safetensors, …\).*overwrite=True") as e:
        fp.save_pretrained(model, tmp_path)
    assert "\n" not in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    fp.save_pretrained(model, tmp_path, overwrite=True)
    fp.save_pretrained(model, tmp_path)  # now it is ours
    assert (tmp_path / "model.safetensors").read_text() == "mine"
    assert torch.equal(outputs(fp.load_pretrained(tmp_path, model=block()), x), outputs(model, x))
    for path in (tmp_path / "model.safetensors", tmp_path / "model.safetensors" / "below"):
        with pytest.raises(ValueError, match="folder"):
            fp.save_pretrained(model, path)


def test_a_loaded_model_is_saved_where_it_came_from(tmp_path):
    model = original(tmp_path / "model")
    fp.save_pretrained(model, tmp_path / "saved")
    loaded = fp.load_pretrained(tmp_path / "saved")
    assert loaded.name_or_path == str(tmp_path / "saved")
    fp.save_pretrained(loaded, tmp_path / "saved")
    assert torch.equal(outputs(fp.load_pretrained(tmp_path / "saved"), batch("bert")), outputs(model, batch("bert")))


@pytest.mark.every(3)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("size", in_turn(["5GB", "50KB"]))
def test_a_save_that_is_killed_leaves_the_old_checkpoint_or_the_new(tmp_path, size, step):
    """At every step on files, or at each third of them, the first among them."""
    old, new, inputs = (
        build("bert"),
        build("bert", {"bert": (*CONFIGS["bert"][:2], {**CONFIGS["bert"][2], "num_hidden_layers": 1})}),
        batch("bert"),
    )
    for model in (old, new):
        fp.swap(model, "int8")
    was, will = outputs(old, inputs), outputs(new, inputs)
    fp.save_pretrained(old, tmp_path / "old", max_shard_size=size)
    seen = []
    for events in range(0, 200, step):
        folder = tmp_path / str(events)
        shutil.copytree(tmp_path / "old", folder)
        ended = killed_after(events, lambda: fp.save_pretrained(new, folder, max_shard_size=size))  # noqa: B023
        got = outputs(fp.load_pretrained(folder), inputs)
        assert torch.equal(got, was) or torch.equal(got, will), events
        seen.append(torch.equal(got, will))
        fp.save_pretrained(new, folder, max_shard_size=size)  # over what is left
        assert {p.name for p in folder.glob("*.safetensors")} == files(folder)
        assert (len(files(folder)) > 1) == (size == "50KB")
        assert not list(folder.glob(".*"))
        if ended:
            break
    assert seen == sorted(seen) and not seen[0] and seen[-1] and seen.count(True) < len(seen) - 3 // step
    for events in range(4):  # a first save that is killed can be made again
        killed_after(events, lambda: fp.save_pretrained(new, tmp_path / "first"))
        fp.save_pretrained(new, tmp_path / "first")


@pytest.mark.parametrize("file", ["weights", "record"])
def test_an_error_while_saving_leaves_the_old_checkpoint(saved, monkeypatch, file):
    folder, x, expected = saved
    before, other = contents(folder), block()
    fp.swap(other, "w8a16")
    real, left = os.fsync, [("weights", "record").index(file)]

    def full(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        fp.save_pretrained(other, folder)
    now = contents(folder)
    assert {name: now[name] for name in before} == before and not list(folder.glob(".*"))
    assert torch.equal(outputs(fp.load_pretrained(folder, model=block()), x), expected)


def test_links_that_wait_are_not_followed(saved):
    folder, _, _ = saved
    mine = folder.parent / "mine"
    mine.write_text("mine")
    for name in (
        "forwardpass.json.partial",
        "model.safetensors.partial",
        f"{weights(folder).name}.partial",
        "config.json",
    ):
        (folder / name).symlink_to(mine)
    model = build("bert")
    fp.swap(model, "int8")
    fp.save_pretrained(model, folder)
    assert mine.read_text() == "mine"
    assert not (folder / "config.json").is_symlink()


# ---- other programs


def test_other_programs_find_no_weights(tmp_path, monkeypatch):
    """As transformers without forwardpass, whose quantizer is not registered then."""
    for mapping in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(mapping, "forwardpass")
    model = build("bert")
    fp.swap(model, "int8")
    fp.save_pretrained(model, tmp_path)
    for cls in (transformers.AutoModel, transformers.BertModel):
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            cls.from_pretrained(tmp_path)


@pytest.mark.every(2)
@pytest.mark.parametrize("made", ["swapped", "copied", "pickled", "compiled", "loaded", "part"])
def test_a_swapped_models_own_method_writes_our_folder(tmp_path, made):
    model = build("llama")
    keys = model.state_dict().keys()
    fp.swap(model, "int8")
    if made == "copied":  # whose copy has other values, and is saved with them
        before = model
        model = copy.deepcopy(model)
        model.model.norm.weight.data.mul_(2)
    if made == "loaded":
        fp.save_pretrained(model, tmp_path / "saved")
    other = {
        "swapped": lambda: model,
        "copied": lambda: model,
        "pickled": lambda: pickle.loads(pickle.dumps(model)),
        "compiled": lambda: torch.compile(model, backend="eager"),
        "loaded": lambda: fp.load_pretrained(tmp_path / "saved"),
        "part": lambda: model.model,
    }[made]()
    other.save_pretrained(tmp_path / "own")
    again = fp.load_pretrained(tmp_path / "own")
    assert torch.equal(outputs(again, batch("llama")), outputs(other, batch("llama")))
    names = {k.removeprefix("_orig_mod.").replace("qweight", "weight") for k in other.state_dict()}
    assert made == "part" or names >= {k for k in keys if ".mlp." not in k}
    if made == "copied":
        assert not torch.equal(outputs(again, batch("llama")), outputs(before, batch("llama")))
        return
    fp.restore(model)
    model.save_pretrained(tmp_path / "floats")
    assert "save_pretrained" not in vars(model) and not (tmp_path / "floats" / "forwardpass.json").exists()


def test_a_method_of_ones_own_comes_back():
    model = build("llama")
    model.save_pretrained = own = lambda *args: None
    fp.swap(model, "int8")
    assert model.save_pretrained is not own
    fp.restore(model)
    assert model.save_pretrained is own


def test_attention_alone_is_saved_by_the_models_own_method(tmp_path):
    model = build("llama")
    before = outputs(model, batch("llama"))
    fp.swap(model, attention=True)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(loaded, batch("llama")), before)
