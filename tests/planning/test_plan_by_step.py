"""Plans of diffusion models by step: the error of each part of a loop, and the timesteps at which the plan counts."""

import copy
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from small_models import assert_same_objects, objects
from torch import nn

import forwardpass as fp
from forwardpass.common.timing import Timing
from forwardpass.planning import planner
from forwardpass.planning.candidates import attention_rows as attention
from forwardpass.planning.candidates import measure
from forwardpass.planning.candidates.by_step import Loop, Part, range_of

pytest.importorskip("skimage", reason="the extra images is not installed")
TIMES = {"before": 4.0, "after": 1.5, "int8": 1.0}


@pytest.fixture(autouse=True)
def times(monkeypatch):
    def interleave(named, device, *, rounds, warmup, on_round=lambda: None):
        for call in named.values():
            call()
            on_round()
        return {name: Timing(TIMES[name], TIMES[name], TIMES[name], rounds) for name in named}

    for module in (measure, attention, planner):
        monkeypatch.setattr(module, "interleave", interleave)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 32)).unbind(-3)
        return self.out(
            F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2)
        )


class Denoiser(nn.Module):
    """Its first steps, at more than 900, move the picture `first` times as far as others."""

    def __init__(self, first=10.0):
        super().__init__()
        torch.manual_seed(0)
        self.attn, self.body, self.first = Attention(), nn.Linear(64, 64), first

    def forward(self, x, timestep):
        y = self.body(x + self.attn(x))
        return y * (self.first if timestep > 900 else 1.0)


STEPS = 10


def drawn(model, seed):
    """Three pictures of 8 x 8 pixels."""
    x = torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(seed))
    for i in range(STEPS):
        x = x - model(x, timestep=999 - 100 * i) / STEPS
    return torch.sigmoid(x[:, 0]).view(3, 1, 8, 8)


def planned(model, bound, **options):
    given = {"candidates": ["int8"], "images": drawn, "min_psnr": bound} | options
    return fp.plan(model, range(2), **given)


def all_in_8_bits(model, **options):
    """The lowest PSNR with everything in int8 at all steps."""
    with fp.swap(model, "int8", include="**", **options):
        return min(fp.parity(model, range(2), images=drawn).images.psnr)


@pytest.mark.every(2)
def test_the_steps_that_err_most_stay_as_they_are(tmp_path):
    model = Denoiser().eval()
    bound = all_in_8_bits(model) + 4
    before, forward = objects(model), model.forward
    plan = planned(model, bound)
    assert_same_objects(model, before)
    assert model.forward == forward and not model._forward_pre_hooks
    assert plan.timesteps == (None, 949.0) and len(plan.layers) == 3
    loop = plan.evidence["timesteps"]
    assert loop["chosen"] == loop["tried"] == [None, 949.0] and len(loop["parts"]) == 8
    assert sum(x["share"] for x in loop["parts"]) == pytest.approx(1)
    *others, first = (x["error"] for x in loop["parts"])
    assert first > 4 * sum(others)
    # three layers of 1 ms where they were 4, at nine steps of ten
    assert plan.evidence["predicted"]["after"] == pytest.approx(3 * (0.9 * 1 + 0.1 * 4))
    printed = " ".join(str(plan).split())
    assert "from 949 on 10%" in printed
    assert "the plan counts at timesteps up to 949; at others the model runs as it is" in printed
    plan.save(tmp_path / "plan.json")
    other = copy.deepcopy(model)
    report = fp.swap(other, plan=tmp_path / "plan.json")
    assert "swapped at timesteps up to 949" in str(report)
    assert min(fp.parity(other, range(2), images=drawn).images.psnr) >= bound


@torch.inference_mode()
def test_attention_by_step():
    """Where attention alone is worth it."""
    model = Denoiser().eval()
    with fp.swap(model, attention="int8", crossover=0):
        after = [drawn(model, seed) for seed in range(2)]
    before = [drawn(model, seed) for seed in range(2)]
    errors = [(a - b).double().square().flatten(1).mean(1).max() for a, b in zip(after, before)]
    bound = float(-10 * torch.stack(errors).max().log10()) + 4
    plan = planned(model, bound, attention="int8", crossover=0, exclude=("body", "**.qkv", "**.out"))
    assert [x.fqn for x in plan.attention_8bit] == ["attn"] and not plan.layers
    assert plan.timesteps == (149.0, 949.0)
    fp.swap(model, plan=plan)
    worst = max((drawn(model, seed) - b).double().square().flatten(1).mean(1).max() for seed, b in enumerate(before))
    assert -10 * worst.log10() >= bound


def test_a_budget_that_all_steps_hold():
    model = Denoiser().eval()
    plan = planned(model, all_in_8_bits(model) - 4)
    assert plan.timesteps is None and len(plan.layers) == 3 and plan.evidence["timesteps"] is None


def test_errors_that_are_spread_evenly():
    model = Denoiser(first=1.0).eval()
    plan = planned(model, all_in_8_bits(model) + 2)
    assert plan.timesteps is None
    loop = plan.evidence["timesteps"]
    assert loop["tried"] is None and "no part brings much more than its share of the error" in str(plan)


def test_a_range_is_found_and_not_given():
    with pytest.raises(ValueError, match=r"plan takes no timesteps=: it belongs to the fp\.swap"):
        planned(Denoiser(), 30, timesteps=(100, 900))


def test_a_model_without_a_loop_has_none():
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval()
    batches = [torch.randn(4, 64, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    plan = fp.plan(model, batches, candidates=["int8"], min_cosine=1 - 1e-9)
    assert plan.timesteps is None and plan.evidence["timesteps"] is None


def test_steps_are_resumed(tmp_path):
    model = Denoiser().eval()
    bound = all_in_8_bits(model) + 4
    plan = planned(model, bound, resume=tmp_path / "measured.json")
    kept = json.loads((tmp_path / "measured.json").read_text())
    assert sum("timesteps" in key for key in kept["times"]) == 8
    assert planned(model, bound, resume=tmp_path / "measured.json") == plan
    assert json.loads((tmp_path / "measured.json").read_text()) == kept


@pytest.mark.every(2)
@pytest.mark.parametrize("damage", [{"chosen": [1]}, {"parts": [{"timesteps": [1, 2, 3], "share": 1, "error": 0.1}]},
                                    {"parts": 3}, {"tried": ["1", 2]}])  # fmt: skip
def test_a_damaged_file_is_refused(damage):
    model = Denoiser().eval()
    content = planned(model, all_in_8_bits(model) + 4).to_json()
    content["evidence"]["timesteps"] |= damage
    with pytest.raises(ValueError, match="the plan is not a plan"):
        fp.Plan.from_json(content)


# what is tried


def loop_of(*values):
    loop = Loop()
    loop.calls += values
    return loop


def test_the_parts_of_a_loop():
    assert loop_of(2, 1).parts(1) == [] == loop_of(3, 2, 1).parts(2)
    parts = loop_of(9, 6, 6, 3).parts(1)
    assert [(p.timesteps, p.share) for p in parts] == [((None, 4.5), 0.25), ((4.5, 7.5), 0.5), ((7.5, None), 0.25)]
    parts = loop_of(*range(50)).parts(1)
    assert len(parts) == 8 and sum(p.share for p in parts) == pytest.approx(1)
    assert all(a.timesteps[1] == b.timesteps[0] for a, b in itertools.pairwise(parts))


def of_errors(*errors):
    n = len(errors)
    ends = [None, *map(float, range(1, n)), None]
    return [Part((a, b), 1 / n, e) for a, b, e in zip(ends, ends[1:], errors)]


@pytest.mark.parametrize(
    ("errors", "timesteps"),
    [
        ((1, 1, 1, 1), None),
        ((4, 1, 1, 1), (1.0, None)),
        ((1, 1, 1, 4), (None, 3.0)),
        ((4, 1, 1, 4), (1.0, 3.0)),
        ((1, 1.1, 1, 1), None),
        ((0, 0, 0, 0), None),
        ((float("inf"), 1, 1, 1), None),
    ],
)
def test_the_first_and_last_parts_that_err_most_are_left_out(errors, timesteps):
    found = range_of(of_errors(*errors))
    assert (found and found.timesteps) == timesteps
    if found is not None:
        within = [e for e in errors if e < 4]
        assert found.time == pytest.approx(len(within) / 4) and found.error == pytest.approx(sum(within) / sum(errors))
