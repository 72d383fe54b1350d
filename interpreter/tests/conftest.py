"""What the tests have in common, and what each area of them costs."""

import collections
import gc
import os
import pathlib

import pytest

#: Of this checkout: what Triton compiled names the files it came from.
os.environ.setdefault("TRITON_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / "build" / "triton"))
#: What is against the letter of the ISA alone is an error too.
os.environ.setdefault("GPULESS_STRICT", "1")
#: area -> core-seconds
spent = collections.Counter()
#: begun first: what takes long would keep one process busy when the others have ended
LONGEST = ("test_pytest_gpu.py", "test_programs.py", "test_witnesses.py", "test_triton_blackwell.py", "test_hazards.py")


@pytest.fixture(scope="module", autouse=True)
def frozen_heap():
    """Thousands of tests, and Triton, are a heap that costs each collection of garbage a third of a second and more: no
    collection looks again at what was there before the module's tests."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    """Of all threads and of the processes that ended meanwhile, with set-up and tear-down."""
    before = sum(os.times()[:4])
    yield
    spent[item.path.stem.removeprefix("test_").split("_")[0]] += sum(os.times()[:4]) - before


def pytest_sessionfinish(session):
    """A process of several hands what it counted to the one that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["spent"] = dict(spent)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    spent.update(getattr(node, "workeroutput", {}).get("spent", {}))


def pytest_terminal_summary(terminalreporter):
    total = sum(spent.values())
    if total < 10:  # a run of a few tests wants no table
        return
    terminalreporter.write_sep("-", f"{total:.0f} core-seconds")
    for area, seconds in spent.most_common():
        if seconds >= total / 100:
            terminalreporter.write_line(f"{seconds:8.1f}  {area}")
