"""What is read from code is run before it is believed: code that does more than was read keeps its layers as they are."""

import dataclasses
import logging
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from rotation import in_turn
from small_models import ATTENTION, CONFIGS, MLPS, batch, build, outputs
from torch import nn

import forwardpass as fp
from forwardpass.common.models import float32
from forwardpass.common.models.float32 import InFloat32
from forwardpass.proofs import inputs, norms, rewritings, run

SIZE = 64


class Tokens(nn.Module):
    """As far as a swap can see, a model of transformers."""

    main_input_name = "input_ids"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(is_encoder_decoder=False, get_text_config=lambda: SimpleNamespace(vocab_size=50))
        self.embed = nn.Embedding(50, SIZE)
        self.block = self.Block()

    def forward(self, input_ids):
        return self.block(self.embed(input_ids))


class Siblings(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)


class Honest(Siblings):
    def forward(self, x):
        flat = x.view(-1)
        y = self.a(x)
        z = self.b(x)
        return y * z + flat.sum()


class ThroughAView(Siblings):
    def forward(self, x):
        flat = x.view(-1)
        y = self.a(x)
        F.relu(flat, inplace=True)
        z = self.b(x)
        return y * z


class ThroughAHelper(Siblings):
    def forward(self, x):
        keep = [x]
        y = self.a(x)
        self.scale(keep)
        z = self.b(x)
        return y * z

    def scale(self, tensors):
        for t in tensors:
            t *= 2


def swapped(block):
    model = type("Model", (Tokens,), {"Block": block})().eval()
    x = {"input_ids": torch.arange(12).view(2, 6)}
    with torch.inference_mode():
        before = model(**x)
        report = fp.swap(model, "w8a16", include="**")
        return report, before, model(**x)


@pytest.mark.parametrize("block", [ThroughAView, ThroughAHelper])
def test_an_input_that_changes_between_two_calls(block):
    """Off by .7 under inference mode, where torch does not count what is written."""
    report, before, after = swapped(block)
    assert report.joined == [] and [s.reason.code for s in report.apart] == ["disproved"]
    assert "gives something else" in report.apart[0].reason.text and "disproved" not in str(report.joined)
    assert (after - before).norm() < 0.02 * before.norm()


@pytest.mark.skipif(torch.cuda.is_initialized(), reason="CUDA is seeded at once")
def test_runs_leave_no_seeds_for_later():
    """As torch.manual_seed does: a text of the whole stack for each call, until CUDA is first used."""
    model = type("Model", (Tokens,), {"Block": Honest})().eval()
    before = len(torch.cuda._queued_calls)
    fp.swap(model, "w8a16", include="**")
    assert len(torch.cuda._queued_calls) == before


def test_what_is_proven_is_made():
    report, before, after = swapped(Honest)
    assert report.joined == [("block.a", "block.b")] and not report.apart
    assert (after - before).norm() < 0.02 * before.norm()


@pytest.mark.every(2)
@pytest.mark.parametrize("name", ["llama", "qwen3", "t5", "bert", "gpt2", "vit", "whisper", "phi3", "gemma3"])
def test_models_of_transformers_are_run_and_proven(name, monkeypatch):
    errors, error = [], run.Prover.error
    monkeypatch.setattr(run.Prover, "error", lambda *args: errors.append(error(*args)) or errors[-1])
    model = build(name, {**CONFIGS, **ATTENTION, **MLPS})
    report = fp.swap(model, "int8", include="**", exclude="lm_head", unpad=False, encoder=False)
    assert not {"disproved", "unproven"} & {s.reason.code for s in report.apart}
    assert len(errors) == 1 and errors[0].relative < 1e-5
    assert torch.isfinite(outputs(model, batch(name))).all()


def test_a_mistake_in_a_rewriting_is_found(monkeypatch):
    """Were an MLP another formula than was read."""
    monkeypatch.setattr(rewritings._OneUnit, "forward", lambda self, x: 2 * self._block.module(x))
    model = build("llama")
    with torch.inference_mode():
        before = outputs(model, batch("llama"))
        report = fp.swap(model, "w8a16", include="**", exclude="lm_head")
        assert report.mlps == [] and len(report.joined) == 2  # q, k, v stay one product
        assert {s.reason.code for s in report.apart} == {"disproved"} and len(report.apart) == 2
        assert (outputs(model, batch("llama")) - before).norm() < 0.05 * before.norm()


def test_a_mistake_about_a_norm_is_found(monkeypatch):
    """Were another formula read, or did something else read what it gives, only a GPU would show it."""
    read = norms.norm_formula
    monkeypatch.setattr(norms, "norm_formula", lambda m: (f := read(m)) and dataclasses.replace(f, offset=1.0))
    report = fp.swap(build("llama"), "int8", include="**", exclude="lm_head")
    assert report.norms == [] and len(report.mlps) == 2
    assert {s.fqn: s.reason.code for s in report.apart} == {
        f"model.layers.{i}.post_attention_layernorm": "disproved" for i in range(2)
    }
    monkeypatch.undo()
    assert len(fp.swap(build("llama"), "int8", include="**", exclude="lm_head", dry_run=True).norms) == 2


def test_what_only_together_gives_something_else(monkeypatch):
    """Then none of it is made."""
    error = run.Prover.error
    kinds = lambda candidates: {x.key[0] for x in candidates if isinstance(x, rewritings.Rewriting)}  # noqa: E731
    monkeypatch.setattr(run.Prover, "error", lambda prover, candidates=():
                        run.Error(2.0, 2.0, 0.1) if len(kinds(candidates)) > 1 else error(prover, candidates))  # fmt: skip
    model = build("llama")
    report = fp.swap(model, "int8", include="**", exclude="lm_head")
    assert not report.mlps and not report.joined and not report.norms
    assert {s.reason.code for s in report.apart} == {"disproved"}


class Conditional(Siblings):
    """Between its layers it changes their input, as `changes` of the input says."""

    changes = None

    def forward(self, x):
        keep = [x]
        y = self.a(x)
        self.perhaps(keep)
        z = self.b(x)
        return y * z

    def perhaps(self, tensors):
        for t in tensors:
            if self.changes(t):
                t *= 2


class WithACache(Tokens):
    """A step of one token reads how many there were."""

    def forward(self, input_ids, attention_mask=None, cache=None, use_cache=None):
        x = self.embed(input_ids)
        if attention_mask is not None:
            x = x * attention_mask[:, -x.shape[1] :, None]
        return {"logits": self.block(x), "cache": (cache or 0) + x.shape[1]}


@pytest.mark.parametrize(
    "changes",
    [lambda x: x.shape[1] == 1, lambda x: (x[-1, 0] == 0).all(), lambda x: len(x) == 1],
    ids=["at a step", "with padding", "in another shape"],
)
def test_what_shows_only_sometimes(changes):
    """Off by .2 and more: the model was run on one shape, without a mask and without a step."""
    block = type("Block", (Conditional,), {"changes": staticmethod(changes)})
    model = type("Model", (WithACache,), {"Block": block})().eval()
    model.config.is_decoder = model.is_decoder = True
    report = fp.swap(model, "w8a16", include="**")
    assert report.joined == [] and [s.reason.code for s in report.apart] == ["disproved"]


def test_batches_to_calibrate_with_are_run():
    """At a length that nothing here would make up."""
    block = type("Block", (Conditional,), {"changes": staticmethod(lambda x: x.shape[1] == 40)})
    model = type("Model", (Tokens,), {"Block": block})().eval()
    ids = torch.arange(80).view(2, 40) % 50
    read = []

    def batches():
        for _ in range(2):
            read.append(ids)
            yield {"input_ids": ids}

    report = fp.swap(model, "int8", include="**", calibrate=batches())
    assert [s.reason.code for s in report.apart] == ["disproved"] and len(read) == 2
    assert len(report.plan.layers) == 2 and all(x.calibrated for x in report.plan.layers)


class OfItsOwn(nn.Module):
    """A class that nobody knows."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x)


class Kinds(nn.Module):
    """What its forward takes is of no shape that its layers state."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        (rows,) = x["rows"]
        return self.block(rows)


class Untold(Honest):
    """Nor what the module itself takes."""

    def forward(self, x, scale):
        y = self.a(x)
        return y * self.b(x) * scale["by"]


@pytest.mark.parametrize("model", [OfItsOwn, Kinds])
@pytest.mark.parametrize("block", [ThroughAView, ThroughAHelper, Honest])
def test_models_of_classes_that_nobody_knows(model, block):
    """Off by .7: only models of transformers were run. Where a whole model does not run, the module that calls the layers does."""
    torch.manual_seed(0)
    model = model(block()).eval()
    x = torch.randn(3, 5, SIZE)
    batch = x if isinstance(model, OfItsOwn) else {"rows": [x]}
    with torch.inference_mode():
        expected = model(x.clone() if batch is x else {"rows": [x.clone()]})
        report = fp.swap(model, "w8a16", include="**")
        assert [s.reason.code for s in report.apart] == ([] if block is Honest else ["disproved"])
        assert (model(batch) - expected).norm() < 0.02 * expected.norm()


def test_what_nobody_can_run_is_not_made():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.block = Untold()
    model.forward = lambda batch: model.block(batch["x"], {"by": 2})
    report = fp.swap(model.eval(), "w8a16", include="**")
    [apart] = report.apart
    assert (apart.fqn, apart.reason.code, report.joined) == ("block.a", "unproven", [])
    assert "calibrate=" in apart.reason.fix and "unproven" in str(report)
    fp.restore(model)
    report = fp.swap(model, "int8", include="**", calibrate=[({"x": torch.randn(40, SIZE)},)])
    assert not any(s.reason.code == "unproven" for s in report.apart)


def test_pictures_of_classes_that_nobody_knows():
    from small_models import VisionTransformer

    model = VisionTransformer().eval()
    report = fp.swap(model, "w8a16", include="**")
    assert not any(s.reason.code in ("disproved", "unproven") for s in report.apart)
    [calls] = [x for x in inputs.made_up(VisionTransformer())][:1]
    assert calls[0].batch[0].shape == (inputs.ROWS, 3, 32, 32)


def test_a_model_is_as_it_was_after_its_run():
    """What it counts, keeps and writes into its buffers as it runs."""

    class Counts(Honest):
        def __init__(self):
            super().__init__()
            self.calls, self.kept = 0, {}
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x):
            self.calls += 1
            self.kept[self.calls] = x
            self.seen += 1
            return super().forward(x)

    model = type("Model", (Tokens,), {"Block": Counts})().eval()
    model.block.forward_count = 0
    state = torch.get_rng_state()
    fp.swap(model, "w8a16", include="**")
    assert (model.block.calls, model.block.kept, model.block.seen.item()) == (0, {}, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_drawn_at_random_is_drawn_alike():
    class Draws(Honest):
        def forward(self, x):
            flat = x.view(-1)
            y = self.a(x)
            z = self.b(x)
            return y * z + torch.rand_like(y) + flat.sum()

    report, _, _ = swapped(Draws)
    assert report.joined == [("block.a", "block.b")] and not report.apart


class AsksForStrides(Siblings):
    """What nn.Linear gives is contiguous; columns of a product are not."""

    def forward(self, x):
        y = self.a(x)
        z = self.b(x)
        y = torch.as_strided(y, y.shape, torch.empty(y.shape).stride(), y.storage_offset())
        return y * z


class ViewsAsOneRow(Siblings):
    def forward(self, x):
        y = self.a(x)
        z = self.b(x)
        return y.view(-1).view(x.shape) * z


@pytest.mark.parametrize("block", [AsksForStrides, ViewsAsOneRow])
def test_code_that_wants_an_output_in_one_piece(block):
    """Off by .1, or a RuntimeError of the model: the proof ran on outputs in one piece."""
    report, before, after = swapped(block)
    assert not report.joined and (after - before).norm() < 0.02 * before.norm()


class Almost(Siblings):
    """Between its layers it adds a few percent to their input."""

    def forward(self, x):
        keep = [x]
        y = self.a(x)
        self.more(keep)
        z = self.b(x)
        return y * z

    def more(self, tensors):
        for t in tensors:
            t *= 1.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", [Almost, Honest])
def test_a_small_error_in_a_model_of_16_bits(block, dtype):
    """Of 2 %: up to 10 % passed for rounding in bfloat16, up to 3 % in float16. In float32 nothing rounds so."""
    model = type("Model", (Tokens,), {"Block": block})().eval().to(dtype)
    before = {name: (p, p.dtype, p._version) for name, p in model.named_parameters()}
    parameters = {id(m): m._parameters for m in model.modules()}
    report = fp.swap(model, "w8a16", include="**", dry_run=True)
    assert [s.reason.code for s in report.apart] == ([] if block is Honest else ["disproved"])
    assert bool(report.joined) == (block is Honest)
    assert all(m._parameters is parameters[id(m)] for m in model.modules())
    assert all(p is before[name][0] and p.dtype == dtype for name, p in model.named_parameters())


def test_what_only_16_bits_do_is_seen_too():
    """A model runs in its own dtype as well."""

    class InHalves(Almost):
        def more(self, tensors):
            for t in tensors:
                if t.dtype == torch.bfloat16:
                    t *= 2

    model = type("Model", (Tokens,), {"Block": InHalves})().eval().bfloat16()
    assert [s.reason.code for s in fp.swap(model, "w8a16", include="**", dry_run=True).apart] == ["disproved"]


def test_layers_that_are_alike_share_their_floats():
    """In float32 one layer of a model is in memory, and no more."""
    model = build("llama", ATTENTION).bfloat16()
    wide = InFloat32.of(model)
    copies = {new.untyped_storage()._cdata: new.nbytes for _, _, _, new in wide._places}
    one = sum(p.nbytes for name, p in model.named_parameters() if ".layers.1." not in name)
    assert 2 * one <= sum(copies.values()) <= 2.1 * one
    before = [*model.parameters()]
    with wide:
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p is q for p, q in zip(model.parameters(), before, strict=True))
    assert InFloat32.of(build("llama", ATTENTION)) is None


@torch.inference_mode()
def test_embeddings_and_heads_of_many_rows_have_no_copy(monkeypatch):
    """What is looked up in them, or multiplied by them, is widened."""
    model, x = build("llama", ATTENTION).bfloat16(), batch("llama")
    monkeypatch.setattr(float32, "PIECE", 100)
    monkeypatch.setattr(float32, "LARGE", 1000)  # so that no matrix has a copy
    with InFloat32.of(model) as wide:
        y = outputs(model, x)
    assert {t.dim() for _, _, t, _ in wide._places} == {1}
    torch.testing.assert_close(y, outputs(model.float(), x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", in_turn(["llama", "qwen3", "t5", "bert", "gpt2", "vit", "whisper", "phi3", "gemma3"]))
def test_models_of_16_bits_are_proven(name, dtype):
    model = build(name, {**CONFIGS, **ATTENTION, **MLPS}).to(dtype)
    report = fp.swap(model, "int8", include="**", exclude="lm_head", attention=True, dry_run=True)
    assert not {"disproved", "unproven"} & {s.reason.code for s in (*report.apart, *report.skipped)}


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_transformers_warns_of_nothing(name, monkeypatch):
    """Neither of a cache that an encoder does not return, nor of a decoder's under its older name."""
    warned = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda _, text, *args: warned.append(text), raising=False)
    fp.swap(build(name, {**CONFIGS, **ATTENTION, **MLPS}), "int8", include="**")
    assert not warned
