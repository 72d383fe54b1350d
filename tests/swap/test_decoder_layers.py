"""A decoder's layers as one operation, and everything that sends a call back to the layers one by one."""

import copy
import dataclasses
import functools
import io
import json
import sys

import pytest
import torch
from torch import nn

import forwardpass as fp
from forwardpass.common.environment import cpu_tier
from forwardpass.integrations.transformers.stacks import decoder_stack
from forwardpass.ops.decoder_layer import OPERATION

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(cpu_tier() in (None, "baseline"), reason="needs AVX2")

SIZES = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 256,
    "vocab_size": 99,
}
IDS = torch.arange(40).reshape(2, 20) % 99
PADDED = torch.ones(2, 20, dtype=torch.int64)
PADDED[1, :8] = 0


def llama(kind="Llama", **changed):
    torch.manual_seed(0)
    options = {
        **SIZES,
        "pad_token_id": 98,
        "bos_token_id": 1,
        "eos_token_id": None,
        "initializer_range": 0.1,
        **changed,
    }
    config = getattr(transformers, f"{kind}Config")(**options)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def swapped(model, precision="int8", **options):
    report = fp.swap(model, precision, **{"kv_cache": "auto", "include": "**", "exclude": "lm_head", **options})
    return model, report


@pytest.fixture
def calls(monkeypatch):
    """Tokens of each call of the operation."""
    count = []

    def counted(*args):
        count.append(args[0].shape[1])
        return OPERATION(*args)

    monkeypatch.setattr(decoder_stack, "OPERATION", counted)
    return count


@torch.inference_mode()
def logits(model, ids=IDS, **inputs):
    return model(ids, **inputs).logits


@torch.inference_mode()
def in_steps(model, ids=IDS, prompt=15, mask=None):
    """A prompt, and steps of one token and of several."""
    cache, parts = transformers.DynamicCache(config=model.config), []
    for first, last in ((0, prompt), (prompt, prompt + 1), (prompt + 1, prompt + 4), (prompt + 4, 20)):
        masks = {} if mask is None else {"attention_mask": mask[:, :last]}
        parts.append(model(ids[:, first:last], cache=cache, use_cache=True, **masks).logits)
    return torch.cat(parts, 1)


def close(a, b, mask=None):
    a, b = (x.flatten(0, 1) if mask is None else x[mask.bool()] for x in (a, b))
    return torch.cosine_similarity(a, b).min() > 0.99 and (a - b).norm() < 0.05 * b.norm()


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("kind", "precision"),
    [("Llama", "int8"), ("Mistral", "int8"), ("Qwen2", "int8"), ("Llama", "w8a16"), ("Qwen2", "w8a16")],
)
def test_layers_are_one_operation(kind, precision, calls):
    model = llama(kind, **({"sliding_window": None} if kind == "Mistral" else {}))
    exact, exact_padded = logits(model), logits(model, attention_mask=PADDED)
    names = [name for name, _ in model.named_modules()]
    model, report = swapped(model, precision)
    assert "decoder: the 3 layers of model.layers are one operation" in str(report)
    assert close(logits(model), exact) and calls == [20]
    assert close(in_steps(model), exact) and calls[1:] == [15, 1, 3, 1]
    assert close(logits(model, attention_mask=PADDED), exact_padded, PADDED) and len(calls) == 6
    assert close(in_steps(model, mask=PADDED), exact_padded, PADDED) and len(calls) == 10
    assert {*names} <= {name for name, _ in model.named_modules()}
    fp.restore(model)
    assert torch.equal(logits(model), exact) and len(calls) == 10
    assert [name for name, _ in model.named_modules()] == names


def test_it_is_what_the_layers_are(calls):
    """But for the order of sums, and what that moves over a tie between two steps of 8 bits."""
    model = swapped(llama())[0]
    y = in_steps(model)
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    one_by_one = in_steps(model)
    assert len(calls) == 4 and not torch.equal(y, one_by_one)
    assert (y - one_by_one).norm() / one_by_one.norm() < 2e-2
    handle.remove()
    assert torch.equal(in_steps(model), y) and len(calls) == 8


def test_weights_alone_in_8_bits_differ_from_the_layers_by_rounding_alone(calls):
    model = swapped(llama(), "w8a16")[0]
    y = in_steps(model)
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    one_by_one = in_steps(model)
    assert len(calls) == 4 and not torch.equal(y, one_by_one)
    assert (y - one_by_one).norm() / one_by_one.norm() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("precision", ["int8", "w8a16"])
def test_a_model_of_16_bits_is_as_near_to_float32_as_by_its_layers(precision, dtype, calls):
    exact = logits(llama())
    model = swapped(llama().to(dtype), precision)[0]
    y = in_steps(model)
    assert calls == [15, 1, 3, 1] and y.dtype == dtype
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    one_by_one = in_steps(model)
    assert len(calls) == 4 and not torch.equal(y, one_by_one)
    assert (y - exact).norm() < 1.2 * (one_by_one - exact).norm() < 0.08 * exact.norm()


def test_norms_in_another_dtype_than_the_hidden_states_count(calls):
    model = swapped(llama())[0]
    model.model.layers[1].input_layernorm.bfloat16()
    logits(model)
    assert not calls
    model.model.layers[1].input_layernorm.float()
    logits(model)
    assert calls == [20]


def test_layers_of_two_precisions_stay_apart(calls):
    model = llama()
    plan = fp.swap(model, "w8a16", include="**", exclude="lm_head", dry_run=True).plan
    of_down = fp.swap(model, "int8", include="**.down_proj", dry_run=True).plan
    changed = {layer.fqn: layer for layer in of_down.layers}
    mixed = dataclasses.replace(plan, layers=tuple(changed.get(x.fqn, x) for x in plan.layers))
    report = fp.swap(model, plan=mixed, decoder=True, kv_cache="auto")
    assert report.decoder.reason.code == "precision" and "int8 and w8a16" in str(report)
    assert logits(model).isfinite().all() and not calls


def test_calls_may_change_from_one_way_to_the_other_within_a_cache(calls):
    model = swapped(llama())[0]
    exact, cache = logits(model), transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        first = model(IDS[:, :10], cache=cache, use_cache=True).logits
        handle = model.model.layers[2].register_forward_hook(lambda *_: None)
        second = model(IDS[:, 10:15], cache=cache, use_cache=True).logits
        handle.remove()
        third = model(IDS[:, 15:], cache=cache, use_cache=True).logits
    assert calls == [20, 10, 5] and close(torch.cat([first, second, third], 1), exact)


def test_generate_takes_it(calls):
    model = swapped(llama())[0]
    with torch.inference_mode():
        tokens = model.generate(IDS, attention_mask=PADDED, max_new_tokens=6, do_sample=False)
        assert calls == [20, 1, 1, 1, 1, 1]
        again = model.generate(IDS, attention_mask=PADDED, max_new_tokens=6, do_sample=False)
        assert torch.equal(tokens, again)
        beams = model.generate(IDS, max_new_tokens=3, num_beams=2, do_sample=False)
    assert beams.shape == (2, 23) and len(calls) == 15


def test_steps_do_not_depend_on_the_threads():
    """With a head in int8: torch's product depends on them."""
    model = swapped(llama(), include=("**", "lm_head"), exclude=())[0]
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(in_steps(model))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results)


def sends_back():
    def hook(model):
        model.model.layers[2].register_forward_hook(lambda *_: None)

    def pre_hook(model):
        model.model.layers[0].self_attn.k_proj.register_forward_pre_hook(lambda *_: None)

    def forward(model):
        norm = model.model.layers[0].input_layernorm
        norm.forward = lambda x: type(norm).forward(norm, x)

    def module(model):
        model.model.layers[1].self_attn.o_proj = nn.Linear(128, 128, bias=False)

    def window(model):
        model.model.layers[1].mlp = nn.Identity()

    return [hook, pre_hook, forward, module, window]


@pytest.mark.every(2)
@pytest.mark.parametrize("change", sends_back(), ids=lambda f: f.__name__)
def test_goes_layer_by_layer_where_something_is_around_one(change, calls):
    model = swapped(llama())[0]
    logits(model)
    change(model)
    assert logits(model).isfinite().all() and len(calls) == 1


def test_weights_that_change_count(calls):
    model = swapped(llama())[0]
    y, layer = logits(model), model.model.layers[0]
    with torch.no_grad():
        layer.input_layernorm.weight.mul_(2)
        assert not torch.equal(logits(model), y)
        layer.input_layernorm.weight.div_(2)
        assert torch.equal(logits(model), y)
        layer.self_attn.o_proj.weight_scale = layer.self_attn.o_proj.weight_scale * 2
        assert not torch.equal(logits(model), y)
    assert len(calls) == 4


def test_a_rotation_that_is_replaced_counts(calls, monkeypatch):
    """Liger and Unsloth put another one into the module, of which its classes know nothing."""
    model = swapped(llama())[0]
    module = sys.modules[type(model).__module__]
    y = logits(model)
    with monkeypatch.context() as patch:
        rotate = module.apply_rotary_pos_emb
        patch.setattr(module, "apply_rotary_pos_emb", lambda q, k, *args: tuple(x / 2 for x in rotate(q, k, *args)))
        other = logits(model)
        fp.restore(model)
        assert len(calls) == 1 and not close(other, y) and close(other, logits(model))


@pytest.mark.parametrize("asked", [{"output_hidden_states": True}, {"output_attentions": True}, {"use_cache": False}])
def test_what_is_asked_for_is_there(asked, calls):
    """Hidden states, attention weights; and without a cache there is nothing to write to."""
    model = swapped(llama())[0]
    with torch.inference_mode():
        out = model(IDS, **asked)
    found = out.hidden_states or out.attentions or ()
    assert not calls and all(x.isfinite().all() for x in found)
    assert close(out.logits, logits(model)) and len(calls) == 1


def test_goes_layer_by_layer_in_training_under_autocast_and_for_other_masks_and_caches(calls):
    model = swapped(llama())[0]
    with torch.autocast("cpu", torch.bfloat16):
        logits(model)
    assert logits(model, attention_mask=PADDED.flip(1)).isfinite().all()
    static = transformers.StaticCache(config=model.config, max_cache_len=24)
    assert logits(model, cache=static, use_cache=True).isfinite().all()
    assert logits(model, cache=fp.KVCache(model.config, "int8"), use_cache=True).isfinite().all()
    model.train()
    logits(model)
    assert not calls


@pytest.mark.every(3)
def test_compiled_code_runs_the_layers_one_by_one(calls):
    model = swapped(llama())[0]
    exact = logits(model)
    with torch.inference_mode():
        compiled = torch.compile(model, backend="eager")(IDS).logits
    assert close(compiled, exact) and calls == [20]
    assert torch.equal(logits(model), exact) and calls == [20, 20]


def test_copies_and_pickles_run_so_too(calls):
    model = swapped(llama())[0]
    y = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), y)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False)), y)
    assert len(calls) == 3


@pytest.mark.parametrize("precision", ["int8", "w8a16"])
def test_folders_have_it(tmp_path, calls, precision):
    model = swapped(llama(), precision)[0]
    y = in_steps(model)
    fp.save_pretrained(model, tmp_path)
    for load in (fp.load_pretrained, transformers.AutoModelForCausalLM.from_pretrained):
        loaded, before = load(tmp_path), len(calls)
        assert torch.equal(in_steps(loaded), y) and len(calls) == before + 4
    fp.save_pretrained(loaded, tmp_path / "again")
    assert torch.equal(in_steps(fp.load_pretrained(tmp_path / "again")), y)
    below, before = transformers.AutoModel.from_pretrained(tmp_path), len(calls)
    with torch.inference_mode():
        assert torch.equal(below(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    assert len(calls) == before + 2


def test_folders_without_it_are_loaded_without_it(tmp_path, calls):
    """And those of versions that did not write of it."""
    fp.save_pretrained(swapped(llama(), decoder=False)[0], tmp_path)
    for name, at in (("forwardpass.json", []), ("config.json", ["quantization_config"])):
        content = json.loads((tmp_path / name).read_text())
        record = functools.reduce(dict.get, at, content)
        assert record.pop("decoders") == []
        (tmp_path / name).write_text(json.dumps(content))
    for load in (fp.load_pretrained, transformers.AutoModelForCausalLM.from_pretrained):
        assert logits(load(tmp_path)).isfinite().all() and not calls


class Reads(transformers.LlamaModel):
    """Code that looks between the layers."""

    def forward(self, input_ids=None, attention_mask=None, cache=None, use_cache=None, **kwargs):
        first, last, x = self.layers[0], self.layers[2], self.embed_tokens(input_ids)
        place = torch.arange(x.shape[1])[None]
        options = {
            "cache": cache or transformers.DynamicCache(config=self.config),
            "position_embeddings": self.rotary_emb(x, place),
        }
        y = first(x, **options)
        z = last(self.layers[1](y, **options), **options) + y
        return transformers.modeling_outputs.BaseModelOutputWithPast(last_hidden_state=z)


def test_code_that_reads_between_the_layers_disproves_it(calls):
    model = llama()
    model.model = Reads(model.config).eval()
    report = swapped(model)[1]
    assert report.decoder.stacks == () and report.decoder.reason.code == "disproved"
    assert logits(model).isfinite().all() and not calls


def test_a_loaded_class_that_reads_between_its_layers_runs_them_one_by_one(tmp_path, calls):
    fp.save_pretrained(swapped(llama())[0], tmp_path)
    other = llama()
    other.model = Reads(other.config).eval()
    with pytest.warns(UserWarning, match=r"the layers of model\.layers run one by one"):
        fp.load_pretrained(tmp_path, model=other)
    before = len(calls)
    assert logits(other).isfinite().all() and len(calls) == before


def test_another_rotation_disproves_it(calls):
    """Its attention and layers have the code of Llama's, and rotate neighbours."""
    report = swapped(llama("Ernie4_5"))[1]
    assert report.decoder.reason.code == "disproved"


@pytest.mark.every(2)
def test_why_not():
    for options, code in (
        ({"exclude": ("**.k_proj", "lm_head")}, "precision"),
        ({"decoder": False}, "decoder_off"),
        ({"kv_cache": None}, "kv_cache"),
        ({"kv_cache": "int8"}, "kv_cache"),
    ):
        assert swapped(llama(), **options)[1].decoder.reason.code == code
    assert swapped(llama("Qwen3"))[1].decoder.reason.code == "other_layers"
    assert swapped(llama("Mistral", sliding_window=4))[1].decoder.reason.code == "other_layers"
    with pytest.raises(TypeError, match="decoder is True or False"):
        fp.swap(llama(), "int8", decoder="auto")
