"""The plot of what `fp.size_batch` measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..common.printing.plots import axes, empty, require

if TYPE_CHECKING:
    from .size_batch import BatchSizing


def size_batch(sizing: BatchSizing, file: str) -> None:
    """What was measured of each batch size, and the policies of which no other is better."""
    require(file)
    figure, (measured, simulated) = axes("measured, medians", f"simulated, {sizing.arrival_rate:g} requests a second")
    sizes = [p.batch for p in sizing.points]
    measured.plot(sizes, [p.next_ms for p in sizing.points], "o-", label="from one result to the next, under load")
    measured.plot(sizes, [p.first_ms for p in sizing.points], "o--", label="from a free server")
    measured.set_xscale("log", base=2)
    measured.set_xticks(sizes, [str(n) for n in sizes])
    measured.set_xlabel("requests in a batch")
    measured.set_ylabel("ms")
    measured.legend(fontsize=8)
    name = f"p{sizing.percentile:g}"
    if not sizing.frontier:
        empty(simulated, f"no policy holds the objective: {sizing.reason}")
    simulated.plot(
        [c.latency_ms[name] for c in sizing.frontier], [100 * c.busy for c in sizing.frontier], "o-", label="frontier"
    )
    if (policy := sizing.policy) is not None:
        label = f"max_batch={policy.max_batch}, max_wait_ms={policy.max_wait_ms:g}"
        simulated.plot([policy.latency_ms[name]], [100 * policy.busy], "*", markersize=14, label=label)
    simulated.axvline(sizing.latency_slo_ms, linestyle=":", color="gray", label="objective")
    simulated.set_xlabel(f"{name} of the latency, ms")
    simulated.set_ylabel("% of the time computing")
    simulated.legend(fontsize=8)
    figure.savefig(file)
