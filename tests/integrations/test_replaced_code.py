"""Classes of transformers whose code somebody replaces, as Liger and Unsloth do: what was read of their files no longer counts."""

import importlib
import inspect
import textwrap
import types

import pytest
import torch
from small_models import ATTENTION, assert_same_objects, batch, build, objects, outputs

import forwardpass as fp

transformers = pytest.importorskip("transformers")
STEPS = 5


def modeling(name):
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def logits_of_steps(model):
    """What each step of a generation gives, by a cache."""
    result = model.generate(batch("llama")["input_ids"], max_new_tokens=STEPS, do_sample=False, eos_token_id=None,
                            disable_compile=True, return_dict_in_generate=True, output_logits=True)  # fmt: skip
    return torch.stack(result.logits)


def halved(forward):
    return lambda self, x: forward(self, x) / 2


def other_rotation(rotate):
    def other(q, k, cos, sin, unsqueeze_dim=1):
        q, k = rotate(q, k, cos, sin, unsqueeze_dim)
        return q / 2, k

    return other


def halved_rotation(q, k, cos, sin, unsqueeze_dim=1):
    """Of no other names than those of the module that it is put into."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return (q * cos + rotate_half(q) * sin) / 2, k * cos + rotate_half(k) * sin  # noqa: F821


def forward_with_halved_queries(module):
    """That of attention, with a statement more behind the rotation."""
    source = textwrap.dedent(inspect.getsource(module.Qwen3Attention.forward))
    call = "query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)\n"
    assert call in source
    names = {}
    exec(source.replace(call, f"{call}    query_states = query_states / 2\n"), vars(module), names)
    return names["forward"]


#: What is replaced, and how a warning names it.
REPLACED = {
    "norm": None,
    "rotation": "apply_rotary_pos_emb",
    "code of the rotation": "apply_rotary_pos_emb",
    "half of the rotation": "rotate_half",
    "forward of attention": "Qwen3Attention.forward",
    "forward of one layer's attention": "the forward of a Qwen3Attention",
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", REPLACED)
@pytest.mark.filterwarnings("ignore:swap")
@torch.inference_mode()
def test_steps_do_what_the_code_does_now(what, when, monkeypatch):
    """.36 to 1.29 off, in silence: a patch counted at prefill and was ignored at every step of decode."""
    module = modeling("qwen3")

    def replace():
        if what == "norm":
            monkeypatch.setattr(module.Qwen3RMSNorm, "forward", halved(module.Qwen3RMSNorm.forward))
        elif what == "forward of attention":
            monkeypatch.setattr(module.Qwen3Attention, "forward", forward_with_halved_queries(module))
        elif what == "forward of one layer's attention":
            for m in (model, plain):
                attention = m.model.layers[1].self_attn
                attention.forward = types.MethodType(forward_with_halved_queries(module), attention)
        elif what == "rotation":
            monkeypatch.setattr(module, "apply_rotary_pos_emb", other_rotation(module.apply_rotary_pos_emb))
        elif what == "half of the rotation":
            monkeypatch.setattr(module, "rotate_half", lambda x: x / 2)
        else:
            rotation = getattr(module.apply_rotary_pos_emb, "__wrapped__", module.apply_rotary_pos_emb)
            monkeypatch.setattr(rotation, "__code__", halved_rotation.__code__)

    model, plain = build("qwen3", ATTENTION), build("qwen3", ATTENTION)
    plain.load_state_dict(model.state_dict())
    original = logits_of_steps(plain)
    if when == "before":
        replace()
    fp.swap(model, attention=True, kv_cache="auto")
    if when == "after":
        replace()
        importlib.import_module("forwardpass.common.printing.quiet").warn_once.cache_clear()
        if name := REPLACED[what]:
            with pytest.warns(UserWarning, match=f"{name} is another function than at the swap"):
                logits_of_steps(model)
    expected = logits_of_steps(plain)
    assert not torch.allclose(expected, original, atol=1e-3)
    torch.testing.assert_close(logits_of_steps(model), expected, rtol=1e-4, atol=1e-4)


def without_patches(monkeypatch):
    """Models of other tests may be about."""
    module, patches = modeling("qwen3"), importlib.import_module("forwardpass.integrations.patches")
    for owner, name in ((module, "apply_rotary_pos_emb"), (module.Qwen3RMSNorm, "forward")):
        monkeypatch.setattr(owner, name, patches.below(owner, name))
    monkeypatch.setattr(patches, "_patches", {})


def interleaved(monkeypatch):
    rotary = importlib.import_module("forwardpass.integrations.transformers.rotary")
    monkeypatch.setattr(rotary, "_rotation", lambda tree: rotary.Rotation(True))


def larger_epsilon(monkeypatch):
    norms = importlib.import_module("forwardpass.integrations.transformers.head_norms")
    weights = norms.weights
    monkeypatch.setattr(norms, "weights", lambda *args: (*weights(*args)[:2], 0.1))


def nothing_to_run(monkeypatch):
    monkeypatch.setattr(importlib.import_module("forwardpass.proofs.inputs"), "made_up", lambda model: [])


@pytest.mark.parametrize(
    ("mistake", "code"),
    [(interleaved, "disproved"), (larger_epsilon, "disproved"), (nothing_to_run, "unproven")],
)
@torch.inference_mode()
def test_steps_that_were_misread(mistake, code, monkeypatch):
    """Was believed: logits of steps were off by .3 to 1.2."""
    model, plain = build("qwen3", ATTENTION), build("qwen3", ATTENTION)
    plain.load_state_dict(model.state_dict())
    expected = logits_of_steps(plain)
    without_patches(monkeypatch)
    mistake(monkeypatch)
    report = fp.swap(model, attention=True, kv_cache="auto")
    assert {s.fqn: s.reason.code for s in report.apart} == {f"model.layers.{i}.self_attn": code for i in range(2)}
    assert code in str(report)
    torch.testing.assert_close(logits_of_steps(model), expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_cache_that_gives_something_else_is_refused(monkeypatch):
    cache = importlib.import_module("forwardpass.integrations.transformers.cache")
    between = cache._Stored.between
    monkeypatch.setattr(cache._Stored, "between", lambda *args: [2 * x for x in between(*args)])
    model = build("qwen3", ATTENTION)
    before = objects(model)
    with pytest.raises(
        ValueError, match=r"kv_cache='int8' does not go with this Qwen3ForCausalLM, as run so, .*: drop it"
    ):
        fp.swap(model, "w8a16", include="**", attention=True, kv_cache="int8")
    assert_same_objects(model, before)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.every(2)
@pytest.mark.parametrize("name", ATTENTION)
def test_what_is_as_it_reads_is_made(name):
    """At prefill and at a step, with padding on the left, in floats."""
    kv_cache = None if name in ("bert", "vit") else "auto"
    model = build(name, ATTENTION)
    report = fp.swap(model, "w8a16", include="**", attention=True, kv_cache=kv_cache)
    assert not {"disproved", "unproven"} & {s.reason.code for s in (*report.apart, *report.skipped)}
    assert report.attention and report.kv_cache == kv_cache


@torch.inference_mode()
def test_restoring_the_last_model_takes_our_functions_out(monkeypatch):
    module = modeling("qwen3")
    without_patches(monkeypatch)
    before = module.apply_rotary_pos_emb, module.Qwen3RMSNorm.forward
    first, second = build("qwen3", ATTENTION), build("qwen3", ATTENTION)
    for model in (first, second):
        fp.swap(model, attention=True, kv_cache="auto")
    assert module.apply_rotary_pos_emb is not before[0] and module.Qwen3RMSNorm.forward is not before[1]
    fp.restore(first)
    assert module.apply_rotary_pos_emb is not before[0]
    fp.restore(second)
    assert (module.apply_rotary_pos_emb, module.Qwen3RMSNorm.forward) == before


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("cls", ["BertLayer", "BertOutput"])
@torch.inference_mode()
def test_encoders_without_padding(cls, when, monkeypatch):
    """Shorter texts were off by .27 to .42: what a layer computes over all rows of a batch saw other rows."""
    owner = getattr(modeling("bert"), cls)
    forward = owner.forward

    def over_rows(self, x, *args, **kwargs):
        y = forward(self, x, *args, **kwargs)
        return y - y.mean(1, keepdim=True)

    model = build("bert")
    x = batch("bert")
    x["attention_mask"] = torch.ones_like(x["input_ids"])
    x["attention_mask"][0, x["input_ids"].shape[1] // 2 :] = 0
    tokens = x["attention_mask"].bool()
    if when == "before":
        monkeypatch.setattr(owner, "forward", over_rows)
    report = fp.swap(model, "w8a16", include="**", attention=True, unpad=True)
    assert bool(report.unpadding.encoders) is (when == "after")
    if when == "after":
        monkeypatch.setattr(owner, "forward", over_rows)
        with pytest.warns(UserWarning, match=f"the code of {cls} is another than at the swap"):
            y = outputs(model, x)
    else:
        assert report.unpadding.reason.code == "replaced" and cls in report.unpadding.reason.text
        y = outputs(model, x)
    fp.restore(model)
    fp.swap(model, "w8a16", include="**", attention=True, unpad=False)
    torch.testing.assert_close(y[tokens], outputs(model, x)[tokens], rtol=1e-4, atol=1e-5)
