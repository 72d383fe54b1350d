"""fp.swap and attention: what it decides, what it changes, and that all of it is in plans, checkpoints, copies and undone."""

import copy
import json
import pickle
import sys
import threading

import pytest
import torch
from processes import fork
from rotation import in_turn
from small_models import ATTENTION, assert_same_objects, batch, build, codes, names, objects, outputs
from torch import nn

import forwardpass as fp
from forwardpass.dispatch.calls import Calls, counted
from forwardpass.integrations.transformers import attention as huggingface


def encoder(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2).eval()


def padded():
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(9) >= torch.tensor([[9], [6]])


def sites(report):
    return [s.fqn for s in report.attention]


@pytest.mark.parametrize("options", [{}, {"norm_first": True, "activation": "gelu"}, {"bias": False}], ids=str)
@torch.no_grad()
def test_an_encoder_with_padding(options):
    """Its fast paths, which would make nested tensors and pass by the attention, are off; the linear layers may be swapped."""
    model, (x, padding) = encoder(**options), padded()
    causal = nn.Transformer.generate_square_subsequent_mask(9)
    calls_of = [
        {"src_key_padding_mask": padding},
        {},
        {"mask": causal},
        {"mask": causal, "src_key_padding_mask": padding},
    ]
    expected = [model(x, **given) for given in calls_of]
    nested = model.use_nested_tensor
    assert nested == ("bias" not in options and "norm_first" not in options)
    before = objects(model)
    report = fp.swap(model, attention=True)
    assert sites(report) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert not model.use_nested_tensor
    for given, y in zip(calls_of, expected):
        with counted(Calls()) as calls:
            got = model(x, **given)
        assert calls.kernel_calls == {"MultiheadAttention": 2} and not calls.fallbacks
        keep = ~padding if "src_key_padding_mask" in given else slice(None)  # torch's fast path makes padding 0
        torch.testing.assert_close(got[keep], y[keep], rtol=1e-4, atol=1e-5)
    fp.restore(model)
    assert model.use_nested_tensor == nested
    assert_same_objects(model, before)
    quantised = fp.swap(model, "int8", attention=True)
    layers = ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")
    assert names(quantised) == [f"layers.{i}.{layer}" for i in (0, 1) for layer in layers]
    got = model(x, src_key_padding_mask=padding)
    assert 0 < (got - expected[0])[~padding].norm() / expected[0][~padding].norm() < 0.03


@torch.inference_mode()
def test_a_decoder_layer():
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(64, 2, 128).eval()
    x, memory = torch.randn(5, 2, 64), torch.randn(7, 2, 64)
    given = {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(5), "tgt_is_causal": True,
             "memory_key_padding_mask": torch.arange(7) >= torch.tensor([[7], [4]])}  # fmt: skip
    expected = model(x, memory, **given)
    assert sites(fp.swap(model, attention=True)) == ["self_attn", "multihead_attn"]
    torch.testing.assert_close(model(x, memory, **given), expected, rtol=1e-4, atol=1e-5)


# ---- decisions


@pytest.fixture(params=["avx2", "baseline"])
def tier(request, monkeypatch):
    def faster_than_torch(device, dtype, head_dim, rows):
        return request.param == "avx2" and (rows >= 4 or dtype != torch.float32)

    monkeypatch.setattr(
        sys.modules["forwardpass.swap.attention.attention_modules"], "faster_than_torch", faster_than_torch
    )
    return request.param


@pytest.mark.every(2)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_cpu_is_left_alone_unless_asked(name, tier):
    """But for encoders, where there is AVX2, and decoders in 16 bits."""
    model = build(name, ATTENTION)
    modules = [n for n, m in model.named_modules() if n.endswith(("attention.self", "self_attn"))]
    assert len(modules) == 2
    report = fp.swap(model, "int8", dry_run=True)
    left = [s for s in report.skipped if s.reason.code == "attention_on_cpu"]
    if (name, tier) == ("bert", "avx2"):
        assert sites(report) == modules and not left
    else:
        assert not report.attention and [s.fqn for s in left] == modules
        assert "pass attention=True" in " ".join(str(report).split())
    fp.swap(model, "int8", strict=True, dry_run=True)
    named = fp.swap(model, "int8", include=[modules[1]], dry_run=True)  # spelled out, as for layers
    assert sites(named) == modules[1:]
    off = fp.swap(model, "int8", attention=False, dry_run=True)
    assert {codes(off)[n] for n in modules} == {"attention_off"}


@pytest.mark.usefixtures("tier")
@pytest.mark.parametrize("tier", ["avx2"], indirect=True)
@pytest.mark.parametrize(
    ("name", "dtype", "count"),
    [
        ("bert", torch.float32, 2),
        ("bert", torch.bfloat16, 2),
        ("llama", torch.float32, 0),
        ("llama", torch.float16, 2),
    ],
)
def test_a_cpu_gets_what_is_faster_there(name, dtype, count):
    """A decoder's steps have one row."""
    assert len(fp.swap(build(name, ATTENTION).to(dtype), "int8", dry_run=True).attention) == count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_gets_what_its_kernels_take(dtype):
    """Interpreted: `auto` swaps 16-bit models, and leaves float32 to torch."""
    for model, count in ((build("llama", ATTENTION), 2), (encoder(), 2)):
        model = model.to(dtype)
        with fp.interpret("sm_90a"):
            report = fp.swap(model, "w8a16", dry_run=True)
        if dtype == torch.bfloat16:
            assert len(report.attention) == count
        else:
            assert not report.attention
            assert list(codes(report).values()).count("dtype") == count
    narrow = build("llama", {"llama": (*ATTENTION["llama"][:2], {**ATTENTION["llama"][2], "head_dim": 12})}).bfloat16()
    with fp.interpret("sm_90a"):
        report = fp.swap(narrow, "w8a16", dry_run=True)
        assert codes(report)["model.layers.0.self_attn"] == "head_dim"
        with pytest.raises(fp.Unsupported, match=r"self_attn.*head dims"):
            fp.swap(narrow, "w8a16", strict=True)
    with fp.interpret("sm_90a"):  # which has another name for its head dim of 16
        report = fp.swap(build("bert").bfloat16(), "w8a16", dry_run=True)
        assert codes(report)["encoder.layer.0.attention.self"] == "head_dim"


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: nn.MultiheadAttention(64, 2, add_bias_kv=True), "extra_keys"),
        (lambda: nn.MultiheadAttention(64, 2, add_zero_attn=True), "extra_keys"),
        (lambda: nn.MultiheadAttention(64, 2, device="meta"), "meta"),
        (lambda: nn.MultiheadAttention(64, 2).double(), "dtype"),
        (lambda: type("Mine", (nn.MultiheadAttention,), {})(64, 2), "subclass"),
        (lambda: type("OddAttention", (nn.Module,), {})(), "own_attention"),
    ],
)
def test_reasons(make, code):
    model = nn.Sequential(nn.Linear(64, 64), make()).eval()
    report = fp.swap(model, "int8", attention=True, dry_run=True)
    assert codes(report)["1"] == code
    reason = next(s.reason for s in report.skipped if s.fqn == "1")
    assert reason.text and reason.fix and "\n" not in str(reason)
    with pytest.raises(fp.Unsupported, match="strict=True"):
        fp.swap(model, "int8", attention=True, strict=True)


def test_hooks_and_shared_modules_stay():
    shared = nn.MultiheadAttention(64, 2)
    hooked = nn.MultiheadAttention(64, 2)
    hooked.register_forward_hook(lambda *a: None)
    model = nn.ModuleList([shared, nn.ModuleList([shared]), hooked]).eval()
    with pytest.warns(UserWarning, match="no layer is swapped"):
        report = fp.swap(model, attention=True, dry_run=True)
    assert codes(report)["0"] == "shared"
    assert codes(report)["2"] == "hooks"


def test_attention_alone_and_wrong_choices():
    model = encoder()
    before = objects(model)
    assert set(codes(fp.swap(model, attention=True, dry_run=True)).values()) == {"no_precision"}
    for choice, words in [
        ("int4", "attention is one of"),
        ("yes", "attention is one of 'auto', True, False, 'int8'.*, not 'yes'"),
        (1, "attention is one of"),
        (None, "attention is one of"),
    ]:
        with pytest.raises(ValueError, match=words):
            fp.swap(model, "int8", attention=choice)
    with pytest.raises(ValueError, match="either precision= or plan="):
        fp.swap(model)
    assert_same_objects(model, before)


# ---- report, plan, parity


def test_report_and_plan():
    model, (x, padding) = encoder(), padded()
    report = fp.swap(model, "int8", attention=True, exclude="layers.1")
    assert "4 layers, 1 attention module swapped" in str(report)
    assert "layers.0.self_attn  MultiheadAttention  torch" in str(report)
    content = json.loads(json.dumps(report.to_json(), allow_nan=False))
    of_the_first = {"fqn": "layers.0.self_attn", "module": "MultiheadAttention", "before": "torch", "bits": None}
    assert content["attention"] == [of_the_first]
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
    again = encoder()
    replayed = fp.swap(again, plan=content["plan"])
    assert replayed.plan == report.plan
    assert sites(replayed) == ["layers.0.self_attn"]
    assert codes(replayed)["layers.1.self_attn"] == "not_planned"
    with torch.no_grad():
        assert torch.equal(again(x, src_key_padding_mask=padding), expected)
    plan = content["plan"]
    with pytest.raises(ValueError, match=r"another model .*no attention nowhere"):
        fp.swap(encoder(), plan={**plan, "attention": ["nowhere"]})
    with pytest.raises(ValueError, match=r"attention\.0 is"):
        fp.swap(encoder(), plan={**plan, "attention": [3]})
    with pytest.raises(ValueError, match="attention=True does not go with plan="):
        fp.swap(encoder(), plan=plan, attention=True)
    with pytest.warns(UserWarning, match="no layer is swapped"):
        assert not fp.swap(encoder(), plan={**plan, "attention": [], "layers": []}).attention
    plan.pop("attention")  # which every plan of this schema has
    with pytest.raises(ValueError, match=r"it has no attention"):
        fp.swap(encoder(), plan=plan)
    hooked = encoder()
    hooked.layers[0].self_attn.register_forward_hook(lambda *a: None)
    with pytest.raises(ValueError, match=r"names attention layers\.0\.self_attn, and hooks"):
        fp.swap(hooked, plan=report.plan)


@pytest.mark.parametrize("name", ["llama", "encoder"])
def test_parity_runs_the_attention_that_was_there(name):
    """And puts the swapped one back."""
    model, inputs = (encoder(), padded()[0]) if name == "encoder" else (build(name, ATTENTION), batch(name))
    model = model.requires_grad_(False)
    report = fp.swap(model, "int8", attention=True)
    after = objects(model)
    with counted(Calls()) as calls:
        found = fp.parity(model, [inputs])
    assert sum(calls.kernel_calls.values()) == len(report.attention)
    assert 0.999 < found.output.cosine_min < 1
    assert_same_objects(model, after)


@pytest.mark.parametrize("keep", ["auto", False])
def test_restore(keep):
    for model in (encoder(), build("llama", ATTENTION)):
        before = objects(model)
        fp.swap(model, "int8", attention=True, keep=keep)
        if keep:
            fp.restore(model)
            assert_same_objects(model, before)
        else:
            with pytest.raises(RuntimeError, match="keep=False"):
                fp.restore(model)


# ---- copies, files, threads, graphs


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@torch.inference_mode()
def test_copies(how):
    for model, inputs in (
        (encoder().requires_grad_(False), padded()[0]),
        (build("mistral", ATTENTION), batch("mistral")),
    ):
        fp.swap(model, attention=True)
        expected = outputs(model, inputs)
        other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
        with counted(Calls()) as calls:
            assert torch.equal(outputs(other, inputs), expected)
        assert sum(calls.kernel_calls.values()) == 2 and not calls.fallbacks
        with pytest.raises(RuntimeError, match="2 swapped layers and no originals"):
            fp.restore(other)
        fp.restore(model)


@pytest.mark.every(3)
def test_another_process_reads_a_pickle(tmp_path):
    """It has neither swapped nor asked transformers for anything yet."""
    model = build("mistral", ATTENTION)
    fp.swap(model, attention=True)
    inputs = batch("mistral")
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
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2 x MistralAttention: forwardpass"


@pytest.mark.every(2)
@pytest.mark.parametrize("name", ["encoder", "mistral", "t5"])
def test_checkpoints(name, tmp_path):
    model = encoder() if name == "encoder" else build(name, ATTENTION)
    inputs = padded()[0] if name == "encoder" else batch(name)
    report = fp.swap(model, "int8", attention=True, exclude="1.self_attn")
    expected = outputs(model, inputs)
    fp.save_pretrained(model, tmp_path)
    record = json.loads((tmp_path / "forwardpass.json").read_text())
    assert record["attention"] == sites(report)
    assert record["model"]["attention"] == (None if name == "encoder" else "sdpa")
    loaded = fp.load_pretrained(tmp_path, encoder() if name == "encoder" else None)
    with counted(Calls()) as calls:
        assert torch.equal(outputs(loaded, inputs), expected)
    assert sum(calls.kernel_calls.values()) == len(report.attention)
    if name != "encoder":
        assert loaded.config._attn_implementation == model.config._attn_implementation
    record["attention"] = ["nowhere"]
    (tmp_path / "forwardpass.json").write_text(json.dumps(record))
    target = encoder() if name == "encoder" else build(name, ATTENTION)
    before = objects(target)
    with pytest.raises(ValueError, match="has no attention nowhere"):
        fp.load_pretrained(tmp_path, target)
    assert_same_objects(target, before)
    del record["attention"]  # which every record of this schema has
    (tmp_path / "forwardpass.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="it has no attention"):
        fp.load_pretrained(tmp_path, target)
    assert_same_objects(target, before)


@torch.inference_mode()
def test_threads():
    model, inputs = build("gemma2", ATTENTION), batch("gemma2")
    fp.swap(model, attention=True)
    expected = outputs(model, inputs)
    got = []
    threads = [threading.Thread(target=lambda: got.append(outputs(model, inputs))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 4 and all(torch.equal(y, expected) for y in got)


@pytest.mark.every(3)
@pytest.mark.parametrize("name", in_turn(["llama", "mistral", "gemma2", "bert", "vit"]))
@torch.inference_mode()
def test_compiled(name):
    model, inputs = build(name, ATTENTION), batch(name)
    fp.swap(model, attention=True)
    expected = outputs(model, inputs)
    torch._dynamo.reset()
    with counted(Calls()) as calls:
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)[0]
    assert calls.kernel_calls and not calls.fallbacks
    keep = inputs["attention_mask"].bool() if name != "vit" else slice(None)
    torch.testing.assert_close(got[keep], expected[keep], rtol=1e-4, atol=1e-5)


def test_importing_does_not_import_transformers():
    code = "import sys, forwardpass as fp, torch.nn as nn; fp.swap(nn.Sequential(nn.Linear(64, 64)), 'int8'); " \
           "print('transformers' in sys.modules)"  # fmt: skip
    done = fork.run(code)
    assert done.stdout.strip() == "False", done.stderr


def test_a_failure_half_way_leaves_the_model(monkeypatch):
    for model in (encoder(), build("llama", ATTENTION)):
        before = objects(model)
        implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["forwardpass.swap.originals"], "remember", lambda *a: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                fp.swap(model, "int8", attention=True)
        assert_same_objects(model, before)
        assert getattr(getattr(model, "config", None), "_attn_implementation", None) == implementation
        assert not any(huggingface.PLACE in vars(m) for m in model.modules())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ATTENTION)
@torch.inference_mode()
def test_on_a_card(name):
    """Chosen without being asked for; off by no more than twice what eager attention is."""
    model = build(name, ATTENTION).cuda()
    model.set_attn_implementation("eager")
    inputs = {k: v.cuda() for k, v in batch(name).items()}
    exact = model(**inputs)[0]
    model = model.half()
    inputs = {k: v.half() if v.is_floating_point() else v for k, v in inputs.items()}
    expected = model(**inputs)[0]
    unasked = fp.swap(model, "w8a16", dry_run=True)
    assert unasked.attention and sites(unasked) == sites(fp.swap(model, attention=True))
    with counted(Calls()) as calls:
        got = model(**inputs)[0]
    assert calls.kernel_calls and not calls.fallbacks
    mask = inputs.get("attention_mask")
    keep = mask.bool() if mask is not None and got.shape[1] == mask.shape[1] else slice(None)
    own = (expected.float() - exact)[keep].abs().max()
    assert (got.float() - exact)[keep].abs().max() <= 2 * own
