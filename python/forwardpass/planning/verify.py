"""Whole plans on all batches: what the budget is held to, and which samples bind it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..swap.plan import Plan
from .candidates.measure import SAMPLES, Arguments, Subject, annotated

#: The share of the samples in the measured batches that effects on the output are averaged over.
BINDING = 0.25


@dataclass(frozen=True)
class Verdict:
    """worst: the largest of what must not pass the budget, of the batches that were run; NaN where it is not finite. mean: of their
    samples, as errors add up.
    """

    worst: float
    mean: float
    batches: int


class Verifier:
    """Runs plans. Batches go in the order of the error that they had last, the worst first: a plan that fails is seen to fail on
    one of the first, and the others are not run.
    """

    def __init__(
        self,
        subject: Subject,
        arguments: Arguments,
        batches: list[Any],
        references: list[Tensor],
    ) -> None:
        self.subject, self.arguments, self.batches, self.references = subject, arguments, batches, references
        self._errors: dict[int, Tensor] = {}  #: of every sample of a batch, the last time
        self._worst = dict.fromkeys(range(len(batches)), 0.0)
        self._verdicts: dict[Plan, Verdict] = {}

    def run(self, plan: Plan, to_the_end: bool = False) -> Verdict:
        """The plan on all batches, or up to the first that passes the budget."""
        if plan in self._verdicts:
            return self._verdicts[plan]
        criterion, worst, errors, tokens = self.subject.criterion, [], [], []
        order = sorted(self._worst, key=lambda i: -self._worst[i])
        outputs = self.subject.outputs(self.batches[i] for i in order)
        with annotated("while verifying a plan; the model is as it was"), self.subject.swapped(plan, self.arguments):
            for i, actual in zip(order, outputs):
                batch, expected = self.batches[i], self.references[i]
                errors.append(criterion.additive(actual, expected, batch))
                worst.append(criterion.worst(errors[-1], actual, expected, batch))
                tokens.append(len(expected))
                self._errors[i] = errors[-1]
                self._worst[i] = worst[-1] if math.isfinite(worst[-1]) else math.inf
                if criterion.fails(worst[-1]) and not to_the_end:
                    break
        finite = all(map(math.isfinite, worst))
        verdict = Verdict(
            criterion.together(worst, tokens) if finite else math.nan, torch.cat(errors).mean().item(), len(worst)
        )
        self._verdicts[plan] = verdict
        return verdict

    def binding(self) -> tuple[list[int], Tensor]:
        """The batches that were worst, as many as hold SAMPLES samples, and the samples in them that were, by index."""
        size = sum(len(r) if r.dim() > 1 else 1 for r in self.references) / len(self.references)
        count = min(len(self.batches), max(1, round(SAMPLES / max(size, 1))))
        indices = sorted(sorted(self._worst, key=lambda i: -self._worst[i])[:count])
        if not self._errors:
            return indices, torch.arange(0)
        errors = torch.cat([self._errors[i] for i in indices]).nan_to_num(math.inf)
        return indices, errors.topk(max(1, round(BINDING * len(errors)))).indices.sort().values
