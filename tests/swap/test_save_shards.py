"""Checkpoints of several files of weights: the same bits by both doors, and a sentence for what is damaged or hostile."""

import gc
import json
import pathlib
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import batch, block, build, outputs
from stored_formats import llama
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import forwardpass as fp
from forwardpass.checkpoints import save

X = {"input_ids": torch.arange(3, 35).reshape(2, 16)}


def weights(folder):
    """The names of the files of the weights."""
    return json.loads((folder / "forwardpass.json").read_text())["weights"]


def names(folder, pattern):
    return {path.name for path in folder.glob(pattern)}


def saved(folder, size="200KB"):
    model = llama()
    fp.swap(model, "int8", include="**")
    fp.save_pretrained(model, folder, max_shard_size=size)
    return outputs(model, X)


def by_name(folder):
    return fp.load_pretrained(folder)


def by_auto_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


DOORS = pytest.mark.parametrize("door", [by_name, by_auto_model])


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("size", "most"), [("5GB", 5 * 10**9), (10**6, 10**6), ("200KB", 200_000), ("100 kib", 102_400), (1, 1)]
)
@torch.inference_mode()
def test_bits_are_equal(tmp_path, size, most):
    expected = saved(tmp_path, size)
    shards = weights(tmp_path)
    assert isinstance(shards, str) == (size == "5GB")
    files = [load_file(tmp_path / name) for name in ([shards] if size == "5GB" else shards)]
    sizes = [sum(t.nbytes for t in tensors.values()) for tensors in files]
    assert len(files) == len(names(tmp_path, "*.safetensors")) and (size != 1 or len(files) > 30)
    assert all(n <= most or len(tensors) == 1 for n, tensors in zip(sizes, files))
    assert size == 1 or len(files) < 2 * sum(sizes) / most + 2
    assert torch.equal(outputs(by_name(tmp_path), X), expected)
    loaded = by_auto_model(tmp_path)
    assert torch.equal(outputs(loaded, X), expected)
    assert type(loaded.config).__module__.startswith("transformers.") and not type(loaded.config).extra_files
    fp.save_pretrained(loaded, tmp_path)  # of one file, in its place
    assert names(tmp_path, "*.safetensors") == {weights(tmp_path)}
    assert torch.equal(outputs(by_auto_model(tmp_path), X), expected)


@pytest.mark.every(2)
@pytest.mark.parametrize("name", ["llama_tied", "mixtral", "t5", "bert"])
@torch.inference_mode()
def test_models(tmp_path, name):
    model, x = build(name), batch(name)
    fp.swap(model, "int8", include="**", exclude="lm_head")
    fp.save_pretrained(model, tmp_path, max_shard_size="30KB")
    assert len(weights(tmp_path)) > 3
    expected = outputs(model, x)
    assert torch.equal(outputs(fp.load_pretrained(tmp_path), x), expected)
    torch.testing.assert_close(outputs(type(model).from_pretrained(tmp_path), x), expected, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_another_head_over_the_same_files(tmp_path):
    saved(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(outputs(model.model, X), outputs(by_name(tmp_path).model, X))


def test_a_model_of_ones_own(tmp_path):
    model, x = block(), torch.randn(4, 64)
    fp.swap(model, "int8")
    fp.save_pretrained(model, tmp_path, max_shard_size=1)
    assert torch.equal(outputs(fp.load_pretrained(tmp_path, model=block()), x), outputs(model, x))


@torch.inference_mode()
def test_a_cached_repository_of_the_hub(tmp_path):
    """Where transformers looks for files by their names in a repository, not in a folder."""
    expected = saved(tmp_path / "saved")
    repository, commit = tmp_path / "cache/models--someone--llama", "0" * 40
    shutil.copytree(tmp_path / "saved", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    loaded = AutoModelForCausalLM.from_pretrained("someone/llama", **options)
    assert torch.equal(outputs(loaded, X), expected)
    (repository / "snapshots" / commit / weights(tmp_path / "saved")[3]).unlink()
    with pytest.raises(FileNotFoundError, match="there is no forwardpass-"):
        AutoModelForCausalLM.from_pretrained("someone/llama", **options)


@pytest.mark.every(2)
@pytest.mark.parametrize("size", ["5 parsecs", "GB", "", "-5MB", "1.5GB", 0, -1, True, 1.5, None])
@pytest.mark.parametrize("save", [fp.save_pretrained, fp.export_pretrained])
def test_sizes_that_are_none(tmp_path, save, size):
    model = llama()
    fp.swap(model, "int8", include="**")
    with pytest.raises(ValueError, match='max_shard_size is a number of bytes, 1 or more, or a text such as "5GB"'):
        save(model, tmp_path / "none", max_shard_size=size)
    assert not (tmp_path / "none").exists()


def test_one_file_at_a_time_is_gathered(tmp_path, monkeypatch):
    """Copies of what lies on a GPU, in padded rows or in a product of several layers: those of one file, not of the model."""
    model, original, calls = llama(hidden_size=200, num_attention_heads=5, num_key_value_heads=5), save._gathered, []

    def gathered(tensors, *args):
        assert not any(ref() is not None for refs in calls for ref in refs)
        result = original(tensors, *args)
        calls.append([weakref.ref(t) for name, t in result.items() if t is not tensors[name]])
        return result

    fp.swap(model, "int8", include="**")
    monkeypatch.setattr(save, "_gathered", gathered)
    fp.save_pretrained(model, tmp_path, max_shard_size="100KB")
    assert len(calls) > 4 and sum(map(len, calls)) > 10


def integers():
    """Bytes of the int8 tensors that there are."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in gc.get_objects()
                if issubclass(type(t), torch.Tensor) and t.dtype == torch.int8 and not t.is_meta}  # fmt: skip
    return sum(storages.values())


@pytest.mark.every(2)
def test_gates_of_mlps_are_copied_for_one_file_at_a_time(tmp_path, monkeypatch):
    """Those of all layers were copied before the first file was written: 1.6 times the model was in memory."""
    model, original, seen = llama(num_hidden_layers=6), save._gathered, []

    def gathered(*args):
        seen.append(integers())
        return original(*args)

    fp.swap(model, "int8", include="**", keep=False)
    assert len(fp.report(model).mlps) == 6
    before = integers()
    monkeypatch.setattr(save, "_gathered", gathered)
    fp.save_pretrained(model, tmp_path, max_shard_size="300KB")
    assert len(seen) > 6 and max(seen) <= before + 350_000
    monkeypatch.undo()
    assert torch.equal(outputs(fp.load_pretrained(tmp_path), X), outputs(model, X))


# ---- damaged and hostile


def edit(folder, change):
    """Changes the list of files in both of its places."""
    for name in ("forwardpass.json", "config.json"):
        record = json.loads((folder / name).read_text())
        change(record if name == "forwardpass.json" else record["quantization_config"])
        (folder / name).write_text(json.dumps(record))


def replaced(value):
    return lambda folder: edit(folder, lambda r: r["weights"].__setitem__(2, value))


def whole(value):
    return lambda folder: edit(folder, lambda r: r.update(weights=value))


def elsewhere(folder):
    shutil.move(folder / weights(folder)[2], folder.parent / weights(folder)[2])
    replaced(f"../{weights(folder)[2]}")(folder)


def a_name_in_two(folder):
    first, second = (folder / name for name in weights(folder)[1:3])
    save_file(load_file(second) | dict([next(iter(load_file(first).items()))]), second)


def without(tensor):
    def remove(folder):
        for path in folder.glob("*.safetensors"):
            if tensor in (tensors := load_file(path)):
                del tensors[tensor]
                save_file(tensors, path)

    return remove


def truncated(folder):
    path = folder / weights(folder)[4]
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder):
    torch.save({"x": torch.ones(1)}, folder / "forwardpass-0123456789abcdef.bin")
    replaced("forwardpass-0123456789abcdef.bin")(folder)


HOSTILE = {
    "elsewhere": (elsewhere, ValueError, "the name of its weights"),
    "an absolute path": (replaced("/etc/passwd"), ValueError, "the name of its weights"),
    "a pickle": (pickled, ValueError, "the name of its weights"),
    "another program's": (replaced("model.safetensors"), ValueError, "the name of its weights"),
    "a name and more": (replaced("forwardpass-0123456789abcdef.safetensors\n"), ValueError, "the name of its weights"),
    "a number": (replaced(3), ValueError, r"weights\.2 is '3', no str"),
    "a list": (replaced([]), ValueError, r"weights\.2 is .*, no str"),
    "none": (whole([]), ValueError, "the name of its weights"),
    "an object": (whole({}), ValueError, "damaged"),
    "null": (whole(None), ValueError, "damaged"),
    "twice": (lambda f: replaced(weights(f)[0])(f), ValueError, "the name of its weights"),
    "of another name": (replaced("forwardpass-0123456789abcdef.safetensors"), FileNotFoundError, "there is no forwardpass-0"),
    "missing": (lambda f: (f / weights(f)[2]).unlink(), FileNotFoundError, "there is no forwardpass-"),
    "a folder": (lambda f: ((f / weights(f)[2]).unlink(), (f / weights(f)[2]).mkdir()), FileNotFoundError, "there is no "),
    "one fewer": (lambda f: edit(f, lambda r: r["weights"].pop(2)), ValueError, "is missing from the file"),
    "truncated": (truncated, ValueError, "damaged or no safetensors file"),
    "a tensor in two files": (a_name_in_two, ValueError, "which is in another file of"),
    "no scale": (without("model.layers.0.mlp.up_proj.weight_scale"), ValueError, "is missing from the file"),
    "no norm": (without("model.norm.weight"), ValueError, "is missing from the file"),
    "no embedding": (without("model.embed_tokens.weight"), ValueError, "is missing from the file"),
}  # fmt: skip


@pytest.mark.every(2)
@DOORS
@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_damaged_or_hostile(tmp_path, case, door, monkeypatch):
    folder = tmp_path / "saved"
    saved(folder)
    damage, error, words = HOSTILE[case]
    damage(folder)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle is read"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(error, match=words) as e:
        door(folder)
    assert "\n" not in str(e.value) and len(str(e.value)) < 600
    assert before == {path: path.stat().st_mtime_ns for path in pathlib.Path(tmp_path).rglob("*")}
