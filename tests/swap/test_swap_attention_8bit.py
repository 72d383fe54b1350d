"""attention="int8" in models and in fp.sdpa: which calls are in 8 bits, and that plans, files, copies and graphs keep it."""

import copy
import json
import pickle
import sys
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from processes import fork
from rotation import in_turn
from small_models import ATTENTION, assert_same_objects, batch, build, objects, of_tokens, outputs
from torch import nn

import forwardpass as fp
from forwardpass.common.models.compare import relative_error
from forwardpass.dispatch.calls import Calls, counted
from forwardpass.nn import eight_bits
from forwardpass.nn.eight_bits import EightBits
from forwardpass.ops.attention_8bit import DTYPES

EVERYWHERE = {"attention": "int8", "crossover": 0}


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def models():
    """(model, its input), of torch and of transformers."""
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1))
    return (encoder().requires_grad_(False), x), (build("mistral", ATTENTION), batch("mistral"))


@pytest.fixture
def vnni(monkeypatch):
    """Whatever this CPU has."""
    monkeypatch.setattr(eight_bits, "cpu_tier", lambda: "avx512_vnni")
    eight_bits._cached.cache_clear()
    yield
    eight_bits._cached.cache_clear()


# ---- what is computed


@pytest.mark.every(2)
@pytest.mark.parametrize("name", ATTENTION)
@torch.inference_mode()
def test_models(name):
    """Padding, causality, windows, softcap, sinks, GQA, position biases and attention to an encoder: all calls are in 8 bits, and
    what 8 bits lose is all that changes."""
    model, inputs = build(name, ATTENTION), batch(name)
    expected = of_tokens(outputs(model, inputs), inputs)
    report = fp.swap(model, **EVERYWHERE)
    with counted(Calls()) as calls:
        got = of_tokens(outputs(model, inputs), inputs)
    assert sum(calls.kernel_calls.values()) == len(report.attention) and not calls.fallbacks
    assert all(call.endswith(" in int8") for call in calls.kernel_calls)
    assert {s.bits for s in report.attention} == {"int8"}
    assert 0 < relative_error(got, expected) < 0.02
    fp.restore(model)
    assert torch.equal(of_tokens(outputs(model, inputs), inputs), expected)


@pytest.mark.parametrize("mask", ["bool", "added"])
@torch.inference_mode()
def test_the_mask_that_sageattention_drops(mask):
    """Its replacement of F.scaled_dot_product_attention takes attn_mask with other keyword arguments, and ignores it."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 32, generator=g) for n in (70, 90, 90))
    allowed = torch.arange(90) < torch.tensor([50, 80]).reshape(2, 1, 1, 1)
    given = allowed if mask == "bool" else torch.zeros(2, 1, 1, 90).masked_fill(~allowed, -torch.inf)
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    without = F.scaled_dot_product_attention(q, k, v)
    with fp.sdpa("int8", crossover=0) as calls:
        got = F.scaled_dot_product_attention(q, k, v, attn_mask=given)
        v[0, :, 50:] = 1e4  # which a mask that is dropped would let through; a channel's scale is of all keys
        k[0, :, 50:] = 0
        masked = F.scaled_dot_product_attention(q, k, v, attn_mask=given)
    assert calls.kernel_calls == {"scaled_dot_product_attention in int8": 2}
    assert relative_error(got, exact) < 0.02 < 0.5 < relative_error(without, exact)
    assert masked[0].abs().max() < 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_strided_views_of_a_fused_qkv(dtype):
    """What wraps in SageAttention at 2^31 elements are the offsets of such views: bits are those of tensors of their own."""
    qkv = torch.randn(2, 50, 3, 4, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    views = [x.transpose(1, 2) for x in qkv.unbind(2)]
    assert not any(x.is_contiguous() or x.transpose(1, 2).is_contiguous() for x in views)
    with fp.sdpa("int8", crossover=0) as calls:
        got = F.scaled_dot_product_attention(*views, is_causal=True)
        expected = F.scaled_dot_product_attention(*(x.contiguous() for x in views), is_causal=True)
    assert calls.kernel_calls == {"scaled_dot_product_attention in int8": 2}
    assert torch.equal(got, expected)


@torch.inference_mode()
def test_text_encoders_without_padding():
    """Each sequence by itself, its scales too."""
    model, inputs = build("bert", ATTENTION), batch("bert")
    expected = outputs(model, inputs)
    fp.swap(model, **EVERYWHERE, unpad=True)
    with counted(Calls()) as calls:
        got = outputs(model, inputs)
    assert calls.kernel_calls == {"BertSelfAttention in int8": 2}
    mask = inputs["attention_mask"].bool()
    assert relative_error(got[mask], expected[mask]) < 0.02
    alone = outputs(model, {name: x[1:, :6] for name, x in inputs.items()})
    torch.testing.assert_close(got[1:, :6], alone, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_steps_of_a_decoder_stay_in_its_dtype():
    """They read a cache: the prompt alone is in 8 bits."""
    model = build("llama", ATTENTION)
    fp.swap(model, **EVERYWHERE)
    ids = batch("llama")["input_ids"][:1]
    with counted(Calls()) as calls:
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, eos_token_id=None
        )
    assert calls.kernel_calls == {"LlamaAttention in int8": 2, "LlamaAttention": 6}


def test_what_8_bits_cannot_take_runs_as_before():
    """Gradients, dropout and attention weights, each counted with its reason."""
    model, inputs = build("llama", ATTENTION), batch("llama")
    fp.swap(model, **EVERYWHERE)
    with counted(Calls()) as calls:
        model(**inputs).logits.sum().backward()
        with torch.no_grad():
            weights = model(**inputs, output_attentions=True).attentions
    assert {reason.code: n for (_, reason), n in calls.fallbacks.items()} == {"grad": 2, "attention_weights": 2}
    assert weights[0].sum(-1)[0] == pytest.approx(1)
    q = torch.randn(1, 2, 8, 16)
    with fp.sdpa("int8", crossover=0) as calls, torch.no_grad():
        F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    assert [reason.code for _, reason in calls.fallbacks] == ["dropout"] and not calls.kernel_calls


@torch.inference_mode()
def test_weights_that_multihead_attention_is_asked_for():
    layer = fp.nn.MultiheadAttention(32, 2, batch_first=True).eval()
    x = torch.randn(2, 20, 32)
    expected = layer(x, x, x)[0]
    layer.bits = EightBits("int8", 0)
    with counted(Calls()) as calls:
        assert torch.equal(layer(x, x, x)[0], expected)
        got, _ = layer(x, x, x, need_weights=False)
    assert calls.kernel_calls == {"MultiheadAttention in int8": 1} and len(calls.fallbacks) == 1
    assert 0 < relative_error(got, expected) < 0.02


# ---- the crossover


def computed_in_8_bits(rows, keys, heads=2, kv_heads=2, dtype=torch.float32, dim=64, crossover=None):
    q, k = torch.randn(1, heads, rows, dim, dtype=dtype), torch.randn(1, kv_heads, keys, dim, dtype=dtype)
    with fp.sdpa("int8", crossover=crossover) as calls, torch.inference_mode():
        F.scaled_dot_product_attention(q, k, k, enable_gqa=heads != kv_heads)
    return "scaled_dot_product_attention in int8" in calls.kernel_calls


@pytest.mark.usefixtures("vnni")
def test_short_calls_stay_in_their_dtype():
    """Both rows and keys count; rows of all query heads that share keys, as those are quantised once."""
    assert computed_in_8_bits(256, 256)
    assert not computed_in_8_bits(255, 4096) and not computed_in_8_bits(4096, 255)
    assert computed_in_8_bits(64, 256, heads=8) and not computed_in_8_bits(63, 256, heads=8)
    assert computed_in_8_bits(256, 256, dim=128) and not computed_in_8_bits(255, 256, dim=128)
    assert computed_in_8_bits(512, 512, dim=32) and not computed_in_8_bits(511, 512, dim=32)
    assert not computed_in_8_bits(1023, 1023, dtype=torch.bfloat16) and computed_in_8_bits(
        1024, 1024, dtype=torch.bfloat16
    )
    assert computed_in_8_bits(1, 1, crossover=0)
    assert computed_in_8_bits(7, 7, crossover=7) and not computed_in_8_bits(7, 6, crossover=7)


@pytest.mark.parametrize("tier", ["baseline", "avx2", "amx"])
def test_where_8_bits_are_not_known_to_be_faster(tier, monkeypatch):
    """The model's dtype stays, and the report says so."""
    monkeypatch.setattr(eight_bits, "cpu_tier", lambda: tier)
    eight_bits._cached.cache_clear()
    try:
        assert not computed_in_8_bits(1200, 1200, dtype=torch.bfloat16)
        assert computed_in_8_bits(300, 300) == (tier == "amx")
        model = build("llama", ATTENTION).bfloat16()
        with pytest.warns(UserWarning, match=rf"computes in bfloat16 in every call.*{tier}.*pass crossover=0"):
            report = fp.swap(model, attention="int8", dry_run=True)
        assert {s.bits for s in report.attention} == {"bfloat16"}
        assert {s.bits for s in fp.swap(model, **EVERYWHERE, dry_run=True).attention} == {"int8"}
    finally:
        eight_bits._cached.cache_clear()


def test_on_gpus():
    """Interpreted ones: by the architecture; float32 has no kernel in 8 bits there either."""
    model = build("llama", ATTENTION).bfloat16()
    for arch, expected in (("sm_80", "int8 from 8192 keys on"), ("sm_89", "int8 from 8192 keys on")):
        with fp.interpret(arch):
            assert {s.bits for s in fp.swap(model, attention="int8", dry_run=True).attention} == {expected}
    with fp.interpret("sm_80"), pytest.warns(UserWarning, match=r"computes in float32 in every call.*tensor cores"):
        assert {s.bits for s in fp.swap(model.float(), attention="int8", dry_run=True).attention} == {"float32"}
    with fp.interpret("sm_80"), pytest.warns(UserWarning, match="runs through the plain-torch reference.*tensor cores"):
        fp.swap(model.float(), **EVERYWHERE, dry_run=True)


@pytest.mark.interpreted
@pytest.mark.parametrize("arch", in_turn(["sm_80", "sm_89"]))
@torch.inference_mode()
def test_models_on_the_kernels_for_gpus(arch):
    """Whose integers are the CPU's."""
    model, inputs = build("mistral", ATTENTION).half(), batch("mistral")
    floats = of_tokens(outputs(model, inputs), inputs).float()
    fp.swap(model, **EVERYWHERE)
    expected = of_tokens(outputs(model, inputs), inputs).float()
    with fp.interpret(arch) as device, fp.use_backend("cuda"), counted(Calls()) as calls:
        got = of_tokens(outputs(model, inputs), inputs).float()
    assert calls.kernel_calls == {"MistralAttention in int8": 2} and device.findings == []
    assert relative_error(got, floats) < 0.02
    assert relative_error(got, expected) < 0.5 * relative_error(expected, floats)


@pytest.mark.usefixtures("vnni")
def test_the_report_says_it():
    model = build("llama", ATTENTION)
    report = fp.swap(model, attention="int8")
    text = " ".join(str(report).split())
    assert "int8 from 512 keys on" in text  # heads of 32 columns
    assert "steps that read a cache, compute in the model's dtype" in text
    assert "gradients or attention weights run what ran before" in text
    rows = json.loads(json.dumps(report.to_json()))["attention"]
    assert {row["bits"] for row in rows} == {"int8 from 512 keys on"}
    fp.restore(model)
    assert "computes in" not in str(fp.swap(model, attention=True))


def test_wrong_choices():
    model = encoder()
    before = objects(model)
    for options, words in [
        ({"attention": "int9"}, "'int8'.*, not 'int9'"),
        ({"attention": "int8", "crossover": -1}, "crossover is a number of keys.*not -1"),
        ({"attention": "int8", "crossover": 1.5}, "not 1.5"),
        (
            {"attention": True, "crossover": 0},
            "crossover=0 is for attention in 8 bits, and attention is True: pass attention='int8'",
        ),
    ]:
        with pytest.raises(ValueError, match=words):
            fp.swap(model, "int8", **options)
    plan = fp.swap(encoder(), **EVERYWHERE, dry_run=True).plan
    with pytest.raises(ValueError, match="crossover=0 does not go with plan="):
        fp.swap(model, plan=plan, crossover=0)
    for arguments, words in [((True, 0), "pass sdpa"), (("int9", None), "not 'int9'"), ((False, None), "not False")]:
        with pytest.raises(ValueError, match=words), fp.sdpa(arguments[0], crossover=arguments[1]):
            pass
    assert_same_objects(model, before)


BY_NAME = {"encoder": {"layers.0.*": None, "*": "int8"}, "mistral": {"*.layers.0.*": None, "*": "int8"}}


@pytest.mark.parametrize("which", BY_NAME)
@torch.inference_mode()
def test_patterns_of_names(which, tmp_path):
    """The first that matches decides; what stays has its reason; plans, folders and a Config keep it."""
    model, inputs = models()[which == "mistral"]
    before, expected = objects(model), outputs(model, inputs)
    config = fp.Config("int8", attention=BY_NAME[which], crossover=0)
    report = fp.swap(model, config)
    (swapped,), (stays,) = report.attention, [s for s in report.skipped if s.reason.code == "attention_off"]
    assert "layers.1." in swapped.fqn and "layers.0." in stays.fqn
    assert "patterns of attention= leave it as it is" in str(stays.reason)
    assert swapped_in_8_bits(model) == {swapped.fqn: EightBits("int8", 0)}
    with counted(Calls()) as calls:
        got = outputs(model, inputs)
    assert [n for call, n in calls.kernel_calls.items() if call.endswith("in int8")] == [1]
    assert 0 < relative_error(got, expected) < 0.05
    fp.save_pretrained(model, tmp_path)
    loaded = fp.load_pretrained(tmp_path, None if which == "mistral" else encoder())
    assert swapped_in_8_bits(loaded) == swapped_in_8_bits(model)
    fp.restore(model)
    assert_same_objects(model, before)
    fp.swap(model, plan=report.plan)
    assert swapped_in_8_bits(model) == {swapped.fqn: EightBits("int8", 0)}
    assert torch.equal(outputs(model, inputs), got)


def test_patterns_of_several_choices():
    """16 bits and 8 side by side; a pattern that names no attention changes nothing; what no pattern names stays."""
    model = build("mistral", ATTENTION)
    fp.swap(model, attention={"*.layers.0.*": True, "lm_head": "int8", "layers.1": "int8"}, crossover=0)
    (name,) = swapped_in_8_bits(model)
    assert "layers.1." in name and len(fp.report(model).attention) == 2
    fp.restore(model)
    fp.swap(model, attention={"*.layers.0.*": True})
    assert not swapped_in_8_bits(model) and len(fp.report(model).attention) == 1


def test_wrong_patterns():
    model = encoder()
    before = objects(model)
    for options, error, words in [
        ({"attention": {}}, ValueError, "attention is an empty dict, which names none"),
        (
            {"attention": {"*": "int9"}},
            ValueError,
            "attention by name is one of 'auto', True, False, 'int8', 'fp8', None, not 'int9'",
        ),
        ({"attention": {"*": 1}}, ValueError, "not 1"),
        ({"attention": {0: "int8"}}, TypeError, "attention: a pattern is a string"),
        ({"attention": {"re:(": "int8"}}, ValueError, "is not a regular expression"),
        ({"attention": {"*": True}, "crossover": 0}, ValueError, "crossover=0 is for attention in 8 bits"),
        ({"attention": {"*.layers.0.*": None, "*": "int8"}, "kv_cache": "int8"}, ValueError, "drop attention="),
    ]:
        with pytest.raises(error, match=words):
            fp.swap(model, **options)
    with pytest.raises(ValueError, match="attention of a plan is 'auto'"):
        fp.plan(model, [torch.randn(2, 9, 64)], max_error=1.0, attention={"*": "int8"})
    assert_same_objects(model, before)


@torch.inference_mode()
def test_code_that_calls_sdpa_itself():
    """Is swapped where it is asked for; by default it stays."""
    from small_models import VisionTransformer

    model, x = VisionTransformer().eval(), torch.randn(2, 3, 32, 32)
    expected, forwards = model(x), {n: m.forward for n, m in model.named_modules()}
    assert {s.reason.code for s in fp.swap(model, "int8", dry_run=True).skipped if s.fqn.endswith("attn")} == {
        "attention_on_cpu"
    }
    with fp.swap(model, **EVERYWHERE) as report, counted(Calls()) as calls:
        assert 0 < (model(x) - expected).norm() < 0.02 * expected.norm()
    assert {s.bits for s in report.attention} == {"int8"} and calls.kernel_calls == {"Attention in int8": 2}
    assert {n: m.forward for n, m in model.named_modules()} == forwards and torch.equal(model(x), expected)


def test_a_second_swap_is_refused():
    model = build("llama", ATTENTION)
    fp.swap(model, attention=True)
    with pytest.raises(RuntimeError, match=r"attention='int8' and kv_cache= belong to that call"):
        fp.swap(model, "int8", **EVERYWHERE)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_every_dtype_of_the_operation(dtype):
    """By the reference where no kernel has it, which a warning says."""
    model, inputs = build("llama", ATTENTION), batch("llama")
    expected = of_tokens(outputs(model, inputs), inputs)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fp.swap(model, attention=dtype, crossover=0)
    where = torch.device("cpu"), torch.float32, 32, 32
    assert bool(told) == (eight_bits.why_no_kernel(dtype, *where) is not None)
    with counted(Calls()) as calls:
        got = of_tokens(outputs(model, inputs), inputs)
    assert calls.kernel_calls == {f"LlamaAttention in {dtype}": 2}
    assert 0 < relative_error(got, expected) < 0.05
    q = torch.randn(1, 2, 40, 32)
    with fp.sdpa(dtype, crossover=0) as calls:
        F.scaled_dot_product_attention(q, q, q)
    assert calls.kernel_calls == {f"scaled_dot_product_attention in {dtype}": 1}
    q = torch.randn(1, 2, 300, 64)
    with fp.sdpa(dtype) as calls:  # where it is faster, and never by the reference
        F.scaled_dot_product_attention(q, q, q)
    if told:
        assert calls.kernel_calls == {"scaled_dot_product_attention": 1}


# ---- restore, copies, files, threads, graphs


def test_restore():
    for model, _ in models():
        before = objects(model)
        with fp.swap(model, "int8", **EVERYWHERE):
            assert len(swapped_in_8_bits(model)) == 2
        assert_same_objects(model, before)
        assert not swapped_in_8_bits(model)
        assert not any("bits" in vars(m) for m in model.modules())


def swapped_in_8_bits(model):
    from forwardpass.swap.attention.attention_modules import bits_of

    return bits_of(model)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@torch.inference_mode()
def test_copies(how):
    for model, inputs in models():
        fp.swap(model, **EVERYWHERE)
        expected = outputs(model, inputs)
        other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
        with counted(Calls()) as calls:
            assert torch.equal(outputs(other, inputs), expected)
        assert [(call.endswith(" in int8"), n) for call, n in calls.kernel_calls.items()] == [(True, 2)]


@pytest.mark.every(3)
def test_another_process_reads_a_pickle(tmp_path):
    model, inputs = build("mistral", ATTENTION), batch("mistral")
    fp.swap(model, **EVERYWHERE)
    torch.save((model, inputs, outputs(model, inputs)), tmp_path / "model.pt")
    code = """
import sys, torch
model, inputs, expected = torch.load(sys.argv[1], weights_only=False)
with torch.inference_mode():
    assert torch.equal(model(**inputs)[0], expected)
import forwardpass as fp
print(fp.call_counts())
"""
    done = fork.run(code, tmp_path / "model.pt")
    assert done.stdout.strip() == "2 x MistralAttention in int8: forwardpass", done.stderr


def test_a_place_of_an_earlier_version_is_read():
    """A pickle from before there were 8 bits has three parts of a module's place."""
    from forwardpass.integrations.transformers.attention import _place

    assert _place(True, "sdpa", None).bits is None


@pytest.mark.parametrize("which", ["encoder", "mistral"])
def test_plans(which, tmp_path):
    """Saved, read, and replayed: the same bits."""
    model, inputs = models()[which == "mistral"]
    report = fp.swap(model, "int8", **EVERYWHERE, exclude="1.self_attn")
    assert [(x.dtype, x.crossover) for x in report.plan.attention_8bit] == [("int8", 0)]
    expected = outputs(model, inputs)
    report.save_plan(str(tmp_path / "plan.json"))
    assert fp.Plan.load(tmp_path / "plan.json") == report.plan
    again = models()[which == "mistral"][0]
    assert fp.swap(again, plan=str(tmp_path / "plan.json")).plan == report.plan
    assert torch.equal(outputs(again, inputs), expected)
    content = json.loads((tmp_path / "plan.json").read_text())
    for change, words in [
        ({"dtype": "int9"}, "not 'int9'"),
        ({"crossover": -3}, "not -3"),
        ({"crossover": "0"}, "crossover is '0'"),
        ({"fqn": "nowhere"}, "nowhere is to compute in 8 bits, and is not among its attention"),
    ]:
        wrong = {**content, "attention_8bit": [{**content["attention_8bit"][0], **change}]}
        with pytest.raises(ValueError, match=words):
            fp.Plan.from_json(wrong)
    content.pop("attention_8bit")  # a plan of an earlier version
    assert fp.Plan.from_json(content).attention_8bit == ()


@pytest.mark.parametrize("which", ["encoder", "mistral"])
def test_checkpoints(which, tmp_path):
    """A folder keeps what was asked for, and one of an earlier version loads as before."""
    model, inputs = models()[which == "mistral"]
    fp.swap(model, "int8", attention="int8", crossover=3)
    expected = outputs(model, inputs)
    fp.save_pretrained(model, tmp_path)
    loaded = fp.load_pretrained(tmp_path, None if which == "mistral" else encoder())
    assert swapped_in_8_bits(loaded) == swapped_in_8_bits(model) != {}
    assert set(swapped_in_8_bits(loaded).values()) == {EightBits("int8", 3)}
    assert torch.equal(outputs(loaded, inputs), expected)
    record = json.loads((tmp_path / "forwardpass.json").read_text())
    wrong = [{**record["attention_8bit"][0], "dtype": "int9"}]
    (tmp_path / "forwardpass.json").write_text(json.dumps({**record, "attention_8bit": wrong}))
    with pytest.raises(ValueError, match="not 'int9'"):
        fp.load_pretrained(tmp_path, None if which == "mistral" else encoder())
    wrong = [{**record["attention_8bit"][0], "fqn": "nowhere"}]
    (tmp_path / "forwardpass.json").write_text(json.dumps({**record, "attention_8bit": wrong}))
    with pytest.raises(ValueError, match="nowhere is to compute in 8 bits, and is not among its attention"):
        fp.load_pretrained(tmp_path, None if which == "mistral" else encoder())
    del record["attention_8bit"]
    (tmp_path / "forwardpass.json").write_text(json.dumps(record))
    older = fp.load_pretrained(tmp_path, None if which == "mistral" else encoder())
    assert not swapped_in_8_bits(older)
    with counted(Calls()) as calls:
        outputs(older, inputs)
    assert [n for call, n in calls.kernel_calls.items() if "int8" not in call] == [2]


def test_transformers_reads_a_folder(tmp_path):
    """As config.json tells it, and the model below a head too."""
    transformers = pytest.importorskip("transformers")
    model, inputs = build("llama", ATTENTION), batch("llama")
    fp.swap(model, "int8", **EVERYWHERE)
    expected = outputs(model, inputs)
    fp.save_pretrained(model, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded, inputs), expected)
    assert len(swapped_in_8_bits(transformers.AutoModel.from_pretrained(tmp_path))) == 2


def test_from_pretrained_swaps_as_it_loads(tmp_path):
    transformers = pytest.importorskip("transformers")
    build("llama", ATTENTION).save_pretrained(tmp_path)
    config = fp.Config("int8", **EVERYWHERE)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert len(swapped_in_8_bits(model)) == 2
    assert {s.bits for s in fp.report(model).attention} == {"int8"}


@torch.inference_mode()
def test_two_threads():
    """One model, in both at once, and a block of fp.sdpa of each its own."""
    model, inputs = build("gemma2", ATTENTION), batch("gemma2")
    fp.swap(model, **EVERYWHERE)
    expected = outputs(model, inputs)
    q = torch.randn(1, 2, 40, 32)
    exact = F.scaled_dot_product_attention(q, q, q)
    got, errors = [], {}

    def run(attention):
        got.append(outputs(model, inputs))
        with fp.sdpa(attention, crossover=None if attention is True else 0), torch.inference_mode():
            errors[attention] = relative_error(F.scaled_dot_product_attention(q, q, q), exact)

    threads = [threading.Thread(target=run, args=(x,)) for x in (True, "int8")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 2 and all(torch.equal(y, expected) for y in got)
    assert errors[True] < 1e-5 < 1e-3 < errors["int8"]


@pytest.mark.every(3)
@pytest.mark.parametrize("name", in_turn(["llama", "mistral", "gemma2", "bert", "vit"]))
@torch.inference_mode()
def test_compiled(name):
    """Whole, and with shapes that are symbols."""
    model, inputs = build(name, ATTENTION), batch(name)
    fp.swap(model, **EVERYWHERE)
    expected = outputs(model, inputs)
    torch._dynamo.reset()
    with counted(Calls()) as calls:
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)[0]
    assert calls.kernel_calls and not calls.fallbacks and all(call.endswith(" in int8") for call in calls.kernel_calls)
    keep = inputs["attention_mask"].bool() if name != "vit" else slice(None)
    torch.testing.assert_close(got[keep], expected[keep], rtol=2e-3, atol=2e-3)


@pytest.mark.every(2)
@pytest.mark.usefixtures("vnni")
@pytest.mark.parametrize("dynamic", [False, True])
@torch.inference_mode()
def test_the_crossover_in_graphs(dynamic):
    """A graph is of one side of it: the other one has its own."""

    def within(q):
        with fp.sdpa("int8"):
            return F.scaled_dot_product_attention(q, q, q)

    torch._dynamo.reset()
    compiled = torch.compile(within, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (250, 260, 255, 256):
        q = torch.randn(1, 2, rows, 64)
        exact = F.scaled_dot_product_attention(q, q, q)
        assert (relative_error(compiled(q), exact) > 1e-3) == (rows >= 256)


def test_a_failure_half_way_leaves_the_model(monkeypatch):
    for model, _ in models():
        before = objects(model)
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["forwardpass.swap.originals"], "remember", lambda *a: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                fp.swap(model, "int8", **EVERYWHERE)
        assert_same_objects(model, before)
        assert not swapped_in_8_bits(model)
