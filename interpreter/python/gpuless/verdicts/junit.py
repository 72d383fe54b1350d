"""A report as JUnit XML, which CI systems show as tests."""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ElementTree

from ..finding import Finding
from .verdict import Report

#: what XML 1.0 cannot hold
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(report: Report) -> ElementTree.Element:
    """A test suite: a test for each case of `verify`, and one for the kernels of the whole run."""
    tests = [_kernels(report)]
    for case in report.cases:
        test = _test(report, case.name, case.seconds)
        if case.problem:
            _child(test, "failure", case.problem, case.problem, case.kind)
        tests.append(test)
    count = {tag: sum(t.find(tag) is not None for t in tests) for tag in ("failure", "error", "skipped")}
    suite = ElementTree.Element(
        "testsuite", name=f"gpuless {report.arch}", tests=str(len(tests)), failures=str(count["failure"]),
        errors=str(count["error"]), skipped=str(count["skipped"]), time=f"{report.seconds:.3f}",
    )  # fmt: skip
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in (
        ("verdict", report.verdict.value),
        ("launches", str(report.launches)),
        ("seeds", " ".join(map(str, report.seeds))),
        *(("not_covered", what) for what in report.not_covered),
    ):
        ElementTree.SubElement(properties, "property", name=name, value=value)
    suite.extend(tests)
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    return suites


def write_junit(report: Report, path: str | os.PathLike[str]) -> None:
    ElementTree.ElementTree(junit(report)).write(path, encoding="utf-8", xml_declaration=True)


def _kernels(report: Report) -> ElementTree.Element:
    test = _test(report, "kernels", report.seconds)
    for finding in report.findings:
        _child(test, "failure", _line(finding), str(finding), finding.kind)
    for why in report.errors:
        _child(test, "error", why, why, "error")
    if report.reasons() and not report.findings and not report.errors:  # an incomplete run must not look like a pass
        why = "; ".join(report.reasons())
        _child(test, "error", f"incomplete: {why}", why, "incomplete")
    return test


def _test(report: Report, name: str, seconds: float) -> ElementTree.Element:
    return ElementTree.Element("testcase", classname=report.subject, name=name, time=f"{seconds:.3f}")


def _child(test: ElementTree.Element, tag: str, message: str, text: str, kind: str) -> None:
    child = ElementTree.SubElement(test, tag, {"message": _FORBIDDEN.sub("?", message), "type": kind})
    child.text = _FORBIDDEN.sub("?", text)


def _line(finding: Finding) -> str:
    where = f"{finding.file}:{finding.line}" if finding.line else f"PTX line {finding.ptx_line}"
    return f"{finding.kind} in {finding.kernel} at {where}"
