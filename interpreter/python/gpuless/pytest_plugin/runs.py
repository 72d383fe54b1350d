"""Several GPUs: a run of pytest for each, one after the other, as torch's cuda device is one in a process."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

#: the exit status of a run without a failure in which a test was not finished; pytest's own end at 5
INCOMPLETE_STATUS = 6


def run_each(architectures: list[str], args: list[str]) -> int:
    """The highest of their exit statuses, a failure before an incomplete run.

    A JUnit file gets the suites of all, each named for its GPU.
    """
    junit = next((a for a in args if a.startswith(("--junitxml=", "--junit-xml="))), None)
    rest = [a for a in _without_gpu(args) if a != junit]
    statuses, suites = [], ElementTree.Element("testsuites")
    for arch in architectures:
        print(f"======== --gpu={arch}", flush=True)
        command = [sys.executable, "-m", "pytest", f"--gpu={arch}", *rest]
        if junit:
            path = pathlib.Path(junit.partition("=")[2])
            command += [f"--junitxml={path.with_suffix(f'.{arch}.xml')}", "-o", f"junit_suite_name=pytest {arch}"]
        statuses.append(subprocess.run(command).returncode)
        if junit and (part := path.with_suffix(f".{arch}.xml")).exists():
            suites.extend(ElementTree.parse(part).getroot())
            part.unlink()
    if junit:
        ElementTree.ElementTree(suites).write(path, encoding="utf-8", xml_declaration=True)
    return max(statuses, key=lambda status: (status not in (0, INCOMPLETE_STATUS), status))


def _without_gpu(args: list[str]) -> list[str]:
    rest: list[str] = []
    remaining = iter(args)
    for a in remaining:
        if a == "--gpu":
            next(remaining, None)
        elif not a.startswith("--gpu="):
            rest.append(a)
    return rest
