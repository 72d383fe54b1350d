"""What the launches of one call do, counted and modelled by the interpreter: of the compiled PTX, without a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import bench
from forwardpass import interpret
from forwardpass.dispatch import Operation
from gpuless import core
from gpuless.timing.profile import Counts, KernelProfile

IMPLEMENTATIONS = ("cuda", "triton")


@dataclasses.dataclass
class Interpreted:
    """What the launches of one call did."""

    kernels: list[KernelProfile]
    seconds: float  # modelled, of all launches
    binding: str  # of the kernel that takes longest

    @property
    def counts(self) -> Counts:
        total = Counts()
        for k in self.kernels:
            total += k.counts
        return total

    def row(self, case: Any) -> dict[str, Any]:
        """What there is to say of any operation's case."""
        return {
            "launches": [k.kernel for k in self.kernels],
            "modelled_us": self.seconds * 1e6,
            "binding": self.binding,
            "least_bytes": case.bytes(),
            "dram_bytes": self.dram,
            "l2_bytes": self.l2,
            "wavefronts_per_ideal": self.counts.conflict_ratio,
        }

    @property
    def dram(self) -> int:
        return sum(k.footprint_read + k.footprint_written for k in self.kernels)

    @property
    def l2(self) -> int:
        c = self.counts
        return 32 * c.sectors + c.bulk_read + c.bulk_written


def run(op: Operation, implementation: str, arch: str, case: Any) -> Interpreted:
    """Raises RuntimeError (Unsupported among others) where this build or this GPU cannot."""
    return run_call(bench.on_backend(op, implementation, bench.as_a_layer_has_them(case.arguments())), arch)


@torch.inference_mode()
def run_call(call: Callable[[], Any], arch: str) -> Interpreted:
    with interpret(arch, counters=True, checks=False) as device:
        call()
    models = device.model()
    return Interpreted(device.kernels(), sum(m.seconds for m in models), max(models, key=lambda m: m.seconds).binding)


def heading(arch: str) -> str:
    return (
        f"interpreted on {core.ARCHITECTURES[arch]} ({arch}), PTX as compiled; times are modelled, nothing is measured"
    )


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def result(name: str, arch: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Modelled and counted: nothing is measured."""
    return bench.header(f"{name}-interpreted", "cpu", []) | {"arch": arch, "modelled": ["results"], "results": rows}
