"""Checkpoints: the same bits in a new process, nothing executed, and a sentence for every damaged file."""

import copy
import json
import os
import pickle
import struct

import pytest
import torch
from processes import fork
from rotation import paired
from small_models import CONFIGS, assert_same_objects, batch, block, build, objects, outputs, transformers
from torch import nn

import forwardpass as fp

safetensors = pytest.importorskip("safetensors.torch")


def weights(folder):
    """The file of the weights."""
    return folder / json.loads((folder / "forwardpass.json").read_text())["weights"]


@pytest.fixture
def saved(tmp_path):
    """A folder with a swapped block, and its output."""
    model, x = block(), torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    fp.swap(model, "int8", calibrate=[x] * 8)
    fp.save_pretrained(model, tmp_path)
    return tmp_path, x, outputs(model, x)


@pytest.mark.every(2)
@pytest.mark.parametrize(("name", "precision"), paired(CONFIGS, ["int8", "fp8", "w8a16", "bf16"]))
def test_bits_are_equal(tmp_path, name, precision):
    model, inputs = build(name), batch(name)
    if name == "bert":
        model.half().float()
    fp.swap(model, precision, keep=False)
    expected = outputs(model, inputs)
    fp.save_pretrained(model, tmp_path / "checkpoint")
    loaded = fp.load_pretrained(tmp_path / "checkpoint")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert torch.equal(outputs(loaded, inputs), expected)
    with torch.device("meta"):
        filled = build(name)
    assert fp.load_pretrained(tmp_path / "checkpoint", model=filled) is filled
    assert torch.equal(outputs(filled, inputs), expected)
    for other in (loaded, filled):
        assert other.state_dict().keys() == model.state_dict().keys()
        ties = {n for n, p in model.named_parameters(remove_duplicate=False)} - {n for n, _ in model.named_parameters()}
        assert ties == {n for n, p in other.named_parameters(remove_duplicate=False)} - {
            n for n, _ in other.named_parameters()
        }
    with pytest.raises(RuntimeError, match="no originals"):
        fp.restore(loaded)
    fp.save_pretrained(loaded, tmp_path / "again")
    assert (tmp_path / "again" / "forwardpass.json").read_text() == (
        tmp_path / "checkpoint" / "forwardpass.json"
    ).read_text()
    assert weights(tmp_path / "again").read_bytes() == weights(tmp_path / "checkpoint").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(tmp_path, dtype):
    model, inputs = build("llama").to(dtype), batch("llama")
    fp.swap(model, "int8")
    fp.save_pretrained(model, tmp_path)
    loaded = fp.load_pretrained(tmp_path)
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))
    assert {t.dtype for t in loaded.parameters()} == {dtype}


@pytest.mark.every(3)
def test_a_new_process_without_the_original_weights(tmp_path):
    model, inputs = build("bert"), batch("bert")
    fp.swap(model, "int8", calibrate=[inputs] * 3)
    fp.save_pretrained(model, tmp_path)
    torch.save((inputs, outputs(model, inputs)), tmp_path / "expected.pt")
    script = """
import sys, torch
from torch import nn
made = []
real = nn.Linear.__init__
def counted(self, *args, **kwargs):
    real(self, *args, **kwargs)
    made.append(self.weight.device.type)
nn.Linear.__init__ = counted
import forwardpass as fp
model = fp.load_pretrained(sys.argv[1])
assert made and set(made) == {"meta"}, made
inputs, expected = torch.load(sys.argv[1] + "/expected.pt")
with torch.inference_mode():
    assert torch.equal(model(**inputs)[0], expected)
"""
    done = fork.run(script, tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_model_of_ones_own(saved):
    folder, x, expected = saved
    model = block()
    with torch.no_grad():
        model.head.weight.zero_()
    fp.load_pretrained(folder, model=model)
    assert torch.equal(outputs(model, x), expected)
    with pytest.raises(
        ValueError, match="holds a Block, which is no class of transformers: build it and pass it as model="
    ):
        fp.load_pretrained(folder)
    with pytest.raises(ValueError, match="fills a model that is not swapped"):
        fp.load_pretrained(folder, model=model)


def test_every_form_of_a_layer(tmp_path):
    linears = [nn.Linear(260, 130), nn.Linear(130, 200, bias=False), nn.Linear(200, 130), nn.Linear(130, 64)]
    model, x = nn.Sequential(*linears).eval(), torch.randn(4, 260)
    for i, layer in enumerate((
        fp.nn.Fp8Linear.from_torch(model[0], scales="block", channel_scale=torch.rand(260) + 0.5),
        fp.nn.Fp8Linear.from_torch(model[1], scales="tensor", input_scale=torch.tensor([0.01])),
        fp.nn.W8A16Linear.from_torch(model[2], weight_dtype=torch.float8_e4m3fn, scales="group"),
    )):  # fmt: skip
        model[i] = layer
    fp.save_pretrained(model, tmp_path)
    loaded = fp.load_pretrained(tmp_path, model=nn.Sequential(*map(copy.deepcopy, linears)).eval())
    assert [type(m) for m in loaded] == [type(m) for m in model]
    assert [m.config() for m in loaded[:3]] == [m.config() for m in model[:3]]
    assert loaded[0].qweight.stride(0) % 16 == 0
    assert torch.equal(outputs(loaded, x), outputs(model, x))


def test_what_state_dict_leaves_out(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)
            self.also = self.layer_norm = nn.LayerNorm(64)
            self.register_buffer("positions", torch.arange(64), persistent=False)
            self.register_buffer("twice", torch.randn(64), persistent=True)
            self.register_buffer("half_of_it", self.twice[:32], persistent=False)
            self.register_buffer("empty", torch.empty(0))
            self.register_buffer("scalar", torch.tensor(3.0))
            self.register_buffer("none", None)

        def forward(self, x):
            return self.also(self.layer(x)) + self.positions * self.scalar + self.twice

    torch.manual_seed(0)
    model, x = Odd().eval(), torch.randn(2, 64)
    fp.swap(model, "int8")
    fp.save_pretrained(model, tmp_path)
    with torch.device("meta"):
        loaded = Odd().eval()
    fp.load_pretrained(tmp_path, model=loaded)
    assert torch.equal(outputs(loaded, x), outputs(model, x))
    assert loaded.also is loaded.layer_norm
    assert torch.equal(loaded.half_of_it, model.half_of_it)
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_what_cannot_be_stored(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    model = nn.Sequential(nn.Linear(64, 64), Extra(2, 2)).eval()
    fp.swap(model, "int8")
    with pytest.raises(ValueError, match=r"1 \(Extra\) has extra state"):
        fp.save_pretrained(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    model[1] = nn.Linear(2, 2, device="meta")
    with pytest.raises(ValueError, match=r"1\.weight is on the meta device"):
        fp.save_pretrained(model, tmp_path / "none")


def test_a_file_that_changes_later_does_not_change_the_model(saved):
    folder, x, expected = saved
    model = fp.load_pretrained(folder, model=block())
    with open(weights(folder), "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size // 2)
        file.write(b"\x55" * (size - size // 2))
    assert torch.equal(outputs(model, x), expected)


# ---- damaged and hostile


def edit(folder, change):
    record = json.loads((folder / "forwardpass.json").read_text())
    change(record)
    (folder / "forwardpass.json").write_text(json.dumps(record))


def tensors(folder, change):
    content = safetensors.load_file(weights(folder))
    change(content)
    safetensors.save_file(content, weights(folder))


def truncated(folder):
    data = weights(folder).read_bytes()
    weights(folder).write_bytes(data[: len(data) // 2])


def written(name, data):
    return lambda folder: (weights(folder) if name == "weights" else folder / name).write_bytes(data)


def header(content, data=b""):
    text = json.dumps(content).encode()
    return written("weights", struct.pack("<Q", len(text)) + text + data)


DAMAGE = {
    "truncated": (truncated, ValueError, "damaged or no safetensors file"),
    "empty": (written("weights", b""), ValueError, "damaged or no safetensors file"),
    "pickle": (written("weights", pickle.dumps({"a": 1})), ValueError, "damaged or no safetensors file"),
    "huge header": (
        written("weights", struct.pack("<Q", 1 << 60) + b"{}"),
        ValueError,
        "damaged or no safetensors file",
    ),
    "beyond its end": (
        header({"first.qweight": {"dtype": "I8", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 1 << 60]}}),
        ValueError,
        "damaged or no safetensors file",
    ),
    "missing tensor": (
        lambda f: tensors(f, lambda t: t.pop("head.bias")),
        ValueError,
        "'head.bias' is missing from the file",
    ),
    "extra tensor": (
        lambda f: tensors(f, lambda t: t.update({"../../etc": torch.ones(1)})),
        ValueError,
        r"'\.\./\.\./etc' has no place in the model",
    ),
    "shape": (
        lambda f: tensors(f, lambda t: t.update({"head.bias": torch.ones(4)})),
        ValueError,
        r"head.bias has the shape \(4,\)",
    ),
    "shape of a layer": (
        lambda f: tensors(f, lambda t: t.update({"first.qweight": torch.ones(2, 2, dtype=torch.int8)})),
        ValueError,
        r"first.qweight in the file is \(2, 2\)",
    ),
    "dtype": (
        lambda f: tensors(f, lambda t: t.update({"head.bias": torch.ones(3, dtype=torch.int32)})),
        ValueError,
        "head.bias is torch.int32",
    ),
    "dtype of a layer": (
        lambda f: tensors(f, lambda t: t.update({"first.weight_scale": torch.ones(128).half()})),
        ValueError,
        "first.weight_scale is torch.float16 in the file, not torch.float32",
    ),
    "no weights": (lambda f: weights(f).unlink(), FileNotFoundError, "no forwardpass-"),
    "no record": (lambda f: (f / "forwardpass.json").unlink(), FileNotFoundError, "no checkpoint of forwardpass"),
    "not json": (written("forwardpass.json", b"{"), ValueError, "not a checkpoint"),
    "deep json": (written("forwardpass.json", b"[" * 500_000), ValueError, "not a checkpoint"),
    "schema": (
        lambda f: edit(f, lambda r: r.update(schema="forwardpass.checkpoint/7")),
        ValueError,
        "this version reads",
    ),
    "weights elsewhere": (
        lambda f: edit(f, lambda r: r.update(weights=f"../{f.name}/{r['weights']}")),
        ValueError,
        "the name of its weights",
    ),
    "entries": (lambda f: edit(f, lambda r: r.pop("aliases")), ValueError, "damaged"),
    "types": (lambda f: edit(f, lambda r: r.update(layers={})), ValueError, "damaged"),
    "layer entries": (
        lambda f: edit(f, lambda r: r["layers"][0].pop("config")),
        ValueError,
        r"layers\.0 has no config",
    ),
    "unknown module": (
        lambda f: edit(f, lambda r: r["layers"][0].update(module="os.system")),
        ValueError,
        "unknown module",
    ),
    "module that is no name": (
        lambda f: edit(f, lambda r: r["layers"][0].update(module=[])),
        ValueError,
        r"layers\.0\.module is",
    ),
    "layer twice": (lambda f: edit(f, lambda r: r["layers"].append(r["layers"][0])), ValueError, "twice"),
    "unknown layer": (
        lambda f: edit(f, lambda r: r["layers"][0].update(fqn="../x")),
        ValueError,
        r"no Linear layer, convolution or experts '\.\./x'",
    ),
    "absurd size": (
        lambda f: edit(f, lambda r: r["layers"][0]["config"].update(in_features=10**15)),
        ValueError,
        "recorded as",
    ),
    "unknown option": (
        lambda f: edit(f, lambda r: r["layers"][0]["config"].update(device="cuda")),
        ValueError,
        "the configuration of first",
    ),
    "dtype of a bias": (
        lambda f: edit(f, lambda r: r["layers"][0]["config"].update(dtype="__builtins__")),
        ValueError,
        "the configuration of first",
    ),
    "bias that is a list": (
        lambda f: edit(f, lambda r: r["layers"][0]["config"].update(dtype=[1])),
        ValueError,
        "the configuration of first",
    ),
    "option of another type": (
        lambda f: edit(f, lambda r: r["layers"][0]["config"].update(symmetric=[])),
        ValueError,
        r"the configuration of first .*symmetric is '\[\]', no bool",
    ),
    "bias that is a number": (
        lambda f: edit(f, lambda r: r["layers"][0]["config"].update(bias=1)),
        ValueError,
        "bias is '1', no bool",
    ),
    "alias": (
        lambda f: edit(f, lambda r: r["aliases"].update({"first.qweight": "nowhere"})),
        ValueError,
        "no tensor 'nowhere'",
    ),
    "alias of another shape": (
        lambda f: edit(f, lambda r: r["aliases"].update({"head.weight": "head.bias"})),
        ValueError,
        "head.weight",
    ),
    "alias that is a number": (
        lambda f: edit(f, lambda r: r["aliases"].update({"head.weight": 3})),
        ValueError,
        "damaged",
    ),
}


@pytest.mark.every(2)
@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_refused(saved, case):
    folder, x, _ = saved
    damage, error, words = DAMAGE[case]
    damage(folder)
    model = block()
    before, exact = objects(model), outputs(model, x)
    with pytest.raises(error, match=words) as e:
        fp.load_pretrained(folder, model=model)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 600
    assert_same_objects(model, before)
    assert torch.equal(outputs(model, x), exact)


def test_another_model_is_refused(saved):
    folder, _, _ = saved
    for model, words in (
        (block(width=96), "recorded as"),
        (nn.Sequential(block()), "no Linear layer, convolution or experts 'first'"),
    ):
        before = objects(model)
        with pytest.raises(ValueError, match=words):
            fp.load_pretrained(folder, model=model)
        assert_same_objects(model, before)
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        fp.load_pretrained(folder / "nowhere", model=block())


def config(**changes):
    return lambda folder: edit(folder, lambda r: r["model"]["config"].update(changes))


def model_class(name):
    return lambda folder: edit(folder, lambda r: r["model"].update({"class": name}))


HUGGINGFACE_DAMAGE = {
    "layers": (config(num_hidden_layers=10**9), ValueError, "num_hidden_layers=1000000000"),
    "layers within": (config(text_config={"num_hidden_layers": 10**9}), ValueError, "num_hidden_layers=1000000000"),
    "layers of stages": (config(encoder={"model_type": "swin", "depths": [2, 10**9]}), ValueError, "depths=1000000000"),
    "labels": (config(num_labels=10**9), ValueError, "num_labels=1000000000"),
    "width": (config(hidden_size=128), ValueError, "recorded as|has the shape"),
    "absurd width": (config(vocab_size=10**12), ValueError, "has the shape|cannot build"),
    "nonsense": (config(hidden_size="wide"), ValueError, "cannot build"),
    "another type": (config(model_type="mine"), ValueError, "cannot build"),
    "config of another type": (lambda f: edit(f, lambda r: r["model"].update(config=[])), ValueError, "damaged"),
    "class": (model_class("os"), ValueError, "has no model class 'os'"),
    "class that is none": (model_class("AutoTokenizer"), ValueError, "has no model class 'AutoTokenizer'"),
    "class of another type": (model_class(["BertModel"]), ValueError, "damaged"),
    "attention": (config(attn_implementation="kernels-community/flash-attn"), ValueError, "names code"),
    "attention, once": (config(_attn_implementation="kernels-community/flash-attn"), ValueError, "names code"),
    "attention by part": (config(attn_implementation={"": "eager", "text_config": "a/b"}), ValueError, "names code"),
    "attention within": (
        config(parts=[{"attn_implementation": "kernels-community/flash-attn"}]),
        ValueError,
        "names code",
    ),
    "internal": (config(_attn_implementation_internal="a/b"), ValueError, "names code"),
    "experts": (config(experts_implementation="sonicmoe"), ValueError, "names code"),
    "quantizer": (config(quantization_config={"quant_method": "mxfp4"}), ValueError, "names code"),
    "remote code": (config(auto_map={"AutoConfig": "mine.Mine"}), ValueError, "names code"),
    "remote code within": (config(text_config={"auto_map": {"AutoModel": "a/b--mine.Mine"}}), ValueError, "names code"),
    "backbone of a hub": (config(backbone_config={"backbone": "hf-hub:a/b"}), ValueError, "names code"),
}


@pytest.mark.every(2)
@pytest.mark.parametrize("case", HUGGINGFACE_DAMAGE)
def test_damaged_huggingface_checkpoints(tmp_path, case, monkeypatch):
    model = build("bert")
    fp.swap(model, "int8")
    fp.save_pretrained(model, tmp_path)
    (tmp_path / "mine.py").write_text("raise SystemExit('executed')")
    monkeypatch.setattr(
        transformers.modeling_utils, "lazy_import_flash_attention", lambda *a, **k: pytest.fail("fetched")
    )
    damage, error, words = HUGGINGFACE_DAMAGE[case]
    damage(tmp_path)
    with pytest.raises(error, match=words) as e:
        fp.load_pretrained(tmp_path)
    assert "\n" not in str(e.value)


def test_generation_settings_come_along(tmp_path):
    model = build("gpt2")
    model.generation_config.max_new_tokens = 7
    fp.swap(model, "int8")
    fp.save_pretrained(model, tmp_path)
    loaded = fp.load_pretrained(tmp_path)
    assert loaded.generation_config.max_new_tokens == 7
    inputs = batch("gpt2")
    assert torch.equal(loaded.generate(**inputs, do_sample=False), model.generate(**inputs, do_sample=False))
    assert isinstance(model, transformers.GPT2LMHeadModel)


def test_the_config_beside_it_is_for_other_programs(tmp_path, monkeypatch):
    monkeypatch.setattr(
        transformers.modeling_utils, "lazy_import_flash_attention", lambda *a, **k: pytest.fail("fetched")
    )
    model = build("bert")
    fp.swap(model, "int8")
    fp.save_pretrained(model, tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).hidden_size == model.config.hidden_size
    content = json.loads((tmp_path / "config.json").read_text())
    content.update(attn_implementation="kernels-community/flash-attn", num_hidden_layers=10**9)
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert torch.equal(outputs(fp.load_pretrained(tmp_path), batch("bert")), outputs(model, batch("bert")))


def test_no_name_of_code_is_stored_and_no_attention_is_fetched(tmp_path, monkeypatch):
    model = build("bert")
    model.config.auto_map, model.config.parts = {"AutoModel": "a/b--mine.Mine"}, [{"attn_implementation": "a/b"}]
    fp.swap(model, "int8", attention=False)
    model.config._attn_implementation_internal = "flash_attention_2"
    monkeypatch.setattr(
        transformers.modeling_utils, "lazy_import_flash_attention", lambda *a, **k: pytest.fail("fetched")
    )
    fp.save_pretrained(model, tmp_path)
    for name in ("forwardpass.json", "config.json"):
        assert "auto_map" not in (tmp_path / name).read_text() and "a/b" not in (tmp_path / name).read_text()
    with pytest.warns(UserWarning, match="saved with attention 'flash_attention_2'.*and runs 'sdpa'"):
        loaded = fp.load_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"


class WithAlias(nn.Module):
    """A buffer that is an attribute by another name too: transformers 4's rotary embeddings have one."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 64)
        self.register_buffer("table", torch.arange(64.0))
        self.original_table = self.table

    def forward(self, x):
        return self.fc(x) * self.original_table


def test_an_attribute_that_is_a_buffer_is_filled_with_it(tmp_path):
    """Refused, as if no file had it: no model with rotary embeddings of transformers 4.50 could be loaded."""
    model = WithAlias().eval()
    fp.swap(model, "w8a16")
    fp.save_pretrained(model, tmp_path)
    with torch.device("meta"):
        empty = WithAlias().eval()
    loaded = fp.load_pretrained(tmp_path, model=empty)
    x = torch.randn(3, 64)
    assert loaded.original_table is loaded.table and torch.equal(outputs(loaded, x), outputs(model, x))
    with torch.device("meta"):
        empty = WithAlias().eval()
        empty.other = torch.ones(3)
    with pytest.raises(ValueError, match="other is a plain attribute on the meta device"):
        fp.load_pretrained(tmp_path, model=empty)
