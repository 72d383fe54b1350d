"""The interpreted GPU's clock, which torch.cuda.Event and Triton's benchmarks read: modelled time, not the host's.

It advances by what launches take if warps issue an instruction a cycle on each of the machine's schedulers: a lower bound,
known without counting anything else. `benchmark` counts, and has the time of model.py.
"""

from __future__ import annotations

from .. import core
from ..device import Device
from ..rates import rates

SCHEDULERS = 4  # of a multiprocessor


class Clock:
    def __init__(self) -> None:
        self._device: Device | None = None

    def start(self, device: Device) -> None:
        self._device = device

    @property
    def seconds(self) -> float:
        assert self._device
        cycles = core.counters()["warp_instructions"] / (SCHEDULERS * core.device_properties().multiprocessors)
        return cycles / (rates(self._device.arch)["clock"] * 1e6)


clock = Clock()
