"""Runs one operation's benchmark cases beside plain torch code and torch.compile of it; prints a table and writes JSON.

python -m benchmarks.quantize [--device cpu|cuda] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from forwardpass.common import environment
from forwardpass.common.models.compare import finite_relative_error
from forwardpass.common.timing import interleave, sustained
from forwardpass.dispatch import BACKENDS, Operation, use_backend
from forwardpass.testing import benchmark_cases

#: What the rounds of a case may take, of which there are at least a third of those asked for.
SECONDS = 30
#: What a call of plain torch may take on a CPU: the largest cases are of a GPU's size.
LONGEST = 2
#: Relative L2 error beside the baseline, as a guard that both do the same work; the tests have the real bounds.
SAME_WORK = 2e-2


def parser(doc: str | None) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--rounds", type=int, default=15, help="timed samples of each candidate")
    p.add_argument("--json", metavar="FILE", help="also write the result to this file")
    return p


def header(schema: str, device: str, measured: list[str]) -> dict[str, Any]:
    """What every result file starts with."""
    return {
        "schema": f"forwardpass.{schema}/1",
        "versions": environment.versions(),
        "device": environment.device(device),
        "commit": commit(),
        "measured": measured,
    }


def commit() -> str | None:
    """The commit that is checked out, with "+changes" where files differ from it; None outside a checkout."""

    def git(*args: str) -> str:
        root = pathlib.Path(__file__).parent
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write(result: dict[str, Any], file: str | None) -> None:
    if file:
        pathlib.Path(file).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(file).write_text(json.dumps(result, indent=1) + "\n")


def main(
    operations: dict[Operation, Callable[..., Any]],
    doc: str | None,
    add_options: Callable[[argparse.ArgumentParser], None] = lambda p: None,
    other: Callable[[argparse.Namespace], dict[str, Any] | None] = lambda args: None,
) -> None:
    """Benchmarks operations, each beside a baseline that takes the operation's arguments by name.

    add_options, other: of a benchmark that can do something else; the result of that, or None where it is not asked for.
    """
    p = parser(doc)
    p.add_argument("--smallest", action="store_true", help="of each operation the smallest case alone: a trial")
    add_options(p)
    args = p.parse_args()
    if instead := other(args):
        write(instead, args.json)
        return
    result = header("benchmark", args.device, ["results"])
    result["results"] = []
    for op, baseline in operations.items():
        cases = benchmark_cases(op)
        for case in [min(cases, key=lambda c: c.bytes())] if args.smallest else cases:
            row = run_case(op, case, baseline, args.device, args.rounds)
            result["results"].append(row)
            print(f"{row['case']}: {row['left_out']}" if "left_out" in row else table_row(row), flush=True)
    write(result, args.json)


@torch.inference_mode()
def run_case(op: Operation, case: Any, baseline: Callable[..., Any], device: str, rounds: int) -> dict[str, Any]:
    """Milliseconds, GB/s and ratios of one case; "left_out" with the reasons where nothing but the reference runs it."""
    call = as_a_layer_has_them(case.arguments(device))
    reasons = {b: op.why_not(b, *call) for b in BACKENDS if b != "reference"}
    backends = [b for b, reason in reasons.items() if reason is None]

    def left_out(why: str) -> dict[str, Any]:
        return {"operation": op.name, "case": op.describe(call), "left_out": f"left out: {why}"}

    if not backends:
        return left_out("; ".join(f"{b}: {reason}" for b, reason in reasons.items()))
    torch.compiler.reset()
    compiled = torch.compile(baseline, dynamic=False)
    runs: dict[str, Callable[..., Any]] = {b: lambda *args, b=b: on_backend(op, b, args)() for b in backends}
    runs["torch eager"] = lambda *args: baseline(**dict(zip(op.parameters, args)))
    runs["torch.compile"] = lambda *args: compiled(**dict(zip(op.parameters, args)))
    start = time.perf_counter()
    expected = op.results(runs["torch eager"], call)
    if device == "cpu" and (seconds := time.perf_counter() - start) > LONGEST:
        return left_out(f"plain torch takes {seconds:.0f} s a call on this CPU, more than {LONGEST}")
    for name, run in runs.items():
        check_same_work(f"{name} of {op.describe(call)}", op.results(run, call), expected)
    calls = {name: functools.partial(run, *call) for name, run in runs.items()}
    clocks: list[int | None] = []

    def fitting(seconds: float) -> int:
        return min(rounds, max(rounds // 3, round(SECONDS / seconds)))

    timings = interleave(calls, device, rounds=fitting, on_round=lambda: clocks.append(environment.sm_clock(device)))
    peers = {p: timings[p].median for p in ("torch eager", "torch.compile")}
    return {
        "operation": op.name,
        "case": op.describe(call),
        "bytes": case.bytes(),
        "sm_mhz": median_clock(clocks),
        "timings": {
            name: {
                **t.to_json(),
                "sustained": sustained_figures(case, calls[name], device),
                "gb_per_s": case.bytes() / t.median / 1e6,
                "times_as_fast_as": ratios(t.median, peers),
            }
            for name, t in timings.items()
        },
    }


def median_clock(clocks: Sequence[int | None]) -> float | None:
    """MHz, of single calls after pauses; None on a CPU."""
    known = [mhz for mhz in clocks if mhz is not None]
    return statistics.median(known) if known else None


def sustained_figures(case: Any, call: Callable[[], Any], device: str) -> dict[str, Any] | None:
    """What a loop measures that keeps a GPU busy, with its clock; None on a CPU, whose samples are loops."""
    if device != "cuda":
        return None
    s = sustained(call, device)
    return {**s.to_json(), "gb_per_s": case.bytes() / s.milliseconds / 1e6,
            "tflops": case.flops() / s.milliseconds / 1e9 if hasattr(case, "flops") else None}  # fmt: skip


def sustained_text(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return "no sustained figure on a CPU"
    tflops = "" if figures["tflops"] is None else f"{figures['tflops']:8.1f} TFLOP/s "
    clock = "an unknown clock" if figures["sm_mhz"] is None else f"{figures['sm_mhz']:.0f} MHz"
    return f"sustained {figures['milliseconds'] * 1e3:9.1f} us {tflops}{figures['gb_per_s']:7.0f} GB/s at {clock}"


def as_a_layer_has_them(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments with their rows one after the other: those of the tests stand apart. Scales of groups stay as they are."""
    return tuple(a.contiguous() if isinstance(a, Tensor) and a.dim() and a.stride(-1) == 1 else a for a in args)


def on_backend(op: Operation, backend: str, call: tuple[Any, ...]) -> Callable[[], Any]:
    def run() -> Any:
        with use_backend(backend):
            return op(*call)

    return run


def ratios(median: float, peers: dict[str, float]) -> dict[str, float]:
    return {name: p / median for name, p in peers.items()}


def check_same_work(name: str, actual: Any, expected: Any) -> None:
    pairs = [(g, e) for g, e in zip(tensors(actual), tensors(expected)) if e.numel()]
    for g, e in pairs:
        error = finite_relative_error(g, e)
        if not error <= SAME_WORK:
            sys.exit(f"{name} does other work than the baseline: relative error {error:.1e}")


def tensors(result: Any) -> Iterator[Tensor]:
    return iter((result,) if isinstance(result, Tensor) else result)


def table_row(row: dict[str, Any]) -> str:
    lines = [f"{row['case']}, {row['bytes'] / 1e6:.2f} MB"]
    for name, t in row["timings"].items():
        beside = ", ".join(f"{r:.2f} x {peer}" for peer, r in t["times_as_fast_as"].items() if peer != name)
        lines.append(
            f"  {name:<14}{t['median']:9.4f} ms [{t['low']:.4f}, {t['high']:.4f}]  {t['gb_per_s']:7.1f} GB/s  {beside}"
        )
        if t["sustained"] is not None:
            lines.append(f"  {'':<14}{sustained_text(t['sustained'])}")
    return "\n".join(lines)
