"""What a plan is chosen by: the integer program, the criterion, the search for the budget of the prediction."""

import itertools
import math
import random

import pytest
import torch

from forwardpass.planning import planner as planning
from forwardpass.planning.choose import Frontier, Option
from forwardpass.planning.criterion import Criterion
from forwardpass.planning.verify import Verdict

# the integer program


def all_choices(layers):
    for picked in itertools.product(*(range(len(options)) for options in layers)):
        chosen = [options[o] for options, o in zip(layers, picked)]
        yield sum(o.cost for o in chosen), sum(o.error for o in chosen)


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_is_cheaper_by_more_than_the_gap(seed):
    rng = random.Random(seed)
    layers = [
        [Option(rng.uniform(1, 2), 0.0), *(Option(rng.random(), rng.random() ** 4) for _ in range(rng.randint(0, 3)))]
        for _ in range(rng.randint(1, 6))
    ]
    front, every = Frontier(layers), list(all_choices(layers))
    assert front.errors == sorted(front.errors) and front.bounds == sorted(front.bounds, reverse=True)
    assert front.choice(0).error == 0
    for i in range(len(front)):
        choice = front.choice(i)
        picked = [options[o] for options, o in zip(layers, choice.options)]
        assert choice.cost == pytest.approx(sum(o.cost for o in picked))
        assert choice.error == pytest.approx(sum(o.error for o in picked))
        least = min(cost for cost, error in every if error <= choice.error + 1e-12)
        assert front.bounds[i] <= least + 1e-9
        assert choice.cost - least <= choice.gap + 1e-9
        assert choice.gap < 1e-3


def test_the_frontier_refuses_what_it_cannot_weigh():
    for layers, words in (
        ([[Option(1, 0)], []], "layer 1 has no option"),
        ([[Option(1, math.nan)]], "layer 0 has a cost or an error"),
        ([[Option(-1, 0)]], "negative"),
    ):
        with pytest.raises(ValueError, match=words):
            Frontier(layers)
    assert Frontier([]).choice(0).options == ()


# the criterion


def test_squares_add_up():
    """Errors of two layers, at right angles: what each brings alone is what both bring together."""
    expected = torch.randn(3, 8, 100, generator=torch.Generator().manual_seed(0)).double()
    a, b = torch.zeros_like(expected), torch.zeros_like(expected)
    a[..., ::2], b[..., 1::2] = 0.01, -0.02
    for criterion in (Criterion("max_error", 0.1), Criterion("min_cosine", 0.999)):
        parts = [criterion.additive(expected + e, expected, None) for e in (a, b, a + b)]
        assert torch.allclose(parts[0] + parts[1], parts[2], rtol=0.02)
    assert criterion.shown(1e-3) == pytest.approx(0.999)
    assert len(parts[0]) == 3


def test_padding_is_no_error():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    expected = torch.ones(2, 3, 4)
    got = expected + (1 - mask).unsqueeze(-1) * torch.randn(2, 3, 4)
    given = {"attention_mask": mask}
    for criterion in (Criterion("max_error", 0.1), Criterion("min_cosine", 0.999)):
        assert criterion.additive(got, expected, given).max() == pytest.approx(0, abs=1e-12)
        assert criterion.additive(got, expected, None).max() > 0.01


# the search


def test_a_worst_sample_that_does_not_follow_the_mean_is_found_all_the_same():
    """A budget that only a few of thousands of choices hold, where each that is tried is a little worse than it should be."""
    layers = [[Option(1.0, 0.0), Option(0.3, 1e-4 * (1 + n)), Option(0.6, 1e-6)] for n in range(30)]
    front, criterion = Frontier(layers), Criterion("min_cosine", 1 - 5e-4)
    tried = []

    def verified(choice):
        tried.append(choice.error)
        return Verdict(choice.error * (1 + 0.05 * len(tried)), choice.error, 1)

    as_it_is = front.choice(0)
    choice, attempts = planning._search(front, as_it_is, criterion, verified, lambda what, steps: lambda: None)
    assert choice.error > 2e-4 and len(attempts) <= planning.ATTEMPTS + planning.CHANGES
    assert choice.cost == min(a["cost"] for a in attempts if a["holds"])


def test_single_layers_are_changed_in_the_end():
    """Where the worst sample is another one for each choice, the best that the prediction leads to is not the last word."""
    layers = [[Option(1.0, 0.0), Option(0.3, 1e-4)] for _ in range(10)]
    front, criterion = Frontier(layers), Criterion("min_cosine", 1 - 6.5e-4)
    lucky = 9  # of the ten alike, the one that costs the samples nothing; the frontier takes others first

    def run(choice):
        worst = 1e-4 * sum(o for n, o in enumerate(choice.options) if n != lucky)
        return Verdict(worst, choice.error, 1)

    as_it_is = front.choice(0)
    choice, attempts = planning._search(front, as_it_is, criterion, run, lambda what, steps: lambda: None)
    assert sum(choice.options) == 7 and choice.options[lucky] == 1
    assert choice.cost == pytest.approx(7 * 0.3 + 3 * 1.0) == min(a["cost"] for a in attempts if a["holds"])
    changed = front.changes(as_it_is)
    assert [c.options for c in changed] == [tuple(int(n == i) for n in range(10)) for i in range(10)]
    assert all((c.cost, c.error) == (pytest.approx(9.3), pytest.approx(1e-4)) and c.gap >= 0 for c in changed)
