"""Rotary embedding that is left to the launch that appends keys to a cache: where code allows it, and what models then compute."""

import copy
import importlib
import pickle

import pytest
import torch
from recorded_calls import recorded_calls
from small_models import ATTENTION, batch, build

import forwardpass as fp

transformers = pytest.importorskip("transformers")
rotary = importlib.import_module("forwardpass.integrations.rotary")
caches = importlib.import_module("forwardpass.integrations.transformers_cache")

STEPS = 6


def decoder(name="llama"):
    model = build(name, ATTENTION)
    model.set_attn_implementation("eager")
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
        ("glm", "GlmAttention", "another apply_rotary_pos_emb"),  # pairs of neighbours
        ("bert", "BertSelfAttention", "another apply_rotary_pos_emb"),
    ],
)
def test_where_code_allows_it(model, cls, reason):
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    why = rotary._why_apart(getattr(module, cls))
    assert why is None if reason is None else reason in why


@pytest.mark.parametrize("kv_cache", ["auto", "int8"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_steps_rotate_as_they_append(name, kv_cache, appended):
    """The prompt is rotated by the model, as attention reads it from there."""
    model = decoder(name)
    expected = generate(model)
    fp.swap(model, kv_cache=kv_cache)
    got = generate(model)
    layers = model.config.num_hidden_layers
    calls = appended()
    assert [call["q"] is not None for call in calls] == [False] * layers + [True] * layers * (STEPS - 1)
    assert all((call["cos"] is None) == (call["q"] is None) for call in calls)
    assert kv_cache == "int8" or torch.equal(got, expected)
    fp.restore(model)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.equal(generate(model), expected)
    assert len(appended()) == len(calls)


def test_logits_of_steps_are_those_of_the_models_rotation(appended):
    """In 16 bits too, where a model rounds each product and the operation once."""
    for dtype, tolerance in ((torch.float32, 0), (torch.bfloat16, 0.02)):
        model = decoder().to(dtype)
        ids = batch("llama")["input_ids"]
        with torch.inference_mode():
            expected = model(ids).logits
            fp.swap(model, kv_cache="auto")
            before = len(appended())
            got = torch.cat([(out := model(ids[:, :4])).logits, model(ids[:, 4:], cache=out.cache).logits], 1)
        assert [call["q"] is not None for call in appended()[before:]] == [False, False, True, True]
        bound = tolerance * expected.abs().max().item() or 1e-5
        torch.testing.assert_close(got, expected, rtol=0, atol=bound)


def test_other_caches_and_models_are_rotated_by_the_model(appended):
    model, other = decoder(), decoder()
    expected = generate(other)
    fp.swap(model, kv_cache="auto")
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
