"""swap: every Linear-like layer is replaced, or left with a reason; after an exception the model is as it was."""

import dataclasses
import threading
import warnings

import pytest
import torch
from processes import fork
from small_models import (
    CONFIGS,
    Block,
    assert_same_objects,
    batch,
    block,
    build,
    codes,
    names,
    objects,
    of_tokens,
    outputs,
)
from torch import nn
from torch.nn.utils import prune

import forwardpass as fp
from forwardpass.common.models.patterns import Pattern
from forwardpass.nn import QuantizedLinear
from forwardpass.nn.quantized_experts import is_experts
from forwardpass.swap import originals

#: About 1.5 times the worst of the models' relative errors, which is T5's.
OFF = {"int8": 0.018, "fp8": 0.08, "w8a16": 0.016, "bf16": 0.006}


@pytest.mark.every(2)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("precision", OFF)
def test_architectures(name, precision):
    model, inputs = build(name), batch(name)
    before = of_tokens(outputs(model, inputs), inputs)
    leaves = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    experts = {n for n, m in model.named_modules() if is_experts(m)}
    report = fp.swap(model, precision)
    after = of_tokens(outputs(model, inputs), inputs)
    attention = {n for n, c in codes(report).items() if c == "attention_on_cpu"}
    assert len(attention) + len(report.attention) >= 2
    assert set(names(report)) | set(codes(report)) - attention == leaves | experts
    assert experts <= set(names(report) if precision in ("int8", "fp8", "w8a16") else codes(report))
    assert not set(names(report)) & set(codes(report))
    assert len(names(report)) >= 4
    for swapped in (s for s in report.swapped if s.fqn not in experts):
        holder, _, part = swapped.fqn.rpartition(".")
        holder = model.get_submodule(holder)
        layer = holder.separate()[part] if isinstance(holder, fp.nn.MLP | fp.nn.GatedMLP) else getattr(holder, part)
        assert isinstance(layer, QuantizedLinear)
        assert (layer.in_features, layer.out_features) == (swapped.in_features, swapped.out_features)
    assert 0 < (after - before).norm() / before.norm() < OFF[precision]
    assert bool(experts) == (name == "mixtral")
    if name not in ("bert", "vit"):  # a head that makes logits, whatever it is called
        assert codes(report)["proj_out" if name == "whisper" else "lm_head"] == "lm_head"


@pytest.mark.every(2)
@pytest.mark.parametrize("precision", ["int8", "fp8", "bf16"])
def test_code_may_ask_for_the_dtype_of_a_weight(precision):
    assert "weight_read" not in codes(fp.swap(build("t5"), precision)).values()


@pytest.mark.parametrize("arch", ["sm_80", "sm_89"])
def test_fp8_asks_for_a_gpu_that_has_it(arch):
    model = block()
    before = objects(model)
    with fp.interpret(arch):
        if arch == "sm_80":
            with pytest.raises(fp.Unsupported, match=r'first.*sm_80.*precision="int8"'):
                fp.swap(model, "fp8", strict=True)
            for dry_run in (True, False):
                with pytest.warns(UserWarning, match="no layer is swapped"):
                    report = fp.swap(model, "fp8", dry_run=dry_run)
                assert codes(report) == {"first": "no_fp8", "second": "no_fp8", "head": "too_small"}
            assert_same_objects(model, before)
        else:
            assert names(fp.swap(model, "fp8")) == ["first", "second"]


def test_fp8_on_a_cpu_says_what_runs_it():
    with pytest.warns(
        UserWarning, match="fp8_linear has no kernel for float32 on cpu.*reference in float64.*slower than"
    ):
        report = fp.swap(block(), "fp8")
    assert [(s.precision, s.version) for s in report.swapped] == [("fp8", 1)] * 2


def test_weight_bytes():
    model = block()
    report = fp.swap(model, "int8")
    first, second, head = 64 * 128, 128 * 64, 64 * 3
    quantised = first + second + (128 + 64) * 8 + 128 * 4  # weights; scale and sum a row; bias
    before = 4 * (first + 128 + second + head + 3)
    b = report.weight_bytes
    assert b.before == before
    assert b.after == quantised + 4 * (head + 3) == sum(t.nbytes for t in model.state_dict().values())
    assert b.originals == 4 * (first + 128 + second)
    assert b.peak == before + quantised
    assert (b.originals_device, report.to_json()["weight_bytes"]["originals_device"]) == ("cpu", "cpu")


# ---- why a layer is left alone


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(64, 64)
        self.lm_head = nn.Linear(64, 100)


class Special(nn.Linear):
    pass


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(100, 64)
        self.out = nn.Linear(64, 100, bias=False)
        self.out.weight = self.embedding.weight


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(64, 64)
        self.shared_expert = nn.ModuleDict({"gate_proj": nn.Linear(64, 64)})
        self.experts = nn.ModuleList([nn.ModuleDict({"gate": nn.Linear(64, 64)})])


class Lora(nn.Module):
    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(64, 64)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(64, 64)})


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def forward(self, x):
        return nn.functional.linear(x, self.inner.weight) + self.inner.bias


def sequential(layer):
    return nn.Sequential(layer, nn.Linear(64, 64))


def changed(change):
    layer = nn.Linear(64, 64)
    with torch.no_grad():
        change(layer)
    return sequential(layer)


def shared():
    layer = nn.Linear(64, 64)
    return nn.Sequential(layer, nn.Sequential(layer), nn.Linear(64, 64))


def overlapping():
    memory, model = torch.randn(96, 64), nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[0].weight, model[1].weight = nn.Parameter(memory[:64]), nn.Parameter(memory[32:])
    return model


class Wrapped(torch.Tensor):
    pass


def hooked_encoder():
    layer = nn.TransformerEncoderLayer(64, 4, 64, batch_first=True)
    layer.self_attn.register_forward_hook(lambda *_: None)
    return layer


SKIPS = {
    "subclass": (lambda: sequential(Special(64, 64)), {"0": "subclass"}),
    "shared": (shared, {"0": "shared"}),
    "tied": (Tied, {"out": "tied"}),
    "overlapping": (overlapping, {"0": "tied", "1": "tied"}),
    "hooks": (lambda: changed(lambda m: m.register_forward_hook(lambda *a: None)), {"0": "hooks"}),
    "pre-hooks": (lambda: changed(lambda m: m.register_forward_pre_hook(lambda *a: None)), {"0": "hooks"}),
    "patched": (lambda: changed(lambda m: setattr(m, "forward", lambda x: x)), {"0": "hooks"}),
    "parametrize": (lambda: sequential(nn.utils.parametrizations.orthogonal(nn.Linear(64, 64))), {"0": "parametrized"}),
    "weight_norm": (lambda: changed(lambda m: nn.utils.parametrizations.weight_norm(m)), {"0": "parametrized"}),
    "pruning": (lambda: changed(lambda m: prune.l1_unstructured(m, "weight", 0.5)), {"0": "parametrized"}),
    "lora": (Lora, {"base_layer": "adapter", "lora_A.default": "adapter"}),
    "meta": (lambda: sequential(nn.Linear(64, 64, device="meta")), {"0": "meta"}),
    "too_small": (lambda: sequential(nn.Linear(64, 63)), {"0": "too_small"}),
    "nan": (lambda: changed(lambda m: m.weight[3, 5].fill_(float("nan"))), {"0": "not_finite"}),
    "inf bias": (lambda: changed(lambda m: m.bias[3].fill_(-float("inf"))), {"0": "not_finite"}),
    "float64": (lambda: sequential(nn.Linear(64, 64).double()), {"0": "dtype"}),
    "tensor class": (
        lambda: changed(lambda m: setattr(m, "weight", nn.Parameter(torch.randn(64, 64).as_subclass(Wrapped)))),
        {"0": "tensor_class"},
    ),
    "lm_head": (Head, {"lm_head": "lm_head"}),
    "moe_router": (Router, {"gate": "moe_router"}),
    "weight_read": (Reads, {"inner": "weight_read"}),
    "lazy": (lambda: sequential(nn.LazyLinear(64)), {"0": "uninitialized"}),
    "encoder": (lambda: nn.TransformerEncoderLayer(64, 4, 64), {"self_attn": "attention_on_cpu"}),
    "encoder, whose attention has to stay": (
        hooked_encoder,
        {
            "self_attn": "attention_on_cpu",
            "self_attn.in_proj": "hooks",
            "self_attn.out_proj": "weight_read",
            "linear1": "weight_read",
            "linear2": "weight_read",
        },
    ),
}


@pytest.mark.parametrize("case", SKIPS)
@pytest.mark.filterwarnings("ignore")
def test_skips(case):
    make, expected = SKIPS[case]
    report = fp.swap(make().eval(), "int8")
    assert codes(report) == expected
    for skipped in report.skipped:
        assert skipped.reason.text
        assert skipped.reason.fix
        assert "\n" not in str(skipped.reason)


def test_a_transformer_encoder_layer_runs_swapped_without_its_fast_path():
    layer = hooked_encoder().eval()
    x = torch.randn(2, 5, 64)
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        before = outputs(layer, x)
        assert names(fp.swap(layer, "int8")) == ["linear1", "linear2"]
        assert (outputs(layer, x) - before).norm() / before.norm() < 0.02
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def test_a_half_that_is_on_meta_stays():
    model = block()
    model.second = nn.Linear(128, 64, bias=False, device="meta")
    assert names(fp.swap(model, "int8")) == ["first"]


# ---- patterns


@pytest.mark.parametrize(
    ("pattern", "fqn", "matches"),
    [
        ("layer.1", "encoder.layer.1.output", True),
        ("layer.1", "encoder.layer.11.output", False),
        ("encoder", "encoder.layer.1", True),
        ("encoder", "my_encoder.layer.1", False),
        ("layer.*.output", "encoder.layer.1.output.dense", True),
        ("encoder.*.dense", "encoder.layer.1.output.dense", False),
        ("encoder.**.dense", "encoder.layer.1.output.dense", True),
        ("*", "encoder.layer.1", True),
        ("layer.[01]", "encoder.layer.1.x", True),
        ("layer.[!01]", "encoder.layer.1.x", False),
        ("q?", "a.q1", True),
        ("re:layer\\.(0|1)", "encoder.layer.1.x", True),
        ("re:layer\\.(0|1)", "encoder.layer.10.x", False),
        ("re:.*dense", "encoder.dense", True),
        ("a+b", "aab", False),
    ],
)
def test_patterns_match_whole_components(pattern, fqn, matches):
    assert Pattern(pattern).matches(fqn) is matches


def test_include_and_exclude():
    report = fp.swap(block(), "int8", include=["first", "second"], exclude="second")
    assert names(report) == ["first"]
    assert codes(report) == {"second": "excluded", "head": "not_included"}


def test_a_user_exclude_does_not_erase_the_default_skips():
    assert codes(fp.swap(Head().eval(), "int8", exclude="body")) == {"body": "excluded", "lm_head": "lm_head"}
    assert "lm_head" in codes(fp.swap(Head().eval(), "int8", include="*"))


def test_a_name_spelled_out_overrides_the_default_skips():
    assert names(fp.swap(Head().eval(), "int8", include=["*", "lm_head"])) == ["body", "lm_head"]
    assert names(fp.swap(Router().eval(), "int8", include="*.gate")) == [
        "experts.0.gate"
    ]  # a group, not this very layer
    assert "gate" in names(fp.swap(Router().eval(), "int8", include=["*", "gate"]))


def test_a_tied_head_that_is_spelled_out_gets_a_copy_of_its_own(tmp_path):
    model, ids = build("llama_tied"), batch("llama_tied")
    embedding, head = model.get_input_embeddings(), model.lm_head
    weight = embedding.weight
    assert head.weight is weight
    with torch.inference_mode():
        before, values = model(**ids).logits, weight.clone()
        report = fp.swap(model, "w8a16", include=["lm_head"])
        assert names(report) == ["lm_head"] and codes(report)["model.layers.0.mlp.up_proj"] == "not_included"
        assert model.get_input_embeddings().weight is weight and torch.equal(weight, values)
        copy, sizes = model.lm_head.qweight, report.weight_bytes
        assert type(model.lm_head) is fp.nn.W8A16Linear and copy.dtype == torch.int8
        assert (
            sizes.after - sizes.before == report.swapped[0].bytes_after > copy.numel()
        )  # the embedding's is still there
        assert sizes.originals == 0  # what is kept is the embedding's, too
        assert report.swapped[0].tied_to == "model.embed_tokens.weight"
        assert "lm_head has a copy of its own now, beside model.embed_tokens.weight" in " ".join(str(report).split())
        after = model(**ids).logits
        assert 0 < (after - before).norm() / before.norm() < 0.02
        fp.save_pretrained(model, tmp_path)
        assert torch.equal(fp.load_pretrained(tmp_path)(**ids).logits, after)
        fp.restore(model)
        assert model.lm_head is head and model.lm_head.weight is weight and torch.equal(model(**ids).logits, before)


def test_originals_that_are_moved_leave_what_the_model_still_has():
    head = build("llama_tied").lm_head
    with pytest.raises(RuntimeError, match="incompatible tensor type"):  # nothing is moved to where there are no values
        originals.Moved([head], torch.device("meta"))
    originals.Moved([head], torch.device("meta"), but=[head.weight])


def test_a_head_is_swapped_where_it_is_spelled_out():
    assert "lm_head" in names(fp.swap(build("llama"), "int8", include=["*", "lm_head"]))


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_a_warning(argument):
    with pytest.warns(UserWarning, match=f"{argument}='firts' matches none of the 3 Linear layers"):
        report = fp.swap(block(), "int8", **{argument: ["firts", "first"]})
    assert any("firts" in w for w in report.warnings)


# ---- refusals: one sentence, and the model untouched

REFUSALS = [
    (lambda m: fp.swap(m, "int4"), ValueError, "no precision 'int4': use one of 'int8' .* 'w8a16'"),
    (lambda m: fp.swap(m), ValueError, "neither was given"),
    (lambda m: fp.swap(m, "int8", {}), ValueError, "both were given"),
    (lambda m: fp.swap(m, "int8", keep="disk"), ValueError, "keep is one of"),
    (lambda m: fp.swap(m, "int8", keep=True), ValueError, "keep is one of"),
    (lambda m: fp.swap(m, "int8", exclude="re:("), ValueError, "not a regular expression"),
    (lambda m: fp.swap(m, "int8", exclude=[1]), TypeError, "exclude: a pattern is a string"),
    (lambda m: fp.swap(m, "int8", calibrate=[]), ValueError, "no batch"),
    (lambda m: fp.swap(m, "int8", calibrate=[1]), TypeError, "pass forward="),
    (lambda m: fp.swap(m, "w8a16", calibrate=[torch.ones(1, 64)]), ValueError, "takes no calibration"),
    (lambda m: fp.swap(m, plan="/nowhere/plan.json"), FileNotFoundError, "no plan at /nowhere/plan.json: write one"),
    (lambda m: fp.swap(m, plan=3), TypeError, "a Plan, a dict or a path"),
    (lambda m: fp.swap(lambda x: x, "int8"), TypeError, "takes a torch.nn.Module, not function"),
    (lambda m: fp.swap(nn.Linear(64, 64), "int8"), ValueError, "itself a Linear"),
    (lambda m: fp.swap(torch.jit.trace(m, torch.ones(1, 64)), "int8"), TypeError, "TorchScript"),
    (lambda m: fp.swap(Block().to("meta"), "int8"), ValueError, "on the meta device"),
    (lambda m: fp.restore(m), RuntimeError, "not swapped"),
    (lambda m: fp.save_pretrained(m, "/nowhere"), ValueError, "call fp.swap first"),
    (lambda m: fp.parity(m, []), ValueError, "call fp.swap first"),
]


@pytest.mark.parametrize("case", range(len(REFUSALS)))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_refusals(case):
    call, error, words = REFUSALS[case]
    model = block()
    before = objects(model)
    with pytest.raises(error, match=words) as e:
        call(model)
    assert "\n" not in str(e.value)
    assert_same_objects(model, before)


def test_a_swapped_model_refuses_gradients():
    model = block()
    fp.swap(model, "int8")
    with pytest.raises(RuntimeError, match="inference_mode"):
        model(torch.ones(1, 64, requires_grad=True))


def test_strict():
    model = changed(lambda m: m.register_forward_hook(lambda *a: None)).eval()
    before = objects(model)
    with pytest.raises(fp.Unsupported, match="would skip 0: hooks are registered") as e:
        fp.swap(model, "int8", strict=True)
    assert e.value.reasons["0"].code == "hooks"
    assert_same_objects(model, before)
    assert names(fp.swap(model, "int8", strict=True, exclude="0")) == ["1"]
    assert codes(fp.swap(Head().eval(), "int8", strict=True)) == {"lm_head": "lm_head"}


@pytest.mark.parametrize("calibrate", [None, [torch.randn(64, 64)]])
def test_dry_run_reports_the_same_and_changes_nothing(calibrate):
    model = block()
    before = objects(model)
    dry = fp.swap(model, "int8", dry_run=True, calibrate=calibrate)
    assert_same_objects(model, before)
    report = fp.swap(model, "int8", calibrate=calibrate)
    dry.dry_run = False
    dry.plan = dataclasses.replace(
        dry.plan, calibration=report.plan.calibration
    )  # which is of batches that it did not read
    assert dry == report
    with fp.swap(block(), "int8", dry_run=True):  # nothing to restore on exit
        pass


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["build", "install", "keep"])
def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch, error, where):
    model = nn.Sequential(block(), block()).eval()
    before = objects(model)

    def fail_at(count, real):
        calls = iter(range(1000))

        def call(*args, **kwargs):
            if next(calls) == count:
                raise error("here")
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as m:
        if where == "build":
            m.setattr(fp.nn.Int8Linear, "from_torch", fail_at(3, fp.nn.Int8Linear.from_torch))
        elif where == "install":
            m.setattr(fp.swap.__globals__["originals"], "remember", fail_at(0, None))
        else:
            m.setattr(fp.swap.__globals__["originals"].Moved, "add", fail_at(2, lambda *a: None))
        with pytest.raises(error, match="here"):
            fp.swap(model, "int8", keep="cpu")
    assert_same_objects(model, before)
    assert len(fp.swap(model, "int8").swapped) == 4


def test_a_model_that_changes_meanwhile_is_not_touched():
    model = block()

    def forward(model, batch):
        result = model(batch)
        model.second = nn.Linear(128, 64)
        return result

    with pytest.raises(RuntimeError, match="second is no longer the Linear"):
        fp.swap(model, "int8", calibrate=[torch.randn(2, 64)], forward=forward)
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())


def test_training_mode_is_a_warning():
    with pytest.warns(UserWarning, match=r"call model.eval\(\)"):
        fp.swap(block().train(), "int8")


def test_warnings_as_errors_leave_the_model_as_it_was():
    model = block().train()
    before = objects(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="training mode"):
            fp.swap(model, "int8")
    assert_same_objects(model, before)


def test_what_users_set_on_a_layer_is_on_its_replacement():
    model = block()
    model.first.tag = "mine"
    model.first.train()
    fp.swap(model, "int8")
    assert model.first.tag == "mine"
    assert model.first.training
    assert not model.second.training


# ---- where models run


def test_under_compile():
    model, x = block(), torch.randn(3, 64)
    exact = outputs(model, x)
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.allclose(outputs(compiled, x), exact)
    with fp.swap(compiled, "int8") as report:
        assert names(report) == ["first", "second"]
        assert not torch.equal(outputs(model, x), exact)
        assert torch.equal(outputs(compiled, x), outputs(model, x))
        assert torch.equal(outputs(torch.compile(model, backend="aot_eager", fullgraph=True), x), outputs(model, x))
    assert torch.allclose(outputs(compiled, x), exact)
    assert torch.equal(outputs(model, x), exact)


def test_in_threads():
    model, x = block(), torch.randn(3, 64)
    exact = outputs(model, x)
    results, errors = [], []
    start = threading.Barrier(4)

    def swap():
        start.wait()
        try:
            results.append(fp.swap(model, "int8"))
        except RuntimeError as e:
            errors.append(str(e))

    threads = [threading.Thread(target=swap) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 1
    assert len(errors) == 3
    swapped = outputs(model, x)
    seen = []
    threads = [threading.Thread(target=lambda: seen.extend(outputs(model, x) for _ in range(20))) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(seen) == 80
    assert all(torch.equal(s, swapped) for s in seen)
    fp.restore(model)
    assert torch.equal(outputs(model, x), exact)


@pytest.mark.every(2)
def test_after_fork():
    script = """
import os, torch
from small_models import block, outputs
import forwardpass as fp
torch.set_num_threads(1)
model, x = block(), torch.randn(3, 64)
exact = outputs(model, x)
fp.swap(model, "int8")
swapped = outputs(model, x)
if (child := os.fork()) == 0:
    same = torch.equal(outputs(model, x), swapped)
    fp.restore(model)
    os._exit(0 if same and torch.equal(outputs(model, x), exact) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(outputs(model, x), swapped)
"""
    done = fork.run(script)
    assert done.returncode == 0, done.stderr


def test_a_device_without_kernels_is_said(monkeypatch):
    reason = fp.types.Reason("device", "no kernel", "")
    monkeypatch.setattr(
        fp.dispatch.operations["int8_linear"], "why_not_on", lambda b, *_: None if b == "reference" else reason
    )
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    with pytest.warns(UserWarning, match="int8_linear has no kernel for float32 on cpu"):
        report = fp.swap(model, precision="int8")
    assert any("plain-torch reference" in note for note in report.warnings)
