"""from_pretrained(quantization_config=fp.Config(…)) quantises layers as they are read: the bits of a swap after the load, and never
more than a layer in floats."""

import contextlib
import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_models import ATTENTION, CONFIGS, MLPS, batch, build, outputs
from stored_formats import MIXTURES, llama, mixture
from torch import nn
from transformers import AutoModelForCausalLM

import forwardpass as fp
from forwardpass.checkpoints import auto_model
from forwardpass.common.models.modules import tensor_bytes
from forwardpass.nn import GatedMLP, Int8Linear
from forwardpass.proofs import walker
from forwardpass.swap import swapping

X = {"input_ids": torch.arange(3, 35).reshape(2, 16)}


@pytest.fixture
def floats(tmp_path):
    llama().save_pretrained(tmp_path / "floats")
    return tmp_path / "floats"


@contextlib.contextmanager
def watched(monkeypatch):
    """What there is when the layers are all read and the model is about to be swapped."""
    seen, original = [], auto_model.swap_loaded

    def look(model, config):
        linears = [
            m for m in model.modules() if isinstance(m, nn.Linear) or type(m).__name__.endswith(("Conv1D", "Experts"))
        ]
        seen.append((model, linears, tensor_bytes(linears)))
        return original(model, config)

    with monkeypatch.context() as patched:
        patched.setattr(auto_model, "swap_loaded", look)
        yield seen


def same(loaded, model):
    """All parameters and buffers, what they are called and their bits."""
    for name in ("named_parameters", "named_buffers"):
        of_loaded, of_model = (dict(getattr(m, name)(remove_duplicate=False)) for m in (loaded, model))
        assert of_loaded.keys() == of_model.keys()
        for key, t in of_model.items():
            assert (t.dtype, t.requires_grad) == (of_loaded[key].dtype, of_loaded[key].requires_grad), key
            torch.testing.assert_close(of_loaded[key], t, rtol=0, atol=0, equal_nan=True, msg=key)
    assert [(n, type(m)) for n, m in loaded.named_modules()] == [(n, type(m)) for n, m in model.named_modules()]


def both(folder, cls=AutoModelForCausalLM, precision="int8", loading=None, **options):
    """(a model that is swapped after the load, the same swapped while loading), which have the same report."""
    model = cls.from_pretrained(folder, **(loading or {}))
    report = fp.swap(model, precision, keep=False, **options)
    loaded = cls.from_pretrained(folder, quantization_config=fp.Config(precision, **options), **(loading or {}))
    same(loaded, model)
    after, before = (r.to_json() for r in (fp.report(loaded), report))
    peaks = [r["weight_bytes"].pop("peak") for r in (after, before)]
    assert after == before and loaded.training is model.training is False
    return model, loaded, peaks


@pytest.mark.every(2)
@pytest.mark.parametrize("precision", ["int8", "w8a16", "fp8", "bf16"])
@torch.inference_mode()
def test_bits_and_memory(floats, precision, monkeypatch):
    with watched(monkeypatch) as seen:
        model, loaded, peaks = both(floats, precision=precision, include="**")
    assert isinstance(loaded.model.layers[0].mlp, GatedMLP) or precision == "bf16"
    assert torch.equal(outputs(loaded, X), outputs(model, X))
    (_, linears, size) = seen[0]
    head = loaded.lm_head.weight.nbytes
    assert len(linears) == 15 and size < head + 15 * 4096  # those that were read, and no floats but the head's
    assert peaks[0] < peaks[1]


def test_the_code_of_the_model_is_read_once(floats, monkeypatch):
    read, block_of = [], walker.block_of
    monkeypatch.setattr(walker, "block_of", lambda leaf, *args: read.append(leaf.fqn) or block_of(leaf, *args))
    AutoModelForCausalLM.from_pretrained(floats, quantization_config=fp.Config("int8"))
    assert len(read) == len({*read}) == 15


FAMILIES = {
    **{name: (CONFIGS, name) for name in CONFIGS},
    **{name: (MLPS, name) for name in MLPS if name not in CONFIGS},
    **{name: (ATTENTION, name) for name in ("gpt_oss", "gemma2") if name not in MLPS},
}


@pytest.mark.every(2)
@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_families(name, tmp_path, monkeypatch):
    """Conv1D, biases, experts, tied heads, gate and up as one; their MLPs as one module and their products as after a load."""
    configs, key = FAMILIES[name]
    model = build(key, configs)
    model.save_pretrained(tmp_path)
    with watched(monkeypatch) as seen:
        _, loaded, _ = both(tmp_path, type(model), include="**", exclude=["lm_head", "re:.*router.*", "re:.*gate$"])
    assert seen[0][2] < tensor_bytes(m for m in model.modules() if any(m is x for x in seen[0][1])) + 10**6
    assert fp.report(loaded).swapped


@pytest.mark.every(2)
@pytest.mark.parametrize("name", MIXTURES)
@torch.inference_mode()
def test_experts(name, tmp_path, monkeypatch):
    """transformers stacks what files have one by one, or gate and up: a stack is quantised when it is whole."""
    mixture(name).save_pretrained(tmp_path)
    with watched(monkeypatch) as seen:
        _, loaded, _ = both(tmp_path, include="**")
    experts = [m for m in seen[0][1] if type(m).__name__.endswith("Experts")]
    floats = sum(x.bytes_before for x in fp.report(loaded).swapped if "expert" in x.fqn)
    assert experts and tensor_bytes(experts) < floats / 3  # one of 4, for all modules


@pytest.mark.every(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, "auto"])
@torch.inference_mode()
def test_dtypes(dtype, tmp_path):
    """Of files and of loads; a layer that its class keeps in float32 stays so."""
    for name, stored in (("t5", torch.bfloat16), ("llama", torch.float16)):
        model = build(name)
        model.to(stored).save_pretrained(tmp_path / name)
        _, loaded, _ = both(tmp_path / name, type(model), loading={"dtype": dtype}, include="**")
        assert loaded.dtype == (stored if dtype == "auto" else dtype)


@pytest.mark.every(2)
@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
@torch.inference_mode()
def test_shards_and_device_maps(device_map, tmp_path):
    llama().save_pretrained(tmp_path, max_shard_size="300KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 3
    both(tmp_path, loading={"device_map": device_map}, include="**")


@torch.inference_mode()
def test_a_tied_head_has_a_copy_of_its_own(tmp_path):
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    _, loaded, _ = both(tmp_path, include=["**", "lm_head"])
    assert isinstance(loaded.lm_head, Int8Linear) and torch.equal(
        loaded.model.embed_tokens.weight, model.model.embed_tokens.weight
    )


@torch.inference_mode()
def test_a_tied_head_that_is_in_the_files_too(tmp_path):
    """As PyTorch's own files have it: transformers compares the two, and makes them one."""
    llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    _, loaded, _ = both(tmp_path, include=["**", "lm_head"])
    assert isinstance(loaded.lm_head, Int8Linear) and loaded.get_expanded_tied_weights_keys()


class PartlyInFloat32(transformers.LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.layers[0].mlp.up_proj.to(torch.float32)


@torch.inference_mode()
def test_a_layer_in_a_dtype_of_its_own(floats):
    _, loaded, _ = both(floats, PartlyInFloat32, loading={"dtype": torch.bfloat16}, include="**", exclude="gate_proj")
    assert loaded.model.layers[0].mlp.up_proj.anchor.dtype == torch.float32


@torch.inference_mode()
def test_a_class_with_a_head_that_no_file_has(floats):
    cls = transformers.AutoModelForSequenceClassification
    loaded = cls.from_pretrained(floats, quantization_config=fp.Config("int8", include="**"))
    model = transformers.AutoModel.from_pretrained(floats)
    fp.swap(model, "int8", include="**")
    same(loaded.model, model)


@torch.inference_mode()
def test_a_precision_that_is_a_function_sees_values(floats):
    whole = load_file(floats / "model.safetensors")

    def of(fqn, module):
        if type(module) is nn.Linear and f"{fqn}.weight" in whole:
            assert torch.equal(module.weight, whole[f"{fqn}.weight"]), fqn
        return "int8" if module.weight.float().std() > 0 and "mlp" in fqn else None

    both(floats, precision=of, include="**")


@torch.inference_mode()
def test_a_plan(floats, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(floats)
    plan = fp.swap(model, {"mlp": "int8", "o_proj": "w8a16"}, include="**").plan
    with watched(monkeypatch) as seen:
        loaded = AutoModelForCausalLM.from_pretrained(floats, quantization_config=fp.Config(plan=plan))
    same(loaded, model)
    assert seen[0][2] < tensor_bytes(m for m in llama().modules() if type(m) is nn.Linear) / 2


@torch.inference_mode()
def test_a_precision_of_ones_own(floats):
    class Louder(fp.nn.W8A16Linear):
        pass

    with contextlib.suppress(ValueError):
        fp.register_precision(fp.Precision("louder_while_loading", 1, Louder))
    _, loaded, _ = both(floats, precision="louder_while_loading", include="**")
    assert isinstance(loaded.model.layers[0].self_attn.o_proj, Louder)


@torch.inference_mode()
def test_a_rewriting_that_a_run_disproves(tmp_path, monkeypatch):
    """Layers are quantised by then, with the activations that were read: they compute none."""
    build("gpt2").save_pretrained(tmp_path)

    build_ = swapping.build
    monkeypatch.setattr(
        swapping, "build", lambda leaf, *rest: build_(replace(leaf, activation=None, block=None), *rest)
    )
    model, loaded, _ = both(tmp_path, transformers.GPT2LMHeadModel, include="**", exclude="lm_head")
    mlp = loaded.transformer.h[0].mlp
    assert mlp.c_fc.activation is None and type(mlp.act) is not nn.Identity
    assert torch.equal(outputs(loaded, batch("gpt2")), outputs(model, batch("gpt2")))


def test_nothing_else_of_the_process_changes(floats):
    state = torch.get_rng_state()
    AutoModelForCausalLM.from_pretrained(floats, quantization_config=fp.Config("int8", include="**"))
    assert torch.equal(torch.get_rng_state(), state)


@torch.inference_mode()
def test_a_state_dict_that_is_given_stays_as_it_is(floats):
    values = load_file(floats / "model.safetensors")
    kept = {name: t.clone() for name, t in values.items()}
    config = transformers.AutoConfig.from_pretrained(floats)
    loaded = transformers.LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=values, quantization_config=fp.Config("int8", include="**")
    )
    assert all(torch.equal(values[name], t) for name, t in kept.items())
    same(loaded, both(floats, include="**")[0])


def rewritten(folder, **changes):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, change in changes.items():
        full = next(x for x in tensors if x.endswith(name))
        tensors[full] = change(tensors.pop(full))
        if tensors[full] is None:
            del tensors[full]
    save_file(tensors, path, metadata={"format": "pt"})


@torch.inference_mode()
def test_values_that_are_not_finite_stay_and_are_reported(floats):
    rewritten(floats, **{"layers.1.mlp.up_proj.weight": lambda t: t.index_fill(0, torch.tensor(3), torch.nan)})
    _, loaded, _ = both(floats, include="**")
    assert type(loaded.model.layers[1].mlp.up_proj) is nn.Linear


def test_a_shape_that_does_not_fit(floats):
    rewritten(floats, **{"layers.1.mlp.up_proj.weight": lambda t: t[:-8].clone()})
    config = fp.Config("int8", include="**")
    with pytest.raises(
        (RuntimeError, ValueError), match=r"ignore_mismatched_sizes|up_proj is \[\d+, \d+\] in the files"
    ):
        AutoModelForCausalLM.from_pretrained(floats, quantization_config=config)


def test_a_layer_that_is_in_part_in_the_files(tmp_path):
    build("gpt2").save_pretrained(tmp_path)
    rewritten(tmp_path, **{"h.1.mlp.c_fc.weight": lambda t: None})
    with pytest.raises(ValueError, match=r"the weight of transformer\.h\.1\.mlp\.c_fc is not in the files"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=fp.Config("int8", include="**"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_load_that_fails(floats, monkeypatch, error):
    """The next one is as if there had been none; nobody's config is another one."""
    quantise, calls = Int8Linear.from_torch.__func__, []

    def fails(cls, module, **options):
        calls.append(module)
        if len(calls) >= 5:
            raise error("in the middle")
        return quantise(cls, module, **options)

    config = transformers.AutoConfig.from_pretrained(floats)
    before = config.to_json_string(), type(config), {**vars(config)}
    monkeypatch.setattr(Int8Linear, "from_torch", classmethod(fails))
    with pytest.raises(error, match="in the middle"):
        AutoModelForCausalLM.from_pretrained(floats, config=config, quantization_config=fp.Config("int8", include="**"))
    monkeypatch.undo()
    assert before == (config.to_json_string(), type(config), vars(config)) and len(calls) >= 5
    both(floats, include="**")


def test_a_layer_that_somebody_replaces_meanwhile(floats, monkeypatch):
    eval_ = transformers.LlamaForCausalLM.eval

    def replaces(model):
        mlp = model.model.layers[0].mlp
        mlp.up_proj, mlp.forward = nn.Bilinear(1, 1, 1), mlp.up_proj.forward
        model.kept = mlp
        return eval_(model)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "eval", replaces)
    with pytest.raises(RuntimeError, match=r"was quantised while the model was loaded"):
        AutoModelForCausalLM.from_pretrained(floats, quantization_config=fp.Config("int8", include="**"))


def test_the_index_of_a_folder_in_several_files_exchanges_no_class(floats, tmp_path):
    """A config that somebody has is not of another class after a load that fails."""
    model = llama()
    fp.swap(model, "int8", include="**")
    fp.save_pretrained(model, tmp_path / "ours", max_shard_size="100KB")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    last = config["quantization_config"]["weights"][-1]
    (tmp_path / "ours" / last).unlink()
    seen = []
    from transformers import quantizers

    original = quantizers.auto.AUTO_QUANTIZER_MAPPING["forwardpass"].update_attn_implementation

    def watch(self, config):
        seen.append((config, type(config), {**vars(config)}))
        return original(self, config)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(quantizers.auto.AUTO_QUANTIZER_MAPPING["forwardpass"], "update_attn_implementation", watch)
        with pytest.raises((FileNotFoundError, ValueError, OSError)):
            AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    ((config, cls, attributes),) = seen
    assert type(config) is cls is transformers.LlamaConfig and vars(config) == attributes


@torch.inference_mode()
def test_nothing_of_the_files_is_mapped_any_more(tmp_path):
    """Where a layer's weight is of 16 bits as it was in the file, too."""
    llama().bfloat16().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=fp.Config("bf16", include="**"))
    expected = outputs(loaded, X)
    for path in tmp_path.glob("*.safetensors"):
        with open(path, "r+b") as file:
            file.write(b"\0" * path.stat().st_size)
    assert torch.equal(outputs(loaded, X), expected)
