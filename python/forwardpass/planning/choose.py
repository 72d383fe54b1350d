"""Chooses one option for each layer: the least cost under a budget of error, as an integer program solved with a known gap.

    minimise  sum_l cost[l, o_l]   subject to   sum_l error[l, o_l] <= budget          (multiple-choice knapsack)

Costs are put on a grid, rounded down, and a dynamic program over the grid finds, for every total on it, the choice of least
error: `fronts` of it is the whole frontier, for every budget at once. A choice's true cost is at least its cost on the grid,
so the least total on the grid that holds a budget is a lower bound on what any choice can cost: the difference is the gap.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch

#: Steps of the grid in all, and for each layer where there are many: rounding down moves a total by less than a step a layer.
GRID, STEPS = 1 << 16, 256


@dataclass(frozen=True)
class Option:
    """What a layer may become: its cost (milliseconds or bytes) and what it adds to the error of the output."""

    cost: float
    error: float


@dataclass(frozen=True)
class Choice:
    """An option for every layer, by index; what they add up to; how far the cost may be from the least, at most."""

    options: tuple[int, ...]
    cost: float
    error: float
    gap: float


class Frontier:
    """The choices that are worth having, from the least error to the least cost: `errors` rise and `bounds`, the least that any
    choice with no more error can cost, fall. `choice(i)` is the one that reaches errors[i].

    Args:
        layers: the options of each layer, at least one; costs and errors are not negative.

    Raises:
        ValueError: a layer without options, or a cost or error that is negative or not finite.
    """

    def __init__(self, layers: Sequence[Sequence[Option]]) -> None:
        for n, options in enumerate(layers):
            if not options:
                raise ValueError(f"layer {n} has no option: give it at least the one to stay as it is")
            if not all(0 <= v < float("inf") for o in options for v in (o.cost, o.error)):
                raise ValueError(f"layer {n} has a cost or an error that is negative or not finite: leave that out")
        # What the cheapest option of each layer costs is spent anyway: the grid holds what is beyond it.
        least = [min(o.cost for o in options) for options in layers]
        beyond = [[o.cost - low for o in options] for options, low in zip(layers, least)]
        step = sum(map(max, beyond)) / max(GRID, STEPS * len(layers)) or 1.0
        self._layers = layers
        self._units = [[int(c / step) for c in costs] for costs in beyond]
        self._options: list[torch.Tensor] = []
        size = sum(map(max, self._units)) + 1
        totals = torch.full((size,), float("inf"), dtype=torch.float64)  # least error at exactly this total on the grid
        totals[0] = 0
        for options, units in zip(layers, self._units):
            ways = torch.full((len(options), size), float("inf"), dtype=torch.float64)
            for way, option, n in zip(ways, options, units):
                way[n:] = totals[: size - n] + option.error
            totals, ways_of_least = ways.min(0)
            self._options.append(ways_of_least.to(torch.int16))
        self._totals: list[int] = []
        self.errors: list[float] = []
        for total, error in enumerate(totals.tolist()):
            if error < (self.errors[-1] if self.errors else float("inf")):
                self._totals.append(total)
                self.errors.append(error)
        for values in (self._totals, self.errors):
            values.reverse()
        self.bounds = [sum(least) + total * step for total in self._totals]

    def __len__(self) -> int:
        return len(self.errors)

    def choice(self, i: int) -> Choice:
        """Read back from the last layer to the first."""
        total, options_of_layers = self._totals[i], []
        for units, options in zip(reversed(self._units), reversed(self._options)):
            options_of_layers.append(int(options[total]))
            total -= units[options_of_layers[-1]]
        options_of_layers.reverse()
        cost = sum(layer[o].cost for layer, o in zip(self._layers, options_of_layers))
        return Choice(tuple(options_of_layers), cost, self.errors[i], max(cost - self.bounds[i], 0.0))

    def changes(self, choice: Choice) -> list[Choice]:
        """The choices that differ from this one in one layer and cost less."""
        changed = []
        for n, options in enumerate(self._layers):
            now = options[choice.options[n]]
            for o, option in enumerate(options):
                if option.cost < now.cost:
                    one_changed = (*choice.options[:n], o, *choice.options[n + 1 :])
                    cost, error = choice.cost - now.cost + option.cost, choice.error - now.error + option.error
                    changed.append(Choice(one_changed, cost, error, self._gap(cost, error)))
        return changed

    def _gap(self, cost: float, error: float) -> float:
        return max(cost - self.bounds[max(bisect_right(self.errors, error) - 1, 0)], 0.0)
