"""gpu.py: parts are resumed, retried and cut off as it says; what the parts do is for a machine with a GPU."""

import json
import sys
import tarfile

import gpu
import pytest


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs gpu.py on steps of our own: step -> [Part]. Gives its exit code."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "about", lambda: {"gpu": "A Card 80GB", "torch": "2"})
    monkeypatch.setattr(gpu, "fingerprint", lambda: "same")

    def run(steps, *arguments):
        monkeypatch.setattr(gpu, "STEPS", {name: (lambda out, p=parts: p, False) for name, parts in steps.items()})
        monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
        try:
            gpu.main()
        except SystemExit as e:
            return e.code
        return 0

    return run


def part(name, code, **more):
    return gpu.Part(name, [sys.executable, "-c", code], **more)


def count(folder):
    return part("count", f"open({str(folder / 'count')!r}, 'a').write('x')")


def status(folder, step, name):
    summary = json.loads((folder / "benchmarks/results/a-card-80gb/summary.json").read_text())
    return summary["steps"][step][name]["status"]


def test_what_passed_is_not_run_again(run, tmp_path, monkeypatch):
    for _ in range(2):
        assert run({"one": [count(tmp_path)]}) == 0
    assert (tmp_path / "count").read_text() == "x"
    assert run({"one": [count(tmp_path)]}, "--again") == 0
    monkeypatch.setattr(gpu, "fingerprint", lambda: "other sources")
    assert run({"one": [count(tmp_path)]}) == 0
    assert (tmp_path / "count").read_text() == "xxx"


def test_what_failed_is_tried_again_last(run, tmp_path, capsys):
    broken = {"one": [part("broken", "print('why'); exit(3)"), count(tmp_path)], "two": [part("fine", "")]}
    assert run(broken, "one") == 1
    assert status(tmp_path, "one", "broken") == "failed" and status(tmp_path, "one", "count") == "passed"
    assert status(tmp_path, "two", "fine") == "left"
    said = capsys.readouterr().out
    assert "why" in said and "exit code 3" in said and "two" not in said
    assert run({"one": [part("broken", ""), count(tmp_path)]}, "--archive", str(tmp_path / "all.tar.gz")) == 0
    assert (tmp_path / "count").read_text() == "x"
    with tarfile.open(tmp_path / "all.tar.gz") as archive:
        assert {"results/summary.json", "logs/one-broken.log"} <= set(archive.getnames())


def test_time(run, tmp_path):
    """A part that had all of the time is too long; one that did not is left."""
    sleep = "import time; time.sleep(60)"
    assert run({"one": [part("long", sleep)]}, "--minutes", "0.1") == 1
    assert status(tmp_path, "one", "long") == "failed"
    steps = {"one": [part("short", "import time; time.sleep(1.5)"), part("other", sleep)], "two": [count(tmp_path)]}
    assert run(steps, "--minutes", "0.12") == 3
    assert status(tmp_path, "one", "short") == "passed"
    assert status(tmp_path, "one", "other") == status(tmp_path, "two", "count") == "left"
    assert not (tmp_path / "count").exists()


def test_tests_that_all_skip_are_a_failure(run, tmp_path):
    skipped = part("tests", "print('5 skipped in 1s')", must_test=True)
    assert run({"one": [skipped]}) == 1
    assert run({"one": [part("tests", "print('5 passed, 5 skipped in 1s')", must_test=True)]}) == 0


def test_skips_and_unknown_steps(run, tmp_path, capsys):
    assert run({"one": [part("tool", "exit(1)", missing="the tool is not installed")]}) == 0
    assert "the tool is not installed" in capsys.readouterr().out
    assert run({"one": []}, "three") == 2
    assert "there is no step three; there are one" in capsys.readouterr().err


def test_every_benchmark_and_operation_is_there(tmp_path):
    from forwardpass import dispatch

    kernels = {
        op.package.split(".")[-1] for op in dispatch.operations.values() if {"cuda", "triton"} & set(op.compiled)
    }
    assert set(gpu.OPERATIONS) == kernels == {op.package.split(".")[-1] for op in dispatch.operations.values()}
    parts = [p.name for p in gpu.benchmarks(tmp_path)]
    assert {
        *gpu.OPERATIONS,
        "host_overhead",
        "gemm fp8_gemm decode",
        "gemm w8a16_gemm prefill",
        "attention sweep",
    } <= set(parts)
    assert len(parts) == len(set(parts))


def test_the_gemms_benchmark_has_all_of_its_rows():
    on_gpu = pytest.importorskip("benchmarks.gemm_on_gpu", reason="benchmarks are in the checkout only")
    assert [m for rows in gpu.GEMM_ROWS.values() for m in rows] == list(on_gpu.ROWS)
