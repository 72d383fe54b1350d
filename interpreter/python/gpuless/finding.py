"""What there is to say about a kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

#: what can be found, as csrc/finding.h has it
KINDS = (
    "race", "in_flight", "uninitialised", "out_of_bounds", "overflow", "misaligned", "deadlock", "barrier", "mbarrier", "illegal",
    "assertion", "unsupported",
)  # fmt: skip


class Finding(RuntimeError):
    """A kernel did what a GPU might have left unsaid. Its text has every field that is known.

    Attributes:
        kind: one of `KINDS`; "unsupported" is a limit of the interpreter, the others are faults of the kernel.
        breaks: "hardware", or "isa": against the letter of the PTX ISA, where today's GPUs are known to do what was meant.
        message: one sentence.
        kernel, mangled: its name, and as the PTX has it.
        file, line: of the source; "" and 0 where it was compiled without line information.
        instruction, ptx_line: the PTX instruction and its line within the module.
        other_file, other_line, other_ptx_line: of the access before, that this one is in conflict with; "" and 0: not known.
        within_warp: between lanes of one warp.
        block, warp, lane: who; warp and lane are -1 where it was no one of them.
        address: the address in question, or None.
        count: how often it came, where launches went on.
        rule: the number of the rule that ignores it, or -1.
        arch, seed: `gpuless.gpu(arch, seed=seed)` repeats it,
        schedule: with `schedule=` where it came of an order that was explored; else "".
    """

    def __init__(
        self,
        kind: str,
        message: str,
        *,
        breaks: str = "hardware",
        kernel: str = "",
        mangled: str = "",
        file: str = "",
        line: int = 0,
        instruction: str = "",
        ptx_line: int = 0,
        other_file: str = "",
        other_line: int = 0,
        other_ptx_line: int = 0,
        within_warp: bool = False,
        block: Sequence[int] = (0, 0, 0),
        warp: int = -1,
        lane: int = -1,
        address: int | None = None,
        count: int = 1,
        rule: int = -1,
        arch: str = "",
        seed: int = 0,
        schedule: str = "",
        text: str = "",
    ):
        super().__init__(text or f"{kind}: {message}\n  kernel {kernel}\n  repeat with arch {arch}, seed {seed}")
        self.kind, self.breaks, self.message = kind, breaks, message
        self.kernel, self.mangled, self.file, self.line = kernel, mangled, file, line
        self.instruction, self.ptx_line = instruction, ptx_line
        self.other_file, self.other_line, self.other_ptx_line = other_file, other_line, other_ptx_line
        self.within_warp = within_warp
        self.block, self.warp, self.lane, self.address = tuple(block), warp, lane, address
        self.count, self.rule = count, rule
        self.arch, self.seed, self.schedule = arch, seed, schedule

    def is_same(self, other: Finding) -> bool:
        """Whether both are of one kind, between the same instructions of one kernel, and both within a warp or both not."""

        def key(f: Finding) -> tuple[Any, ...]:
            return f.kind, f.mangled, f.file, f.line, f.ptx_line, f.other_ptx_line, f.within_warp

        return key(self) == key(other)

    def fields(self) -> dict[str, Any]:
        """What JSON has of it: its attributes and its text. `Finding(**fields)` is the same again."""
        return {**self.__dict__, "block": list(self.block), "text": str(self)}

    def __reduce__(self) -> tuple[Any, ...]:  # to cross processes: exceptions are made anew from their text alone
        return _restore, (self.fields(),)


class TimeLimit(RuntimeError):
    """Launches took longer than `Device.time_limit` allows."""


class FindingWarning(UserWarning):
    """A finding that breaks no hardware, only the letter of the PTX ISA."""


for _type in (Finding, TimeLimit, FindingWarning):
    _type.__module__ = "gpuless"  # where users find it, and what a traceback shows


def _restore(fields: dict[str, Any]) -> Finding:
    return Finding(**fields)


@dataclasses.dataclass(frozen=True)
class Explored:
    """The orders in which a launch's warps may synchronise, as far as they were explored before it ran (`gpuless.gpu(explore=)`).

    Attributes:
        kernel: its name.
        launch: its number since the seed was set, as schedules name it.
        orders: those that differ. Blocks that do not synchronise with each other count one by one.
        runs: executions of the launch, or of some of its blocks, that this took.
        complete: there are no other orders.
        limit: why there may be more; "" where there are none.
    """

    kernel: str
    launch: int
    orders: int
    runs: int
    complete: bool
    limit: str

    def __str__(self) -> str:
        orders = f"{self.orders} order{'s' * (self.orders != 1)}"
        if self.complete:
            return f"{self.kernel}, launch {self.launch}: explored all {orders}"
        return f"{self.kernel}, launch {self.launch}: explored {orders} of more ({self.limit})"
