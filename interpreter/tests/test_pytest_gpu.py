"""`pytest --gpu`: a project's tests with device="cuda", unchanged, in a pytest of their own."""

import os
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

pytest.importorskip("triton")

from gpuless import core

pytestmark = pytest.mark.interpreted
PROJECT = pathlib.Path(__file__).parent / "project"
REPEATED = ["test_unmasked", "test_caught", "test_expected_in_vain", "test_race", "test_overwritten",
            "test_of_the_first_schedule_alone"]  # fmt: skip


def run(file, *options, folder):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-c",
        "/dev/null",
        f"--rootdir={PROJECT}",
        "-rA",
    ]
    # memory that torch reads after it was freed shows, at exit too
    environment = os.environ | {"MALLOC_PERTURB_": "165", "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    core = {min(os.sched_getaffinity(0))}  # on several, the host's threads decide which block begins first
    done = subprocess.run(
        [*command, PROJECT / file, *options], capture_output=True, text=True, cwd=folder, env=environment, timeout=600,
        preexec_fn=lambda: os.sched_setaffinity(0, core),
    )  # fmt: skip
    outcomes = {name: outcome for outcome, name in re.findall(r"^(PASSED|FAILED|ERROR) \S*?::(\S+)", done.stdout, re.M)}
    return done, outcomes


@pytest.mark.parametrize("options", [[], pytest.param(["--gpu-guard"], marks=pytest.mark.slow)])
def test_device_is_cuda(options, tmp_path):
    done, outcomes = run("device_checks.py", "--gpu=sm_90a", "-q", *options, folder=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert len(outcomes) > 50 and set(outcomes.values()) == {"PASSED"}
    assert "0 findings" in done.stdout


@pytest.mark.parametrize("file", ["compiled_checks.py", "graph_checks.py", "halves_checks.py"])
def test_device_can(file, tmp_path):
    done, outcomes = run(file, "--gpu=sm_90a", "-q", folder=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert len(outcomes) > 10 and set(outcomes.values()) == {"PASSED"} and "0 findings" in done.stdout


def test_nothing_without_being_asked(tmp_path):
    done, _ = run("device_checks.py", folder=tmp_path)
    assert done.returncode and "torch.cuda.is_available()" in done.stdout


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faulty")
    junit = folder / "junit.xml"
    options = ["--gpu=sm_90a", "--gpu-budget=0.25", f"--junitxml={junit}"]
    return *run("faulty_kernels.py", *options, folder=folder), ElementTree.parse(junit)


def test_findings_fail_their_tests(faulty):
    done, outcomes, _ = faulty
    assert done.returncode == 1
    assert {name for name, outcome in outcomes.items() if outcome == "FAILED"} == set(REPEATED), done.stdout[-3000:]
    assert {
        "test_expected",
        "test_expected_compiled",
        "test_ignored",
        "test_mended_race",
        "test_whole_blocks",
    } <= outcomes.keys()
    assert re.search(r"SKIPPED.*more than 0.25 s on the interpreted GPU", done.stdout)


def test_a_budget_that_ran_out_is_no_success(tmp_path):
    done, _ = run("faulty_kernels.py", "--gpu=sm_90a", "--gpu-budget=0.25", "-k", "long or without", folder=tmp_path)
    assert done.returncode == 6 and re.search(r"incomplete: \S+test_long took more than 0.25 s", done.stdout), (
        done.stdout
    )


def test_findings_say_where(faulty):
    done, _, _ = faulty
    line = 1 + (PROJECT / "faulty_kernels.py").read_text().splitlines().index(
        "    tl.store(out + i, tl.load(x + i), mask=i < n)"
    )
    assert f"faulty_kernels.py:{line}" in done.stdout
    assert re.search(r"block \(2, 0, 0\), warp \d, lane \d", done.stdout) and "seed 0" in done.stdout
    assert "3 findings" in done.stdout  # each once, though three tests have the first
    assert "with 2 schedules (seeds 0 to 1)" in done.stdout and "not covered: machine code" in done.stdout
    assert "no such finding came" in done.stdout


def test_junit_has_findings(faulty):
    _, _, tree = faulty
    cases = {c.get("name"): c for c in tree.iter("testcase")}
    properties = {name: [p.get("name") for p in c.iter("property")] for name, c in cases.items()}
    assert "gpu_finding" in properties["test_race"] and "gpu_finding" in properties["test_caught"]
    assert "gpu_finding" not in properties["test_ignored"] and "gpu_launches" in properties["test_ignored"]


def test_seeds(tmp_path):
    """One test to pytest, whatever the schedules; the first that fails it ends it."""
    options = ["--gpu=sm_90a", "--gpu-seeds=3", "-k", "race or without or overwritten"]
    done, outcomes = run("faulty_kernels.py", *options, folder=tmp_path)
    assert outcomes == {
        "test_race": "FAILED",
        "test_overwritten": "FAILED",
        "test_overwritten_as_expected": "PASSED",
        "test_mended_race": "PASSED",
        "test_without_the_gpu": "PASSED",
    }
    assert "repeat with arch sm_90a, seed 1" in done.stdout and "seeds 0 to 2" in done.stdout
    assert "StashKey" not in done.stdout
    options = ["--gpu=sm_90a", "--gpu-seeds=1", "-k", "race or overwritten"]
    for seed, overwritten in ((2, "PASSED"), (3, "FAILED")):
        again, outcomes = run("faulty_kernels.py", *options, f"--gpu-seed={seed}", folder=tmp_path)
        assert outcomes["test_overwritten"] == overwritten and f"1 schedule (seed {seed}: " in again.stdout
    assert outcomes["test_mended_race"] == "PASSED"


needs_driver = pytest.mark.skipif(not core.DRIVER.exists(), reason="gpuless was built without a CUDA toolkit")


@needs_driver
def test_launches_of_libraries_in_every_place(tmp_path):
    """No part of gpuless's Python knows of these launches."""
    options = ["--gpu=sm_80", "--gpu-seeds=1", "--continue-on-collection-errors", str(PROJECT / "wrong_import.py")]
    done, _ = run("outside_kernels.py", *options, folder=tmp_path)
    outcomes = set(re.findall(r"^(PASSED|FAILED|ERROR) (?:\S*?::|\S*/)(\S+)", done.stdout, re.M))
    assert done.returncode == 1 and outcomes == {
        ("PASSED", "test_right"),
        ("FAILED", "test_call"),
        ("FAILED", "test_setup"),
        ("PASSED", "test_after_it"),
        ("PASSED", "test_teardown"),
        ("ERROR", "test_teardown"),
        ("PASSED", "test_after_teardown"),
        ("ERROR", "test_failing_setup"),
        ("ERROR", "wrong_import.py"),
    }, done.stdout[-4000:] + done.stderr
    assert "5 launches with 1 schedule" in done.stdout and "2 findings\n" in done.stdout
    place = "out_of_bounds in twice at PTX line 17"
    assert re.search(rf"^{place}\n  in \S*wrong_import.py and 4 more$", done.stdout, re.M), done.stdout[-2000:]


AT_THE_END = """
import sys; sys.path.insert(0, %r)
import outside_kernels
def pytest_sessionfinish():
    outside_kernels.wrong()
"""


@needs_driver
@pytest.mark.parametrize("workers", [[], ["-n", "1"]])
def test_launches_after_the_tests_fail_the_session(workers, tmp_path):
    (tmp_path / "conftest.py").write_text(AT_THE_END % str(PROJECT))
    (tmp_path / "test_nothing.py").write_text("def test_nothing(): pass")
    done, outcomes = run(tmp_path / "test_nothing.py", "--gpu=sm_80", *workers, folder=tmp_path)
    assert done.returncode == 1 and outcomes == {"test_nothing": "PASSED"}, done.stdout + done.stderr
    assert "in no test: a hook, or a thread" in done.stdout


SCOPES = """
import pytest, torch

made = []

@pytest.fixture(scope="module")
def module():
    made.append("module")
    yield made
    print("MADE", made)

@pytest.fixture
def function(module):
    made.append("function")
    yield module
    made.append("torn")

def test_kernel(function, gpu_seed):
    made.append(gpu_seed)
    (torch.ones(4, device="cuda") + 1).sum()
    import faulty_kernels
    faulty_kernels.unmasked(256)

class TestOfUnittest(__import__("unittest").TestCase):
    def test_case(self):
        import faulty_kernels
        faulty_kernels.unmasked(128)
"""


def test_fixtures_of_a_test_are_made_for_each_schedule(tmp_path):
    file = tmp_path / "test_scopes.py"
    file.write_text(f"import sys; sys.path.insert(0, {str(PROJECT)!r})\n{SCOPES}")
    done, outcomes = run(file, "--gpu=sm_90a", "-s", folder=tmp_path)
    assert set(outcomes.values()) == {"PASSED"} and len(outcomes) == 2, done.stdout + done.stderr
    assert "MADE ['module', 'function', 0, 'torn', 'function', 1, 'torn']" in done.stdout


def test_several_gpus_and_workers(tmp_path):
    options = ["--gpu=sm_80,sm_90a", "-n", "1", "--junitxml=j.xml", "-k", "unmasked or whole"]
    done, outcomes = run("faulty_kernels.py", *options, folder=tmp_path)
    assert done.returncode == 1 and outcomes == {"test_unmasked": "FAILED", "test_whole_blocks": "PASSED"}
    assert done.stdout.count("1 finding\n") == 2, done.stdout[-3000:]
    suites = [s.get("name") for s in ElementTree.parse(tmp_path / "j.xml").iter("testsuite")]
    assert suites == ["pytest sm_80", "pytest sm_90a"]


def test_a_baseline_hides_no_failure(tmp_path):
    """All schedules run for it, and a test that fails with the first fails, whatever the last says."""
    options = ["--gpu=sm_90a", "-k", "first_schedule", "--gpu-save-baseline=known.txt"]
    done, outcomes = run("faulty_kernels.py", *options, folder=tmp_path)
    assert done.returncode == 1 and outcomes == {"test_of_the_first_schedule_alone": "FAILED"}
    assert "known.txt has 1 rules" in done.stdout and "2 launches" in done.stdout


def test_baseline(tmp_path):
    options = ["--gpu=sm_90a", "-k", "unmasked or race or whole"]
    first, _ = run("faulty_kernels.py", *options, "--gpu-save-baseline=known.txt", folder=tmp_path)
    assert first.returncode == 1 and "known.txt has 2 rules" in first.stdout
    rules = (tmp_path / "known.txt").read_text()
    assert re.search(r"^race faulty_kernels.py:\d+ shift_kernel", rules, re.M)
    second, outcomes = run("faulty_kernels.py", *options, "--gpu-ignore=known.txt", folder=tmp_path)
    assert second.returncode == 0 and set(outcomes.values()) == {"PASSED"} and "0 findings" in second.stdout
    third, _ = run("faulty_kernels.py", "--gpu=sm_90a", "-k", "race", "--gpu-ignore=known.txt", folder=tmp_path)
    assert "nothing was found that a rule ignores: out_of_bounds" in third.stdout
    (tmp_path / "wrong.txt").write_text("race\n")
    wrong, _ = run("faulty_kernels.py", "--gpu=sm_90a", "--gpu-ignore=wrong.txt", folder=tmp_path)
    assert wrong.returncode == 4 and "wrong.txt:1" in wrong.stderr


def test_unknown_gpu(tmp_path):
    done, _ = run("faulty_kernels.py", "--gpu=sm_70", folder=tmp_path)
    assert done.returncode == 4 and "sm_70" in done.stderr and "sm_90a" in done.stderr
