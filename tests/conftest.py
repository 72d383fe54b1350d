"""Fixtures of several files, the tests that need a GPU, and what each area of the tests costs."""

import collections
import gc
import os
import pathlib

import pytest
import torch
from processes import fork
from rotation import pytest_addoption, pytest_pyfunc_call, pytest_sessionstart, take_turns  # noqa: F401
from triton_version import what_is_against_the_isa_is_an_error

import forwardpass as fp
from forwardpass.common import environment
from forwardpass.dispatch import Operation
from forwardpass.swap import rules
from forwardpass.testing import poisoned_outputs

#: Of this checkout: what Triton compiled names the files it came from, and the mutants' reasons go by those names.
os.environ.setdefault("TRITON_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / "build" / "triton"))
what_is_against_the_isa_is_an_error()  # of our own kernels too
#: No test has a network, and the hub's client waits 30 s for one, call after call. It reads this as it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
#: area -> core-seconds
spent = collections.Counter()


@pytest.fixture(params=[0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def seed(request):
    """Of a case's random data: one in `make test`, three in `make test-all`."""
    return request.param


@pytest.fixture(params=["cold", "bound"])
def refusing(request, monkeypatch):
    """For refusals: of the first call, which Python checks, and of a later one, which the implementation alone does."""
    for op in fp.dispatch.operations.values():
        monkeypatch.setattr(op, "_bound", {})
    if request.param == "cold":
        monkeypatch.setattr(Operation, "_bind_checked", lambda op, args: op._unbound)
        yield
        return

    def bind(op, args):
        if any(isinstance(a, torch.Tensor) and a.is_meta for a in args):
            return op._bind(args)  # gpuless refuses them in words of its own
        return op.runs.get("cpu") or fp.dispatch.interpreter().bind(op, op.runs["cuda"])

    monkeypatch.setattr(Operation, "_bind_checked", bind)
    with fp.interpret("sm_90a"):  # for those without a kernel for the CPU
        yield


@pytest.fixture(scope="module", autouse=True)
def frozen_heap():
    """Thirteen thousand tests, and Triton, are a heap that costs each collection of garbage a third of a second and more: no
    collection looks again at what was there before the module's tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def forks_end():
    yield
    fork.close()


@pytest.fixture(autouse=True)
def int8_on_any_cpu():
    """Swaps to int8 are tested on CPUs that gain nothing by it too, and of layers so small that no CPU does."""
    with pytest.MonkeyPatch.context() as patch:  # of its own, as a test may undo its patches
        patch.setitem(environment.INT8_INSTRUCTIONS, "baseline", "sgemm")
        patch.setattr(rules, "LEAST_SIZES_ON_CPU", {})
        yield


@pytest.fixture(autouse=True)
def lines_of_a_log():
    """What is printed is as wide as the terminal of who runs the tests, which may be narrow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "100")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a model for the command line."""
    from command_line import small_bert  # which needs the extra cli

    return small_bert(tmp_path_factory.mktemp("model"))


@pytest.fixture
def fewer_texts(monkeypatch):
    """For the command line to measure on: one of the built-in ones in nine."""
    from forwardpass.cli import embedding, readout  # which needs the extra cli

    calibration, evaluation = embedding.builtin_texts()
    monkeypatch.setattr(readout.Embeddings, "builtin", staticmethod(lambda: (calibration, evaluation[::9])))


@pytest.fixture
def poisoned():
    """What no kernel writes is NaN or -1, in what C++ allocates and in what torch.empty returns."""
    torch.use_deterministic_algorithms(True)
    with poisoned_outputs():
        yield
    torch.use_deterministic_algorithms(False)


#: files that take half a minute and more: begun last, one of them would keep one process busy when the others have ended
LONGEST = ("interpreted/test_gemm.py", "interpreted/test_mutants.py", "interpreted/test_attention_kernels.py",
           "ops/test_triton.py", "cli/test_cli.py", "serving/test_pipeline.py", "interpreted/test_gemm_counters.py",
           "ops/test_attention.py", "interpreted/test_kernels.py", "gates/test_gates.py")  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before pytest looks at `-m`
def pytest_collection_modifyitems(items):
    take_turns(items)
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get("/".join(item.path.parts[-2:]), len(rank)))
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is False")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


def area_of(path):
    """tests/ops/test_int8_gemm.py -> ops/int8: a file, or the files that share the word after `test_`."""
    path = pathlib.Path(path)
    name = path.stem.removeprefix("test_")
    return f"{path.parent.name}/{name.split('_')[0]}" if path.parent.name != "tests" else name


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    """Of all threads and of the processes that ended meanwhile, with set-up and tear-down."""
    before = fork.core_seconds()
    yield
    spent[area_of(item.path)] += fork.core_seconds() - before


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
    largest = [(area, s) for area, s in spent.most_common() if s >= total / 100]
    remainder = total - sum(s for _, s in largest)
    for area, seconds in [*largest, ("the others", remainder)]:
        terminalreporter.write_line(f"{seconds:8.1f}  {area}")
