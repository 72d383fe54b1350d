"""`python -m gpuless run`: a Python script that says device="cuda", or a program that `build` made, and what to make of it."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

from .. import core
from ..verdicts.coverage import read_coverage
from ..verdicts.finding_log import FindingLog, read_log
from ..verdicts.junit import write_junit
from ..verdicts.sarif import write_sarif
from ..verdicts.verdict import Report
from .program import check_program

#: launches end by themselves at their time limit; a program that takes so many seconds more, its own work, is ended
GRACE = 20.0
#: lines about explored launches that a script's run prints; --json has all
MOST_LINES = 20


def run(arguments: list[str]) -> int:
    """The exit code of the verdict."""
    options = _parser().parse_args(arguments)
    check_program(options.program)
    if options.time_limit < 0:
        raise ValueError(f"--time-limit is a number of seconds, or 0 for none, not {options.time_limit}")
    report = run_program(options)
    if options.program.suffix == ".py":  # a CUDA program prints them itself, as they come
        for finding in report.findings:
            print(f"{finding}\n", file=sys.stderr)
        for launch in report.explored[:MOST_LINES]:
            print(launch, file=sys.stderr)
        if len(report.explored) > MOST_LINES:
            print(f"... and {len(report.explored) - MOST_LINES} launches more (--json)", file=sys.stderr)
    write_reports(report, options)
    return report.verdict.exit_code


def write_reports(report: Report, options: argparse.Namespace) -> None:
    """The summary on stderr, and the files that are asked for."""
    for coverage in report.coverage or []:
        print(f"coverage of {coverage}", file=sys.stderr)
    print(report.summary(), file=sys.stderr)
    if options.json:
        report.write_json(options.json)
    if options.sarif:
        write_sarif(report, options.sarif)
    if options.junit:
        write_junit(report, options.junit)


def add_report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the verdict and all it stands on")
    parser.add_argument("--sarif", type=pathlib.Path, metavar="FILE", help="write the findings for code scanning")
    parser.add_argument("--junit", type=pathlib.Path, metavar="FILE", help="write them for a CI's list of tests")
    parser.add_argument("--coverage", action="store_true", help="list what of the kernels did not run; slower")
    parser.add_argument("--strict", action="store_true", help="also what is against the letter of the PTX ISA alone")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gpuless run",
        description="Runs a Python script with torch's cuda device being an interpreted GPU, or a CUDA program that `build` made. "
        "Its kernels are checked. The exit code is the verdict: 0 clean, 2 error, 3 finding, 4 incomplete.",
    )
    parser.add_argument("--gpu", default="sm_90a", choices=core.ARCHITECTURES, help="which (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of its schedule: repeats a finding")
    parser.add_argument(
        "--explore", type=int, default=0, metavar="N", help="try N orders of each launch's synchronisation"
    )
    parser.add_argument("--schedule", default="", help="of a finding that one of these had: repeats it")
    parser.add_argument("--guard", action="store_true", help="kernels get padded, poisoned copies of their arguments")
    parser.add_argument(
        "--ignore", type=pathlib.Path, action="append", default=[], metavar="FILE", help="rules of what is known"
    )
    parser.add_argument(
        "--largest", default="0", metavar="BYTES", help="32-bit offsets have to be right in tensors of 32GB, say"
    )
    parser.add_argument(
        "--time-limit", type=float, default=0, metavar="SECONDS", help="longer is incomplete (default: no limit)"
    )
    parser.add_argument("--log", type=pathlib.Path, metavar="FILE", help="write each finding there as it comes")
    add_report_options(parser)
    parser.add_argument("program", type=pathlib.Path, help="SCRIPT.py, or a program")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the program's own")
    return parser


def run_program(options: argparse.Namespace) -> Report:
    report = Report(str(options.program), options.gpu, [options.seed])
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        log = options.log or pathlib.Path(folder) / "log"
        log.unlink(missing_ok=True)
        coverage = pathlib.Path(folder) / "coverage.json"
        environment = {k: v for k, v in os.environ.items() if k != "GPULESS_ARCH"} | {"GPULESS_LOG": str(log)}
        if options.coverage:
            environment["GPULESS_COVERAGE"] = str(coverage)
        process = subprocess.Popen(_command(options, environment), env=environment)
        report.status, ran_out = _wait(process, options.time_limit)
        report.seconds = time.monotonic() - begin
        seen = read_log(log)
        if coverage.exists():
            report.coverage = read_coverage(coverage.read_text())
    report.launches, report.warp_instructions = seen.launches, seen.warp_instructions
    report.incomplete += seen.incomplete
    report.explored = seen.explored
    report.not_covered = _not_covered(seen)
    report.sort(seen.findings, options.strict)
    if ran_out:
        report.incomplete.append(
            f"the program was ended after {options.time_limit:g} s and {GRACE:g} more (--time-limit)"
        )
    elif not _succeeded(options.program, report.status) and not any(
        "ran out of time" in why for why in seen.incomplete
    ):
        report.errors.append(_ending(report.status))
    elif not seen.ended:
        report.incomplete.append("the program left by _exit, or replaced itself: its last launches are not known")
    return report


def _not_covered(seen: FindingLog) -> list[str]:
    orders = "other schedules than this seed's"
    if seen.explored:
        complete = len(seen.explored) == seen.launches and all(launch.complete for launch in seen.explored)
        orders = "orders that are never explored (docs/orders.md)" if complete else "orders that were not explored"
    return ["machine code: the PTX is run", orders, "code that was not executed (--coverage)"]


def _succeeded(program: pathlib.Path, status: int) -> bool:
    """The stand-in of CUDA programs tells of findings by 3, and of refusals by 4."""
    return status == 0 or (program.suffix != ".py" and status in (3, 4))


def _command(options: argparse.Namespace, environment: dict[str, str]) -> list[str]:
    if options.program.suffix == ".py":
        how = {"arch": options.gpu, "seed": options.seed, "guard": options.guard, "largest": options.largest,
               "explore": options.explore, "schedule": options.schedule,
               "time_limit": options.time_limit, "ignore": [str(file.absolute()) for file in options.ignore]}  # fmt: skip
        module = [sys.executable, "-m", "gpuless.commands.script", json.dumps(how)]
        return [*module, str(options.program), *options.arguments]
    if options.guard or len(options.ignore) > 1:
        raise ValueError("a CUDA program takes no --guard, and one file of --ignore")
    environment |= {"GPULESS_ARCH": options.gpu, "GPULESS_SEED": str(options.seed), "GPULESS_FINDINGS": "collect",
                    "GPULESS_STRICT": str(int(options.strict))}  # fmt: skip
    if options.explore:
        environment["GPULESS_EXPLORE"] = str(options.explore)
    if options.schedule:
        environment["GPULESS_SCHEDULE"] = options.schedule
    if options.largest != "0":
        environment["GPULESS_LARGEST"] = options.largest
    if options.ignore:
        environment["GPULESS_IGNORE"] = str(options.ignore[0])
    if options.time_limit:
        environment["GPULESS_TIME_LIMIT"] = str(options.time_limit)
    return [str(options.program.absolute()), *options.arguments]


def _wait(process: subprocess.Popen[bytes], time_limit: float) -> tuple[int, bool]:
    """(its status, whether it was ended for its time limit)."""
    try:
        return process.wait(time_limit + GRACE if time_limit else None), False
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait(), True
    except BaseException:
        process.kill()
        raise


def _ending(status: int) -> str:
    if status >= 0:
        return f"the program ended with status {status}"
    name = signal.Signals(-status).name if -status in signal.valid_signals() else f"signal {-status}"
    return f"the program was ended by {name}"
