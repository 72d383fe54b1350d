"""A kernel's time, modelled from its counts: the slowest of its resources, each used at its full rate.

So a lower bound of what the counted work takes: latencies, dependences, launch overhead and what ptxas makes of the PTX
are not in it. Every CTA counts as much as every other, and the busiest multiprocessor has whole CTAs. All sectors go to
L2, as if L1 held nothing; DRAM moves each sector once, as if L2 held everything and were cold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..core import ARCHITECTURES
from ..rates import rates
from .profile import KernelProfile

#: pipe -> the classes of instructions that it executes
PIPES = {
    "float": ("float",),
    "float64": ("float64",),
    "half": ("half",),
    "integer": ("integer", "logic", "compare"),
    "special function": ("special function",),
    "conversion": ("conversion",),
    "shuffle and vote": ("shuffle and vote",),
}
#: not issued by the machine, for the most part: ptxas renames registers and knows that generic addresses need no change
FREE = ("move",)


@dataclass(frozen=True)
class Modelled:
    """Modelled, not measured.

    Attributes:
        seconds: of all launches together, at the clock of rates.py.
        binding: the resource that takes them.
        terms: resource -> seconds that it alone would take; `seconds` is the largest.
    """

    kernel: str
    arch: str
    launches: int
    seconds: float
    binding: str
    terms: dict[str, float]

    def __str__(self) -> str:
        ordered = sorted(self.terms.items(), key=lambda t: -t[1])
        terms = ", ".join(f"{name} {_time(s)}" for name, s in ordered if s >= 0.01 * self.seconds and s)
        return (
            f"modelled {_time(self.seconds)} on {ARCHITECTURES[self.arch]} for {self.launches} "
            f"launch{'es' * (self.launches != 1)} of {self.kernel}, bound by {self.binding} ({terms})"
        )


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} us" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def modelled(k: KernelProfile) -> Modelled:
    rate, counts = rates(k.arch), k.counts
    ctas = math.prod(k.grid)
    # of all the work, what the busiest multiprocessor has
    share = math.ceil(ctas / k.multiprocessors) / ctas

    def on_chip(cycles: float) -> float:
        return cycles * share / (rate["clock"] * 1e6)

    terms = {"issue": on_chip(sum(n for c, n in counts.instructions.items() if c not in FREE) / rate["issue"])}
    for pipe, classes in PIPES.items():
        terms[pipe] = on_chip(32 * sum(counts.instructions[c] for c in classes) / rate[pipe])
    terms["tensor cores"] = on_chip(sum(n / _tensor_rate(rate, name) for name, n in counts.macs.items()))
    bytes_of_l1 = counts.wavefronts * 128 + counts.sectors * 32 + counts.bulk_shared + counts.matrix_shared
    terms["shared memory and L1"] = on_chip(bytes_of_l1 / rate["shared memory"])
    bytes_of_l2 = counts.sectors * 32 + counts.bulk_read + counts.bulk_written
    terms["L2"] = bytes_of_l2 / rate["L2"] / (rate["clock"] * 1e6)
    terms["DRAM"] = (k.footprint_read + k.footprint_written) / (rate["DRAM"] * 1e9)
    binding = max(terms, key=lambda t: terms[t])
    return Modelled(k.kernel, k.arch, k.launches, terms[binding], binding, terms)


def _tensor_rate(rate: dict[str, float], name: str) -> float:
    instruction, element = name.split()
    return rate[f"mma {element}"] * (rate["mma share"] if instruction == "mma" else 1)
