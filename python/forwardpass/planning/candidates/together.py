"""Gate and up of an MLP as one product: what that takes less than the two layers where both get one precision.

A swap makes one product of them where it can (`fp.nn.GatedMLP`), so a plan counts them so.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...common.timing import Track, interleave
from ...proofs.mlp_formulas import Block
from ..choose import Option
from .measure import ROUNDS, WARMUP, Layer, Measurer, annotated, form_of, sample_inputs, twins

#: candidate -> phase -> how many milliseconds less one product takes than two and the multiplication of what they give; of those
#: that can be one; negative where it takes more
Saved = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Pair:
    """The layers of an MLP with a gate: gate, up and down."""

    block: Block
    gate: Layer
    up: Layer
    down: Layer

    @property
    def layers(self) -> tuple[Layer, Layer]:
        return self.gate, self.up

    def candidates(self) -> list[str]:
        """Those that may be chosen for both."""
        return [name for name in self.gate.open() if name in self.up.open()]


def pairs_of(layers: Sequence[Layer]) -> list[Pair]:
    """Those that are called alike."""
    by_fqn = {layer.leaf.fqn: layer for layer in layers}
    pairs = []
    for layer in layers:
        block = layer.leaf.block
        if isinstance(block, Block) and block.formula.gated and len(block.names) == 3:
            three = [by_fqn.get(name) for name in block.names]
            gate, up, down = three
            if gate is not None and up is not None and down is not None and gate.calls == up.calls:
                pairs.append(Pair(block, gate, up, down))
    return pairs


def time_pairs(pairs: Sequence[Pair], measurer: Measurer, track: Track) -> list[Saved]:
    """What each pair saves: one timing for all of one form that are called alike."""
    times, keys = measurer.content["times"], []
    for pair in pairs:
        forms = [form_of(layer.leaf) for layer in (pair.gate, pair.up, pair.down)]
        keys.append(repr(("together", forms, pair.gate.calls, pair.candidates())))
    by_key = dict(zip(keys, pairs))
    advance = track("timing gates and ups as one product", len(by_key))
    for key, pair in by_key.items():
        if key not in times:
            with annotated(f"while timing {pair.block.fqn}; the model is as it was"):
                times[key] = _time(pair, measurer)
            measurer.measurements.keep()
        advance()
    return [times[key] for key in keys]


def _time(pair: Pair, measurer: Measurer) -> Saved:
    saved: Saved = {}
    for name in pair.candidates():
        three = [measurer.built(layer.leaf, name) for layer in (pair.gate, pair.up, pair.down)]
        if pair.block.why_not(three) is None:
            gate, up, _ = three
            one = pair.block.build(three).layers[0].eval()
            saved[name] = {
                phase: _saved(gate, up, one, [sample_inputs(pair.gate.leaf, shape)[0] for shape in shapes], phase)
                for phase, shapes in pair.gate.calls.items()
            }
    return saved


def _saved(gate: nn.Module, up: nn.Module, one: nn.Module, inputs: list[Tensor], phase: str) -> float:
    with torch.inference_mode():
        # between two steps of a decoder come the weights of all other layers
        turns = [twins(m, inputs[:1]) if phase.startswith("decode") else [m] for m in (gate, up, one)]  # type: ignore[arg-type]
        gates, ups, ones = map(itertools.cycle, turns)
        timings = interleave(
            {
                "two": lambda: [next(gates)(x) * next(ups)(x) for x in inputs],
                "one": lambda: [next(ones)(x) for x in inputs],
            },
            inputs[0].device,
            rounds=ROUNDS,
            warmup=WARMUP,
        )
    return timings["two"].median - timings["one"].median


def units_of(
    layers: Sequence[Layer], pairs: Sequence[Pair], saved: Sequence[Saved]
) -> list[tuple[tuple[Layer, ...], Saved]]:
    """What is chosen at once: gate and up of each pair, and every other layer by itself, which saves nothing."""
    units: list[tuple[tuple[Layer, ...], Saved]] = [(pair.layers, x) for pair, x in zip(pairs, saved)]
    paired = {layer.leaf.fqn for unit, _ in units for layer in unit}
    return [*units, *(((layer,), {}) for layer in layers if layer.leaf.fqn not in paired)]


def options_of(
    unit: Sequence[Layer], options: Mapping[str, list[tuple[str | None, Option]]], saved: Mapping[str, float]
) -> list[tuple[tuple[str | None, ...], Option]]:
    """Each of every layer's options, by name, and less what is saved where all have one candidate."""
    together = []
    for choice in itertools.product(*(options[layer.leaf.fqn] for layer in unit)):
        names = tuple(name for name, _ in choice)
        less = saved.get(names[0], 0.0) if names[0] is not None and len(set(names)) == 1 else 0.0
        cost = max(sum(option.cost for _, option in choice) - less, 0.0)
        together.append((names, Option(cost, sum(option.error for _, option in choice))))
    return together
