"""What `fp.plan` measured, as JSON keeps it beside a plan."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from ..common.timing import Timing
from ..swap.plan_evidence import NO_GAIN
from .candidates.attention_rows import AttentionLayer
from .candidates.measure import Candidate, Layer
from .choose import Frontier

#: Points of the frontier that are kept.
POINTS = 200


def row(layer: Layer, choice: str | None, target: str) -> dict[str, Any]:
    """A layer, its candidates, its choice and why."""
    return {
        "fqn": layer.leaf.fqn,
        "in_features": layer.features[0],
        "out_features": layer.features[1],
        "calls": {phase: [list(shape) for shape in shapes] for phase, shapes in layer.calls.items()},
        "before": {"ms": layer.ms.to_json() if layer.ms else None, "phases": _json(layer.phases), "bytes": layer.bytes},
        "candidates": {name: candidate(c) for name, c in layer.candidates.items()},
        **({"crossover": layer.bits[choice].crossover} if choice and isinstance(layer, AttentionLayer) else {}),
        "choice": choice,
        "reason": reason(layer, choice, target),
    }


def candidate(c: Candidate) -> dict[str, Any]:
    """`output`: mean and worst of the samples (or batches), as the criterion adds them up."""
    return {
        "refused": {"code": c.refusal.code, "text": c.refusal.text} if c.refusal else None,
        "ms": c.ms.to_json() if c.ms else None,
        "phases": _json(c.phases),
        "bytes": c.bytes,
        "error": c.error,
        "quantisation": c.quantisation,
        "kernel": c.kernel,
        "output": {"mean": c.output_mean, "worst": max(c.output)} if c.output else None,
    }


def _json(phases: Mapping[str, Timing]) -> dict[str, Any]:
    return {name: timing.to_json() for name, timing in phases.items()}


def reason(layer: Layer, choice: str | None, target: str) -> str:
    if choice is not None:
        c = layer.candidates[choice]
        if target == "memory":
            return f"{c.bytes} bytes, {layer.bytes} as it is"
        assert c.ms and layer.ms
        return f"{layer.ms.low / c.ms.low:.2f} times as fast: {c.ms.low:.3g} ms, {layer.ms.low:.3g} as it is"
    if any(c.refusal is None for c in layer.candidates.values()):
        return "left alone: the error that a swap brings here buys more elsewhere, or passes the budget"
    timed = [f"{name} {c.ms.low:.3g} ms" for name, c in layer.candidates.items() if c.ms]
    if timed and layer.ms and target == "latency":
        return f"{NO_GAIN} than {layer.ms.low:.3g} ms ({', '.join(timed)})"
    refusals = dict.fromkeys(str(c.refusal) for c in layer.candidates.values())
    return f"left alone: {'; '.join(refusals)}"


def blocks(
    layers: list[Layer], choices: Mapping[str, str | None], cost: Callable[[Layer | Candidate], float]
) -> dict[str, dict[str, Any]]:
    """For each block that a model repeats (`encoder.layer.3`): the cost before and after, the error that the plan is predicted to
    add there, and the error of each candidate in all its layers where it is a gain, None where it is no gain.
    """
    by_block: dict[str, dict[str, Any]] = {}
    for layer in layers:
        if match := re.match(r"(.*\.)?\d+(?=\.)", layer.leaf.fqn):
            empty = {"before": 0.0, "after": 0.0, "error": 0.0, "candidates": dict.fromkeys(layer.candidates)}
            block = by_block.setdefault(match[0], empty)
            candidate = layer.candidates[name] if (name := choices[layer.leaf.fqn]) else None
            block["before"] += cost(layer)
            block["after"] += cost(candidate or layer)
            block["error"] += candidate.output_mean if candidate else 0.0
            for name in layer.open():
                block["candidates"][name] = (block["candidates"][name] or 0.0) + layer.candidates[name].output_mean
    return by_block


def thinned(front: Frontier) -> list[list[float]]:
    """[least cost, predicted error], from the least error on."""
    stride = max(1, len(front) // POINTS)
    return [[front.bounds[i], front.errors[i]] for i in sorted({*range(0, len(front), stride), len(front) - 1})]
