"""What the interpreter has to say about a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: what can be found, as csrc/interpreter/finding.h has it
KINDS = (
    "race", "in_flight", "uninitialised", "out_of_bounds", "misaligned", "deadlock", "barrier", "mbarrier", "illegal",
    "unsupported",
)  # fmt: skip


class InterpreterFinding(RuntimeError):
    """A kernel did what a GPU might have left unsaid. Its text has every field that is known.

    Attributes:
        kind: one of `KINDS`; "unsupported" is a limit of the interpreter, the others are faults of the kernel.
        message: one sentence.
        kernel, file, line: of the source; file "" and line 0 where it was compiled without line information.
        instruction, ptx_line: the PTX instruction and its line within the module.
        block, warp, lane: who; warp and lane are -1 where it was no one of them.
        address: the address in question, or None.
        arch, seed: `fp.interpret(arch, seed=seed)` repeats it.
    """

    def __init__(
        self,
        kind: str,
        message: str,
        *,
        kernel: str = "",
        file: str = "",
        line: int = 0,
        instruction: str = "",
        ptx_line: int = 0,
        block: Sequence[int] = (0, 0, 0),
        warp: int = -1,
        lane: int = -1,
        address: int | None = None,
        arch: str = "",
        seed: int = 0,
        text: str = "",
    ):
        super().__init__(text or f"{kind}: {message}\n  kernel {kernel}\n  repeat with arch {arch}, seed {seed}")
        self.kind, self.message = kind, message
        self.kernel, self.file, self.line = kernel, file, line
        self.instruction, self.ptx_line = instruction, ptx_line
        self.block, self.warp, self.lane, self.address = tuple(block), warp, lane, address
        self.arch, self.seed = arch, seed

    def __reduce__(self) -> tuple[Any, ...]:  # to cross processes: exceptions are made anew from their text alone
        return _restore, ({**self.__dict__, "text": str(self)},)


class InterpreterTimeout(RuntimeError):
    """Launches took longer than `Device.time_limit` allows."""


InterpreterTimeout.__module__ = "forwardpass"
InterpreterFinding.__module__ = "forwardpass"  # where users find it, and what a traceback shows


def _restore(fields: dict[str, Any]) -> InterpreterFinding:
    return InterpreterFinding(**fields)
