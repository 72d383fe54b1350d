"""How many tests pytest selects by each of several Selections of gpu.py: JSON from stdin, JSON to stdout. Nothing is run.

All in one process and by one collection, because to import torch and to make the tests' cases takes seconds.
"""

import contextlib
import json
import os
import sys

import pytest


class Collected:
    """A plugin that asks, of each selection, what is left of the files' tests."""

    def __init__(self, selections):
        self.selections, self.counts, self.errors = selections, [], []

    def pytest_collectreport(self, report):
        if report.failed:
            self.errors.append(f"{report.nodeid}: {str(report.longrepr).splitlines()[-1]}")

    def pytest_collection_finish(self, session):
        marked = {}  # keywords, which are slow to match, are asked of what has the marks
        for s in self.selections:
            key = (*s["files"], s["marks"])
            if key not in marked:
                files = {session.config.rootpath / name for name in s["files"]}
                marked[key] = left([i for i in session.items if i.path in files], session, marks=s["marks"])
            self.counts.append(len(left(marked[key], session, keywords=s["keywords"])))


def left(items, session, marks="", keywords=""):
    """Those of items that -m and -k leave."""
    items, session.config.option.markexpr, session.config.option.keyword = [*items], marks, keywords
    session.config.hook.pytest_collection_modifyitems(session=session, config=session.config, items=items)
    return items


def count(selections):
    plugin = Collected(selections)
    files = sorted({name for s in selections for name in s["files"]})
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        code = pytest.main(["-p", "no:cacheprovider", "--collect-only", "-qq", *files], plugins=[plugin])
    if code != pytest.ExitCode.OK:
        sys.exit("; ".join(plugin.errors) or f"pytest's exit code {int(code)}")
    return plugin.counts


if __name__ == "__main__":
    selections = json.load(sys.stdin)
    json.dump(count(selections) if selections else [], sys.stdout)
