"""The interpreted GPU's clock, which torch.cuda.Event and Triton's benchmarks read: modelled time, not the host's.

It advances by what launches take if warps issue an instruction a cycle on each of the machine's schedulers: a lower bound,
known without counting anything else. `benchmark` counts, and has the time of model.py.
"""

from __future__ import annotations

from .. import core
from ..rates import rates

SCHEDULERS = 4  # of a multiprocessor


def seconds() -> float:
    """What the launches of this process have taken on the installed device so far."""
    p = core.device_properties()
    cycles = core.counters()["warp_instructions"] / (SCHEDULERS * p.multiprocessors)
    return cycles / (rates(p.arch.decode())["clock"] * 1e6)
