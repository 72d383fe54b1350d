"""A report as SARIF 2.1.0, which GitHub's code scanning and editors show at the source lines."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from typing import Any

from ..finding import KINDS, Finding
from ..version import __version__
from .verdict import Case, Report

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
#: kind -> what it means, in a sentence
MEANING = {
    "race": "Two accesses of which one writes, and nothing orders them.",
    "in_flight": "Data of an asynchronous operation is used before it was waited for.",
    "uninitialised": "Memory is read that nothing has written.",
    "out_of_bounds": "An access beyond the memory that the kernel was given.",
    "overflow": "An offset that does not fit 32 bits reaches an address.",
    "misaligned": "An address that is no multiple of the access's size.",
    "deadlock": "Threads wait for what never comes.",
    "barrier": "A barrier with the wrong number of threads, or without some lanes of a warp.",
    "mbarrier": "An mbarrier that is not initialised, gets too many arrivals, or is overwritten.",
    "illegal": "What the PTX ISA forbids.",
    "assertion": "An assertion of the kernel failed.",
    "unsupported": "The interpreter does not know it.",
    "verify": "The candidate does not do what the reference does.",
}


def sarif(report: Report) -> dict[str, Any]:
    results = [_result(f, "error") for f in report.findings]
    results += [_result(f, "note") for f in report.letter]
    results += [{**_result(f, "note"), "suppressions": [{"kind": "external"}]} for f in report.ignored]
    results += [_of_case(report, case) for case in report.problems]
    notes = [("error", why) for why in report.errors] + [("warning", why) for why in report.reasons()]
    invocation = {
        "executionSuccessful": not report.errors,
        "exitCode": report.verdict.exit_code,
        "toolExecutionNotifications": [{"level": level, "message": {"text": text}} for level, text in notes],
    }
    rules = [
        {"id": kind, "shortDescription": {"text": MEANING[kind]}, "defaultConfiguration": {"level": "error"}}
        for kind in (*KINDS, "verify")
    ]
    driver = {"name": "gpuless", "version": __version__, "rules": rules}
    run = {
        "tool": {"driver": driver},
        "invocations": [invocation],
        "results": results,
        "columnKind": "unicodeCodePoints",
        "properties": {"verdict": report.verdict.value, "launches": report.launches, "notCovered": report.not_covered},
    }
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def write_sarif(report: Report, path: str | os.PathLike[str]) -> None:
    pathlib.Path(path).write_text(json.dumps(sarif(report), indent=1) + "\n")


def _result(finding: Finding, level: str) -> dict[str, Any]:
    key = f"{finding.kind} {finding.mangled} {pathlib.PurePath(finding.file).name} {finding.line} {finding.other_line}"
    result: dict[str, Any] = {
        "ruleId": finding.kind,
        "ruleIndex": KINDS.index(finding.kind),
        "level": level,
        "message": {"text": str(finding)},
        "occurrenceCount": max(1, finding.count),
        "partialFingerprints": {"gpuless/v1": hashlib.sha256(key.encode()).hexdigest()},
    }
    result["locations"] = _location(finding.file, finding.line, finding.kernel)
    if finding.other_line:
        result["relatedLocations"] = [
            {"id": 1, "message": {"text": "the other access"}, **place}
            for place in _location(finding.other_file, finding.other_line, finding.kernel)
        ]
    return result


def _of_case(report: Report, case: Case) -> dict[str, Any]:
    return {
        "ruleId": "verify",
        "ruleIndex": len(KINDS),
        "level": "error",
        "message": {"text": f"{case.kind}: {case.problem} ({case.name})"},
        "locations": _location(report.subject, 1, ""),
        "partialFingerprints": {"gpuless/v1": hashlib.sha256(f"{case.kind} {case.name}".encode()).hexdigest()},
    }


def _location(file: str, line: int, kernel: str) -> list[dict[str, Any]]:
    """None without a source line: a kernel's PTX is in no file."""
    names = [{"fullyQualifiedName": kernel, "kind": "function"}] if kernel else []
    if not line:
        return [{"logicalLocations": names}] if names else []
    physical = {"artifactLocation": {"uri": _uri(file)}, "region": {"startLine": line}}
    return [{"physicalLocation": physical, **({"logicalLocations": names} if names else {})}]


def _uri(file: str) -> str:
    """Relative to the working directory where it lies below, as code scanning wants it."""
    path = pathlib.Path(file)
    if path.is_absolute():
        folder = pathlib.Path.cwd()
        return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_uri()
    return path.as_posix()
