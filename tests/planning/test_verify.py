"""What a whole plan is held to, and which samples bind the budget."""

import contextlib

import torch

from forwardpass.planning.criterion import Criterion
from forwardpass.planning.verify import Verifier


class Subject:
    """Outputs are angles."""

    def __init__(self, bound):
        self.criterion = Criterion.of(None, bound, None, None)

    def swapped(self, plan, arguments):
        return contextlib.nullcontext()

    def outputs(self, batches):
        for angle in batches:
            yield torch.stack([torch.cos(angle), torch.sin(angle)], 1)


ANGLES = [torch.full((64,), float(i)) * 0.01 + torch.arange(64) * 1e-4 for i in (1, 3, 2)]
REFERENCES = [torch.tensor([[1.0, 0.0]]).expand(64, 2)] * 3


def test_effects_are_measured_on_the_samples_that_bind_the_budget():
    """Those that are worst when every layer runs its fastest: of one batch of 64 a quarter."""
    verifier = Verifier(Subject(0.9999), {}, ANGLES, REFERENCES)
    assert verifier.run("fastest", to_the_end=True).batches == 3
    indices, worst = verifier.binding()
    assert indices == [1] and worst.tolist() == list(range(48, 64))


def test_a_plan_that_fails_is_run_up_to_the_batch_that_says_so():
    verifier = Verifier(Subject(0.99951), {}, ANGLES, REFERENCES)  # too much for the second batch alone
    first, second = verifier.run("a"), verifier.run("b")
    assert (first.batches, second.batches) == (2, 1)  # the one that failed goes first
    assert first.worst == second.worst > 1 - 0.99951
    assert verifier.run("a") is first  # and is not run again


def test_nan_fails():
    verifier = Verifier(Subject(0.9), {}, [ANGLES[0], ANGLES[1] * torch.nan, ANGLES[2]], REFERENCES)
    verdict = verifier.run("a")
    assert verdict.batches == 2 and not verdict.worst <= 0.1
    assert verifier.binding()[0] == [1]
