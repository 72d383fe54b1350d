"""`python -m gpuless report`: a program, run on the interpreted GPU and shown by source line."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterable

from .. import core
from ..latencies import as_text, machine
from ..timing.model import modelled
from ..timing.profile import Counts, KernelProfile, LineProfile, by_line
from ..timing.timeline import ERROR, KernelTimeline, Timeline
from .program import check_program


def report(arguments: list[str]) -> int:
    """The program's exit status; the table goes to stdout behind what the program prints."""
    parser = argparse.ArgumentParser(
        prog="python -m gpuless report",
        description="Runs a Python script, or a program that `build` made, with every launch counted, and prints where "
        "its kernels spend what. Instructions are PTX's. Times are modelled, not measured.",
    )
    parser.add_argument("--arch", default="sm_90a", choices=core.ARCHITECTURES, help="where the program names none")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--inlined", action="store_true", help="by the lines of inlined functions, not of the kernel")
    parser.add_argument("--json", type=pathlib.Path, help="also keep the counts there")
    parser.add_argument(
        "--timeline", action="store_true", help="also print what the warps of one multiprocessor wait for"
    )
    parser.add_argument("--trace", type=pathlib.Path, help="also keep the timeline there, for ui.perfetto.dev")
    parser.add_argument("program", help="SCRIPT.py, PROG, or counts that --json kept")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    program = pathlib.Path(options.program)
    check_program(program)
    timed = options.timeline or options.trace is not None
    status, counts, timeline = 0, program.read_text() if program.suffix == ".json" else "", ""
    if counts and timed:
        raise ValueError(f"{program} has counts alone: a timeline takes the program itself")
    if not counts:
        status, counts, timeline = run(program, options.arguments, options.arch, timed)
    if options.json:
        options.json.write_text(counts)
    profiles = [KernelProfile.read(k) for k in json.loads(counts)]
    kernels = [k for k in profiles if options.kernel in k.kernel]
    if kernels:
        print(table(kernels, options.inlined))
    elif profiles:
        launched = ", ".join(dict.fromkeys(k.kernel for k in profiles))
        print(f"no kernel that was launched has {options.kernel!r} in its name; there are {launched}")
    else:
        print(f"{program} launched no kernel on the interpreted GPU")
    if timeline:
        records = (k for k in json.loads(timeline) if options.kernel in k["kernel"])
        times = Timeline([KernelTimeline.read(k, machine(k["arch"])) for k in records])
        if options.timeline:
            print("\n\n".join([*(k.table(inlined=options.inlined) for k in times.kernels), ERROR]))
        if options.trace:
            times.save_trace(options.trace)
    return status


#: what runs a script that need not import gpuless, as `python SCRIPT.py` would
SCRIPT = """
import os, runpy, sys
import gpuless
del sys.argv[0]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(program: pathlib.Path, arguments: list[str], arch: str, timed: bool) -> tuple[int, str, str]:
    """Its exit status, the counts that the core wrote at its end, and the timeline."""
    with tempfile.TemporaryDirectory() as folder:
        counts, timeline = (pathlib.Path(folder) / name for name in ("counts.json", "timeline.json"))
        environment = {"GPULESS_ARCH": arch, **os.environ, "GPULESS_COUNTERS": str(counts)}
        if timed:
            environment["GPULESS_TIMELINE"] = folder
            for name in core.ARCHITECTURES:
                (pathlib.Path(folder) / f"{name}.txt").write_text(as_text(machine(name)))
        python = [sys.executable, "-c", SCRIPT, str(program)]
        command = python if program.suffix == ".py" else [str(program.absolute())]
        process = subprocess.run([*command, *arguments], env=environment)
        for output in (counts, timeline) if timed else (counts,):
            if not output.exists():
                raise RuntimeError(f"{program} ended with status {process.returncode} and without its {output.stem}")
        return process.returncode, counts.read_text(), timeline.read_text() if timed else ""


COLUMNS = ("line", "issued", "lanes", "MAC", "sectors/request", "global bytes", "wavefronts", "waits", "source")


def table(kernels: list[KernelProfile], inlined: bool = False) -> str:
    lines = []
    for name in dict.fromkeys(k.kernel for k in kernels):
        launches = [k for k in kernels if k.kernel == name]
        total = Counts()
        for k in launches:
            total += k.counts
        lines.append(f"{name}")
        for k in launches:
            lines.append(f"  grid {k.grid}, block {k.block}: {modelled(k)}")
        lines.append(f"  {classes(total)}")
        rows = [COLUMNS, *(row(p) for p in by_line(launches, inlined)), ("all", *figures(total), "")]
        lines += [*aligned(rows), ""]
    return "\n".join(lines)


def classes(counts: Counts) -> str:
    return ", ".join(f"{n} {name}" for name, n in counts.instructions.most_common())


def row(p: LineProfile) -> tuple[str, ...]:
    place = f"{pathlib.Path(p.file).name}:{p.line}" if p.file else f"PTX {p.line}"
    return place, *figures(p.counts), p.text[:80]


def figures(c: Counts) -> tuple[str, ...]:
    moved = c.global_read + c.global_written + c.bulk_read + c.bulk_written
    sectors, conflicts = c.sectors_per_request, c.conflict_ratio
    return (
        str(c.issued),
        f"{c.lanes / c.issued:.1f}" if c.issued else "",
        str(c.macs.total() or ""),
        "" if sectors is None else f"{sectors:.2f}",
        str(moved or ""),
        "" if conflicts is None else f"{c.wavefronts} ({conflicts:.2f})",
        str(c.waits.total() or ""),
    )


def aligned(rows: list[tuple[str, ...]]) -> Iterable[str]:
    """Numbers to the right, the first and the last column to the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for r in rows:
        cells = [f"{r[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(r[1:-1], widths[1:-1])), r[-1]]
        yield "  " + "  ".join(cells).rstrip()
