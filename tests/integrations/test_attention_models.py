"""Models of transformers with swapped attention beside their own eager attention, as outputs and as they generate."""

import copy
import dataclasses
import importlib.util
import pathlib
from contextlib import ExitStack, contextmanager

import pytest
import torch
from recorded_calls import recorded_calls
from rotation import paired
from small_models import ATTENTION, batch, build

import forwardpass as fp
from forwardpass.dispatch.calls import Calls, counted
from forwardpass.integrations.transformers import attention as huggingface
from forwardpass.nn import eight_bits

transformers = pytest.importorskip("transformers")

DECODERS = ["llama", "mistral", "gemma2", "gpt_oss"]
GENERATING = [*DECODERS, "t5", "whisper"]
ROOT = pathlib.Path(__file__).parents[2]


def interpreted(implementation, arch):
    """Runs as soon as the kernel is there."""
    attention = ROOT / "csrc/kernels/attention"
    there = {
        ("triton", "sm_90a"): importlib.util.find_spec("forwardpass.ops.attention.triton_kernel") is not None,
        ("cuda", "sm_80"): "cudaErrorNotSupported" not in (attention / "table_sm80.cu").read_text(),
        ("cuda", "sm_90a"): (attention / "table_sm90a.cu").exists(),
    }[implementation, arch]
    skip = pytest.mark.skipif(not there, reason=f"attention has no {implementation} kernel for {arch} yet")
    marks = [pytest.mark.interpreted, skip]
    return pytest.param((implementation, arch, torch.float16), marks=marks, id=f"{implementation}-{arch}")


#: (backend, the GPU that is interpreted, dtype of the model)
RUNS = [
    pytest.param(("auto", None, torch.float32), id="float32"),
    pytest.param(("auto", None, torch.bfloat16), id="bfloat16"),
    pytest.param(("reference", None, torch.bfloat16), id="reference"),
    interpreted("cuda", "sm_80"),
    interpreted("cuda", "sm_90a"),
    interpreted("triton", "sm_90a"),
]


@contextmanager
def running(implementation, arch):
    with ExitStack() as stack:
        device = stack.enter_context(fp.interpret(arch)) if arch else None
        stack.enter_context(fp.use_backend(implementation))
        yield
        assert device is None or device.findings == []


def attention_only(model):
    report = fp.swap(model, attention=True)
    assert len(report.attention) == sum(hasattr(m, huggingface.PLACE) for m in model.modules()) > 0
    assert not report.swapped
    return report


def models(name, dtype):
    """Eager: the exact one, the one at dtype; and one at dtype to be swapped."""
    model = build(name, ATTENTION)
    model.set_attn_implementation("eager")
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    model = model.to(dtype)
    return copy.deepcopy(model).to(wide), model, copy.deepcopy(model)


def on(model, inputs):
    return {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}


@pytest.mark.every(2)
@pytest.mark.parametrize(("name", "run"), paired(ATTENTION, RUNS))
@torch.inference_mode()
def test_outputs(name, run):
    """Off by no more than twice what eager's are: largest; and one and a half times, mean."""
    implementation, arch, dtype = run
    exact, eager, ours = models(name, dtype)
    inputs = batch(name)
    reference, expected = (m(**on(m, inputs))[0].double() for m in (exact, eager))
    attention_only(ours)
    with running(implementation, arch), counted(Calls()) as calls:
        got = ours(**on(ours, inputs))[0].double()
    assert calls.kernel_calls and not calls.fallbacks
    mask = inputs.get("attention_mask")
    keep = mask.bool() if mask is not None and got.shape[1] == mask.shape[1] else slice(None)
    own, error = ((y - reference)[keep].abs() for y in (expected, got))
    assert own.mean() > 0
    assert error.max() <= 2 * own.max()
    assert error.mean() <= 1.5 * own.mean()


def start(model, name):
    """What the first step gets, and a function of (tokens so far, all of them, the cache)."""
    inputs = on(model, batch(name))
    if name in DECODERS:
        mask = inputs["attention_mask"]

        def step(tokens, count, past):
            longer = torch.cat([mask, mask.new_ones(2, count)], 1)
            return model(input_ids=tokens, attention_mask=longer, past_key_values=past)

        first = model(**inputs, use_cache=True)
    else:
        kept = {k: v for k, v in inputs.items() if k == "attention_mask"}
        source = {k: v for k, v in inputs.items() if k in ("input_ids", "input_features")}
        encoded = model.get_encoder()(**source, **kept)

        def step(tokens, count, past):
            return model(encoder_outputs=encoded, decoder_input_ids=tokens, past_key_values=past, **kept)

        first = model(encoder_outputs=encoded, decoder_input_ids=inputs["decoder_input_ids"], use_cache=True, **kept)
    return first, step


def logits_of(model, name, tokens=None, steps=64):
    """[2, steps, vocabulary] of the last position, cached, and the tokens: those given, else the greedy ones."""
    out, step = start(model, name)
    logits, chosen = [], []
    for i in range(steps):
        logits.append(out.logits[:, -1].double())
        chosen.append(logits[-1].argmax(-1) if tokens is None else tokens[:, i])
        out = step(chosen[-1].unsqueeze(1), i + 1, out.past_key_values)
    return torch.stack(logits, 1), torch.stack(chosen, 1)


@pytest.mark.every(2)
@pytest.mark.parametrize(("name", "run"), paired(GENERATING, RUNS))
@torch.inference_mode()
def test_generation(name, run):
    """Fed the same tokens, each step's logits are off by at most twice eager's own error, and the token is the same wherever
    eager's first two are further apart than four times that; free runs agree up to the first step where they are not."""
    implementation, arch, dtype = run
    steps = 6 if arch else 64
    exact, eager, ours = models(name, dtype)
    reference, tokens = logits_of(exact, name, steps=steps)
    expected, _ = logits_of(eager, name, tokens, steps)
    attention_only(ours)
    with running(implementation, arch), counted(Calls()) as calls:
        got, _ = logits_of(ours, name, tokens, steps)
        free = logits_of(ours, name, steps=steps)[1]
    assert calls.kernel_calls and not calls.fallbacks
    own = (expected - reference).abs().max()
    assert (got - reference).abs().max() <= 2 * own
    top = reference.topk(2, -1).values
    sure = top[..., 0] - top[..., 1] > 4 * own
    assert torch.equal(got.argmax(-1)[sure], reference.argmax(-1)[sure])
    assert sure.any()
    for row in range(2):
        agree = steps if sure[row].all() else int((~sure[row]).int().argmax())
        assert torch.equal(free[row, :agree], tokens[row, :agree])


@pytest.mark.every(2)
@pytest.mark.parametrize("name", GENERATING)
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_with_left_padding(name, cache):
    model = build(name, ATTENTION)
    model.set_attn_implementation("eager")
    inputs = {k: v for k, v in batch(name).items() if k != "decoder_input_ids"}
    if name in DECODERS:
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "cache_implementation": cache,
               "return_dict_in_generate": True, "output_logits": True, "disable_compile": True}  # fmt: skip
    expected = model.generate(**inputs, **options)
    attention_only(model)
    with counted(Calls()) as calls:
        got = model.generate(**inputs, **options)
    assert calls.kernel_calls and not calls.fallbacks
    assert torch.equal(got.sequences, expected.sequences)
    for a, b in zip(got.logits, expected.logits):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture
def given(monkeypatch):
    """What the operation is given by models."""
    return recorded_calls(monkeypatch, eight_bits, "ATTENTION")


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss"])
@torch.inference_mode()
def test_a_window_is_a_number_where_nothing_else_is_masked(name, given):
    model = build(name, ATTENTION)
    model.set_attn_implementation("eager")
    ids = batch(name)["input_ids"]
    expected = model(input_ids=ids)
    attention_only(model)
    given.clear()  # those of the swap's own runs
    got = model(input_ids=ids)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)
    windows = [None if call["window_left"] is None else call["window_left"] + 1 for call in given()]
    assert windows == ([6, 6] if name == "mistral" else [6, None])
    assert all(call["causal"] and call["mask"] is None for call in given())
    # a second chunk sees the first through the window, and only then a mask is made
    more = model(input_ids=ids[:, :4], past_key_values=got.past_key_values).logits
    fp.restore(model)
    torch.testing.assert_close(
        more, model(input_ids=ids[:, :4], past_key_values=expected.past_key_values).logits, rtol=1e-4, atol=1e-5
    )


@torch.inference_mode()
def test_a_window_over_a_cache_that_keeps_everything():
    """A single row has no mask where nothing else is masked, and a window then has to be one."""
    model = build("mistral", ATTENTION)
    model.set_attn_implementation("eager")
    ids = batch("mistral")["input_ids"]
    both = []
    for swapped in (False, True):
        if swapped:
            attention_only(model)
        cache = transformers.DynamicCache()
        model(input_ids=ids, past_key_values=cache)
        both.append(model(input_ids=ids[:, :1], past_key_values=cache).logits)
        assert cache.get_seq_length() == cache.layers[0].keys.shape[2] == 11
    torch.testing.assert_close(both[1], both[0], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_padding_of_an_encoder_is_not_written_out(given):
    model = build("bert", ATTENTION)
    fp.swap(model, attention=True, unpad=False)
    given.clear()  # those of the swap's own runs
    model(**batch("bert"))
    for call in given():
        assert call["mask"].shape == (2, 1, 10, 10)
        assert call["mask"].stride(2) == 0
        assert not call["causal"]


@torch.inference_mode()
def test_what_models_pass_arrives(given):
    calls = []
    for name in ("gemma2", "gpt_oss", "t5", "whisper"):
        model = build(name, ATTENTION)
        attention_only(model)
        given.clear()  # those of the swap's own runs
        model(**batch(name))
        calls += given()
    assert [c["softcap"] for c in calls[:2]] == [2.0, 2.0]
    assert [c["scale"] for c in calls[:2]] == [0.5, 0.5]
    assert all(c["sinks"].shape == (4,) for c in calls[2:4])
    assert all(c["k"].shape[2] == 2 and c["q"].shape[2] == 4 for c in calls[:4])  # not repeated
    biased, cross = calls[4:6], [c for c in calls if c["q"].shape[1] != c["k"].shape[1]]
    assert all(c["mask"].dtype == torch.float32 and c["mask"].shape == (2, 4, 10, 10) for c in biased)
    assert {c["k"].shape[1] for c in cross} == {10, 16}
    assert all(not c["causal"] for c in cross)


# ---- where it does not run


@pytest.fixture(params=["eager", "sdpa"])
def swapped(request):
    model = build("llama", ATTENTION)
    model.set_attn_implementation(request.param)
    before = copy.deepcopy(model)
    attention_only(model)
    return model, before


def reasons(calls):
    return {reason.code for _, reason in calls.fallbacks}


def test_weights_are_those_of_before(swapped):
    model, before = swapped
    with counted(Calls()) as calls, torch.inference_mode():
        got, expected = (m(**batch("llama"), output_attentions=True) for m in (model, before))
    assert reasons(calls) == {"attention_weights"}
    assert len(got.attentions) == 2 >= len(expected.attentions)  # sdpa has none
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)


def test_gradients_and_dropout_are_those_of_before(swapped):
    model, before = swapped
    inputs = {"input_ids": batch("llama")["input_ids"][:, :8]}
    for m in (model, before):
        m.train()
        for layer in m.model.layers:
            layer.self_attn.attention_dropout = 0.5
    with counted(Calls()) as calls:
        for m in (model, before):
            torch.manual_seed(5)
            m(**inputs).logits.square().mean().backward()
    assert reasons(calls) == {"dropout"}
    for a, b in zip(model.parameters(), before.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
    for m in (model, before):
        m.eval().zero_grad()
    with counted(Calls()) as calls:
        for m in (model, before):
            m(**inputs).logits.square().mean().backward()
    assert reasons(calls) == {"grad"}
    for a, b in zip(model.parameters(), before.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.every(2)
@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss", "t5"])
@pytest.mark.parametrize("padded", [True, False])
@torch.inference_mode()
def test_a_module_that_is_left_out_runs_as_before(name, padded):
    """With the window and the mask that it would have had."""
    model = build(name, ATTENTION)
    model.set_attn_implementation("eager")
    inputs = batch(name)
    if not padded:
        del inputs["attention_mask"]
    expected = model(**inputs)[0]
    site = "decoder.block.0.layer.0" if name == "t5" else "model.layers.0"
    report = fp.swap(model, attention=True, exclude=site)
    left = {s.fqn for s in report.skipped if s.reason.code == "excluded"} - {
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)
    }
    assert len([n for n in left if "ttention" in n or n.endswith("attn")]) == 1
    with counted(Calls()) as calls:
        got = model(**inputs)[0]
    assert reasons(calls) == {"not_swapped"}
    assert sum(calls.kernel_calls.values()) == len(report.attention)
    keep = inputs["attention_mask"].bool() if padded and name != "t5" else slice(None)
    torch.testing.assert_close(got[keep], expected[keep], rtol=1e-4, atol=1e-5)


def test_sinks_that_are_trained_or_of_another_type():
    model = build("gpt_oss", ATTENTION).requires_grad_(False)
    ids = batch("gpt_oss")["input_ids"]
    expected = model(input_ids=ids).logits
    attention_only(model)
    for layer in model.model.layers:
        layer.self_attn.sinks.requires_grad_()
    with counted(Calls()) as calls:
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert reasons(calls) == {"grad"}
    for layer in model.model.layers:
        layer.self_attn.sinks.data = layer.self_attn.sinks.data.bfloat16()
    with counted(Calls()) as calls, torch.inference_mode():
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)
    assert calls.kernel_calls and not calls.fallbacks


@torch.inference_mode()
def test_an_argument_that_nobody_knows_is_declined_by_name(swapped):
    model, before = swapped
    with counted(Calls()) as calls:
        got = model.model(**batch("llama"), cu_seq_lens_q=torch.tensor([0, 10])).last_hidden_state
    assert "cu_seq_lens_q= is nothing that fused attention takes" in str(calls)
    torch.testing.assert_close(got, before.model(**batch("llama")).last_hidden_state, rtol=1e-4, atol=1e-5)


# ---- which models


def test_names_are_on_this_model_only_and_restored():
    model, other = build("whisper", ATTENTION), build("whisper", ATTENTION)
    before = {id(m.config): m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}
    for _ in range(2):
        attention_only(model)
        assert model.config._attn_implementation == model.model.decoder.config._attn_implementation
        assert huggingface.replaced_by(model.config._attn_implementation) == "sdpa" != model.config._attn_implementation
        assert other.config._attn_implementation == "sdpa"
        fp.restore(model)
        after = {id(m.config): m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}
        assert after == before
        assert not any(hasattr(m, huggingface.PLACE) for m in model.modules())
    with fp.swap(model, "int8", attention=True), pytest.raises(RuntimeError, match=r"already holds .* swapped layers"):
        fp.swap(model, attention=True)


@torch.inference_mode()
def test_a_config_that_two_models_share():
    config = build("mistral", ATTENTION).config
    torch.manual_seed(1)
    first, second = (transformers.MistralForCausalLM(config).eval() for _ in range(2))
    ids = batch("mistral")["input_ids"]
    expected = second(input_ids=ids).logits
    attention_only(first)
    with counted(Calls()) as calls:
        torch.testing.assert_close(second(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert reasons(calls) == {"shared_config"}
    report = fp.swap(second, "int8", attention=True, dry_run=True)
    assert {s.reason.code for s in report.skipped if s.fqn.endswith("self_attn")} == {"shared_config"}


@torch.inference_mode()
def test_a_model_of_two_configs():
    """Text and vision: each part's config is named, and the one above them."""
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 50, "max_position_embeddings": 16, "eos_token_id": 1, "bos_token_id": 0},
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    inputs = {"input_ids": torch.arange(8).reshape(1, 8), "pixel_values": torch.randn(1, 3, 16, 16)}
    expected = model(**inputs).logits_per_image
    assert len(attention_only(model).attention) == 2
    configs = (model.config, model.config.text_config, model.config.vision_config)
    assert all(c._attn_implementation in huggingface.NAMES for c in configs)
    with counted(Calls()) as calls:
        torch.testing.assert_close(model(**inputs).logits_per_image, expected, rtol=1e-4, atol=1e-5)
    assert sum(calls.kernel_calls.values()) == 2
    fp.restore(model)
    assert all(c._attn_implementation == "sdpa" for c in configs)


def test_code_that_asks_for_an_implementation_by_name():
    """Sparse attention hands its selection to the implementations that it knows as a mask, and to others otherwise."""
    from transformers.models.deepseek_v32 import modeling_deepseek_v32 as sparse

    assert '("eager", "sdpa")' in huggingface.asks_for_a_name(sparse.__name__)
    for name in ATTENTION:
        assert huggingface.asks_for_a_name(type(build(name, ATTENTION)).__module__) is None


def without_masks(monkeypatch):
    from transformers import masking_utils

    monkeypatch.delattr(masking_utils, "AttentionMaskInterface")


def with_caches_of_another_name(monkeypatch):
    """As in 5.23."""
    from transformers import modeling_outputs

    named = dataclasses.make_dataclass("CausalLMOutputWithPast", ["logits", "past_key_values"])
    monkeypatch.setattr(modeling_outputs, "CausalLMOutputWithPast", named)


@pytest.mark.parametrize(
    ("older", "text"),
    [
        (without_masks, "no interface for attention and its masks"),
        (with_caches_of_another_name, "take their cache by another name than `cache`"),
    ],
)
def test_versions_of_transformers_that_are_not_known(older, text, monkeypatch):
    older(monkeypatch)
    huggingface.register.cache_clear()
    try:
        with pytest.warns(UserWarning, match="no layer is swapped"):
            report = fp.swap(build("llama", ATTENTION), attention=True)
        reason = next(s.reason for s in report.skipped if s.fqn.endswith("self_attn"))
        assert reason.code == "transformers" and text in reason.text
    finally:
        huggingface.register.cache_clear()
