"""Which instructions and branches of the kernels ran, and which source lines never did."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

#: what ends a kernel that is wrong anyway; and the end of a function, which compilers also put where nothing gets to
NOT_COUNTED = ("trap", "brkpt", "ret", "ret.uni", "exit")


@dataclasses.dataclass
class Coverage:
    """The coverage of a kernel: of all of its launches and compiled variants together.

    Attributes:
        instructions, executed: of its PTX, with the functions that it calls. Executed: with at least one thread.
        branches, both_ways: conditional branches, and those that were taken and passed.
        missed_lines: (file, line) of the source of which nothing was executed; line of the PTX and "" without line
            information.
        one_way_lines: (file, line) of branches that always went one way.
    """

    kernel: str
    instructions: int = 0
    executed: int = 0
    branches: int = 0
    both_ways: int = 0
    missed_lines: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    one_way_lines: list[tuple[str, int]] = dataclasses.field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "missed_lines": [list(p) for p in self.missed_lines],
                "one_way_lines": [list(p) for p in self.one_way_lines]}  # fmt: skip

    def __str__(self) -> str:
        text = f"{self.kernel}: {self.executed} of {self.instructions} instructions, "
        text += f"{self.both_ways} of {self.branches} branches both ways"
        if self.missed_lines:
            text += f"\n    never ran: {_places(self.missed_lines)}"
        if self.one_way_lines:
            text += f"\n    always one way: {_places(self.one_way_lines)}"
        return text


def _places(places: Sequence[tuple[str, int]]) -> str:
    """ "a.cu:3, 7-9"."""
    parts: list[str] = []
    previous = ""
    for file, first, last in _runs(places):
        lines = f"{first}-{last}" if last > first else str(first)
        name = pathlib.Path(file).name if file else "PTX"
        parts.append(lines if file == previous and parts else f"{name}:{lines}")
        previous = file
    return ", ".join(parts)


def _runs(places: Sequence[tuple[str, int]]) -> list[tuple[str, int, int]]:
    runs: list[tuple[str, int, int]] = []
    for file, line in sorted(places):
        if runs and runs[-1][0] == file and runs[-1][2] + 1 >= line:
            runs[-1] = (file, runs[-1][1], line)
        else:
            runs.append((file, line, line))
    return runs


def read_coverage(text: str) -> list[Coverage]:
    """What the core wrote (gpuless_coverage_json), by kernel."""
    merged: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for record in json.loads(text or "[]"):
        key = record["kernel"], record["module"], record["function"]
        if key not in merged:
            merged[key] = record["instructions"]
            continue
        for total, more in zip(merged[key], record["instructions"]):  # the same code, launched in another shape
            total["active"] += more["active"]
            total["passed"] += more["passed"]
    kernels: dict[str, list[dict[str, Any]]] = {}
    for (kernel, _, _), instructions in merged.items():
        kernels.setdefault(kernel, []).extend(instructions)
    return [_of_kernel(kernel, instructions) for kernel, instructions in kernels.items()]


def _of_kernel(kernel: str, instructions: list[dict[str, Any]]) -> Coverage:
    counted = [i for i in instructions if i["opcode"] not in NOT_COUNTED]
    branches = [i for i in counted if i["guarded"] and i["opcode"].split(".")[0] == "bra"]
    for i in branches:  # it has done its work where nobody takes it, too
        i["executed"] = i["active"] + i["passed"]
    lines: dict[tuple[str, int], bool] = {}
    ways: dict[tuple[str, int], bool] = {}
    for i in counted:
        place = _place(i)
        lines[place] = lines.get(place, False) or _ran(i)
    for i in branches:
        place = _place(i)
        if _ran(i):
            ways[place] = ways.get(place, True) and bool(i["active"] and i["passed"])
    return Coverage(
        kernel,
        instructions=len(counted),
        executed=sum(map(_ran, counted)),
        branches=len(branches),
        both_ways=sum(bool(i["active"] and i["passed"]) for i in branches),
        missed_lines=sorted(place for place, ran in lines.items() if not ran),
        one_way_lines=sorted(place for place, both in ways.items() if not both),
    )


def _ran(instruction: dict[str, Any]) -> bool:
    return instruction.get("executed", instruction["active"]) > 0


def _place(instruction: dict[str, Any]) -> tuple[str, int]:
    """The line of the function that was inlined there: that is the line which its author sees."""
    file = instruction["inner_file"]
    return (file, instruction["inner_line"]) if file else ("", instruction["ptx_line"])
