"""The file of GPULESS_LOG, as csrc/finding_log.h has it: read after its process ended, however that was."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..finding import Explored, Finding


@dataclass
class FindingLog:
    """What a run logged.

    Attributes:
        incomplete: what was asked for and not done.
        explored: the orders of each launch, where that was asked for.
        ended: whether a process came to its end: one that was killed leaves what it had seen until then.
    """

    findings: list[Finding] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)
    explored: list[Explored] = field(default_factory=list)
    launches: int = 0
    warp_instructions: int = 0
    ended: bool = False

    def add(self, finding: Finding) -> None:
        same = next(filter(finding.is_same, self.findings), None)
        if same:
            same.count += finding.count
        else:
            self.findings.append(finding)


def read_log(path: str | os.PathLike[str]) -> FindingLog:
    file = pathlib.Path(path)
    lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    return _from_events(map(json.loads, filter(_is_whole, lines)))


def _is_whole(line: str) -> bool:
    """The last line of a process that was killed may have been cut."""
    return line.startswith("{") and line.endswith("}")


def _from_events(events: Iterable[dict[str, Any]]) -> FindingLog:
    log = FindingLog()
    of_process: dict[int | None, list[Finding]] = {}  # Python's lines have no process, and their own counts
    for fields in events:
        event, pid = fields.pop("event"), fields.pop("pid", None)
        if event == "finding":
            of_process.setdefault(pid, []).append(Finding(**fields))
        elif event == "incomplete":
            log.incomplete.append(fields["why"])
        elif event == "explored":
            log.explored.append(Explored(**fields))
        elif event == "end":
            log.ended = True
            log.launches += fields["launches"]
            log.warp_instructions += fields["warp_instructions"]
            for finding, count in zip(of_process.get(pid, []), fields["counts"]):
                finding.count = max(1, count)
    for finding in (f for findings in of_process.values() for f in findings):
        log.add(finding)
    log.incomplete = list(dict.fromkeys(log.incomplete))
    return log
