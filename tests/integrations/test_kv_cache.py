"""Caches of keys and values that a swap puts into models of transformers: `kv_cache`, in the model's dtype and in 8 bits."""

import copy
import pickle

import pytest
import torch
from decoders import DECODERS, OPTIONS, STEPS, decoder, padded, static_cache
from small_models import ATTENTION, assert_same_objects, batch, build, objects

import forwardpass as fp
from forwardpass.dispatch.calls import Calls, counted
from forwardpass.integrations import heads_first
from forwardpass.integrations.transformers import attention as huggingface
from forwardpass.integrations.transformers import cache_readers, kv_scales

transformers = pytest.importorskip("transformers")


@pytest.mark.every(3)
@pytest.mark.parametrize("name", [*DECODERS, "t5", "whisper"])
@pytest.mark.parametrize("kv_cache", ["auto", "int8", "fp8"])
def test_kv_cache(name, kv_cache):
    """As with transformers' own cache, bits and all where it is of the model's dtype, and beam search reorders it."""
    model = decoder(name)
    expected = model.generate(**padded(name), **OPTIONS)
    beams = model.generate(**padded(name), **OPTIONS, num_beams=3).sequences
    report = fp.swap(model, kv_cache=kv_cache)
    assert report.kv_cache == kv_cache
    assert not report.swapped
    got = model.generate(**padded(name), **OPTIONS)
    ends = {"auto": 1e-5, "int8": 0.03, "fp8": 0.12}[kv_cache]
    for i, (a, b) in enumerate(zip(got.logits, expected.logits)):
        torch.testing.assert_close(a, b, rtol=0, atol=ends * b.abs().max().item())
        if kv_cache != "auto" and not torch.equal(
            got.sequences[:, : -STEPS + i + 1], expected.sequences[:, : -STEPS + i + 1]
        ):
            break
    else:
        assert torch.equal(got.sequences, expected.sequences) or kv_cache != "auto"
    if kv_cache == "auto":
        assert torch.equal(model.generate(**padded(name), **OPTIONS, num_beams=3).sequences, beams)
    cache = got.cache.self_attention_cache if name in ("t5", "whisper") else got.cache
    for layer in cache.layers if name != "whisper" else ():  # whose generate returns copies of what layers hold
        assert layer.keys.dtype == {"auto": torch.float32, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[kv_cache]
        assert (kv_scales.scale_of(layer.keys) is None) == (kv_cache == "auto")
    fp.restore(model)
    again = model.generate(**padded(name), **OPTIONS)
    assert torch.equal(again.sequences, expected.sequences)
    own = again.cache.self_attention_cache if name in ("t5", "whisper") else again.cache
    assert {type(layer).__module__ for layer in own.layers} == {"transformers.cache_utils"}


@pytest.mark.every(2)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("kv_cache", ["auto", "int8"])
def test_drafts_are_taken_back_and_prompts_come_in_pieces(name, kv_cache):
    """What a model generates alone it generates with drafts, of which it crops the cache, and from a prompt in pieces."""
    model, draft = decoder(name), decoder(name)
    for m in (model, draft):
        fp.swap(m, kv_cache=kv_cache)
    ids = batch(name)["input_ids"][:1]
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    alone = model.generate(ids, **options)
    for more in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": draft}, {"prefill_chunk_size": 10}):
        assert torch.equal(model.generate(ids, **options, **more), alone), more


@torch.inference_mode()
def test_a_cache_that_already_holds_something_goes_on():
    """A prompt's cache from before the swap, and chunks of many rows over 8 bits."""
    model = decoder("gemma2")
    ids = batch("gemma2")["input_ids"]
    expected = model(input_ids=ids.repeat(1, 3)).logits[:, -1]
    cache = model(input_ids=ids).cache
    fp.swap(model, kv_cache="int8")
    more = model(input_ids=ids, cache=cache)
    assert more.cache is cache
    last = model(input_ids=ids, cache=cache).logits[:, -1]
    torch.testing.assert_close(last, expected, rtol=0, atol=0.02 * expected.abs().max().item())
    assert cache.get_seq_length() == 30
    sliding = cache.layers[[layer.is_sliding for layer in cache.layers].index(True)]
    assert sliding.keys.shape[2] == 5  # a window of 6, the new token's own key included


@torch.inference_mode()
def test_what_can_be_done_to_a_cache():
    from forwardpass.integrations.transformers.cache import GrowingLayer

    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 2, 3, 190, 32, generator=g)
    for window in (None, 8):
        ours = GrowingLayer(None, window)
        own = transformers.cache_utils
        theirs = own.DynamicLayer() if window is None else own.DynamicSlidingWindowLayer(window)
        for begin, end in ((0, 5), (5, 6), (6, 7), (7, 20), *((i, i + 1) for i in range(20, 190))):
            assert ours.get_mask_sizes(end - begin) == theirs.get_mask_sizes(end - begin)
            part = k[:, :, begin:end], v[:, :, begin:end]
            for a, b in zip(ours.update(*part), theirs.update(*part)):
                assert torch.equal(a, b)
            assert torch.equal(ours.keys, theirs.keys)
            assert ours.get_seq_length() == theirs.get_seq_length() == end
        for layer in (ours, theirs):
            layer.batch_repeat_interleave(2)
            layer.reorder_cache(torch.tensor([3, 0, 1, 1]))
            layer.batch_select_indices(torch.tensor([0, 2]))
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
        if window is None:
            for layer in (ours, theirs):
                layer.crop(-3)
            assert torch.equal(ours.values, theirs.values)
            with pytest.raises(ValueError, match="negative"):
                ours.crop(3)
        else:
            with pytest.raises(RuntimeError, match="window of 8 has left"):
                ours.crop(-60)
        again = copy.deepcopy(ours)
        ours.reset()
        assert ours.get_seq_length() == 0 and again.get_seq_length() == (187 if window is None else 190)
        assert torch.equal(again.update(k[:, :, :1], v[:, :, :1])[0][:, :, -1], k[:, :, 0])


@pytest.mark.parametrize(("kv_cache", "tolerance"), [("int8", 0.02), ("fp8", 0.07)])
@torch.inference_mode()
def test_a_window_of_8_bits_in_a_static_cache(kv_cache, tolerance):
    """Beside transformers' own: prompts below and beyond the window, steps, several tokens at once; and a cache that was in use."""
    from forwardpass.integrations.transformers import cache as ours

    own, dtype, window = transformers.cache_utils, ours.kv_scales.KV_CACHES[kv_cache], 8
    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 2, 3, 60, 32, generator=g)
    for parts in ((5, 1, 1, 1, 1, 1, 4, 1, 9, 1), (3, 7, 1, 1), (20, 1, 1, 2), (8, 1, 1), (1, 1, 12, 1)):
        for adopted in (0, 2):
            theirs, layer = own.StaticSlidingWindowLayer(24, window), None
            begin = 0
            for i, n in enumerate(parts):
                part = k[:, :, begin : begin + n], v[:, :, begin : begin + n]
                if i == adopted:
                    layer = ours._adapted(copy.deepcopy(theirs), dtype)
                    assert type(layer) is ours.StaticSlidingLayer and not layer.appends_in_place()
                if layer is not None:
                    assert layer.get_mask_sizes(n) == theirs.get_mask_sizes(n)
                    got = layer.update(*part)
                expected = theirs.update(*part)
                begin += n
                if layer is not None:
                    assert layer.get_seq_length() == theirs.get_seq_length() == begin
                    for a, b in zip(got, expected):
                        rows = n if i == 0 == adopted else b.shape[2]  # of an empty cache the prompt's own alone
                        wide = ours.kv_scales.widened(a, torch.float32)
                        torch.testing.assert_close(wide, b[:, :, :rows], rtol=0, atol=tolerance * 4)
            assert layer.keys.dtype == dtype and layer.is_croppable == theirs.is_croppable
            layer.reset(), theirs.reset()
            assert torch.equal(layer.update(*part)[0], part[0])  # a prompt's own keys
            assert layer.get_seq_length() == parts[-1]


@torch.inference_mode()
def test_a_quarter_of_the_memory():
    model = decoder("llama").to(torch.bfloat16)
    fp.swap(model, kv_cache="int8")
    cache = fp.KVCache(model.config, "int8")
    model(input_ids=torch.zeros(1, 100, dtype=torch.long), cache=cache)
    layer = cache.layers[0]
    stored = layer._stored
    sizes = [x.nbytes for x in (stored.keys, stored.values, *stored.scales)]
    assert sum(sizes) == stored.capacity * 2 * 2 * (32 + 4)  # heads, K and V; a byte an element and 4 for the scale
    assert stored.capacity <= 100 * 5 // 4 + 64


def test_calibrated_scales_are_reported():
    """compressed-tensors' beside the projections, ModelOpt's in them; a cache in the model's dtype has no use for any."""
    model = decoder("llama")
    layers = [layer.self_attn for layer in model.model.layers]
    layers[0].register_parameter("k_scale", torch.nn.Parameter(torch.ones(1)))
    layers[1].v_proj.register_buffer("v_scale", torch.ones(1))
    with pytest.warns(
        UserWarning, match=r"calibrated scales of 2 attention modules \(model.layers.0.self_attn, …\) are not used"
    ):
        fp.swap(model, kv_cache="fp8")
    fp.restore(model)
    report = fp.swap(model, kv_cache="auto")
    assert not any("calibrated" in w for w in report.warnings)


@pytest.mark.every(2)
def test_kv_cache_in_plans_and_checkpoints(tmp_path):
    model = decoder("llama")
    report = fp.swap(model, "int8", kv_cache="int8", include=["lm_head", "**"])
    assert "int8, appended to in place" in str(report)
    assert report.to_json()["kv_cache"] == "int8"
    tokens = model.generate(**padded("llama"), **OPTIONS).sequences
    fp.save_pretrained(model, tmp_path / "saved")
    report.save_plan(tmp_path / "plan.json")
    fp.restore(model)
    assert fp.swap(model, plan=tmp_path / "plan.json", kv_cache="fp8").kv_cache == "fp8"  # in place of the plan's
    fp.restore(model)
    fp.swap(model, plan=tmp_path / "plan.json")
    loaded = fp.load_pretrained(tmp_path / "saved")
    replayed = decoder("llama")
    assert fp.swap(replayed, plan=tmp_path / "plan.json").kv_cache == "int8"
    for other in (loaded, replayed, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        got = other.generate(**padded("llama"), **OPTIONS)
        assert torch.equal(got.sequences, tokens)
        assert got.cache.layers[0].keys.dtype == torch.int8


def test_refusals():
    model = decoder("llama")
    before = model.config._attn_implementation
    for kwargs, message in (
        ({"kv_cache": "int4"}, r"kv_cache is None or one of 'auto', 'int8', 'fp8', not 'int4'"),
        ({"kv_cache": "int8", "attention": False}, "drop attention=False"),
        ({"kv_cache": "int8", "exclude": "model.layers.*.self_attn"}, "needs swapped attention"),
    ):
        with pytest.raises(ValueError, match=message):
            fp.swap(model, **kwargs)
    assert model.config._attn_implementation == before and not model._forward_pre_hooks
    with pytest.raises(ValueError, match="is for decoders of transformers"):
        fp.swap(build("bert", ATTENTION), kv_cache="int8")
    with pytest.raises(ValueError, match="KVCache: dtype is one of"):
        fp.KVCache(model.config, "int4")
    with pytest.raises(RuntimeError, match=r"call fp\.swap"), torch.inference_mode():
        model(input_ids=torch.zeros(1, 4, dtype=torch.long), cache=fp.KVCache(model.config, "int8"))


#: What they keep in a cache is not what attention gets.
_OTHER_CACHES = {
    "latents": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**ATTENTION["llama"][2], "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
         "v_head_dim": 32, "n_routed_experts": 2, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
         "moe_intermediate_size": 32},
    ),
    "halves": ("DiffLlamaForCausalLM", "DiffLlamaConfig", ATTENTION["llama"][2]),
}  # fmt: skip


@pytest.mark.parametrize(("name", "kv_cache", "why"), [
    ("latents", "auto", "something else than keys and values"),
    ("latents", "int8", "something else than keys and values"),
    ("halves", "fp8", "computes with what its cache returns"),
])  # fmt: skip
def test_a_cache_that_a_models_code_cannot_read_is_refused_by_the_swap(name, kv_cache, why):
    model = build(name, _OTHER_CACHES)
    before = objects(model)
    with pytest.raises(
        ValueError, match=rf"kv_cache='{kv_cache}' does not go with \w+Attention \(model\.layers\.0.*{why}"
    ):
        fp.swap(model, kv_cache=kv_cache)
    assert_same_objects(model, before)
    assert model.config._attn_implementation in ("sdpa", "eager") and not model._forward_pre_hooks


@torch.inference_mode()
def test_a_cache_of_the_models_dtype_where_code_computes_with_it():
    model = build("halves", _OTHER_CACHES)
    ids = batch("llama")["input_ids"]
    expected = model.generate(ids, **OPTIONS).sequences
    fp.swap(model, kv_cache="auto")
    assert torch.equal(model.generate(ids, **OPTIONS).sequences, expected)


@pytest.mark.parametrize("name", [*DECODERS, "t5", "whisper"])
def test_what_models_do_between_a_cache_and_attention_is_nothing(name):
    attention = [m for m in build(name, ATTENTION).modules() if huggingface.dispatches(m)]
    assert {cache_readers.why_not_read(m, torch.int8) for m in attention} == {None}


@torch.inference_mode()
def test_a_static_cache_that_is_full():
    model = decoder("llama")
    fp.swap(model, kv_cache="int8")
    cache = static_cache(model, "llama", 12)
    step = torch.zeros(2, 1, dtype=torch.long)
    for _ in range(2):
        model(input_ids=step, cache=cache)
    keys = cache.layers[0].keys.clone()
    with pytest.raises(
        ValueError, match="room for 12 tokens, 12 are in it, and 1 more were given: make it with a larger max"
    ):
        model(input_ids=step, cache=cache)
    assert torch.equal(cache.layers[0].keys, keys)
    assert cache.get_seq_length() == 12


@torch.inference_mode()
def test_attention_that_is_left_out_reads_8_bits_too():
    """A module that shares the config: it runs what it ran, on keys that are widened."""
    model = decoder("llama")
    fp.swap(model, kv_cache="int8")
    step = dict(zip(("key", "value"), torch.randn(2, 2, 2, 5, 32)))
    scale = torch.rand(2, 5, 2) / 100
    for name, x in step.items():
        step[name] = torch.clamp(x * 40, -127, 127).to(torch.int8)
        kv_scales.attach(step[name], scale)
    wide = {name: kv_scales.widened(x, torch.float32) for name, x in step.items()}
    query = torch.randn(2, 4, 1, 32)
    attention = model.model.layers[0].self_attn
    expected = huggingface._attention(attention, query, **wide, attention_mask=None)[0]
    got = huggingface._attention(attention, query, **step, attention_mask=None)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    with counted(Calls()) as calls:
        declined = huggingface._attention(attention, query, **step, attention_mask=None, scaling=32**-0.5, unknown=1)[0]
    assert calls.fallbacks
    torch.testing.assert_close(declined, expected, rtol=1e-4, atol=1e-5)


def test_no_kernel_no_step(monkeypatch):
    """Where only the reference could run it, attention_decode is not asked."""
    q, k = torch.randn(1, 4, 1, 32), torch.randn(1, 2, 9, 32)
    assert heads_first.decode_arguments(q, k, k, None, None, 0.0, None) is not None
    monkeypatch.setattr(heads_first, "why_no_kernel", lambda operation, call: "there is none")
    assert heads_first.decode_arguments(q, k, k, None, None, 0.0, None) is None
