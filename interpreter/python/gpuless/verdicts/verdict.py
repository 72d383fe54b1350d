"""The verdict of a run, and everything that it stands on."""

from __future__ import annotations

import enum
import json
import os
import pathlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..finding import Explored, Finding
from ..version import __version__
from .coverage import Coverage

#: of the JSON document: grows when a field changes its meaning or goes
FORMAT = 1


class Verdict(enum.Enum):
    """CLEAN: everything that was asked for was done, and nothing was found. FINDING: a kernel is wrong.

    INCOMPLETE: nothing was found, but something was not done: an instruction or a call that is refused, a limit that ran
    out, no launch at all. It is no success. ERROR: the program failed by itself, or could not be run.
    """

    CLEAN = "clean"
    ERROR = "error"
    FINDING = "finding"
    INCOMPLETE = "incomplete"

    @property
    def exit_code(self) -> int:
        return {Verdict.CLEAN: 0, Verdict.ERROR: 2, Verdict.FINDING: 3, Verdict.INCOMPLETE: 4}[self]


@dataclass
class Case:
    """One call of a candidate in `verify`.

    Attributes:
        name: sizes, inputs and seed.
        problem: what is wrong, "" for nothing.
        error, bound: the largest error as a share of its bound, and that bound; None where nothing was compared.
        seconds: of the call.
    """

    name: str
    problem: str = ""
    kind: str = ""
    error: float | None = None
    bound: float | None = None
    seconds: float = 0.0


@dataclass
class Report:
    """What a run comes to.

    Attributes:
        subject: what was run.
        arch, seeds: the GPU, and the schedules.
        findings: the faults of its kernels, the cause before what follows from it.
        letter: findings that break only the letter of the PTX ISA.
        ignored: findings that a rule matches.
        incomplete: what was not done, in sentences.
        errors: why the program failed.
        not_covered: what such a run never checks.
        explored: the orders of each launch, where that was asked for.
        status: the program's own exit status, None where it has none.
    """

    subject: str
    arch: str
    seeds: list[int]
    findings: list[Finding] = field(default_factory=list)
    letter: list[Finding] = field(default_factory=list)
    ignored: list[Finding] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    not_covered: list[str] = field(default_factory=list)
    explored: list[Explored] = field(default_factory=list)
    cases: list[Case] = field(default_factory=list)
    coverage: list[Coverage] | None = None
    launches: int = 0
    warp_instructions: int = 0
    seconds: float = 0.0
    status: int | None = None

    @property
    def problems(self) -> list[Case]:
        return [case for case in self.cases if case.problem]

    @property
    def verdict(self) -> Verdict:
        if self.findings or self.problems:
            return Verdict.FINDING
        if self.errors:
            return Verdict.ERROR
        return Verdict.INCOMPLETE if self.incomplete or not self.launches else Verdict.CLEAN

    def sort(self, findings: Iterable[Finding], strict: bool) -> None:
        """Puts each finding where it belongs. A refusal is no fault of the kernel: it leaves the run incomplete."""
        for finding in sorted(findings, key=_rank):
            if finding.rule >= 0:
                self.ignored.append(finding)
            elif finding.kind == "unsupported":
                self.incomplete.append(f"{finding.kernel or self.subject}: {finding.message}")
            elif finding.breaks == "isa" and not strict:
                self.letter.append(finding)
            else:
                self.findings.append(finding)

    def as_json(self) -> dict[str, Any]:
        """docs/verdict.schema.json describes it."""
        reasons = self.reasons()
        return {
            "format": FORMAT,
            "gpuless": __version__,
            "verdict": self.verdict.value,
            "exit_code": self.verdict.exit_code,
            "subject": self.subject,
            "arch": self.arch,
            "seeds": self.seeds,
            "status": self.status,
            "launches": self.launches,
            "warp_instructions": self.warp_instructions,
            "seconds": round(self.seconds, 3),
            "findings": [f.fields() for f in self.findings],
            "letter": [f.fields() for f in self.letter],
            "ignored": [f.fields() for f in self.ignored],
            "incomplete": reasons,
            "errors": self.errors,
            "cases": [vars(case) for case in self.cases],
            "coverage": None if self.coverage is None else [c.as_json() for c in self.coverage],
            "not_covered": self.not_covered,
            "explored": [vars(launch) for launch in self.explored],
        }

    def reasons(self) -> list[str]:
        """Why it is incomplete, if it is."""
        return self.incomplete or ([] if self.launches else ["no kernel was launched: nothing was checked"])

    def write_json(self, path: str | os.PathLike[str]) -> None:
        pathlib.Path(path).write_text(json.dumps(self.as_json(), indent=1) + "\n")

    def summary(self) -> str:
        """The last lines of a run: the verdict first."""
        faults = len(self.findings) + len(self.problems)
        lines = [
            f"gpuless: {self.verdict.value}: {faults} finding{'s' * (faults != 1)}, {self.launches} "
            f"launch{'es' * (self.launches != 1)} on {self.arch}, {self.warp_instructions / 1e6:.1f} million warp instructions"
        ]
        lines += [f"  error: {why}" for why in self.errors]
        lines += [f"  incomplete: {why}" for why in self.reasons()]
        if self.letter:
            lines.append(f"  {len(self.letter)} more against the letter of the PTX ISA alone (--strict)")
        if self.ignored:
            lines.append(f"  {len(self.ignored)} ignored by rules")
        lines += [f"  not covered: {what}" for what in self.not_covered]
        return "\n".join(lines)


def _rank(finding: Finding) -> tuple[int, int]:
    """The cause before its effects: what is unordered is read too early, and what is read too early is an address."""
    order = ("race", "in_flight", "mbarrier", "barrier", "uninitialised", "misaligned", "overflow", "out_of_bounds")
    return (order.index(finding.kind) if finding.kind in order else len(order), finding.seed)
