"""A swapped model in the hands of transformers: its config, attention weights, resized embeddings."""

import copy
import pickle

import pytest
import torch
from rotation import in_turn
from small_models import ATTENTION, CONFIGS, MLPS, assert_same_objects, batch, build, codes, objects

import forwardpass as fp
from forwardpass.dispatch.calls import Calls, counted
from forwardpass.integrations.transformers import attention as huggingface

transformers = pytest.importorskip("transformers")

GREEDY = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}


def swapped(name, implementation="sdpa", configs=ATTENTION, **options):
    model = build(name, configs)
    model.set_attn_implementation(implementation)
    return model, fp.swap(model, **{"attention": True, "unpad": False, **options})


# ---- the config


def by_class(model):
    return type(model)(model.config)


def by_copy(model):
    return type(model)(copy.deepcopy(model.config))


def by_auto_model(model):
    return transformers.AutoModelForCausalLM.from_config(copy.deepcopy(model.config))


def by_pickle(model):
    return type(model)(pickle.loads(pickle.dumps(model.config)))


@pytest.mark.every(2)
@pytest.mark.parametrize("how", [by_class, by_copy, by_auto_model, by_pickle])
@pytest.mark.parametrize(
    ("name", "before"), [("llama", "sdpa"), ("llama", "eager"), ("mistral", "sdpa"), ("gpt_oss", "eager")]
)
@torch.inference_mode()
def test_models_built_from_the_config_run_what_it_named_before(name, before, how, monkeypatch):
    """With the mask and the window that it would have had, and padding."""
    model, _ = swapped(name, before)
    other = how(model).eval()
    other.load_state_dict(model.state_dict())
    ran = []
    sdpa = huggingface._interface["sdpa"]
    monkeypatch.setitem(
        huggingface._interface._local_mapping, "sdpa", lambda *a, **k: ran.append("sdpa") or sdpa(*a, **k)
    )
    with counted(Calls()) as calls:
        got = other(**batch(name)).logits
    assert {reason.code for _, reason in calls.fallbacks} == {"shared_config"}
    assert bool(ran) == (before == "sdpa")
    original = copy.deepcopy(model)
    fp.restore(model)
    expected = model(**batch(name)).logits
    keep = batch(name)["attention_mask"].bool()
    torch.testing.assert_close(got[keep], expected[keep], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(original(**batch(name)).logits[keep], expected[keep], rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("before", ["sdpa", "eager"])
@torch.inference_mode()
def test_a_model_of_a_copied_config_is_swapped_and_restored(before):
    first, _ = swapped("llama", before)
    second = by_copy(first).eval()
    named = second.config._attn_implementation
    expected = second(**batch("llama")).logits
    report = fp.swap(second, attention=True)
    assert len(report.attention) == 2 and {a.before for a in report.attention} == {before}
    with counted(Calls()) as calls:
        got = second(**batch("llama")).logits
    assert calls.kernel_calls and not calls.fallbacks
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    fp.restore(second)
    assert second.config._attn_implementation == named
    torch.testing.assert_close(second(**batch("llama")).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_draft_model_of_the_config():
    model, _ = swapped("llama")
    draft = by_copy(model).eval()
    draft.load_state_dict(model.state_dict())
    ids = batch("llama")["input_ids"][:1]
    alone = model.generate(ids, **GREEDY)
    for assistant in (draft, by_copy(model).eval()):
        assert torch.equal(model.generate(ids, assistant_model=assistant, **GREEDY), alone)


def test_the_config_is_saved_and_loaded(tmp_path):
    model, _ = swapped("llama")
    before = build("llama", ATTENTION)
    for folder, saved in (("swapped", model), ("before", before)):
        saved.config.save_pretrained(tmp_path / folder)
    text = (tmp_path / "swapped" / "config.json").read_text()
    assert text == (tmp_path / "before" / "config.json").read_text()
    loaded = transformers.AutoConfig.from_pretrained(tmp_path / "swapped")
    assert type(model)(loaded).config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path / "model")  # attention alone is swapped, so its weights are transformers' own
    again = type(model).from_pretrained(tmp_path / "model").eval()
    with torch.inference_mode():
        torch.testing.assert_close(again(**batch("llama")).logits, model(**batch("llama")).logits, rtol=1e-4, atol=1e-5)
    other = by_copy(model)
    fp.swap(other, "int8")
    fp.save_pretrained(other, tmp_path / "int8")
    assert fp.load_pretrained(tmp_path / "int8").config._attn_implementation == "sdpa"


# ---- attention weights


FAMILIES = {**ATTENTION, **{name: MLPS[name] for name in ("gpt2", "clip", "siglip", "modernbert")}, "opt": (
    "OPTForCausalLM", "OPTConfig", {"hidden_size": 64, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                                    "vocab_size": 100, "max_position_embeddings": 64, "word_embed_proj_dim": 64}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", CONFIGS["gpt2"][2]),
    "longt5": ("LongT5ForConditionalGeneration", "LongT5Config", {**ATTENTION["t5"][2], "num_decoder_layers": 2})}  # fmt: skip
KEYS = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")


def weights(output):
    return {key: output[key] for key in KEYS if output.get(key) is not None}


@pytest.mark.every(2)
@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_weights_that_a_call_asks_for(name):
    """Those of eager attention, sdpa having none, and the same output as without."""
    model = build(name, FAMILIES)
    model.set_attn_implementation("eager")
    inputs = batch("t5" if name == "longt5" else name)
    expected = model(**inputs, output_attentions=True)
    for before in ("eager", "sdpa"):
        if before == "sdpa" and not model._supports_sdpa:
            continue
        model.set_attn_implementation(before)
        report = fp.swap(model, attention=True)
        assert report.attention
        got = model(**inputs, output_attentions=True)
        assert weights(got).keys() == weights(expected).keys()
        assert any(weights(expected).values())
        for key, layers in weights(expected).items():
            assert len(weights(got)[key]) == len(layers)
            for a, b in zip(weights(got)[key], layers):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-5)
        with counted(Calls()) as calls:
            assert not any(weights(model(**inputs)).values())
        assert {reason.code for _, reason in calls.fallbacks} <= {"need_weights"}  # SigLIP's pooling is torch's
        fp.restore(model)


@pytest.mark.every(2)
@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_a_config_that_asks_for_weights_keeps_its_attention(name):
    model = build(name, FAMILIES)
    model.set_attn_implementation("eager")
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        config.output_attentions = True
    inputs = batch("t5" if name == "longt5" else name)
    expected = model(**inputs)
    report = fp.swap(model, attention=True)
    assert "output_attentions" in codes(report).values()
    assert {a.before for a in report.attention} <= {"torch"}
    got = model(**inputs)
    assert any(weights(expected).values())
    for key, layers in weights(expected).items():
        for a, b in zip(weights(got)[key], layers, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_weights_of_some_layers_alone():
    """Layers that are left out return theirs as well, though sdpa had none."""
    model = build("llama", ATTENTION)
    report = fp.swap(model, attention=True, exclude="model.layers.0")
    assert len(report.attention) == 1
    assert len(model(**batch("llama"), output_attentions=True).attentions) == 2


@pytest.mark.every(3)
@pytest.mark.parametrize("name", in_turn(["llama", "gpt2"]))
@torch.inference_mode()
def test_weights_of_a_compiled_call(name):
    model = build(name, FAMILIES)
    expected = model(**batch(name)).logits
    fp.swap(model, attention=True)
    torch._dynamo.reset()
    layer = (model.model.layers if name == "llama" else model.transformer.h)[1]
    alone = layer.forward
    layer.forward = torch.compile(alone, backend="eager", fullgraph=True)
    torch.testing.assert_close(model(**batch(name)).logits, expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()  # what is compiled without hooks goes on without them
    layer.forward = torch.compile(alone, backend="eager")  # transformers' hooks break its graph
    assert len(model(**batch(name), output_attentions=True).attentions) == 2
    layer.forward = alone
    compiled = torch.compile(model, backend="eager")
    got = compiled(**batch(name), output_attentions=True)
    assert len(got.attentions) == 2 and got.attentions[0].shape[-2:] == (10, 10)
    torch.testing.assert_close(got.logits, expected, rtol=1e-4, atol=1e-5)
    assert not compiled(**batch(name)).attentions
    torch._dynamo.reset()


# ---- resized embeddings


@pytest.mark.parametrize("precision", ["int8", "w8a16", "bf16"])
def test_a_swapped_head_is_not_resized_nor_anything_else(precision):
    model = build("llama", ATTENTION)
    report = fp.swap(model, precision, include="lm_head")
    assert [s.fqn for s in report.swapped] == ["lm_head"]
    before = objects(model), copy.deepcopy(model.config)
    other = copy.deepcopy(model)
    for m in (model, other):
        for resize in (dict(new_num_tokens=120), dict(pad_to_multiple_of=64)):
            with pytest.raises(
                RuntimeError, match=r"LlamaForCausalLM.resize_token_embeddings .* fp.restore\(model\) first"
            ):
                m.resize_token_embeddings(**resize)
    assert_same_objects(model, before[0])
    assert model.config.to_dict() == before[1].to_dict()
    embeddings = model.model.embed_tokens
    assert (
        model.resize_token_embeddings(100) is model.resize_token_embeddings() is embeddings
    )  # as scripts do, to be sure
    fp.restore(model)
    model.resize_token_embeddings(120)
    assert model.lm_head.out_features == model.model.embed_tokens.num_embeddings == 120


@torch.inference_mode()
def test_embeddings_of_a_model_whose_head_stays_are_resized():
    model = build("llama", ATTENTION)
    fp.swap(model, "int8")
    model.resize_token_embeddings(120)
    assert model(**batch("llama")).logits.shape[-1] == 120
    fp.restore(model)
    assert model(**batch("llama")).logits.shape[-1] == 120
