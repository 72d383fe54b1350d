"""A verification: the candidate in a process of its own, called with trial after trial, and compared here."""

from __future__ import annotations

import contextlib
import os
import pathlib
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..verdicts.coverage import read_coverage
from ..verdicts.finding_log import read_log
from ..verdicts.verdict import Case, Report
from .bounds import Expected, compare, expected, is_trivial
from .inputs import HOSTILE, Trial, trials
from .specification import FAMILIES, Specification
from .wire import Ended, Wire, from_bytes, name_of, packed

NOT_COVERED = (
    "machine code: the PTX is run",
    "schedules other than seeds 0 and 1",
    "sizes and inputs that were not tried",
)
#: seconds that an interrupted process has before it is killed
INTERRUPTED = 5.0


class TimeIsUp(RuntimeError):
    """The verification's own limit."""


class Process:
    """The worker, and the wire to it."""

    def __init__(self, arch: str, environment: dict[str, str], deadline: float, budget: float):
        requests, answers = os.pipe(), os.pipe()
        command = [
            sys.executable,
            "-m",
            "gpuless.verification.worker",
            arch,
            str(requests[0]),
            str(answers[1]),
            str(budget),
        ]
        # a group of its own: what the candidate starts, such as compilers, ends with it
        self._process = subprocess.Popen(
            command, env=environment, pass_fds=(requests[0], answers[1]), start_new_session=True
        )
        os.close(requests[0])
        os.close(answers[1])
        self._answers, self._deadline = answers[0], deadline
        self.wire = Wire(answers[0], requests[1])

    def ask(self, message: dict[str, Any], blobs: Sequence[bytes] = ()) -> tuple[dict[str, Any], list[bytes]]:
        self.wire.send(message, blobs)
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            if not selector.select(max(0.0, self._deadline - time.monotonic())):
                raise TimeIsUp
        return self.wire.receive()

    def end(self) -> int:
        """Its exit status."""
        try:
            self.wire.send({"do": "end"})
            return self._process.wait(
                max(30.0, self._deadline - time.monotonic())
            )  # on a busy machine it takes a while
        except (Ended, subprocess.TimeoutExpired):
            return self.kill()

    def kill(self) -> int:
        """Interrupts it first: torch then removes the lock of an extension that it builds, where later processes wait."""
        for signal_number, patience in ((signal.SIGINT, INTERRUPTED), (signal.SIGKILL, None)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal_number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
        return self._process.wait()


class Verification:
    """Calls one candidate, and compares.

    Args:
        entry: the function that is called.
        library: what the candidate was compiled to, where it is CUDA C++.
        time_limit: seconds for everything.
        keep_going: all trials are made, and not only those until the first that fails.
    """

    def __init__(
        self, candidate: pathlib.Path, spec: Specification, arch: str, entry: str, time_limit: float, *,
        library: str = "", coverage: bool = False, keep_going: bool = False, strict: bool = False,
    ):  # fmt: skip
        self.candidate, self.spec, self.entry = candidate, spec, entry
        self.arch, self.strict, self.library = arch, strict, library
        self.coverage, self.keep_going = coverage, keep_going
        self.time_limit = time_limit
        self.loaded = False
        self.report = Report(str(candidate), arch, [0, 1], not_covered=list(NOT_COVERED))
        self.random: list[tuple[list[Tensor], list[Expected]]] = []  # of the first two trials: output, reference

    def run(self) -> Report:
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            self._run(pathlib.Path(folder), begin + self.time_limit)
        self.report.seconds = time.monotonic() - begin
        return self.report

    def _run(self, folder: pathlib.Path, deadline: float) -> None:
        log, coverage = folder / "log", folder / "coverage.json"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("GPULESS_")} | {"GPULESS_LOG": str(log)}
        if self.coverage:
            environment["GPULESS_COVERAGE"] = str(coverage)
        process = Process(self.arch, environment, deadline, self.time_limit)
        try:
            self._trials(process)
        except TimeIsUp:
            process.kill()
            self.report.incomplete.append(
                f"{self.time_limit:g} s were over after {len(self.report.cases)} calls (--time-limit)"
                if self.loaded
                else f"{self.time_limit:g} s were over before the candidate was loaded, with all that it compiles (--time-limit)"
            )
        except Ended:
            process.kill()
            self.report.errors.append(f"the candidate ended its process in call {len(self.report.cases) + 1}")
        except BaseException:
            process.kill()
            raise
        else:
            if status := process.end():
                self.report.errors.append(f"the candidate's process ended with status {status}")
        seen = read_log(log)
        self.report.launches, self.report.warp_instructions = seen.launches, seen.warp_instructions
        self.report.incomplete += seen.incomplete
        self.report.sort(seen.findings, self.strict)
        if coverage.exists():
            self.report.coverage = read_coverage(coverage.read_text())

    def _trials(self, process: Process) -> None:
        where = {"path": str(self.candidate.absolute()), "library": self.library, "entry": self.entry}
        answer, _ = process.ask({"do": "load", **where})
        self.loaded = True
        if answer["error"]:
            self.report.errors.append(f"the candidate cannot be loaded: {answer['error']}")
            return
        for family, why in self.spec.without.items():
            self.report.not_covered.append(f"{family} inputs: {why}")
        self.report.not_covered += self.spec.not_covered
        if self.library:
            self.report.not_covered.append("strided and overlapping inputs: the host function takes pointers")
        for trial in trials(self.spec):
            if self.library and trial.family in ("strided", "overlap"):
                continue
            if (case := self._trial(process, trial)) is None:
                continue
            self.report.cases.append(case)
            if case.kind == "refused":
                return
            if case.problem and not self.keep_going:
                self.report.not_covered.append("calls after the first that failed (--keep-going)")
                return
        if self.random and all(is_trivial(outputs) for _, outputs in self.random):
            self.report.incomplete.append("zeros would pass: the reference's outputs are within their bounds of zero")

    def _trial(self, process: Process, trial: Trial) -> Case | None:
        """None where the reference refuses such inputs, as a logarithm's may."""
        case = Case(str(trial))
        try:
            references = expected(self.spec.at(trial.sizes), [*trial.args, *trial.weights])
        except ValueError as e:
            if trial.family not in HOSTILE:
                raise
            self.report.not_covered.append(f"{trial}: {e}")
            return None
        message, blobs = packed(trial.args)
        outputs = [{"dtype": name_of(e.dtype), "shape": list(e.value.shape)} for e in references]
        message |= {"do": "call", "seed": trial.seed, "reuses": trial.reuses, "outputs": outputs,
                    "sizes": list(trial.sizes.values()), "allowed": list(self.spec.allowed),
                    "model": self.spec.models.init_inputs(trial.sizes) if self.spec.models else None}  # fmt: skip
        answer, answers = process.ask(message, blobs)
        case.seconds = answer["seconds"]
        if answer["refused"] and not answer["findings"]:
            case.kind = "refused"
            self.report.incomplete.append(f"{case.name}: {answer['refused']}")
        elif answer["error"]:
            case.kind, case.problem = "error", answer["error"]
        elif answer["problem"]:
            case.kind, case.problem = answer["problem"]
        elif answer["outputs"] != outputs:
            case.kind, case.problem = (
                "contract",
                f"the outputs are {_shapes(answer['outputs'])} instead of {_shapes(outputs)}",
            )
        else:
            self._compare(
                case, trial, references, [from_bytes(b, e.dtype, e.value.shape) for b, e in zip(answers, references)]
            )
        if answer["findings"] and not case.problem:
            case.kind, case.problem = "finding", "a kernel did what the findings say"
        return case

    def _compare(self, case: Case, trial: Trial, references: list[Expected], outputs: list[Tensor]) -> None:
        comparisons = [
            compare("output" if len(references) == 1 else f"output {k}", o, e)
            for k, (o, e) in enumerate(zip(outputs, references))
        ]
        worst = max(comparisons, key=lambda c: c.share)
        case.error, case.bound, case.problem = worst.share, worst.bound, worst.problem
        case.kind = "mismatch" if case.problem else ""
        if trial.family == "again" and case.problem and self.random:
            before, _ = self.random[-1]
            if all(torch.equal(_raw(o), _raw(b)) for o, b in zip(outputs, before) if o.shape == b.shape):
                case.kind, case.problem = (
                    "remembered",
                    f"the result of the call before came again for other inputs: {case.problem}",
                )
        if trial.family in FAMILIES[:2]:
            self.random.append((outputs, references))


def _raw(t: Tensor) -> Tensor:
    """NaN is equal to itself."""
    return t.contiguous().reshape(-1).view(torch.uint8)


def _shapes(outputs: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{o['dtype']}{o['shape']}" for o in outputs) or "none"
