"""parity: errors that are known beforehand come out; the kernel's error is apart; the model is as it was."""

import json
import math

import pytest
import torch
from small_models import CONFIGS, assert_same_objects, batch, block, build, objects, outputs
from torch import nn

import forwardpass as fp
from forwardpass.planning import plan_plots as plots
from forwardpass.planning.agreement import CausalLm, Classification, Embedding
from forwardpass.planning.criterion import Criterion
from forwardpass.planning.parity import Comparison, LayerParity, ParityReport
from forwardpass.swap import originals


@pytest.mark.every(2)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("precision", ["int8", "fp8", "w8a16", "bf16"])
def test_architectures(name, precision):
    model, batches = build(name), [batch(name, 1), batch(name, 2)]
    exact = [outputs(model, b) for b in batches]
    fp.swap(model, precision)
    before = objects(model)
    report = fp.parity(model, batches)
    assert_same_objects(model, before)
    assert report.batches == 2
    assert report.output.samples == 4
    assert 0.99 < report.output.cosine_min < 1
    fp8 = precision == "fp8"  # 3 bits of significand, twice
    assert 0 < report.output.relative_error < (0.08 if fp8 else 0.05)
    if "attention_mask" not in batches[0]:
        got = [outputs(model, b) for b in batches]
        assert report.output.relative_error == pytest.approx(
            max(float((g - e).norm() / e.norm()) for g, e in zip(got, exact)), rel=1e-4
        )
        assert report.output.max_abs_error == pytest.approx(
            max(float((g - e).abs().max()) for g, e in zip(got, exact)), rel=1e-4
        )
    for layer in report.layers:
        assert layer.total.samples
        assert layer.kernel.relative_error < (
            2**-8 if precision == "bf16" else 1e-6
        )  # its product is rounded to bfloat16
        module = model.get_submodule(layer.fqn)
        several = (
            2 if isinstance(module, fp.nn.MLP | fp.nn.GatedMLP | fp.nn.Experts) else 1
        )  # layers, whose errors add up
        assert 1e-4 < layer.quantisation.relative_error < several * (0.05 if fp8 else 0.03)
        apart = math.hypot(layer.quantisation.relative_error, layer.kernel.relative_error)
        assert layer.total.relative_error == pytest.approx(apart, rel=0.1 if precision == "bf16" else 1e-2)


@pytest.mark.parametrize("kind", ["static", "static symmetric", "symmetric", "smoothed", "16 bits"])
def test_the_kernel_error_is_apart_in_every_form_of_the_layer(kind):
    model, x = block(), torch.randn(9, 64)
    fp.swap(model, "int8")
    swapped, original = model.first, originals.find(model).layers[0].original
    options = {"input_scale": torch.tensor([0.04])} if "static" in kind else {}
    if kind == "static":
        options["input_zero_point"] = torch.tensor([-3], dtype=torch.int32)
    if kind == "smoothed":
        options["channel_scale"] = torch.rand(64) + 0.5
    model.first = swapped.from_torch(original, symmetric="symmetric" in kind, **options)
    if kind == "16 bits":
        model.half()
        x = x.half()
        report = fp.parity(model, [x], reference=block().half())
        assert report.layers[0].kernel.relative_error < 5e-4
    else:
        report = fp.parity(model, [x], reference=block())
        assert report.layers[0].kernel.relative_error < 1e-6
    assert 1e-3 < report.layers[0].quantisation.relative_error < 0.05


def test_a_wrong_kernel_shows_as_kernel_error():
    model, x = block(), torch.randn(9, 64)
    fp.swap(model, "int8")
    good = fp.parity(model, [x])
    real = type(model.first).forward
    model.first.forward = lambda x: real(model.first, x) * 1.01
    bad = fp.parity(model, [x])
    assert good.layers[0].kernel.relative_error < 1e-6
    assert bad.layers[0].kernel.relative_error == pytest.approx(0.01, rel=1e-3)
    assert bad.layers[0].quantisation.relative_error == good.layers[0].quantisation.relative_error
    assert bad.layers[1].kernel.relative_error < 1e-6


def test_a_wrong_weight_shows_as_quantisation_error():
    model, x = block(), torch.randn(9, 64)
    fp.swap(model, "int8")
    model.first.weight_scale *= 1.05
    bad = fp.parity(model, [x])
    assert bad.layers[0].kernel.relative_error < 1e-6
    assert bad.layers[0].quantisation.relative_error == pytest.approx(0.05, rel=0.1)


def test_a_reference_gives_the_same():
    model, x = block(), torch.randn(9, 64)
    fp.swap(model, "int8")
    kept, given = fp.parity(model, [x]), fp.parity(model, [x], block())
    assert kept.to_json() == given.to_json()


def test_without_originals_a_reference_is_needed(tmp_path):
    model, x = block(), torch.randn(9, 64)
    fp.swap(model, "int8", keep=False)
    with pytest.raises(
        ValueError, match="swapped with keep=False and has no originals to compare with: pass reference="
    ):
        fp.parity(model, [x])
    assert fp.parity(model, [x], block()).output.samples == 9
    fp.save_pretrained(model, tmp_path)
    loaded = fp.load_pretrained(tmp_path, model=block())
    with pytest.raises(ValueError, match="was loaded or copied"):
        fp.parity(loaded, [x])
    with pytest.raises(ValueError, match="the reference is itself swapped"):
        fp.parity(loaded, [x], model)
    with pytest.raises(ValueError, match="the reference has no layer first"):
        fp.parity(loaded, [x], nn.Sequential(block()))


def test_padding_is_left_out():
    model, inputs = build("bert"), batch("bert")
    fp.swap(model, "int8")
    a = fp.parity(model, [inputs])
    inputs["input_ids"][inputs["attention_mask"] == 0] = 77
    b = fp.parity(model, [inputs])
    assert a.to_json() == b.to_json()
    assert {x.total.samples for x in a.layers if "pooler" not in x.fqn} == {16}
    del inputs["attention_mask"]
    assert {x.total.samples for x in fp.parity(model, [inputs]).layers if "pooler" not in x.fqn} == {20}


def test_batches_and_outputs():
    model, x = block(), torch.randn(6, 64)
    fp.swap(model, "int8")
    expected = fp.parity(model, [x]).to_json()
    for batches in ([(x,)], [[x]], [{"x": x}], iter([x])):
        assert fp.parity(model, batches).to_json() == expected
    assert fp.parity(model, [3], forward=lambda m, b: m(x)).to_json() == expected
    half = fp.parity(model, [x], output=lambda y: y[:3])
    assert half.output.samples == 3
    assert fp.parity(model, [x], output=lambda y: y.sum()).output.samples == 1
    with pytest.raises(TypeError, match="pass forward="):
        fp.parity(model, [3])
    with pytest.raises(TypeError, match="pass output="):
        fp.parity(model, [3], forward=lambda m, b: "text")
    with pytest.raises(ValueError, match="no batch"):
        fp.parity(model, [])


def test_flags_and_hooks_are_put_back_after_an_error():
    model = block()
    fp.swap(model, "int8")
    model.first.train()
    before, calls = objects(model), []

    def forward(model, batch):
        model(batch)
        calls.append(type(model.first))
        if len(calls) == 2:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fp.parity(model, [torch.randn(2, 64)], forward=forward, output=lambda r: torch.ones(1))
    assert calls == [fp.nn.Int8Linear, nn.Linear]
    assert_same_objects(model, before)
    assert model.first.training
    assert not any(m._forward_hooks for m in model.modules())


def test_originals_that_wait_elsewhere_visit_one_at_a_time(monkeypatch):
    model, x = block(), torch.randn(5, 64)
    fp.swap(model, "int8")
    expected = fp.parity(model, [x]).to_json()
    kept = {id(layer.original) for layer in originals.find(model).layers}
    away, most = set(), []

    class Counted(originals.Moved):
        def add(self, module, device):
            assert id(module) in kept
            away.add(module)
            most.append(len(away))

        def undo(self):
            away.clear()

    monkeypatch.setattr(
        "forwardpass.planning.parity.device_of", lambda m: torch.device("meta" if id(m) in kept else "cpu")
    )
    monkeypatch.setattr(originals, "Moved", Counted)
    assert fp.parity(model, [x]).to_json() == expected
    assert most == [1] * 4  # two layers, compared and then in place
    assert not away
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_compiled_model():
    model, x = block(), torch.randn(5, 64)
    compiled = torch.compile(model, backend="aot_eager")
    fp.swap(compiled, "int8")
    outputs(compiled, x)
    expected = fp.parity(model, [x]).to_json()
    assert fp.parity(compiled, [x]).to_json() == expected
    model.compile(backend="aot_eager")
    assert fp.parity(model, [x]).to_json() == expected


def test_layers_that_no_batch_reaches():
    model, x = block(), torch.randn(5, 64)
    model.unused = nn.Linear(64, 64)
    fp.swap(model, "int8")
    report = fp.parity(model, [x])
    assert report.layers[-1].total.samples == 0
    assert report.to_json()["layers"][-1]["cosine_min"] is None
    assert ["unused", "int8", "-", "-", "-", "-", "-"] in [line.split() for line in str(report).splitlines()]
    assert report.unreached == report.to_json()["unreached"] == ["unused"]
    assert report.worst_first()[0].fqn == "unused"
    assert "not compared: no batch reached 1 of 3 swapped layers (unused)" in " ".join(str(report).split())


def test_the_report_in_words_and_in_json():
    model = block()
    fp.swap(model, "int8")
    report = fp.parity(model, [torch.randn(5, 64)])
    content = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert content["schema"] == "forwardpass.parity/1"
    assert content["cosine_min"] == report.output.cosine_min
    assert content["layers"][0]["fqn"] == "first"
    assert str(report).startswith("output over 5 samples in 1 batch: lowest cosine 0.99")


def test_worst_first_goes_by_a_wrong_row_and_by_a_wrong_scale():
    found = {
        "many small": (0.9995, 0.05),
        "a wrong row": (0.82, 0.02),
        "a wrong scale": (1.0, 0.3),
        "the best": (0.9999, 0.01),
    }
    layers = [
        LayerParity(name, "int8", Comparison(3000, *x, 1.0), Comparison(), Comparison()) for name, x in found.items()
    ]
    report = ParityReport(Comparison(3000, 0.99, 1e-2, 1.0), layers, 1, "cpu")
    assert [x.fqn for x in report.worst_first()] == ["a wrong row", "a wrong scale", "many small", "the best"]
    assert "worst first: by the relative error of a batch, or by that of a row" in " ".join(str(report).split())


def test_a_batch_alone_is_no_iterable_of_batches():
    model, x = block(), torch.randn(5, 64)
    fp.swap(model, "int8")
    for alone in (x, {"x": x}, "x", 3):
        kind = type(alone).__name__
        with pytest.raises(TypeError, match=rf"batches is an iterable of batches, not a {kind}: pass \[batch\]"):
            fp.parity(model, alone)
    assert fp.parity(model, iter([x])).batches == 1


def test_the_report_fits_whatever_layers_are_called():
    names = [f"encoder.layer.{i}.{part}" for i in range(6) for part in ("attention.self.key", "attention.output.dense")]
    names.append(f"vision_model.{'backbone.' * 12}proj")
    layers = [LayerParity(name, "int8", *(Comparison(3000, 0.99, 1e-2, 12.5) for _ in range(3))) for name in names]
    text = str(ParityReport(Comparison(288, 0.99, 1e-2, 1e-1), layers, 9, "cpu", task="embedding",
                            agreement={f"a_measure_with_a_long_name_{i}": 0.123456789 for i in range(5)}))  # fmt: skip
    assert max(map(len, text.splitlines())) <= 100
    assert all(name in text for name in names[:-1]) and names[-1][-20:] in text


def test_plots_say_why_there_is_nothing_in_them(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    file = tmp_path / "parity.svg"
    exact = LayerParity("a", "int8", *(Comparison(1, 1.0) for _ in range(3)))
    for layer, words in ((LayerParity("a", "int8"), "no layer has a finite error"), (exact, "no layer has an error")):
        with matplotlib.rc_context({"svg.fonttype": "none"}):
            plots.parity([layer], str(file))
        assert words in file.read_text()


def test_comparison():
    c = Comparison()
    c.add(torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[1.0, 0], [2, 0]]))
    assert c.cosine_min == 0
    assert c.relative_error == pytest.approx(math.sqrt(8 / 5))
    assert c.max_abs_error == 2
    c.add(torch.tensor([[-1.0, 0]]), torch.tensor([[1.0, 0]]))
    assert c.cosine_min == -1
    assert c.relative_error == 2
    assert c.samples == 3
    c = Comparison()
    c.add(torch.zeros(2, 3), torch.zeros(2, 3))
    assert (c.cosine_min, c.relative_error, c.max_abs_error) == (1, 0, 0)
    c.add(torch.ones(1, 3), torch.zeros(1, 3))
    assert (c.cosine_min, c.relative_error) == (0, math.inf)
    c.add(torch.full((1, 3), float("nan")), torch.zeros(1, 3))
    assert all(math.isnan(v) for v in (c.cosine_min, c.relative_error, c.max_abs_error, c.norm_error))
    assert c.to_json() == {
        "samples": 4,
        **dict.fromkeys(("cosine_min", "relative_error", "max_abs_error", "norm_error")),
    }


def test_a_scale_that_is_wrong_shows():
    """It does in no cosine."""
    x = torch.randn(4, 64, dtype=torch.float64)
    c = Comparison()
    c.add(torch.cat((1.1 * x[:1], x[1:])), x)
    assert c.cosine_min == pytest.approx(1) and c.norm_error == pytest.approx(0.1)
    criterion = Criterion("min_cosine", 0.999)
    for scale, fails in ((1.04, False), (0.96, False), (1.05, True), (0.95, True)):
        errors = criterion.additive(scale * x, x, None)
        assert errors.max() == pytest.approx((scale - 1) ** 2 / 2)
        assert criterion.fails(criterion.worst(errors, scale * x, x, None)) is fails


def causal(scale):
    """Logits that favour the next token in a cycle of 8, the more the larger `scale`."""
    return scale * torch.eye(8).roll(1, 1)


@pytest.mark.parametrize("padded", [False, True])
def test_agreement_of_a_language_model(padded):
    ids = torch.arange(12).remainder(8).view(2, 6)
    lm = CausalLm()
    batch = {"input_ids": ids}
    before, after = causal(3.0)[ids], causal(2.0)[ids].clone()
    after[0, 1, 5] = 9.0  # one token of ten changes
    if padded:
        batch["attention_mask"] = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
        before[0, 4:], after[0, 4:] = torch.nan, torch.nan
        before[0, 3], after[0, 3] = torch.nan, torch.nan  # predicts what is padding
    lm.add(after, before, batch)
    found, tokens = lm.values(), 8 if padded else 10
    assert found["tokens"] == tokens and found["top1_agreement"] == (tokens - 1) / tokens
    assert found["perplexity_before"] == pytest.approx(1 + 7 * math.exp(-3))
    wrong = math.log(math.exp(9) + math.exp(2) + 6) - 2
    right = math.log(math.exp(2) + 7) - 2
    assert found["perplexity_after"] == pytest.approx(math.exp((wrong + (tokens - 1) * right) / tokens), rel=1e-5)
    labels = CausalLm()
    labels.add(after, before, {**batch, "labels": torch.where(torch.arange(6) == 2, ids, -100)})
    assert labels.values()["tokens"] == 2 and labels.values()["top1_agreement"] == 0.5
    with pytest.raises(ValueError, match="causal_lm"):
        lm.add(after[0], before[0], batch)
    with pytest.raises(ValueError, match="no perplexity"):
        CausalLm().values()


def test_agreement_of_a_classifier():
    task = Classification()
    before = torch.eye(4)
    after = before[torch.tensor([0, 1, 2, 2])]
    task.add(after, before, {"labels": torch.tensor([0, 1, 3, 3])})
    task.add(before[:2], before[:2], torch.zeros(2))
    assert task.values() == {"class_agreement": 5 / 6, "samples": 6, "accuracy_before": 0.75, "accuracy_after": 0.5}
    with pytest.raises(ValueError, match="classification"):
        task.add(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), None)


def test_agreement_of_embeddings():
    g = torch.Generator().manual_seed(0)
    before = torch.randn(20, 5, 16, generator=g)
    mask = torch.rand(20, 5, generator=g) < 0.7
    mask[:, 0] = True
    same = Embedding()
    noisy = before.clone()
    noisy[~mask] = 77.0  # padding does not count
    for half in (slice(0, 7), slice(7, 20)):
        same.add(3 * noisy[half], before[half], {"attention_mask": mask[half].long()})
    found = same.values()
    assert found["samples"] == 20 and found["cosine_min"] == pytest.approx(1)
    assert found["rank_agreement"] == pytest.approx(1)
    assert found["nearest_neighbour_agreement"] == 1
    # in the plane, by their angle: the first's order of the others is turned round, and so are the others' at its ends
    angles = torch.tensor([0.0, 0.1, 0.3, 0.6])
    turned = torch.tensor([0.0, 0.6, 0.3, 0.1])
    points = [torch.stack([a.cos(), a.sin()], -1) for a in (angles, turned)]
    other = Embedding()
    other.add(points[1], points[0], None)
    found = other.values()
    assert found["cosine_min"] == pytest.approx(math.cos(0.5)) and found["cosine_mean"] < 1
    assert found["nearest_neighbour_agreement"] == 0.25 * sum(
        abs_nearest(angles, i) == abs_nearest(turned, i) for i in range(4)
    )
    assert -1 <= found["rank_agreement"] < 0.6


def abs_nearest(angles, i):
    return min((j for j in range(len(angles)) if j != i), key=lambda j: abs(float(angles[j] - angles[i])))


def test_the_task_is_what_the_class_is_called():
    llama, tokens = build("llama"), batch("llama")
    fp.swap(llama, "int8")
    report = fp.parity(llama, [tokens])
    assert report.task == "causal_lm" and report.agreement["tokens"] > 0
    assert report.agreement["perplexity_after"] == pytest.approx(report.agreement["perplexity_before"], rel=0.05)
    assert "as causal lm: perplexity before" in str(report)
    assert fp.parity(llama, [tokens], task=None).agreement == {}
    assert fp.parity(llama, [tokens], output=lambda r: r.logits[:, 0]).task is None  # no longer what its name says
    with pytest.raises(ValueError, match="causal_lm"):
        fp.parity(llama, [tokens], output=lambda r: r.logits[:, 0], task="causal_lm")
    with pytest.raises(ValueError, match="'causal_lm'"):
        fp.parity(llama, [tokens], task="translation")


@pytest.mark.every(3)
def test_a_model_under_compile_is_compared_too():
    model, x = block(), torch.randn(5, 64)
    fp.swap(model, "int8")
    assert fp.parity(model, [x]).compiled is None
    report = fp.parity(model, [x], compiled=True)
    assert report.compiled.samples == 5
    assert report.compiled.relative_error == pytest.approx(report.output.relative_error, rel=0.05)
    assert "under torch.compile" in str(report) and report.to_json()["compiled"]["samples"] == 5


@pytest.mark.every(2)
def test_layers_are_listed_worst_first_and_drawn(tmp_path):
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(block() for _ in range(3))

        def forward(self, x):
            return sum(b(x) for b in self.blocks)

    model = Blocks()
    fp.swap(model, "int8")
    model.blocks[1].second.weight_scale *= 1.3
    model.blocks[2].first.weight_scale *= torch.nan
    report = fp.parity(model, [torch.randn(9, 64)])
    order = ["blocks.2.first", "blocks.2.second", "blocks.1.second"]  # NaN, what gets it, and 30 % too large
    assert [x.fqn for x in report.worst_first()][:3] == order
    named = [line.split()[0] for line in str(report).splitlines() if line.startswith("blocks.")]
    assert named[:3] == order
    pytest.importorskip("matplotlib")
    report.save_plot(tmp_path / "parity.png")
    assert (tmp_path / "parity.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="give it another name"):
        report.save_plot(tmp_path / "parity.txt")
