"""What a decoder's cache of keys and values becomes in a plan: what the perplexity allows, and what makes steps faster."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from ...common.timing import Timing
from ...integrations.transformers.kv_scales import KV_CACHES
from ...swap.plan import Plan
from ..criterion import PERPLEXITY, Criterion
from ..verify import Verifier

#: The times of the model as it is, `before`, and `after` under a plan, of each phase.
Phases = Mapping[str, Mapping[str, Timing]]


def kv_cache_candidates(names: str | Iterable[str] | None, criterion: Criterion, decodes: bool) -> tuple[str, ...]:
    """ValueError, in one sentence, where there is no such cache, or nothing to choose it by."""
    if names is None:
        return ()
    listed = (names,) if isinstance(names, str) else tuple(names)
    if not listed or not all(n in KV_CACHES for n in listed):
        raise ValueError(f"kv_cache names at least one of {', '.join(KV_CACHES)}, and is {names!r}")
    if criterion.kind != PERPLEXITY or not decodes:
        raise ValueError("the cache of a plan is chosen by perplexity and by the time of a step: pass max_perplexity_increase=, "
                         "and a Decoding among shapes=, or no kv_cache=")  # fmt: skip
    return listed


def with_cache(
    plan: Plan,
    phases: Phases,
    attention: tuple[str, ...],
    names: tuple[str, ...],
    verifier: Verifier,
    run: Callable[[Plan], Phases],
) -> tuple[Plan, dict[str, dict[str, Any]]]:
    """The plan with the cache whose steps take least, of those whose perplexity is within the budget; as it is where none is
    faster. And what each of `names` came to.

    Perplexity is that of steps, which see earlier tokens through the cache. A step's time is relative to the model as it is, which
    takes turns with every plan.

    Args:
        phases: the times under the plan without; run: those under another.
        attention: the modules that are swapped where there is such a cache.
    """
    if not names:
        return plan, {}
    criterion, without = verifier.subject.criterion, _step(phases)
    best, least = plan, without
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        trial = replace(plan, kv_cache=name, attention=attention)
        verdict = verifier.run(trial, to_the_end=True)
        holds = verdict.worst <= criterion.budget  # False for NaN
        step = _step(run(trial)) if holds else None
        value = criterion.shown(verdict.worst) if math.isfinite(verdict.worst) else None
        results[name] = {"value": value, "holds": holds, "step": step, "without": without}
        if step is not None and step < least:
            best, least = trial, step
    return best, {name: {**x, "chosen": best.kv_cache == name} for name, x in results.items()}


def _step(phases: Phases) -> float:
    """The time of all steps, as a share of what they take in the model as it is."""
    if "after" not in phases:
        return 1.0
    before, after = (
        sum(t.low for p, t in phases[when].items() if p.startswith("decode")) for when in ("before", "after")
    )
    return after / before
