"""By step: what a plan brings at each part of a diffusion model's loop, and the timesteps at which it is worth its error.

Steps take the same time and do not err alike, so a plan may count in a range of timesteps alone: what people do by hand, who
leave the first and the last steps in 16 bits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ...common.timing import Track
from ...integrations.timesteps import Timesteps, describe, place_of, timesteps_of
from ...swap.plan import Plan
from ..choose import Option
from .measure import Measurer, annotated

#: Parts of a loop that are measured, each of about as many timesteps; and how many timesteps a loop has at least.
PARTS, LEAST = 8, 3
#: By how much the share of the error that steps out of a range bring passes their share of the time, for the range to be tried.
WORTH = 0.1


@dataclass
class Part:
    """Timesteps of a loop that follow each other; neighbours meet half-way, and the outermost have no bound."""

    timesteps: Timesteps
    share: float  #: of the model's calls
    error: float = math.nan  #: at the output, with the fastest candidates at these timesteps alone


@dataclass
class Loop:
    """The timesteps that a model is called at for one batch, if it is called in a loop over them."""

    calls: list[float] = field(default_factory=list)  #: of all calls, in their order
    is_known: bool = True  #: whether each call was at one timestep

    @contextmanager
    def noted(self, model: nn.Module) -> Iterator[None]:
        """Within it the model's calls are noted."""

        place = place_of(model)

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            of_call = timesteps_of(place, args, kwargs) if self.is_known else None
            if of_call is None or of_call[0] != of_call[1]:
                self.is_known = False
            else:
                self.calls.append(of_call[0])

        handle = model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def parts(self, batches: int) -> list[Part]:
        """Those of the loop, from the least timestep on; none where there is no loop."""
        values = sorted({*self.calls})
        if not self.is_known or len(values) < LEAST or len(self.calls) < LEAST * batches:
            return []
        count = min(PARTS, len(values))
        starts = [round(i * len(values) / count) for i in range(count + 1)]
        middle = [(values[i - 1] + values[i]) / 2 for i in starts[1:-1]]
        ends: list[float | None] = [None, *middle, None]
        groups = [{*values[a:b]} for a, b in itertools.pairwise(starts)]
        shares = [sum(t in group for t in self.calls) / len(self.calls) for group in groups]
        return [Part(timesteps, share) for timesteps, share in zip(itertools.pairwise(ends), shares)]


@dataclass
class Range:
    """The timesteps at which a plan counts, and of all steps the share of time and of error that they bring."""

    timesteps: Timesteps
    time: float
    error: float

    def scaled(self, options: Sequence[Sequence[Option]]) -> list[list[Option]]:
        """What the options of each layer, of which the first is to stay as it is, come to where they count in the range alone."""
        return [
            [Option(o.cost + (1 - self.time) * (of_layer[0].cost - o.cost), self.error * o.error) for o in of_layer]
            for of_layer in options
        ]


def measure(
    parts: Sequence[Part],
    plans: Sequence[Plan],
    measurer: Measurer,
    batches: list[Any],
    references: list[Tensor],
    worst: Tensor,
    track: Track,
) -> None:
    """Fills in each part's error, with its plan.

    Args:
        references: the model's own outputs of `batches`; worst: the samples that count.
    """
    content = measurer.content["times"]
    advance = track("measuring errors by step", len(parts))
    for part, plan in zip(parts, plans):
        layers = [(x.fqn, x.precision, x.calibrated) for x in plan.layers]
        key = repr(("timesteps", part.timesteps, layers, plan.attention_8bit))
        if key not in content:
            with annotated(f"while measuring {describe(part.timesteps)}; the model is as it was"):
                content[key] = measurer.output_error(plan, batches, references, worst)
            measurer.measurements.keep()
        errors = content[key]
        part.error = math.inf if errors is None else sum(errors) / max(len(errors), 1)
        advance()


def range_of(parts: Sequence[Part]) -> Range | None:
    """Without the first and the last parts that bring more than their share of the error; None where errors are spread evenly."""
    total = sum(part.error for part in parts)
    if not 0 < total < math.inf:
        return None
    gains = [part.share - part.error / total for part in parts]
    spans = ((sum(gains[i:j]), i, j) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))
    gain, i, j = max(spans, key=lambda span: (span[0], span[2] - span[1]))
    if gain < WORTH:
        return None
    within = parts[i:j]
    low, high = within[0].timesteps[0], within[-1].timesteps[1]
    return Range((low, high), sum(x.share for x in within), sum(x.error for x in within) / total)


def evidence(parts: Sequence[Part], tried: Range | None, planned: Timesteps | None) -> dict[str, Any] | None:
    """As a plan keeps it; None where there is no loop."""
    if not parts:
        return None
    rows = [
        {"timesteps": list(x.timesteps), "share": x.share, "error": x.error if math.isfinite(x.error) else None}
        for x in parts
    ]
    return {
        "parts": rows,
        "tried": None if tried is None else list(tried.timesteps),
        "chosen": None if planned is None else list(planned),
    }
