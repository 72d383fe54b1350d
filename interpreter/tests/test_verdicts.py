"""What a run comes to: verdicts, exit codes, and the files of them."""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from ptx import kernel
from shadow_launches import WARPS, always

from gpuless import Finding, core
from gpuless.__main__ import main
from gpuless.commands.build import build
from gpuless.verdicts.coverage import read_coverage
from gpuless.verdicts.finding_log import read_log
from gpuless.verdicts.junit import junit, write_junit
from gpuless.verdicts.sarif import sarif, write_sarif
from gpuless.verdicts.verdict import Case, Report, Verdict

pytestmark = pytest.mark.interpreted
SCHEMA = pathlib.Path(__file__).parents[1] / "docs/verdict.schema.json"
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None or not core.STANDIN.exists(), reason="there is no nvcc")
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")

RACE = Finding(
    "race", "two", kernel="k", mangled="k", file="/a/b.cu", line=3, other_file="/a/b.cu", other_line=2, count=4
)
LETTER = Finding("in_flight", "early", breaks="isa", kernel="k", ptx_line=7)
REFUSED = Finding("unsupported", "wmma", kernel="k")


def report(findings=(), **fields):
    r = Report("k.py", "sm_90a", [0], **{"launches": 1, **fields})
    r.sort(findings, strict=False)
    return r


@pytest.mark.parametrize(
    ("r", "verdict", "code"),
    [
        (report(), "clean", 0),
        (report([LETTER]), "clean", 0),
        (report([RACE]), "finding", 3),
        (report([RACE, REFUSED], errors=["status 1"]), "finding", 3),
        (report([REFUSED]), "incomplete", 4),
        (report(launches=0), "incomplete", 4),
        (report(incomplete=["time"]), "incomplete", 4),
        (report(incomplete=["time"], errors=["status 1"]), "error", 2),
        (report(cases=[Case("random", "wrong", "mismatch", 3.0, 1e-6)]), "finding", 3),
        (report(cases=[Case("random", error=0.5, bound=1e-6)]), "clean", 0),
    ],
)
def test_verdicts(r, verdict, code, tmp_path):
    """Each has its exit code, in every file."""
    assert (r.verdict.value, r.verdict.exit_code) == (verdict, code)
    r.write_json(tmp_path / "r.json")
    document = json.loads((tmp_path / "r.json").read_text())
    pytest.importorskip("jsonschema").validate(document, json.loads(SCHEMA.read_text()))
    assert (document["verdict"], document["exit_code"]) == (verdict, code)
    assert r.summary().startswith(f"gpuless: {verdict}: ")
    suite = junit(r).find("testsuite")
    passed = suite.get("failures") == suite.get("errors") == "0"
    assert passed == (code == 0)
    assert sarif(r)["runs"][0]["invocations"][0]["exitCode"] == code


def test_the_codes_are_all_different():
    assert len({v.exit_code for v in Verdict}) == len(Verdict)


def test_causes_come_first():
    late = [Finding(kind, "x") for kind in ("out_of_bounds", "uninitialised", "deadlock", "race")]
    assert [f.kind for f in report(late).findings] == ["race", "uninitialised", "out_of_bounds", "deadlock"]


def test_sarif_has_what_code_scanning_reads(tmp_path):
    """Of a result: a rule that there is, a message, a place relative to the folder, and a fingerprint that lines up again."""
    inside = Finding(
        "race", "two", kernel="k", file=str(pathlib.Path.cwd() / "src/k.cu"), line=3, other_file="k.h", other_line=1
    )
    r = report([RACE, inside, LETTER], cases=[Case("random", "wrong", "mismatch")])
    write_sarif(r, tmp_path / "r.sarif")
    document = json.loads((tmp_path / "r.sarif").read_text())
    (run,) = document["runs"]
    assert document["version"] == "2.1.0"
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    for result in run["results"]:
        assert rules[result["ruleIndex"]] == result["ruleId"] and result["message"]["text"]
        assert result["level"] in ("error", "note") and result["partialFingerprints"]
    uris = [
        place["physicalLocation"]["artifactLocation"]["uri"]
        for result in run["results"]
        for place in result["locations"]
        if "physicalLocation" in place
    ]
    assert sorted(uris) == ["file:///a/b.cu", "k.py", "src/k.cu"]
    assert run["results"][0]["relatedLocations"][0]["physicalLocation"]["region"]["startLine"] == 2


def test_junit_is_read_by_a_library(tmp_path):
    r = report([RACE], cases=[Case("zeros", "bell \a", "mismatch"), Case("random", error=0.1, bound=1.0)])
    write_junit(r, tmp_path / "r.xml")
    junitparser = pytest.importorskip("junitparser")
    (suite,) = junitparser.JUnitXml.fromfile(str(tmp_path / "r.xml"))
    assert (suite.tests, suite.failures, suite.errors) == (3, 2, 0)
    assert [[r.type for r in case.result] for case in suite] == [["race"], ["mismatch"], []]
    assert ElementTree.parse(tmp_path / "r.xml").getroot().tag == "testsuites"


# ---- Runs ----

# Warp 1 reads what warp 0 writes, with nothing between; then all leave.
SKIPPED = """
@!%p0 bra READ;
st.shared.u32 [%s], 1;
bra OVER;
READ:
ld.shared.u32 %r2, [%s];
@%p1 st.shared.u32 [%s+4], %r2;
OVER:
"""
ENDLESS = "mov.u32 %r2, 0;\nAGAIN:\nadd.u32 %r2, %r2, 2;\nsetp.ne.u32 %p2, %r2, 1;\n@%p2 bra AGAIN;\n"
SCRIPT = """
import os, signal, sys
from gpuless import Module, current
for text in {texts!r}:
    try:
        Module(text)["k"].launch(1, 64, [])
    except RuntimeError:
        pass
{then}
"""


def run(tmp_path, *bodies, then="", options=()):
    """(exit code, the JSON document)."""
    script, document = tmp_path / "script.py", tmp_path / "verdict.json"
    script.write_text(SCRIPT.format(texts=[kernel(WARPS + body, [], block=64) for body in bodies], then=then))
    code = main(["run", "--json", str(document), *options, str(script)])
    written = json.loads(document.read_text())
    assert code == written["exit_code"]
    return code, written


@needs_torch
def test_a_run_that_is_clean(tmp_path, capfd):
    assert run(tmp_path, "bar.sync 0;\n", options=["--seed=1"])[0] == 0
    assert "gpuless: clean: 0 findings, 1 launch on sm_90a" in capfd.readouterr().err


@needs_torch
def test_a_script_prints_what_was_explored(tmp_path, capfd):
    code, document = run(tmp_path, "bar.sync 0;\n", "bar.sync 0;\n", options=["--explore=9"])
    printed = capfd.readouterr().err
    assert code == 0 and [launch["launch"] for launch in document["explored"]] == [1, 2]
    assert "k, launch 2: explored all 1 order\n" in printed
    assert "not covered: orders that are never explored" in printed


@needs_torch
def test_a_process_that_is_killed_loses_no_finding(tmp_path):
    code, document = run(tmp_path, SKIPPED, then="os.kill(os.getpid(), signal.SIGKILL)")
    assert code == 3 and document["status"] == -9
    assert document["errors"] == ["the program was ended by SIGKILL"]
    assert document["findings"][0]["kind"] == "race"


@needs_torch
def test_a_refusal_is_incomplete(tmp_path):
    code, document = run(tmp_path, "tcgen05.fence;\n")
    assert code == 4 and "tcgen05.fence" in document["incomplete"][0] and not document["findings"]


@needs_torch
def test_a_limit_that_runs_out_is_incomplete(tmp_path, monkeypatch):
    monkeypatch.setattr("gpuless.commands.run.GRACE", 120.0)
    code, document = run(tmp_path, ENDLESS, options=["--time-limit=0.5"])
    assert code == 4 and "ran out of time" in " ".join(document["incomplete"])
    monkeypatch.setattr("gpuless.commands.run.GRACE", 1.0)
    code, document = run(tmp_path, then="import time; time.sleep(600)", options=["--time-limit=0.1"])
    assert code == 4 and "--time-limit" in document["incomplete"][0]


@needs_torch
def test_a_script_that_fails_is_an_error_and_one_without_launches_incomplete(tmp_path):
    code, document = run(tmp_path, "bar.sync 0;\n", then="sys.exit(4)")
    assert code == 2 and document["status"] == 4
    code, document = run(tmp_path)
    assert code == 4 and "nothing was checked" in document["incomplete"][0]


@needs_torch
def test_coverage_lists_what_did_not_run(tmp_path):
    body = """@!%p0 bra OVER;
mov.u32 %r2, 1;
OVER:
setp.gt.u32 %p3, %t, 100;
@%p3 bra NEVER;
bra END;
NEVER:
mov.u32 %r2, 2;
mov.u32 %r2, 3;
END:
"""
    _, document = run(tmp_path, body, options=["--coverage"])
    (coverage,) = document["coverage"]
    text = kernel(WARPS + body, [], block=64).splitlines()
    assert [text[line - 1] for _, line in coverage["missed_lines"]] == ["mov.u32 %r2, 2;", "mov.u32 %r2, 3;"]
    assert [text[line - 1] for _, line in coverage["one_way_lines"]] == ["@%p3 bra NEVER;"]
    assert coverage["instructions"] - coverage["executed"] == 2
    assert (coverage["branches"], coverage["both_ways"]) == (2, 1)


def test_coverage_adds_launches_and_variants():
    def record(module, *active):
        place = {"opcode": "add.u32", "inner_file": "a.cu", "guarded": False, "passed": 0, "ptx_line": 0}
        instructions = [{**place, "inner_line": n, "active": a} for n, a in enumerate(active)]
        return {"kernel": "k", "module": module, "function": "k", "instructions": instructions}

    (c,) = read_coverage(json.dumps([record(1, 1, 0, 0), record(1, 0, 1, 0), record(2, 1, 0, 0)]))
    assert (c.instructions, c.executed, c.missed_lines) == (6, 3, [("a.cu", 2)])


def test_the_last_line_of_a_log_may_be_cut(tmp_path):
    fields = {"event": "finding", "pid": 7, **RACE.fields()}
    end = {"event": "end", "pid": 7, "launches": 2, "warp_instructions": 9, "counts": [5]}
    (tmp_path / "log").write_text("\n".join(map(json.dumps, (fields, end))) + '\n{"event": "fin')
    log = read_log(tmp_path / "log")
    assert [f.count for f in log.findings] == [5] and log.launches == 2 and log.ended
    assert not read_log(tmp_path / "none").ended


READS = "ld.shared.u32 %r2, [%s];\nsetp.eq.u32 %p5, %r2, 0;\n@%p5 bra OVER;\nOVER:\n"


def test_a_race_is_told_before_the_read_that_it_causes():
    """Whichever warp comes first: a read of what nobody has written yet, and another warp then writes, is that race."""
    always("race", "@%p1 bra READ;\nst.shared.u32 [%s], 1;\nbra.uni OVER;\nREAD:\n" + READS, seeds=range(6))


def test_a_read_that_comes_too_early_names_the_write():
    body = READS + "bar.sync 0;\n@%p1 st.shared.u32 [%s], 1;\n"
    message = always("uninitialised", body, seeds=range(4)).message
    assert message.split("; ")[1].startswith("the write by warp 1 at PTX line ") and "is a barrier missing?" in message


CUDA_PROGRAM = """#include <cstdio>
__global__ void reverse(int* x) {
  __shared__ int s[256];
  s[threadIdx.x] = x[threadIdx.x];
  x[threadIdx.x] = s[255 - threadIdx.x];  // HAZARD
}
__global__ void spin(volatile int* x) {
  for (int k = 1; k; k += 2) *x = k;
}
__global__ void take(int* x) {
  x[atomicAdd(x, 1) + 1] = blockIdx.x;
}
int main(int n, char**) {
  int* x;
  cudaMallocManaged(&x, 1024);
  for (int k = 0; k < 256; ++k) x[k] = k;
  if (n == 1) reverse<<<1, 256>>>(x);
  if (n == 2) spin<<<1, 1>>>(x);
  x[0] = 0;
  if (n == 3) take<<<3, 1>>>(x);
  std::printf("%d\\n", cudaDeviceSynchronize());
}
"""


@pytest.fixture(scope="module")
def cuda_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "reverse.cu").write_text(CUDA_PROGRAM)
    assert build([str(folder / "reverse.cu"), "-arch=sm_80", "-o", str(folder / "reverse")]) == 0
    return folder


def run_in(folder, *options):
    """(exit code, stderr, the JSON document)."""
    command = [sys.executable, "-m", "gpuless", "run", "--gpu=sm_80", "--json=v.json", "--sarif=v.sarif", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stderr, json.loads((folder / "v.json").read_text())


@needs_nvcc
def test_a_cuda_program(cuda_folder):
    """The source line is printed; paths below the folder are relative; no line is longer than 100 columns."""
    code, printed, document = run_in(cuda_folder, "reverse")
    assert code == 3, printed
    place, line = re.search(r"^  at reverse.cu:(4|5)\n    \| (.*)$", printed, re.M).groups()
    assert line == CUDA_PROGRAM.splitlines()[int(place) - 1].strip()
    assert max(map(len, printed.splitlines())) <= 100
    assert document["status"] == 3 and document["launches"] == 1
    assert document["findings"][0]["kind"] == "race"
    (location,) = json.loads((cuda_folder / "v.sarif").read_text())["runs"][0]["results"][0]["locations"]
    assert location["physicalLocation"] == {
        "artifactLocation": {"uri": "reverse.cu"},
        "region": {"startLine": document["findings"][0]["line"]},
    }


@needs_nvcc
@pytest.mark.parametrize(("executions", "code"), [(100, 0), (2, 4)])
def test_orders_that_were_not_explored_are_incomplete(cuda_folder, executions, code):
    """Three blocks take tickets, in 3! orders."""
    ended, printed, document = run_in(cuda_folder, f"--explore={executions}", "reverse", "take", "tickets")
    assert ended == code, printed
    assert bool(document["incomplete"]) == (code == 4)
    assert all(re.search(r"take\(int\*\), launch 1: explored 1 order of more", why) for why in document["incomplete"])
    (launch,) = document["explored"]
    assert (launch["kernel"], launch["complete"]) == ("take(int*)", code == 0)
    left_out = "orders that are never explored (docs/orders.md)" if code == 0 else "orders that were not explored"
    assert left_out in document["not_covered"] and f"not covered: {left_out}" in printed
    assert "other schedules than this seed's" not in printed


@needs_nvcc
def test_a_race_that_is_read_first_is_found_by_exploring(cuda_folder):
    """The read of what nobody has written is postponed there too."""
    code, printed, document = run_in(cuda_folder, "--explore=10", "reverse")
    assert code == 3 and document["findings"][0]["kind"] == "race", printed


@needs_nvcc
def test_a_cuda_program_has_a_time_limit(cuda_folder):
    code, _, document = run_in(cuda_folder, "--time-limit=0.2", "reverse", "spin")
    assert code == 4 and document["status"] == 4
    assert document["incomplete"] == ["a launch of spin(int volatile*) ran out of time"]

    def alone(limit):
        environment = {**os.environ, "GPULESS_ARCH": "sm_80", "GPULESS_TIME_LIMIT": limit}
        return subprocess.run([cuda_folder / "reverse", "spin"], capture_output=True, text=True, env=environment)

    assert alone("0.2").returncode == 4
    wrong = alone("soon")
    assert wrong.returncode == 2 and "GPULESS_TIME_LIMIT is a number of seconds, not soon" in wrong.stderr
