"""Swaps that count at some timesteps of a diffusion model: at others it runs on its originals."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from small_models import assert_same_objects, objects
from torch import nn
from torch._dynamo.testing import CompileCounter

import forwardpass as fp


class Attention(nn.Module):
    """Queries, keys and values are one product."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (2, 32)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """One unit, with the activation in an epilogue."""

    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(64), Attention(), MLP()

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])

    def forward(self, x, timestep=None):
        for block in self.blocks:
            x = block(x)
        return x


SWAP = {"include": "**", "attention": "int8", "crossover": 0}
X = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def both():
    """(a model swapped from timestep 100 on, the output that it has as it was, the one that it has swapped)"""
    model = Denoiser().eval()
    with torch.inference_mode():
        before = model(X)
        with fp.swap(model, "int8", **SWAP):
            after = model(X)
        fp.swap(model, "int8", timesteps=(100, 900), **SWAP)
        yield model, before, after


def test_a_call_runs_on_what_its_timestep_says(both):
    model, before, after = both
    assert not torch.equal(before, after)
    swapped = objects(model)
    for t, expected in [
        (99.5, before), (100, after), (500.0, after), (900, after), (901, before), (torch.tensor(500), after),
        (torch.tensor([500, 500]), after), (torch.tensor([500, 901]), before), (torch.tensor([[99.0], [99.0]]), before),
    ]:  # fmt: skip
        assert torch.equal(model(X, t), expected) and torch.equal(model(X, timestep=t), expected)
    assert_same_objects(model, swapped)


def test_a_loop_may_say_it(both):
    model, before, after = both
    for t, expected in [(7, before), (torch.tensor([500.0]), after)]:
        with fp.timestep(t):
            assert torch.equal(model(X), expected)
            with fp.timestep(500):
                assert torch.equal(model(X, timestep=7), after)  # which goes before the argument
    with pytest.raises(RuntimeError, match=r"swapped for timesteps 100 to 900.*within `with fp\.timestep\(t\):`"):
        model(X)
    for t in ("7", True, None, torch.tensor([1, 2]), float("nan")):
        with pytest.raises(TypeError, match="takes a number"), fp.timestep(t):
            pass


def test_after_an_error_it_is_swapped(both):
    model, before, after = both
    with pytest.raises(RuntimeError):
        model(X[..., :3], 7)
    assert torch.equal(model(X, 500), after) and torch.equal(model(X, 7), before)


def test_copies_do_the_same(both):
    model, before, after = both
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X, 7), before) and torch.equal(other(X, 500), after)
        assert not {id(m) for m in other.modules()} & {id(m) for m in model.modules()}


def test_torchs_attention_stays_ours_in_floats():
    """Its in_proj is a layer for as long as the model is swapped."""
    model = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True).eval()
    with torch.inference_mode():
        before = model(X)
        fp.swap(model, "int8", timesteps=(100, 900), **SWAP)
        with fp.timestep(7):
            torch.testing.assert_close(model(X), before, rtol=1e-5, atol=1e-5)
        with fp.timestep(500):
            assert (model(X) - before).abs().max() > 1e-3


def test_it_is_restored(both):
    model = Denoiser().eval()
    objects_before, forward = objects(model), model.forward
    with fp.swap(model, "int8", timesteps=(None, 900), **SWAP) as report:
        assert "swapped at timesteps up to 900; at others the model runs on its originals" in str(report)
        assert report.plan.timesteps == (None, 900) and report.to_json()["plan"]["timesteps"] == [None, 900]
        model(X, 950)
    assert_same_objects(model, objects_before)
    assert model.forward == forward and "forward" not in vars(model)


def test_a_plan_says_it(both, tmp_path):
    model, before, after = both
    fp.report(model).save_plan(tmp_path / "plan.json")
    plan = fp.Plan.load(tmp_path / "plan.json")
    assert plan.timesteps == (100, 900) and "at timesteps 100 to 900" in str(plan)
    other = Denoiser().eval()
    fp.swap(other, plan=plan)
    assert torch.equal(other(X, 7), before) and torch.equal(other(X, 500), after)
    older = {k: v for k, v in plan.to_json().items() if k != "timesteps"}
    assert fp.Plan.from_json(older).timesteps is None
    for wrong in ([3], [5, 1], [None, None], ["1", 2], 7):
        with pytest.raises(ValueError, match="the plan is not a plan"):
            fp.Plan.from_json(plan.to_json() | {"timesteps": wrong})


def test_parity_compares_the_layers_where_they_run(both):
    model, *_ = both
    report = fp.parity(model, [{"x": X, "timestep": 500}, {"x": X, "timestep": 7}])
    assert not report.unreached and 0 < report.output.relative_error < 0.05
    assert {x.total.samples for x in report.layers} == {32}  # of the first batch alone
    assert fp.parity(model, [{"x": X, "timestep": 7}]).output.relative_error == 0


def test_two_threads_do_not_see_each_others_step(both):
    model, before, after = both
    wrong = []

    def run(t, expected):
        with torch.inference_mode():
            for _ in range(20):
                if not torch.equal(model(X, t), expected):
                    wrong.append(t)

    threads = [threading.Thread(target=run, args=x) for x in ((7, before), (500, after))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.every(2)
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_code_is_two_ways_and_no_more(both, whole):
    """Of blocks with fullgraph; of the whole model without."""
    model, before, after = both
    torch._dynamo.reset()
    counter = CompileCounter()
    if whole:
        call = torch.compile(model, backend=counter)
    else:
        for block in model.blocks:
            block.compile(fullgraph=True, backend=counter)
        call = model
    counts = []
    for t in (7, 500, 8, 600, 9, 700, 950):
        expected = after if 100 <= t <= 900 else before
        torch.testing.assert_close(call(X, torch.tensor(float(t))), expected, rtol=0, atol=2e-6)
        counts.append(counter.frame_count)
    assert counts[1] > counts[0] and len({*counts[1:]}) == 1
    torch._dynamo.reset()


def test_the_whole_model_in_one_graph_is_refused_with_the_reason(both):
    model, *_ = both
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile the model's blocks"):
        torch.compile(model, fullgraph=True, backend="eager")(X, torch.tensor(7.0))
    torch._dynamo.reset()


def test_a_graph_cannot_be_captured_without_saying_it(both, monkeypatch):
    model, *_ = both
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"capture within `with fp\.timestep\(t\):`"):
        model(X, torch.tensor(7))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"timesteps": 7}, TypeError, "a pair of numbers, not 7"),
        ({"timesteps": (1, 2, 3)}, TypeError, "a pair of numbers"),
        ({"timesteps": (1, "2")}, TypeError, "'2', which is no finite number"),
        ({"timesteps": (1, float("inf"))}, TypeError, "inf, which is no finite number"),
        ({"timesteps": (True, 2)}, TypeError, "True, which is no finite number"),
        ({"timesteps": (2, 1)}, ValueError, "starts above its end"),
        ({"timesteps": (None, None)}, ValueError, "has no bound"),
        ({"timesteps": (1, 2), "keep": False}, ValueError, "keep=False does not go with timesteps="),
        ({"timesteps": (1, 2), "keep": "cpu"}, ValueError, "keep='cpu' does not go with timesteps="),
        ({"timesteps": (1, 2), "kv_cache": "int8"}, ValueError, "is for decoders, and timesteps= for diffusion models"),
    ],
)
def test_what_does_not_go_is_refused(options, error, words):
    model = Denoiser()
    before = objects(model)
    with pytest.raises(error, match=words):
        fp.swap(model, "int8", **options)
    assert_same_objects(model, before)


def test_it_is_the_only_swap_of_a_model(both, tmp_path):
    model, *_ = both
    with pytest.raises(RuntimeError, match="a swap at some timesteps is the only one"):
        fp.swap(model, "int8")
    with pytest.raises(ValueError, match="store the original model and the plan"):
        fp.save_pretrained(model, tmp_path / "folder")
    plan = fp.report(model).plan
    with pytest.raises(ValueError, match=r"timesteps=\(1, 2\) does not go with plan="):
        fp.swap(Denoiser(), plan=plan, timesteps=(1, 2))
    other = Denoiser()
    fp.swap(other, "int8", include="**.up")
    with pytest.raises(RuntimeError, match="a swap at some timesteps is the only one"):
        fp.swap(other, "int8", timesteps=(1, 2))


def test_originals_that_were_left_behind_are_told_of(both):
    model, *_ = both
    model.to("meta")
    with pytest.raises(RuntimeError, match="move it first, then swap it"):
        model(X, 7)
