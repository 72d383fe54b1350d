"""Rotary embedding that is left to the launch that appends keys to a cache: where code allows it, and what models then compute."""

import ast
import concurrent.futures
import copy
import importlib
import pickle

import pytest
import torch
from recorded_calls import recorded_calls
from small_models import ATTENTION, batch, build

import forwardpass as fp

transformers = pytest.importorskip("transformers")
head_norms = importlib.import_module("forwardpass.integrations.transformers.head_norms")
rotary = importlib.import_module("forwardpass.integrations.transformers.rotary")
caches = importlib.import_module("forwardpass.integrations.transformers.cache")

STEPS = 6
#: Cohere and GLM rotate neighbouring columns, GLM half of all columns.
DECODERS = {
    **ATTENTION,
    "cohere": ("CohereForCausalLM", "CohereConfig", ATTENTION["llama"][2]),
    "glm": ("GlmForCausalLM", "GlmConfig", ATTENTION["llama"][2]),
}


def decoder(name="llama"):
    model = build(name, DECODERS)
    model.set_attn_implementation("eager")
    return model


def with_other_norms(model):
    """A norm's first weight is 1, or for Gemma 0: each head's are others here."""
    generator = torch.Generator().manual_seed(5)
    for name, weight in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            weight.data.copy_(0.5 + torch.rand(weight.shape, generator=generator))
    return model


def generate(model, **options):
    return model.generate(
        batch("llama")["input_ids"],
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=None,
        disable_compile=True,
        **options,
    )


@pytest.fixture
def appended(monkeypatch):
    return recorded_calls(monkeypatch, caches, "APPEND_KV")


@pytest.mark.parametrize(
    ("model", "cls", "reason"),
    [
        ("llama", "LlamaAttention", None),
        ("qwen3", "Qwen3Attention", None),
        ("glm4_moe", "Glm4MoeAttention", None),  # of a part of the columns
        ("ministral3", "Ministral3Attention", "something else between"),  # scales queries behind it
        ("hunyuan_v1_dense", "HunYuanDenseV1Attention", "something else between"),  # norms behind it
        ("gpt_oss", "GptOssAttention", "another apply_rotary_pos_emb"),
        ("glm", "GlmAttention", None),  # pairs of neighbours
        ("cohere", "CohereAttention", None),
        ("helium", "HeliumAttention", "another apply_rotary_pos_emb"),
        ("bert", "BertSelfAttention", "another apply_rotary_pos_emb"),
    ],
)
def test_where_code_allows_it(model, cls, reason):
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    why = rotary._why_apart(getattr(module, cls))
    assert why is None if reason is None else reason in why


@pytest.mark.parametrize(
    ("model", "cls", "precede"),
    [
        ("qwen3", "Qwen3Attention", True),
        ("qwen3_moe", "Qwen3MoeAttention", True),
        ("gemma3", "Gemma3Attention", True),
        ("llama", "LlamaAttention", False),
        ("olmo2", "Olmo2Attention", False),  # of all heads together
    ],
)
def test_whose_norms_come_right_before(model, cls, precede):
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    assert rotary.norms_precede(getattr(module, cls)) == precede


CODE = """
input_shape = hidden_states.shape[:-1]
query_states = self.q_norm(self.q_proj(hidden_states).view(hidden_shape)).transpose(1, 2)
key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
key_states = self.k_norm(key_states)
cos, sin = position_embeddings
"""


@pytest.mark.parametrize(
    ("old", "new", "precede"),
    [
        ("", "", True),
        ("cos, sin =", "value_states = key_states\ncos, sin =", False),
        ("cos, sin =", "query_states *= 2\ncos, sin =", False),
        ("cos, sin = position_embeddings", "cos, sin = self.rotary_emb(hidden_states)", False),
        ("cos, sin =", "cos = cos * 2\ncos, sin =", False),
        ("self.k_norm(key_states)", "self.k_norm(key_states) * 2", False),
        ("self.k_norm(key_states)", "self.k_norm(key_states, 2)", False),
        (".transpose(1, 2)\nkey", ".transpose(2, 3)\nkey", False),
        ("input_shape =", "x = self.k_norm(hidden_states)\ninput_shape =", False),
        ("key_states = self.k_norm(key_states)", "if True:\n    key_states = self.k_norm(key_states)", False),
    ],
)
def test_what_is_done_between(old, new, precede):
    assert old in CODE
    assert head_norms.precede(ast.parse(CODE.replace(old, new) if old else CODE).body) == precede


def test_norms_that_something_else_looks_at_are_the_models(appended):
    """A hook on one of them; weights of a dtype that the operation does not take."""
    model = with_other_norms(decoder("qwen3"))
    model.model.layers[1].self_attn.k_norm.half()
    expected = generate(model)
    fp.swap(model, kv_cache="auto")
    appended.clear()  # those of the swap's own runs
    seen = []
    attention = model.model.layers[0].self_attn
    attention.q_norm.register_forward_hook(lambda module, args, output: seen.append(output))
    assert torch.equal(generate(model), expected)
    assert len(seen) == STEPS
    assert {call["q_norm"] for call in appended()} == {None}


def test_norms_after_a_call_that_failed_before_them():
    model = with_other_norms(decoder("qwen3"))
    fp.swap(model, kv_cache="auto")
    attention = model.model.layers[0].self_attn
    x = torch.randn(1, 3, attention.head_dim)
    expected = attention.q_norm(x)
    ids = batch("llama")["input_ids"]
    with torch.inference_mode():
        cache = model(ids).cache
        attention.q_proj.register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids[:, :1], cache=cache)
    assert torch.equal(attention.q_norm(x), expected)


def test_norms_in_threads():
    """Each leaves out its own calls."""
    model = with_other_norms(decoder("qwen3"))
    fp.swap(model, kv_cache="auto")
    expected = generate(model)
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        for got in threads.map(lambda _: generate(model), range(8)):
            assert torch.equal(got, expected)


@pytest.mark.every(2)
@pytest.mark.parametrize("kv_cache", ["auto", "int8"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "cohere", "glm"])
def test_steps_rotate_as_they_append(name, kv_cache, appended):
    """The prompt is rotated by the model, as attention reads it from there."""
    model = with_other_norms(decoder(name))
    expected = generate(model)
    fp.swap(model, kv_cache=kv_cache)
    appended.clear()  # those of the swap's own runs
    got = generate(model)
    layers = model.config.num_hidden_layers
    calls = appended()
    assert [call["q"] is not None for call in calls] == [False] * layers + [True] * layers * (STEPS - 1)
    assert all((call["cos"] is None) == (call["q"] is None) for call in calls)
    assert all(call["interleaved"] == (name in ("cohere", "glm") and call["q"] is not None) for call in calls)
    has_norms = name in ("qwen3", "gemma3")
    assert all(
        (call["q_norm"] is not None and call["k_norm"] is not None) == (has_norms and call["q"] is not None)
        for call in calls
    )
    assert kv_cache == "int8" or torch.equal(got, expected)
    fp.restore(model)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.equal(generate(model), expected)
    assert len(appended()) == len(calls)


@pytest.mark.every(2)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "cohere", "glm"])
def test_logits_of_steps_are_those_of_the_models_rotation(name, appended):
    """In 16 bits they are no further from float32's, where a model rounds each product and the operation once."""
    for dtype in (torch.float32, torch.bfloat16):
        model = with_other_norms(decoder(name)).to(dtype)
        ids = batch("llama")["input_ids"]
        with torch.inference_mode():
            exact = copy.deepcopy(model).float()(ids).logits
            own_error = (model(ids).logits - exact).square().mean().sqrt().item()
            fp.swap(model, kv_cache="auto")
            before = len(appended())
            got = torch.cat([(out := model(ids[:, :4])).logits, model(ids[:, 4:], cache=out.cache).logits], 1)
        layers = model.config.num_hidden_layers
        assert [call["q"] is not None for call in appended()[before:]] == [False] * layers + [True] * layers
        assert (got - exact).square().mean().sqrt().item() <= (1e-6 if dtype == torch.float32 else 1.25 * own_error)


def test_other_caches_and_models_are_rotated_by_the_model(appended):
    model, other = decoder(), decoder()
    expected = generate(other)
    fp.swap(model, kv_cache="auto")
    appended.clear()  # those of the swap's own runs
    assert torch.equal(generate(other), expected)  # of the same Python module, not swapped
    assert not appended()
    with torch.inference_mode():
        static = transformers.StaticCache(config=model.config, max_cache_len=24)
        ids = batch("llama")["input_ids"]
        whole = model(ids, cache=static).logits
        torch.testing.assert_close(model(ids, use_cache=False).logits, whole, rtol=1e-5, atol=1e-5)
    assert not appended()


def test_copies_and_pickles_of_a_swapped_model(appended):
    model = decoder()
    expected = generate(model)
    fp.swap(model, kv_cache="auto")
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = len(appended())
        assert torch.equal(generate(copied), expected)
        assert any(call["q"] is not None for call in appended()[before:])


def test_a_call_that_fails_leaves_no_mark(monkeypatch):
    """The mark is on the call's own cosines."""
    model = decoder()
    expected = generate(model)
    fp.swap(model, kv_cache="auto")
    ids = batch("llama")["input_ids"]
    with torch.inference_mode():
        cache = model(ids).cache
        with monkeypatch.context() as broken:
            broken.setattr(caches, "APPEND_KV", lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(ids[:, :1], cache=cache)
    assert torch.equal(generate(model), expected)
    fp.restore(model)
    assert torch.equal(generate(model), expected)
