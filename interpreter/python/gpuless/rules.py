"""Findings that a project knows of and lives with: the rules of `gpuless.gpu(ignore=...)`, and the files that hold them.

A rule is a line: kind, place, kernel, and after a # the reason. csrc/ignore_rules.h says what matches.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterable
from typing import TypeAlias

from .finding import KINDS, Finding


@dataclasses.dataclass(frozen=True)
class Rule:
    """Findings to ignore.

    Attributes:
        kind: one of `KINDS`, or "*".
        place: "file.cu" or "file.cu:12", of either access, with as many of its directories as are needed; "ptx:34" without
            line information; "*" for any.
        kernel: a part of its name, demangled or not. "*" and "?" stand for any characters, for one.
        reason: for whoever reads the rule.
    """

    kind: str = "*"
    place: str = "*"
    kernel: str = "*"
    reason: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ("*", *KINDS):
            raise ValueError(f"a rule's kind is {', '.join(KINDS)} or *, not {self.kind!r}")
        if not self.place or any(c.isspace() for c in self.place):
            raise ValueError(f"a rule's place is a file, file:line, ptx:line or *, not {self.place!r}")
        if any("\n" in text or " #" in text for text in (self.kernel, self.reason)):
            raise ValueError(f"a rule is one line, and its reason begins at the first #: {self!r}")

    def __str__(self) -> str:
        return f"{self.kind} {self.place} {self.kernel}" + (f"  # {self.reason}" if self.reason else "")

    @staticmethod
    def parse(line: str) -> Rule:
        """A line of a file: kind, place, and if need be a kernel, then # and a reason."""
        text, _, reason = line.partition(" #")
        kind, place, kernel = (*text.split(maxsplit=2), "", "", "")[:3]
        try:
            return Rule(kind, place, kernel.strip() or "*", reason.strip())
        except ValueError as e:
            raise ValueError(
                f"{line!r} is no rule, kind place kernel # reason (a file of them is a pathlib.Path): {e}"
            ) from None

    @staticmethod
    def of_finding(finding: Finding) -> Rule:
        """It alone, and others of its kind at its place in its kernel."""
        place = f"{pathlib.PurePath(finding.file).name}:{finding.line}" if finding.line else f"ptx:{finding.ptx_line}"
        if any(c.isspace() for c in place):
            place = "?".join(place.split())
        return Rule(finding.kind, place if finding.ptx_line else "*", finding.kernel or "*", "")


def read_rules(path: str | os.PathLike[str]) -> list[Rule]:
    """Those of a file; empty lines and lines that begin with # are comments."""
    rules = []
    for n, line in enumerate(pathlib.Path(path).read_text().splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                rules.append(Rule.parse(line))
            except ValueError as e:
                raise ValueError(f"{path}:{n}: {e}") from None
    return rules


#: what `ignore=` takes
Ignore: TypeAlias = "Rule | str | os.PathLike[str] | Iterable[Rule | str | os.PathLike[str]]"


def collected(ignore: Ignore) -> list[Rule]:
    """What `ignore=` means: rules, lines of text, and files of them as paths; one, or several."""
    if isinstance(ignore, (str, os.PathLike, Rule)):
        ignore = [ignore]
    rules: list[Rule] = []
    for entry in ignore:
        if isinstance(entry, Rule):
            rules.append(entry)
        elif isinstance(entry, str):
            rules.append(Rule.parse(entry))
        else:
            rules += read_rules(entry)
    return rules


def write_rules(path: str | os.PathLike[str], rules: Iterable[Rule]) -> None:
    """A file of rules, each once."""
    lines = [str(rule) for rule in dict.fromkeys(rules)]
    head = "# Findings of the interpreter that are known: kind, place, kernel  # reason"
    pathlib.Path(path).write_text("\n".join([head, *lines]) + "\n")
