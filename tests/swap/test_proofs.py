"""What is read from code is run before it is believed: code that does more than was read keeps its layers as they are."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from small_models import batch, build, outputs
from torch import nn

import forwardpass as fp
from forwardpass.proofs import run as proofs

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


def test_what_is_proven_is_made():
    report, before, after = swapped(Honest)
    assert report.joined == [("block.a", "block.b")] and not report.apart
    assert (after - before).norm() < 0.02 * before.norm()


@pytest.mark.parametrize("name", ["llama", "qwen3", "t5", "bert", "gpt2", "vit", "whisper", "phi3", "gemma3"])
def test_models_of_transformers_are_run_and_proven(name, monkeypatch):
    runs, run = [], proofs._run
    monkeypatch.setattr(proofs, "_run", lambda *args: runs.append(run(*args)) or runs[-1])
    try:
        model = build(name)
    except KeyError:
        pytest.skip("no small model of that family")
    found = [*proofs.rewritings(proofs_leaves(model))]
    report = fp.swap(model, "int8", include="**", exclude="lm_head")
    assert not any(s.reason.code == "disproved" for s in report.apart)
    if proofs.made_up(build(name)) is not None and found:
        assert len(runs) == 1 and all(t.isfinite().all() for t in runs)
    assert torch.isfinite(outputs(model, batch(name))).all()


def proofs_leaves(model):
    from forwardpass.proofs.walker import linear_like

    return linear_like(model)


def test_a_mistake_in_a_rewriting_is_found(monkeypatch):
    """Were an MLP another formula than was read."""
    monkeypatch.setattr(proofs._OneUnit, "forward", lambda self, x: 2 * self._block.module(x))
    model = build("llama")
    with torch.inference_mode():
        before = outputs(model, batch("llama"))
        report = fp.swap(model, "w8a16", include="**", exclude="lm_head")
        assert report.mlps == [] and len(report.joined) == 2  # q, k, v stay one product
        assert {s.reason.code for s in report.apart} == {"disproved"} and len(report.apart) == 2
        assert (outputs(model, batch("llama")) - before).norm() < 0.05 * before.norm()


def test_a_model_whose_code_raises_is_believed():
    class Refuses(Honest):
        def forward(self, x):
            if x.shape[0] == proofs.ROWS and x.shape[1] == proofs.TOKENS:
                raise RuntimeError("not these")
            y = self.a(x)
            return y * self.b(x)

    report, before, after = swapped(Refuses)
    assert (after - before).norm() < 0.02 * before.norm() and not report.apart
