"""The time of kernels as one multiprocessor would spend it: csrc/timeline_replay.h, read and shown. Modelled."""

from __future__ import annotations

import json
import linecache
import pathlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..core import ARCHITECTURES

#: of a table's line; docs and terminals
WIDTH = 100
#: docs/interpreter.md, "Kernels that nothing was fitted to"
ERROR = "Of kernels that nothing was fitted to, modelled times were off by 10 % (median), at most by 20 %."


@dataclass
class LineTime:
    """The time of a source line; where a kernel was compiled without line information, file is "" and line that of the PTX.

    Attributes:
        issued: instructions that warps issued, after the rules that stand for ptxas.
        waited: reason -> cycles that warps stood before an instruction of this line, added over warps.
    """

    file: str
    line: int
    text: str
    issued: int = 0
    waited: Counter[str] = field(default_factory=Counter)


@dataclass
class KernelTimeline:
    """The time of one kernel in one shape of launch, modelled from what the CTAs of one multiprocessor did in its first launch.

    Attributes:
        resident: clusters (most often of one CTA) that a multiprocessor has at once; by default of assumed registers.
        clusters, replayed: those that the busiest multiprocessor has, and how many of them the clock went through; the rest
            is extrapolated.
        cycles: of a launch, from its first CTA on.
        dependency_cycle: of the first griddepcontrol.wait; 0 where there is none.
        after_cycles: of a launch with programmatic stream serialisation, those that come after the launch before has ended.
        busy: resource -> share of the cycles; of "tensor cores" their occupancy.
        clock: MHz.
        launch_seconds: what a launch costs besides.
    """

    kernel: str
    arch: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    launches: int
    programmatic: int
    resident: int
    clusters: int
    replayed: int
    cycles: int
    dependency_cycle: int
    after_cycles: int
    busy: dict[str, float]
    clock: float
    launch_seconds: float
    record: dict[str, Any] = field(repr=False)

    @classmethod
    def read(cls, record: dict[str, Any], machine: dict[str, float]) -> KernelTimeline:
        shape: dict[str, Any] = {name: tuple(record[name]) for name in ("grid", "block", "cluster")}
        names = (
            "kernel",
            "arch",
            "launches",
            "programmatic",
            "resident",
            "clusters",
            "replayed",
            "cycles",
            "dependency_cycle",
            "after_cycles",
        )
        busy = {name: n / max(1, record["replayed_cycles"]) for name, n in record["busy"].items()}
        return cls(
            **{name: record[name] for name in names}, **shape, busy=busy, clock=machine["clock"],
            launch_seconds=machine["launch"] * 1e-6, record=record,
        )  # fmt: skip

    @property
    def seconds(self) -> float:
        """All launches, one after the other. One with programmatic stream serialisation has begun, and done what comes before
        its griddepcontrol.wait, when the launch before it ends; and more, if that lets it begin early and there is room."""
        one = self.cycles / (self.clock * 1e6) + self.launch_seconds
        dependent = self.after_cycles / (self.clock * 1e6) if self.dependency_cycle else one
        return (self.launches - self.programmatic) * one + self.programmatic * dependent

    @property
    def waited(self) -> Counter[str]:
        return sum((line.waited for line in self.lines()), Counter())

    def lines(self, inlined: bool = False) -> list[LineTime]:
        """By source line, what was waited at most first. What was inlined counts for the line of the kernel, or for its own."""
        lines: dict[tuple[str, int], LineTime] = {}
        opcodes: dict[tuple[str, int], dict[str, None]] = {}
        prefix = "inner_" if inlined else ""
        for i in self.record["instructions"]:
            file = i[f"{prefix}file"]
            place = file, i[f"{prefix}line"] if file else i["ptx_line"]
            line = lines.setdefault(place, LineTime(*place, ""))
            line.issued += i["slots"]
            line.waited.update(i["waited"])
            opcodes.setdefault(place, {})[i["opcode"]] = None
        for place, line in lines.items():
            line.text = linecache.getline(*place).strip() or ", ".join(opcodes[place])
        return sorted(lines.values(), key=lambda line: -line.waited.total())

    def __str__(self) -> str:
        return self.table()

    def table(self, rows: int = 12, inlined: bool = False) -> str:
        """At most so many lines of source, each cut to 100 columns."""
        launches = f"{self.launches} launch{'es' * (self.launches != 1)}"
        head = [
            f"modelled {_time(self.seconds)} on {ARCHITECTURES[self.arch]} for {launches} of {self.kernel}",
            f"  grid {self.grid}, block {self.block}, cluster {self.cluster}: {self.cycles} cycles at {self.clock:g} MHz",
            f"  {self.resident} of {self.clusters} clusters at once on a multiprocessor, {self.replayed} replayed",
            "  busy: " + ", ".join(f"{name} {share:.0%}" for name, share in self.busy.items()),
        ]
        lines = self.lines(inlined)
        every = sum(line.waited.total() for line in lines)
        cells = [("line", "issued", "waited", "share", "mostly for", "source")]
        for line in lines[:rows]:
            place = f"{pathlib.Path(line.file).name}:{line.line}" if line.file else f"PTX {line.line}"
            most = line.waited.most_common(1)
            total = line.waited.total()
            share = f"{total / every:.0%}" if every else ""
            cells.append((place, str(line.issued), str(total), share, most[0][0] if most else "", line.text))
        widths = [max(map(len, column)) for column in zip(*cells)]
        for c in cells:
            numbers = [f"{text:>{w}}" for text, w in zip(c[1:4], widths[1:4])]
            head.append("  " + "  ".join([f"{c[0]:<{widths[0]}}", *numbers, f"{c[4]:<{widths[4]}}", c[5]]))
        return "\n".join(line[:WIDTH].rstrip() for line in head)


class Timeline:
    """What `Device.timeline` gives: modelled, not measured. `print` shows where each kernel's warps wait.

    Attributes:
        kernels: a `KernelTimeline` for each kernel and shape of launch.
    """

    def __init__(self, kernels: list[KernelTimeline]):
        self.kernels = kernels

    @property
    def cycles(self) -> int:
        """One launch of each kernel."""
        return sum(k.cycles for k in self.kernels)

    @property
    def seconds(self) -> float:
        """All launches."""
        return sum(k.seconds for k in self.kernels)

    def __str__(self) -> str:
        return "\n\n".join([*map(str, self.kernels), ERROR]) if self.kernels else "no kernel was launched"

    def save_trace(self, path: str | pathlib.Path) -> None:
        """What one multiprocessor does, for chrome://tracing or ui.perfetto.dev: a process for each kernel, a thread for each
        warp, for the tensor cores and for bulk copies. Microseconds from the first CTA on."""
        events: list[dict[str, Any]] = []
        for process, k in enumerate(self.kernels):
            events.append(
                {"ph": "M", "pid": process, "name": "process_name", "args": {"name": f"{k.kernel} (modelled)"}}
            )
            for thread, name in enumerate(k.record["tracks"]):
                events.append({"ph": "M", "pid": process, "tid": thread, "name": "thread_name", "args": {"name": name}})
            for thread, name, begin, end in k.record["spans"]:
                event = {
                    "ph": "X",
                    "pid": process,
                    "tid": thread,
                    "ts": begin / k.clock,
                    "dur": (end - begin) / k.clock,
                }
                if isinstance(name, int):
                    event["name"] = k.record["names"][name]
                else:
                    file, line, opcode = name
                    event["name"] = f"{pathlib.Path(file).name}:{line}" if file else f"PTX {line}"
                    event["args"] = {"first": opcode}
                events.append(event)
        pathlib.Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ns"}))


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} us" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"
