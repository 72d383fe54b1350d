"""Steps of decoding in models of transformers: what they read of which cache, with which operation."""

import copy
import itertools
import os

import pytest
import torch
from decoders import DECODERS, OPTIONS, STEPS, decoder, padded, static_cache
from processes import fork
from recorded_calls import recorded_calls
from rotation import in_turn
from small_models import batch

import forwardpass as fp
from forwardpass.dispatch.calls import Calls, counted
from forwardpass.integrations.transformers import attention as huggingface
from forwardpass.integrations.transformers import key_ranges

transformers = pytest.importorskip("transformers")
masking_utils = transformers.masking_utils


@pytest.fixture
def steps(monkeypatch):
    """What attention_decode is given."""
    return recorded_calls(monkeypatch, huggingface, "ATTENTION_DECODE")


@pytest.mark.every(2)
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_every_step_is_attention_decode(name, cache, steps):
    """And no mask is made: of each sequence there are its first key and its end."""
    model = decoder(name)
    layers = model.config.num_hidden_layers
    expected = model.generate(**padded(name), **OPTIONS, cache_implementation=cache)
    fp.swap(model, attention=True)
    steps.clear()  # those of the swap's own runs
    with counted(Calls()) as calls:
        got = model.generate(**padded(name), **OPTIONS, cache_implementation=cache)
    assert not calls.fallbacks
    assert torch.equal(got.sequences, expected.sequences)
    for a, b in zip(got.logits, expected.logits):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    calls = steps()
    assert len(calls) == layers * (STEPS - 1)
    assert all(call["q"].shape[1] == 1 and call["leftpad"].shape == (2,) for call in calls)
    if name == "llama":
        assert [call["leftpad"].tolist() for call in calls] == [[0, 4]] * len(calls)
        assert [call["seq_lens"].tolist() for call in calls[::layers]] == [[n, n] for n in range(11, 10 + STEPS)]


@torch.inference_mode()
@pytest.mark.parametrize("rows", [2, 8, 9])
def test_several_rows_see_each_what_is_before_them(rows, steps):
    """As candidates of speculative decoding do; of more than 8 rows a mask is made."""
    model = decoder("llama")
    swapped = copy.deepcopy(model)
    fp.swap(swapped, attention=True)
    steps.clear()  # those of the swap's own runs
    ids = batch("llama")["input_ids"]
    more = ids.repeat(1, 2)[:, :rows]
    both = []
    for m in (model, swapped):
        cache = m(input_ids=ids).cache
        both.append(m(input_ids=more, cache=cache).logits)
    torch.testing.assert_close(both[1], both[0], rtol=1e-4, atol=1e-5)
    assert len(steps()) == (2 if rows <= 8 else 0)


@torch.inference_mode()
def test_padding_behind_tokens_is_a_mask(steps):
    """A prompt that is padded on the right, and goes on behind its padding."""
    model = decoder("llama")
    swapped = copy.deepcopy(model)
    fp.swap(swapped, attention=True)
    steps.clear()  # those of the swap's own runs
    inputs = batch("llama")
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    both = []
    for m in (model, swapped):
        cache = m(**inputs).cache
        both.append(m(input_ids=inputs["input_ids"][:, :1], attention_mask=mask, cache=cache).logits)
    torch.testing.assert_close(both[1], both[0], rtol=1e-4, atol=1e-5)
    assert not steps()


@pytest.mark.every(2)
@torch.inference_mode()
@pytest.mark.parametrize("cache", ["dynamic", "static", "auto", "int8"])
@pytest.mark.parametrize("tokens", [4, 8, 10])
def test_an_attention_mask_that_is_shorter_than_the_cache(tokens, cache, steps):
    """Masks all keys behind its end, as with transformers' own attention: no range of keys says that."""
    model = decoder("llama")
    swapped = copy.deepcopy(model)
    fp.swap(swapped, attention=True)
    steps.clear()  # those of the swap's own runs
    ids = batch("llama")["input_ids"]  # [2, 10]
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[1, :2] = 0
    both = []
    for m in (model, swapped):
        if cache == "static":
            kept = static_cache(m, "llama", 16)
        else:
            kept = m(
                input_ids=ids, cache=fp.KVCache(m.config, cache) if m is swapped and cache != "dynamic" else None
            ).cache
        both.append(m(input_ids=ids[:, :1], attention_mask=mask, cache=kept).logits)
    bound = {"rtol": 0.05, "atol": 0.05} if cache == "int8" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(both[1], both[0], **bound)
    assert not steps()


def test_what_a_mask_function_says():
    causal, reach = masking_utils.causal_mask_function, key_ranges.reach
    assert reach(masking_utils, None) == reach(masking_utils, causal) == float("inf")
    assert reach(masking_utils, masking_utils.sliding_window_causal_mask_function(7)) == 7
    chunked = masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int))
    other = masking_utils.and_masks(masking_utils.sliding_window_overlay(7), chunked)
    for function in (chunked, other, masking_utils.bidirectional_mask_function, lambda *index: True):
        assert reach(masking_utils, function) is None


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_range_says_what_the_mask_does(rows, window):
    before, offset, keys = 9, 2, 11
    padding = torch.ones(3, before + rows, dtype=torch.bool)
    padding[1, :1] = False
    padding[2, :5] = False
    function = (
        masking_utils.causal_mask_function
        if window is None
        else masking_utils.sliding_window_causal_mask_function(window)
    )
    reach = key_ranges.reach(masking_utils, function)
    bounds = key_ranges.of_step(3, rows, keys, before, offset, reach, padding, "cpu")
    if window is not None and rows > 1:
        assert bounds is None
        return
    arguments = {"q_offset": before, "kv_offset": offset, "attention_mask": padding, "allow_is_causal_skip": False}
    mask = masking_utils.sdpa_mask(3, rows, keys, mask_function=function, **arguments)
    assert key_ranges.is_range(bounds)
    assert not key_ranges.is_range(mask)
    assert torch.equal(key_ranges.as_mask(bounds, rows, keys), mask)
    on_device = key_ranges.of_step(3, rows, keys, torch.tensor(before), offset, reach, padding, "cpu")
    assert torch.equal(on_device, bounds)


@pytest.mark.every(3)
@pytest.mark.parametrize(("name", "kv_cache"), in_turn(itertools.product(("llama", "gemma2"), (None, "auto", "int8"))))
@torch.inference_mode()
def test_compiled_with_a_static_cache(name, kv_cache):
    """One graph a step, whose length is on the device."""
    model = decoder(name)
    fp.swap(model, attention=True, kv_cache=kv_cache)
    with _quiet():
        caches = [static_cache(model, name, 24) for _ in range(2)]
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    for token in range(5, 9):
        step = torch.full((2, 1), token)
        got, expected = compiled(input_ids=step, cache=caches[0]), model(input_ids=step, cache=caches[1])
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.every(3)
@torch.inference_mode()
def test_a_step_with_a_static_cache_is_not_broken_up():
    """Without fullgraph=, which lets a graph take the value of a tensor, a cache's length would end it."""
    model = decoder("llama")
    fp.swap(model, kv_cache="auto")
    cache = static_cache(model, "llama", 24)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.compile(model.forward, backend="aot_eager")(input_ids=torch.full((2, 1), 5), cache=cache)
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


class _quiet:
    def __enter__(self):
        return self

    def __exit__(self, *args):
        return None


# ---- continuous batching


@pytest.mark.every(2)
@pytest.mark.parametrize("name", DECODERS)
def test_generate_batch(name, monkeypatch):
    """The config's name has the word that continuous batching asks for, and packed sequences come to us; the steps' with pages,
    where no layer has a window."""
    continuous = pytest.importorskip("transformers.generation.configuration_utils")
    model = decoder(name)
    prompts = [[5, 6, 7, 8], [9, 10, 11], [12] * 9, [4, 3]]
    config = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    expected = [model.generate(torch.tensor([p]), generation_config=config)[0, len(p) :].tolist() for p in prompts]
    fp.swap(model, attention=True)
    in_pages = []
    packed = huggingface._packed
    monkeypatch.setattr(
        huggingface, "_packed", lambda m, qkv, o: in_pages.append(o["block_table"] is not None) or packed(m, qkv, o)
    )
    before = sum(fp.call_counts().kernel_calls.values())
    options = continuous.ContinuousBatchingConfig(
        page_size=16, max_memory_percent=0.02, max_batch_tokens=64, use_cuda_graph=False
    )
    got = model.generate_batch(prompts, generation_config=config, continuous_batching_config=options)
    assert [x.generated_tokens for x in got.values()] == expected
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
    assert any(in_pages) == (kinds == {"full_attention"} and not getattr(model.config, "sliding_window", None))
    assert not all(in_pages)
    assert sum(fp.call_counts().kernel_calls.values()) > before
    fp.restore(model)
    assert model.config._attn_implementation == "eager"


#: In a process of its own, as continuous batching generates in a thread.
_INTERPRETED = """
import sys
import torch, transformers
import forwardpass as fp
from forwardpass.dispatch import interpreter
from small_models import ATTENTION, build
from transformers.generation.configuration_utils import ContinuousBatchingConfig

model = build(sys.argv[1], ATTENTION).half()
prompts = [[5, 6, 7, 8], [9, 10, 11], [12] * 9]
config = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
alone = [model.generate(torch.tensor([p]), generation_config=config)[0, len(p) :].tolist() for p in prompts]
fp.swap(model, attention=True)
options = {"cache_implementation": "static", "disable_compile": True}
static = [model.generate(torch.tensor([p]), generation_config=config, **options)[0, len(p) :].tolist() for p in prompts]
options = ContinuousBatchingConfig(page_size=16, max_memory_percent=0.02, max_batch_tokens=64, use_cuda_graph=False)
batched = model.generate_batch(prompts, generation_config=config, continuous_batching_config=options)
assert static == alone, (static, alone)
assert [x.generated_tokens for x in batched.values()] == alone
assert fp.call_counts().kernel_calls and not interpreter().device.findings
print(interpreter().arch)
"""


@pytest.mark.every(3)
@pytest.mark.interpreted
@pytest.mark.parametrize(("name", "arch"), in_turn([("llama", "sm_90a"), ("gpt_oss", "sm_80")]))
def test_generate_batch_and_static_caches_interpreted(name, arch):
    done = fork.run(_INTERPRETED, name, env={**os.environ, "GPULESS_ARCH": arch})
    assert done.returncode == 0 and done.stdout.strip().endswith(arch), done.stderr


@torch.inference_mode()
def test_pages_of_continuous_batching(steps):
    """One token each of two sequences, appended to their pages: K and V are overlapping views, and one page is not there."""
    model = decoder("llama")
    fp.swap(model, attention=True)
    steps.clear()  # those of the swap's own runs
    attention = model.model.layers[0].self_attn
    g = torch.Generator().manual_seed(0)
    memory = torch.randn(9, 16, 2, 32, generator=g)
    before = memory.clone()
    k_cache, v_cache = memory[:-1], memory[1:]
    table = torch.tensor([[0, 4], [2, -1]], dtype=torch.int32)
    q, k, v = (torch.randn(1, heads, 2, 32, generator=g) for heads in (4, 2, 2))
    options = {"cu_seq_lens_q": torch.arange(3, dtype=torch.int32), "max_length_q": 1, "max_length_k": 20,
               "cu_seq_lens_k": torch.tensor([0, 20, 27], dtype=torch.int32), "is_causal": True}  # fmt: skip
    paged = {"block_table": table, "k_cache": k_cache, "v_cache": v_cache}
    got, _ = huggingface._attention(attention, q, k, v, None, **options, **paged)
    keys = [torch.cat([before[0], before[4][:3], k[0, :, 0][None]]), torch.cat([before[2][:6], k[0, :, 1][None]])]
    values = [torch.cat([before[1], before[5][:3], v[0, :, 0][None]]), torch.cat([before[3][:6], v[0, :, 1][None]])]
    packed = [torch.cat(x).transpose(0, 1)[None] for x in (keys, values)]
    expected, _ = huggingface._attention(attention, q, *packed, None, **options)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert len(steps()) == 1
    changed = (memory != before).flatten(2).any(2).nonzero().tolist()
    assert changed == [[2 + 0, 6], [3, 6], [4, 3], [5, 3]]
