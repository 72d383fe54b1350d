"""How the error of an output is measured and bounded, and in which form errors of single layers add up to that of a plan."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.batches import padding_mask
from ..common.models.compare import squared_relative_error
from .agreement import next_tokens
from .pictures import psnr, ssim

#: Of pictures.
PSNR, SSIM = "min_psnr", "min_ssim"
PERPLEXITY = "max_perplexity_increase"
#: metric(output, reference, batch): how much worse the output is, 0 where it is the reference
Metric = Callable[[Tensor, Tensor, Any], float]


@dataclass(frozen=True)
class Criterion:
    """One of: the lowest cosine over samples (a norm that is off counts as well), the largest relative L2 error over batches, the
    largest value of a metric, the rise of a decoder's perplexity over all batches together, the lowest PSNR or SSIM of a picture.

    Errors that layers bring are small and independent of each other, so their squares add up at the output: 1 - cosine, which
    is half of the squared error across the output, the squared relative error, the squared error of a picture's pixels, and
    1 - SSIM. Those are `additive`; `budget` and `worst` are in the same units but for a metric, whose own are unknown, and
    perplexity, of which they are the logarithm.
    """

    kind: str  #: min_cosine, max_error, metric, max_perplexity_increase, min_psnr or min_ssim
    bound: float
    metric: Metric | None = None

    @staticmethod
    def of(
        max_error: float | None,
        min_cosine: float | None,
        metric: Metric | None,
        tolerance: float | None,
        max_perplexity_increase: float | None = None,
        min_psnr: float | None = None,
        min_ssim: float | None = None,
    ) -> Criterion:
        criteria = {
            "max_error": max_error,
            "min_cosine": min_cosine,
            "metric": metric,
            PERPLEXITY: max_perplexity_increase,
            PSNR: min_psnr,
            SSIM: min_ssim,
        }
        named = [name for name, value in criteria.items() if value is not None]
        if len(named) != 1 or (metric is None) != (tolerance is None):
            raise ValueError("plan takes exactly one criterion, max_error=, min_cosine=, metric= with tolerance=, "
                             "max_perplexity_increase=, or of images= min_psnr= or min_ssim=, and got "
                             f"{', '.join([*named, *(['tolerance'] if tolerance is not None else [])]) or 'none'}: pass one, "
                             "e.g. min_cosine=0.9995")  # fmt: skip
        bound = tolerance if metric is not None else criteria[named[0]]
        low, high = (-1, 1) if named[0] in ("min_cosine", SSIM) else (0, math.inf)
        if (
            isinstance(bound, bool)
            or not isinstance(bound, int | float)
            or not low <= bound <= high
            or bound == math.inf
        ):
            name = "tolerance" if metric is not None else named[0]
            raise ValueError(
                f"{name} must be {'between -1 and 1' if high == 1 else 'a finite number, 0 or more'}, not {bound!r}"
            )
        if metric is not None and not callable(metric):
            raise TypeError(
                f"metric must be callable as metric(output, reference, batch), not a {type(metric).__name__}"
            )
        return Criterion(named[0], float(bound), metric)

    @property
    def budget(self) -> float:
        if self.kind == PERPLEXITY:
            return math.log1p(self.bound)
        if self.kind == PSNR:
            return 10 ** (-self.bound / 10)
        return {"min_cosine": 1 - self.bound, SSIM: 1 - self.bound, "max_error": self.bound**2, "metric": self.bound}[
            self.kind
        ]

    def compared(self, output: Tensor, batch: Any) -> Tensor:
        """What is kept and compared of a batch's output: all, or for perplexity the losses of its tokens, in nats [tokens, 1]."""
        if self.kind != PERPLEXITY:
            return output
        logits, target = next_tokens(output, batch)
        return F.cross_entropy(logits.float(), target, reduction="none").unsqueeze(1)

    def additive(self, actual: Tensor, expected: Tensor, batch: Any) -> Tensor:
        """fp64 on the host: for min_cosine 1 - cosine of every sample and, as no cosine sees it, half of the square of its norm's
        relative error, together half of its squared relative error. Of pictures the mean squared error, or 1 - SSIM, of each. Else
        the batch's squared relative error [1]."""
        if self.kind == PSNR:
            return 10 ** (-psnr(actual, expected) / 10)
        if self.kind == SSIM:
            return 1 - ssim(actual, expected)
        mask = padding_mask(batch, expected.shape[:-1])
        actual, expected = samples(actual, mask).double(), samples(expected.to(actual.device), mask).double()
        if self.kind == "min_cosine":
            return (1 - cosines(actual, expected) + norm_errors(actual, expected).square() / 2).cpu()
        return squared_relative_error(actual, expected).reshape(1).cpu()

    def worst(self, errors: Tensor, actual: Tensor, expected: Tensor, batch: Any) -> float:
        """The error of one batch that must not pass `budget`; `errors`: what `additive` gave for it."""
        if self.metric is not None:
            return float(self.metric(actual, expected.to(actual.device), batch))
        if self.kind == PERPLEXITY:
            return (actual.double() - expected.to(actual.device).double()).mean().item()
        return errors.max().item() if errors.numel() else 0.0

    def together(self, worst: list[float], tokens: list[int]) -> float:
        """What must not pass `budget`, of what `worst` gave for each batch: the largest, or of perplexity the mean over tokens."""
        if self.kind == PERPLEXITY:
            return sum(w * n for w, n in zip(worst, tokens)) / max(sum(tokens), 1)
        return max(worst)

    def fails(self, worst: float) -> bool:
        """Whether one batch says already that the plan does not hold. Of NaN it does."""
        return self.kind != PERPLEXITY and not worst <= self.budget

    def shown(self, worst: float) -> float:
        """What `together` found in the units of `bound`."""
        if self.kind == PERPLEXITY:
            return math.expm1(worst)
        if self.kind == PSNR:
            return -10 * math.log10(max(worst, 1e-20))  # 200 dB where all are equal: JSON has no infinity
        return {"min_cosine": 1 - worst, SSIM: 1 - worst, "max_error": math.sqrt(max(worst, 0.0)), "metric": worst}[
            self.kind
        ]

    def __str__(self) -> str:
        return {
            "min_cosine": "lowest cosine >= ",
            "max_error": "relative error <= ",
            "metric": "metric <= ",
            PSNR: "lowest PSNR in dB >= ",
            SSIM: "lowest SSIM >= ",
            PERPLEXITY: "perplexity's increase <= ",
        }[self.kind] + f"{self.bound:g}"


def samples(t: Tensor, mask: Tensor | None) -> Tensor:
    """[samples, n]: the first dimension counts samples; what is padding is zero on both sides and so adds nothing."""
    if mask is not None:
        t = torch.where(mask.to(t.device).unsqueeze(-1), t, 0)
    return t.flatten(1) if t.dim() > 1 else t.reshape(1, -1)


def cosines(actual: Tensor, expected: Tensor) -> Tensor:
    """The cosine of each pair of rows of two fp64 [samples, n]: 1 where both are zero, 0 where one is."""
    norms = actual.square().sum(1), expected.square().sum(1)
    cosine = (actual * expected).sum(1) / (norms[0] * norms[1]).sqrt().clamp_min(1e-300)
    return torch.where((norms[0] == 0) & (norms[1] == 0), 1.0, cosine)


def norm_errors(actual: Tensor, expected: Tensor) -> Tensor:
    """By how much the norm of each row of one fp64 [samples, n] is off, relative to the other's; 0 where that is zero."""
    norms = actual.norm(dim=1), expected.norm(dim=1)
    return torch.where(norms[1] == 0, 0 * norms[0], (norms[0] / norms[1].clamp_min(1e-300) - 1).abs())
