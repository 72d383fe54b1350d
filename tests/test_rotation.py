"""rotation.py: parts of sets of cases, and one test that runs many of them."""

import dataclasses
import importlib
import subprocess
import sys
from collections import Counter

import pytest
import rotation
from every_backend import OF_TRITON, on_each
from processes import two_threads
from rotation import VARIABLE, in_parts, in_turn, paired, some_of, take_turns

from forwardpass.dispatch import operations


@dataclasses.dataclass(frozen=True)
class Case:
    op: str
    n: int


#: of three operations, one of which has fewer cases than there are parts
CASES = (
    [Case("many", n) for n in range(50)] + [Case("other", n) for n in range(17)] + [Case("few", n) for n in range(3)]
)


def each_part(monkeypatch, parts, **options):
    for number in range(parts):
        monkeypatch.setenv(VARIABLE, str(number))
        yield some_of(CASES, parts, **options)


@pytest.mark.parametrize("parts", [1, 4, 12])
def test_parts_are_the_whole(monkeypatch, parts):
    taken = list(each_part(monkeypatch, parts))
    assert {case for part in taken for case in part} == set(CASES)
    assert all({case.op for case in part} == {"many", "other", "few"} for part in taken)
    assert max(map(len, taken)) - min(map(len, taken)) <= 2
    assert sum(map(len, taken)) == 50 + 17 + max(parts, 3)  # few ones are in several parts


@pytest.mark.every(2)
@pytest.mark.parametrize("parts", [4, OF_TRITON])
@pytest.mark.parametrize("name", sorted({operation.package for operation in operations.values()}))
def test_every_run_has_each_operation_on_each_architecture(monkeypatch, name, parts):
    """And as many runs as there are parts have every case on each."""
    architectures, cases = (
        ("sm_80", "sm_89", "sm_90a", "sm_120"),
        list(importlib.import_module(f"{name}.cases").cases()),
    )
    names = {getattr(case, "op", None) for case in cases}
    run = {arch: set() for arch in architectures}
    for number in range(parts):
        monkeypatch.setenv(VARIABLE, str(number))
        part = {p.values[-1]: p.values[0] for p in on_each(architectures, cases, parts) if p.marks == ()}
        assert {arch: {getattr(case, "op", None) for case in of} for arch, of in part.items()} == dict.fromkeys(
            run, names
        )
        for arch, of in part.items():
            run[arch] |= set(of)
    assert all(of == set(cases) for of in run.values())


def test_shifted_parts_share_no_case(monkeypatch):
    """As many architectures run different cases of one commit."""
    for number in range(8):
        monkeypatch.setenv(VARIABLE, str(number))
        parts = [[c for c in some_of(CASES, 8, shift) if c.op != "few"] for shift in range(4)]
        assert len({case for part in parts for case in part}) == sum(map(len, parts))


def test_the_rest_is_slow(monkeypatch):
    """So that `make test-all`, which runs both, runs every case once."""
    monkeypatch.setenv(VARIABLE, "5")
    part, rest = in_parts(CASES, 4, "cuda", "sm_80")
    assert [p.values[1:] for p in (part, rest)] == [("cuda", "sm_80")] * 2
    assert [p.id for p in (part, rest)] == ["cuda-sm_80-part", "cuda-sm_80-rest"]
    assert [p.marks for p in (part, rest)] == [(), (pytest.mark.slow,)]
    assert part.values[0] == tuple(some_of(CASES, 4))
    assert sorted([*part.values[0], *rest.values[0]], key=str) == sorted(CASES, key=str)
    assert [p.id for p in in_parts(CASES, 1)] == ["part"]


def quick(parameters):
    return [p.values for p in parameters if p.marks == ()]


def test_each_value_has_its_turn(monkeypatch):
    turns, pairs = [], []
    for number in range(4):
        monkeypatch.setenv(VARIABLE, str(number))
        turns.append(quick(in_turn(["a", "b", ("c", 1), "d"])))
        pairs.append(quick(paired("abcd", (1, 2))))
        assert len(quick(in_turn(range(10), 5))) == 2
        assert {x for x, _ in pairs[-1]} == {*"abcd"} and {y for _, y in pairs[-1]} == {1, 2}
    assert sorted(str(v) for turn in turns for v in turn) == ["('a',)", "('b',)", "('c', 1)", "('d',)"]
    assert {pair for part in pairs for pair in part} == {(x, y) for x in "abcd" for y in (1, 2)}
    assert len(pairs[0]) == 4


def test_the_commit_chooses(monkeypatch):
    numbers = set()
    for made in ("95cf3da77e0c", "666f5ee01234", None):
        monkeypatch.delenv(VARIABLE, raising=False)
        monkeypatch.setattr(rotation, "commit", lambda made=made: made)
        numbers.add(rotation.number())
    assert numbers == {0x95CF3DA7, 0x666F5EE0, 0}


FILE = """
import pytest
from rotation import in_parts, whole

@pytest.mark.parametrize(("case", "arch"), in_parts(range(12), 2, "sm_80"))
def test_of_a_part(case, arch):
    assert case % 3, f"{case} on {arch}"

@pytest.mark.parametrize("case", [whole(range(9, 12))])
def test_some_cases_are_skipped(case):
    if case % 2:
        pytest.skip(f"{case} is odd")

@pytest.mark.parametrize("case", [whole(range(3))])
def test_all_cases_are_skipped(case):
    pytest.skip("no kernel")
"""


def run(folder, *options):
    (folder / "test_them.py").write_text(FILE)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "rotation",
        "-p",
        "no:cacheprovider",
        "--strict-markers",
        "-rsf",
        *options,
    ]
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=two_threads({VARIABLE: "1"}))


def test_every_case_that_fails_is_reported(tmp_path):
    """With where it failed and its own values; and none stops another."""
    done = run(tmp_path, "-q", "-m", "not slow")
    assert done.returncode == 1
    assert f"{VARIABLE}=1, as the environment says" in done.stdout
    for case in (3, 9):  # of 1, 3, 5, 7, 9, 11
        assert f"AssertionError: {case} on sm_80" in done.stdout
        assert f"SUBFAILED[{case}] test_them.py::test_of_a_part[sm_80-part]" in done.stdout
    assert "contains 2 failed subtests" in done.stdout and ">       assert case % 3" in done.stdout
    assert "3 failed, 1 passed, 1 skipped, 1 deselected" in done.stdout
    assert "no kernel" in done.stdout and "is odd" not in done.stdout


def test_one_case_is_run_again(tmp_path):
    done = run(tmp_path, "-q", "-m", "not slow", "--case", "11")
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout
    assert "no case has the text of --case in its name" in done.stdout


class Item:
    """What `take_turns` asks of a test that pytest has collected."""

    def __init__(self, nodeid, *marks):
        self.nodeid, self.marks = nodeid, {mark.name: mark for mark in marks}

    def get_closest_marker(self, name):
        return self.marks.get(name)

    def add_marker(self, mark):
        self.marks[mark.name] = mark.mark


def test_tests_take_turns(monkeypatch):
    """As many runs as a mark says have each test of its function; what has no mark is in all of them."""
    half, third = pytest.mark.every(2).mark, pytest.mark.every(3).mark
    runs = []
    for number in range(6):
        monkeypatch.setenv(VARIABLE, str(number))
        items = [Item(f"nine[{n}]", half) for n in range(9)] + [Item(f"all[{n}]") for n in range(9)]
        items.append(Item("one", third))
        take_turns(items)
        runs.append({item.nodeid for item in items if "slow" not in item.marks})
    sizes = [Counter(name.split("[")[0] for name in run) for run in runs]
    assert [size["nine"] for size in sizes] in ([4, 5] * 3, [5, 4] * 3)
    assert [size["one"] for size in sizes] in ([1, 0, 0] * 2, [0, 1, 0] * 2, [0, 0, 1] * 2)
    assert {size["all"] for size in sizes} == {9}
    assert len(set.union(*runs)) == 9 + 9 + 1
