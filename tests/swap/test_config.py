"""quantization_config=fp.Config(…): what from_pretrained gives is what fp.swap makes of the same floats."""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from processes import fork
from safetensors.torch import load_file, save_file
from small_models import batch, build, outputs
from stored_formats import llama
from transformers import AutoModelForCausalLM

import forwardpass as fp
from forwardpass.nn import Int8Linear

X = {"input_ids": torch.arange(3, 35).reshape(2, 16)}


@pytest.fixture
def floats(tmp_path):
    llama().save_pretrained(tmp_path / "floats")
    return tmp_path / "floats"


def load(folder, *args, **options):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=fp.Config(*args, **options))


OPTIONS = {
    "int8": {"precision": "int8", "include": "**"},
    "w8a16": {"precision": "w8a16", "include": ["**", "lm_head"]},
    "bf16": {"precision": "bf16", "exclude": "mlp"},
    "patterns": {"precision": {"mlp": "int8", "o_proj": "w8a16"}, "include": "**"},
    "function": {"precision": lambda fqn, module: "int8" if "mlp" in fqn else None, "include": "**"},
    "cache": {"precision": "int8", "kv_cache": "int8"},
    "attention": {"attention": True},
    "calibrated": {"precision": "int8", "include": "**", "calibrate": [X, X]},
    "kept": {"precision": "int8", "include": "**", "keep": "auto"},
}


@pytest.mark.every(2)
@pytest.mark.parametrize("case", OPTIONS)
@torch.inference_mode()
def test_as_fp_swap(floats, case):
    options = OPTIONS[case]
    model = AutoModelForCausalLM.from_pretrained(floats)
    report = fp.swap(model, **options)
    loaded = load(floats, **options)
    assert torch.equal(outputs(loaded, X), outputs(model, X)) and not loaded.training
    assert fp.report(loaded).swapped == report.swapped and fp.report(loaded).skipped == report.skipped
    assert fp.report(loaded).attention == report.attention and fp.report(loaded).kv_cache == report.kv_cache
    assert not hasattr(loaded.config, "quantization_config") and not hasattr(loaded, "hf_quantizer")
    assert loaded.state_dict().keys() == model.state_dict().keys()


@torch.inference_mode()
def test_a_plan(floats, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(floats)
    report = fp.swap(model, "int8", include="mlp")
    report.save_plan(tmp_path / "plan.json")
    for plan in (tmp_path / "plan.json", report.plan, report.plan.to_json()):
        assert torch.equal(outputs(load(floats, plan=plan), X), outputs(model, X))


@pytest.mark.every(2)
@pytest.mark.parametrize("name", ["bert", "mixtral", "t5", "llama_tied", "gpt2"])
@torch.inference_mode()
def test_models(name, tmp_path):
    model, x = build(name), batch(name)
    model.save_pretrained(tmp_path)
    fp.swap(model, "int8", include="**", exclude="lm_head")
    loaded = type(model).from_pretrained(
        tmp_path, quantization_config=fp.Config("int8", include="**", exclude="lm_head")
    )
    # float32 sums go by where a weight lies
    torch.testing.assert_close(outputs(loaded, x), outputs(model, x), rtol=0, atol=1e-5)
    ties = {n for n, _ in model.named_parameters(remove_duplicate=False)} - {n for n, _ in model.named_parameters()}
    assert ties == {n for n, _ in loaded.named_parameters(remove_duplicate=False)} - {
        n for n, _ in loaded.named_parameters()
    }


@pytest.mark.every(2)
@torch.inference_mode()
def test_saved_by_every_way(floats, tmp_path):
    model = load(floats, "int8", include="**")
    expected = outputs(model, X)
    fp.save_pretrained(model, tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    copied = copy.deepcopy(model)
    copied.save_pretrained(tmp_path / "c")
    for name in "abc":
        assert torch.equal(outputs(fp.load_pretrained(tmp_path / name), X), expected)
        assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / name), X), expected)
    assert torch.equal(outputs(pickle.loads(pickle.dumps(model)), X), expected)
    with pytest.raises(ValueError, match="is where the model was loaded from"):
        model.save_pretrained(floats)


@torch.inference_mode()
def test_originals(floats):
    with pytest.raises(RuntimeError, match="keep=False"):
        fp.restore(load(floats, "int8"))
    model = load(floats, "int8", include="**", keep="device")
    fp.restore(model)
    assert torch.equal(outputs(model, X), outputs(AutoModelForCausalLM.from_pretrained(floats), X))


@torch.inference_mode()
def test_nothing_of_the_files_is_mapped_any_more(floats):
    """A mapped file is in memory whole while one tensor of it is."""
    model = load(floats, "int8", include="**")
    expected = outputs(model, X)
    for path in floats.glob("*.safetensors"):
        with open(path, "r+b") as file:
            file.write(b"\0" * path.stat().st_size)
    assert torch.equal(outputs(model, X), expected)


@pytest.mark.every(3)
@torch.inference_mode()
def test_an_iterator_of_batches_serves_one_load(floats):
    config = fp.Config("int8", include="**", calibrate=(x for x in [X, X]))
    model = AutoModelForCausalLM.from_pretrained(floats, quantization_config=config)
    assert fp.report(model).plan.calibrated
    assert torch.equal(outputs(model, X), outputs(load(floats, **OPTIONS["calibrated"]), X))
    with pytest.raises(ValueError, match="batch"):
        AutoModelForCausalLM.from_pretrained(floats, quantization_config=config)
    again = fp.Config("int8", include="**")  # and any other any number
    for _ in range(2):
        AutoModelForCausalLM.from_pretrained(floats, quantization_config=again)


@pytest.mark.every(2)
@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, torch.device("cpu"), "auto"])
@torch.inference_mode()
def test_dtype_and_device_map(floats, device_map):
    model = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.bfloat16)
    fp.swap(model, "int8", include="**")
    config = fp.Config("int8", include="**")
    loaded = AutoModelForCausalLM.from_pretrained(
        floats, dtype="bfloat16", device_map=device_map, quantization_config=config
    )
    assert loaded.dtype == torch.bfloat16 and {p.device.type for p in loaded.parameters()} == {"cpu"}
    assert torch.equal(outputs(loaded, X), outputs(model, X))


def test_several_devices_are_refused(floats, tmp_path, monkeypatch):
    options = {"device_map": "auto", "max_memory": {"cpu": 10**6}, "offload_folder": tmp_path / "disk"}
    with pytest.raises(ValueError, match="this device_map leaves weights on a disk"):
        AutoModelForCausalLM.from_pretrained(floats, quantization_config=fp.Config("int8"), **options)
    as_loaded = transformers.LlamaForCausalLM.eval

    def dispatched(model):  # as accelerate does over several devices
        model.model.layers[0]._hf_hook = object()
        return as_loaded(model)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "eval", dispatched)
    with pytest.raises(ValueError, match="swaps a model on one device, and this device_map spreads it"):
        load(floats, "int8")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"precision": "int4"}, ValueError, "there is no precision 'int4'"),
        ({"precision": {"mlp": "int4"}}, ValueError, "there is no precision 'int4'"),
        ({"precision": 8}, TypeError, "precision is a name"),
        ({"precision": "int8", "plan": "plan.json"}, ValueError, "both were"),
        ({"plan": "nowhere.json"}, FileNotFoundError, r"nowhere\.json"),
        ({"precision": "int8", "keep": True}, ValueError, "keep is one of"),
        ({"precision": "int8", "attention": "int4"}, ValueError, "not 'int4'"),
        ({"precision": "int8", "crossover": 0}, ValueError, "attention is 'auto': pass attention='int8'"),
        ({"precision": "int8", "attention": "int8", "crossover": -1}, ValueError, "not -1"),
        ({"precision": "int8", "attention": "int8", "crossover": True}, ValueError, "not True"),
        ({"precision": "int8", "kv_cache": "int4"}, ValueError, "kv_cache is None or one of"),
        ({"precision": "int8", "unpad": 1}, TypeError, 'unpad is "auto", True or False'),
        ({"precision": "int8", "strict": "yes"}, TypeError, "strict is True or False"),
        ({"precision": "int8", "include": 3}, TypeError, "int"),
        ({"precision": "int8", "exclude": "re:("}, ValueError, "is not a regular expression"),
        ({"precision": "int8", "calibrate": 3}, TypeError, "calibrate is an iterable of batches"),
        ({"precision": "int8", "calibrate": X}, TypeError, "not a dict: pass .batch. for one"),
        ({"precision": "int8", "forward": 3}, TypeError, "forward is a function"),
        ({"precision": "int8", "dry_run": True}, TypeError, "dry_run"),
    ],
)
def test_wrong_arguments_are_refused_when_it_is_made(options, error, words):
    with pytest.raises(error, match=words):
        fp.Config(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "either precision= or plan= says what is swapped, and neither was"),
        ({"precision": "stored"}, "is for what another library has stored"),
        ({"precision": {"mlp": "stored"}}, "is for what another library has stored"),
        ({"precision": "w8a16", "calibrate": [X]}, "w8a16 takes no calibration"),
    ],
)
def test_what_is_nothing_for_a_model_of_floats_is_refused_before_it_is_loaded(floats, options, words, monkeypatch):
    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", None)
    with pytest.raises(ValueError, match=words):
        load(floats, **options)


def test_a_config_does_not_change_and_is_carried_by_a_swap(floats):
    """Its fields are those of fp.swap; fields that are given beside it stand in the place of its own."""
    config = fp.Config("int8", include="**", exclude="o_proj", attention=False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.exclude = ()
    by_config, by_fields, without = (transformers.LlamaForCausalLM.from_pretrained(floats) for _ in range(3))
    first = fp.swap(by_config, config)
    second = fp.swap(by_fields, "int8", include="**", exclude="o_proj", attention=False)
    assert first.plan == second.plan and torch.equal(outputs(by_config, X), outputs(by_fields, X))
    assert len(fp.swap(without, config, exclude=()).swapped) == len(first.swapped) + 2
    with pytest.raises(TypeError, match="a swap has no option 'keep_originals': it has attention, calibrate"):
        fp.swap(without, "int8", keep_originals=True)
    with pytest.raises(ValueError, match="plan takes no precision="):
        fp.plan(without, [X], config, min_cosine=0.9)


def test_folders_that_are_quantised_already(floats, tmp_path):
    model = load(floats, "int8", include="**")
    model.save_pretrained(tmp_path / "ours")
    fp.export_pretrained(model, tmp_path / "theirs")
    for name in ("ours", "theirs"):
        with pytest.raises(ValueError, match=r"The model is quantized with .* but you are passing a Config"):
            load(tmp_path / name, "int8")
    with pytest.raises(ValueError, match=r"is an fp\.Config"):
        AutoModelForCausalLM.from_pretrained(floats, quantization_config={"quant_method": "forwardpass"})


def test_files_that_hold_no_floats_of_the_model(floats):
    """As of a library that transformers does not know, and goes on without."""
    path = floats / "model.safetensors"
    whole = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**whole, name: whole[name].to(torch.int8)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight is I8 in the files"):
        load(floats, "int8")
    save_file({k: v for k, v in whole.items() if k != name}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the weight of model\.layers\.1\.mlp\.up_proj is not in the files"):
        load(floats, "int8")
    save_file(whole, path, metadata={"format": "pt"})
    model = (
        transformers.AutoModelForSequenceClassification.from_pretrained(  # whose head is in no file, as it should be
            floats, quantization_config=fp.Config("int8", include="**")
        )
    )
    assert isinstance(model.model.layers[0].self_attn.q_proj, Int8Linear)


def test_a_swap_that_fails(floats):
    path, name = floats / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(path)
    save_file({**tensors, name: tensors[name] * torch.nan}, path, metadata={"format": "pt"})
    with pytest.raises(fp.Unsupported, match=r"strict=True.*up_proj.*NaN"):
        load(floats, "int8", include="**", strict=True)
    with pytest.warns(UserWarning, match="matches none"):
        load(floats, "int8", exclude="nothing_of_that_name")


def test_printed():
    config = fp.Config({"o_proj": "w8a16"}, include="**")
    assert "'o_proj': 'w8a16'" in repr(config) and copy.deepcopy(config) is config
    of_model = llama().config
    of_model.quantization_config = config
    printed = json.loads(of_model.to_json_string())["quantization_config"]
    assert printed["quant_method"] == "forwardpass" and printed["keep"] == "auto" and "w8a16" in printed["precision"]


def test_it_needs_no_transformers():
    code = (
        "import sys, forwardpass as fp; print(fp.Config('int8', exclude='mlp')); print('transformers' in sys.modules)"
    )
    ran = fork.run(code)
    assert ran.stdout.startswith("Config(precision='int8'") and ran.stdout.splitlines()[1] == "False"


MEMORY = """
import re, sys, torch, forwardpass as fp
from transformers import LlamaConfig, LlamaForCausalLM
def status():
    return {k: int(v) for k, v in re.findall(r"(\\w+):\\s+(\\d+) kB", open("/proc/self/status").read())}
torch.set_num_threads(1)
torch.manual_seed(0)
size = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=2, num_attention_heads=8, vocab_size=4000)
LlamaForCausalLM(LlamaConfig(**size)).save_pretrained(sys.argv[1])
fp.swap(LlamaForCausalLM(LlamaConfig(**size)).eval(), "int8", include="**")
open("/proc/self/clear_refs", "w").write("5")
before = status()
model = LlamaForCausalLM.from_pretrained(sys.argv[1], quantization_config=fp.Config("int8", include="**"))
after = status()
bytes_before, bytes_after = fp.report(model).weight_bytes.before, fp.report(model).weight_bytes.after
print(bytes_before >> 10, bytes_after >> 10, after["VmHWM"] - before["VmRSS"], after["VmRSS"] - before["VmRSS"])
"""


@pytest.mark.slow
def test_memory(tmp_path):
    """The mapped file and the 8-bit model at most, and that model alone afterwards."""
    ran = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True)
    floats, swapped, peak, left = map(int, ran.stdout.split())
    assert floats > 100 << 10 and peak < 1.1 * (floats + swapped) and left < 1.3 * swapped
