"""gpu.py: parts are resumed, retried and cut off as it says; what the parts do is for a machine with a GPU."""

import argparse
import json
import runpy
import sys
import tarfile

import gpu
import pytest

ROOT = gpu.ROOT


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs gpu.py on steps of our own: step -> [Part]. Gives its exit code."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "BUILD", tmp_path / "build")
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


@pytest.mark.every(3)
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


SELECTION = gpu.Selection(["tests/gpu/test_on_card.py"], "gpu")


def test_tests_that_all_skip_are_a_failure(run, tmp_path):
    skipped = part("tests", "print('5 skipped in 1s')", selection=SELECTION)
    assert run({"one": [skipped]}) == 1
    assert run({"one": [part("tests", "print('5 passed, 5 skipped in 1s')", selection=SELECTION)]}) == 0


@pytest.mark.every(3)
def test_a_build_goes_on_where_it_was_cut_off_and_nothing_runs_without_one(run, tmp_path, capsys):
    """A build of more than nine minutes on few cores is no failure."""
    count_down = f"""if True:
        import pathlib, time
        mark = pathlib.Path({str(tmp_path)!r}, "begun")
        if not mark.exists():
            mark.touch()
            time.sleep(60)
    """
    steps = {"build": [part("in place", count_down, resumes=True)], "parity": [count(tmp_path)]}
    assert run(steps, "--minutes", "0.1") == 3
    assert status(tmp_path, "build", "in place") == status(tmp_path, "parity", "count") == "left"
    assert run(steps) == 0
    assert (tmp_path / "count").read_text() == "x"


def test_after_a_build_that_failed_no_step_runs(run, tmp_path, capsys):
    steps = {"build": [part("in place", "exit(1)", resumes=True)], "parity": [count(tmp_path)]}
    assert run(steps) == 1
    assert not (tmp_path / "count").exists()
    assert "without a build no other step runs" in capsys.readouterr().out
    assert run(steps, "parity") == 0  # asked for by name


def test_what_racecheck_finds_is_to_be_read(run, tmp_path, capsys):
    """It follows TMA and mbarriers in part only; a test that fails is a failure beside it, and so is what memcheck finds."""
    found = f"print('RACECHECK SUMMARY: 1 hazard'); print('5 passed in 1s'); exit({gpu.FINDINGS})"
    assert run({"one": [part("racecheck", found, selection=SELECTION, reports=True)]}) == 0
    assert status(tmp_path, "one", "racecheck") == "findings"
    assert "one-racecheck.log" in capsys.readouterr().out
    for code, reports in ((found, False), (found.replace("5 passed", "1 failed, 4 passed"), True)):
        assert run({"one": [part("check", code, selection=SELECTION, reports=reports)]}, "--again") == 1


@pytest.mark.every(3)
def test_every_part_selects_a_test(monkeypatch, tmp_path, capsys):
    """The dry run of what needs a GPU: each of its selections is collected, by one process. One that selects nothing fails."""
    nothing = part("of none", "", selection=gpu.Selection(["tests/gpu/test_gpu.py"], "gpu", "no_such_operation"))
    real = [*gpu.parity(tmp_path), *gpu.sanitizer(tmp_path)]
    monkeypatch.setattr(gpu, "STEPS", {"both": (lambda out: [*real, nothing], False)})
    monkeypatch.setattr(gpu, "about", lambda: {"gpu": None, "torch": "2"})
    monkeypatch.setattr(gpu, "BUILD", tmp_path / "build")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    said = capsys.readouterr().out
    assert ended.value.code == 1 and "of none: failed, 0 selected, it selects no test" in said
    parts = json.loads((tmp_path / "summary.json").read_text())["steps"]["both"]
    assert {name for name, p in parts.items() if p["status"] != "passed"} == {"of none"}, said
    assert len(parts) == len(real) + 1
    assert {f"{op} {i}" for op in gpu.OPERATIONS for i in gpu.IMPLEMENTATIONS} < set(parts)


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
    on_cpus = {op.package.split(".")[-1] for op in dispatch.operations.values()} - kernels
    assert set(gpu.OPERATIONS) == kernels and on_cpus == {"encoder_layer", "decoder_layer"}
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


class Parsed(Exception):
    """A command line that a benchmark took."""


def test_every_benchmark_takes_its_arguments(tmp_path, monkeypatch):
    """Both what a card gets and what a dry run does."""
    pytest.importorskip("benchmarks", reason="benchmarks are in the checkout only")
    parse = argparse.ArgumentParser.parse_args

    def parse_alone(*arguments):
        parse(*arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_alone)
    for part in gpu.benchmarks(tmp_path):
        for command in filter(None, (part.command, part.trial)):
            module = command[command.index("-m") + 1]
            monkeypatch.setattr(sys, "argv", [module, *command[command.index("-m") + 2 :]])
            if not part.missing:
                with pytest.raises(Parsed):
                    runpy.run_module(module, run_name="__main__")
