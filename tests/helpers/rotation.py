"""Large sets of cases as few tests, of which `make test` runs a part and `make test-all` the whole::

    @pytest.mark.parametrize("case", in_parts(cases.cases(), 8))
    def test_cpu(case, seed): ...

This is two tests: one calls the function with an eighth of the cases, the other, which is slow, with all others. Which eighth it is
follows from the commit, so that a few commits run the whole. `some_of` chooses in the same way within a test.

`@pytest.mark.every(3)` is for functions of more than a core-second, `every(2)` for those of more than 0.4: a run has a third
or a half of the tests of one. If it has only one test, one commit in three or two runs it.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import subprocess
import zlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

#: chooses the parts, instead of the commit
VARIABLE = "FORWARDPASS_TEST_PART"


#: Parameters of a test that takes `some_of` by itself: one case in four, and the whole.
A_QUARTER = (4, pytest.param(1, marks=pytest.mark.slow))


class Cases(tuple):
    """A parameter of a test that is called with each of them in turn, instead of one test per case."""


def commit() -> str | None:
    """The hash of the checkout's last commit; None without git."""
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def number() -> int:
    """Of a set in n parts, the part with the remainder of this by n is chosen."""
    if VARIABLE not in os.environ:  # the processes of a run inherit it
        os.environ[VARIABLE] = str(int((commit() or "0")[:8], 16))
    return int(os.environ[VARIABLE])


def chosen(cases: Iterable[Any], parts: int, shift: int = 0) -> list[bool]:
    """For each case, whether it is in the part. The part has one in `parts` of each operation's cases, and at least one.

    `shift` takes another part. Two shifts that differ by less than `parts` share no case of an operation with so many.
    """
    names = [getattr(case, "op", None) for case in cases]
    sizes, seen, taken = Counter(names), Counter[Any](), []
    for name in names:
        taken.append((seen[name] - number() - shift) % min(parts, sizes[name]) == 0)
        seen[name] += 1
    return taken


def some_of(cases: Iterable[Any], parts: int, shift: int = 0) -> list[Any]:
    """One case in `parts`."""
    cases = list(cases)
    return [case for case, taken in zip(cases, chosen(cases, parts, shift)) if taken]


def in_parts(
    cases: Iterable[Any], parts: int, *values: Any, label: str = "", shift: int = 0, marks: Iterable[Any] = ()
) -> list[Any]:
    """Parameters of two tests, (cases, *values): the part of `chosen`, and the rest, which is slow."""
    cases = list(cases)
    taken = chosen(cases, parts, shift)
    part, rest = ([case for case, t in zip(cases, taken) if t == wanted] for wanted in (True, False))
    tests = [whole(part, *values, label=label, which="part", marks=marks)]
    if rest:
        tests.append(whole(rest, *values, label=label, which="rest", marks=[*marks, pytest.mark.slow]))
    return tests


def whole(cases: Iterable[Any], *values: Any, label: str = "", which: str = "all", marks: Iterable[Any] = ()) -> Any:
    """The parameters of one test, (cases, *values), with all of the cases."""
    name = "-".join([label] * bool(label) + [str(v) for v in values if v is not None] + [which])
    return pytest.param(Cases(cases), *values, id=name, marks=tuple(marks))


def in_turn(values: Iterable[Any], parts: int | None = None) -> list[Any]:
    """Parameters of a test per value, for tests that cannot run several in one: one value in `parts` (by default one of all), and
    the others, which are slow. A value that is a tuple is of several arguments."""
    values = list(values)
    return [
        pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=() if taken else pytest.mark.slow)
        for v, taken in zip(values, chosen(values, parts or len(values)))
    ]


def paired(first: Iterable[Any], second: Iterable[Any]) -> list[Any]:
    """Parameters (x, y) of a test per pair. Each value is in a pair that is not slow, and each pair is in turn. A y may be a
    pytest.param."""
    first, second = list(first), list(second)
    parts = min(len(first), len(second))
    pairs = []
    for (i, x), (j, y) in itertools.product(enumerate(first), enumerate(second)):
        slow = (i + j - number()) % parts != 0
        given = y if hasattr(y, "marks") else pytest.param(y, id=None)
        name = None if given.id is None else f"{x}-{given.id}"
        pairs.append(pytest.param(x, *given.values, id=name, marks=(*given.marks, *[pytest.mark.slow] * slow)))
    return pairs


def take_turns(items: list[pytest.Item]) -> None:
    """Of each function with `@pytest.mark.every(n)`, marks all but an nth of the tests as slow. The order is by hashes of names, as
    neighbours differ in one parameter."""
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("every"):
            functions.setdefault(item.nodeid.split("[")[0], []).append(item)
    for name, tests in functions.items():
        first = zlib.crc32(name.encode()) - number()
        for i, test in enumerate(sorted(tests, key=lambda test: zlib.crc32(test.nodeid.encode()))):
            if (i + first) % test.get_closest_marker("every").args[0]:
                test.add_marker(pytest.mark.slow)


# What pytest calls, by way of conftest.py.


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--case", metavar="TEXT", default="", help="of a test that runs many cases, those with TEXT in their name"
    )


def pytest_sessionstart(session: pytest.Session) -> None:
    """Prints the part. pytest_report_header is not called with -q."""
    by = "as the environment says" if VARIABLE in os.environ else f"by commit {(commit() or 'none')[:8]}"
    line = f"part of the large sets of cases: {VARIABLE}={number()}, {by}"
    if not hasattr(session.config, "workerinput"):
        session.config.get_terminal_writer().line(line)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Calls a test that has Cases with each. A case that fails stops no other, and is reported as a test of its own would be."""
    args = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    looped = [name for name, value in args.items() if isinstance(value, Cases)]
    if not looped:
        return None
    (name,) = looped
    cases = [case for case in args[name] if pyfuncitem.config.getoption("--case") in str(case)]
    skipped, subtests = [], pyfuncitem._request.getfixturevalue("subtests")
    for case in cases:
        try:
            pyfuncitem.obj(**{**args, name: case})
        except pytest.skip.Exception as e:
            skipped.append(str(e))
        except Exception:
            with subtests.test(str(case)):
                raise
    if len(skipped) == len(cases):
        pytest.skip(skipped[0] if skipped else "no case has the text of --case in its name")
    return True
