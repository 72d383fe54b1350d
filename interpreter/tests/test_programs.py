"""CUDA programs that know nothing of the interpreter, built by it with nvcc and run on each architecture."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import gpuless
from gpuless.__main__ import main

NVCC = shutil.which(f"{os.environ['CUDA_HOME']}/bin/nvcc" if "CUDA_HOME" in os.environ else "nvcc")
pytestmark = [pytest.mark.interpreted, pytest.mark.skipif(NVCC is None, reason="there is no nvcc")]

FOLDER = pathlib.Path(__file__).parent / "programs"
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a")


def build(folder, name):
    """Once for all architectures; the flags are nvcc's."""
    program = folder / name
    assert main(["build", str(FOLDER / f"{name}.cu"), "-std=c++17", "-lineinfo", "-O3", "-o", str(program)]) == 0
    return program


class Programs(dict):
    """By name, built when first asked for."""

    def __init__(self, folder):
        self.folder = folder

    def __missing__(self, name):
        self[name] = build(self.folder, name)
        return self[name]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return Programs(tmp_path_factory.mktemp("programs"))


def execute(program, *arguments, architecture="sm_80", **environment):
    """Further variables without their GPULESS_."""
    more = {f"GPULESS_{name}": str(value) for name, value in environment.items()}
    environment = {**os.environ, "GPULESS_ARCH": architecture, **more}
    return subprocess.run([program, *arguments], capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features(programs, architecture):
    done = execute(programs["features"], architecture=architecture)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    features = len(re.findall(r'^ +\{"', (FOLDER / "features.cu").read_text(), re.M))
    assert features and sum(line.endswith(": PASS") for line in lines) == features
    assert lines[-1] == "PASS"
    assert re.search(rf"^device: .+, {architecture.removesuffix('a')}, \d+ SMs$", done.stdout, re.M)
    spoken = sorted(line for line in lines if line.startswith("block"))
    assert spoken == [f"block {b} warp {w}: hello  1.50 1099511627776 x %" for b in (0, 1) for w in (0, 1)]
    assert done.stdout.index("block 0") < done.stdout.index("printf: PASS")  # out by the time of the synchronisation


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["runtime", "capture", "occupancy", pytest.param("cub", marks=pytest.mark.slow)])
def test_verdicts(programs, name, architecture):
    """`runtime` sees that a call which is refused says so: it passes, and the run is incomplete."""
    done = execute(programs[name], architecture=architecture)
    assert done.returncode == (4 if name == "runtime" else 0) and done.stdout.endswith("\nPASS\n"), (
        done.stdout + done.stderr
    )


def test_tensors_of_32_gb(programs):
    """The program measures its own memory, and an L40S has 48 GB."""
    done = execute(programs["large"])
    assert done.returncode == 0 and done.stdout.endswith("\nPASS\n"), done.stdout + done.stderr
    done = execute(programs["large"], architecture="sm_89")
    assert done.returncode == 1 and done.stdout == "no memory for two of 32 GB\n"


def test_offsets_in_a_tensor_of_32_gb(programs):
    """2^33 elements: as an int, a row's offset wraps."""
    right = execute(programs["large"], "wide")
    assert right.returncode == 0, right.stdout + right.stderr
    wrong = execute(programs["large"], "narrow", FINDINGS="collect")
    assert wrong.returncode == 3 and "overflow: " in wrong.stderr, wrong.stdout + wrong.stderr
    line = 1 + (FOLDER / "large.cu").read_text().splitlines().index("  x[row * columns] += 1;  // HAZARD")
    assert f"large.cu:{line}" in wrong.stderr
    assert all(int(run.stdout.removesuffix(" MB\n")) < 200 for run in (right, wrong))


def test_report(programs):
    command = [sys.executable, "-m", "gpuless", "report", "--arch", "sm_80", programs["features"]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "modelled " in done.stdout and "on A100" in done.stdout
    source = (FOLDER / "features.cu").read_text().splitlines()
    rows = re.findall(r"^  features\.cu:(\d+) .*", done.stdout, re.M)
    assert rows and all(source[int(n) - 1].strip()[:20] in done.stdout for n in rows)


def test_printf_is_that_of_the_host(programs):
    host, device = execute(programs["printing"]), execute(programs["printing"], "device")
    assert host.returncode == device.returncode == 0, host.stderr + device.stderr
    assert host.stdout.count("\n") > 8
    assert device.stdout == host.stdout


def test_a_capture_that_waits_is_refused(programs):
    done = execute(programs["capture"], "broken")
    assert done.returncode == 2 and "captured" not in done.stdout
    assert "cudaErrorStreamCaptureUnsupported: operation not permitted when stream is capturing" in done.stdout


def test_a_failed_assert_is_an_error_of_the_program(programs):
    done = execute(programs["features"], "assert")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "cudaErrorAssert\n"
    assert re.search(r"features\.cu:\d+: .*block: \[0,0,0\], thread: \[31,0,0\] Assertion `.*` failed", done.stderr)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_finding_is_the_exit_code(programs, architecture):
    done = execute(programs["missing_syncthreads"], architecture=architecture)
    assert done.returncode == 3
    source = (FOLDER / "missing_syncthreads.cu").read_text().splitlines()
    found = re.search(r"missing_syncthreads\.cu:(\d+)", done.stderr)
    assert found, done.stderr
    assert "// HAZARD" in source[int(found[1]) - 1]
    assert re.search("race|uninitialised", done.stderr)  # as the schedule has it
    assert "reverse" in done.stderr


def test_findings_are_collected(programs):
    """The program runs to its end, and fails for what is left."""
    done = execute(programs["missing_syncthreads"], FINDINGS="collect", SEED=1)
    assert done.returncode == 3 and done.stdout.strip().lstrip("-").isdigit()
    assert re.search(r"race .*missing_syncthreads\.cu:\d+ reverse\(int\*\), \d+ times", done.stderr), done.stderr


def test_findings_are_ignored(programs, tmp_path):
    rules = tmp_path / "rules"
    rules.write_text("# known\n\nrace missing_syncthreads.cu reverse  # right by luck\nuninitialised *.cu\n")
    for findings in ("raise", "collect"):
        done = execute(programs["missing_syncthreads"], FINDINGS=findings, IGNORE=rules)
        assert done.returncode == 0 and done.stdout.strip().lstrip("-").isdigit()
        assert "(ignored)" in done.stderr and "nothing orders" not in done.stderr
    rules.write_text("race other.cu\n")
    assert execute(programs["missing_syncthreads"], IGNORE=rules).returncode == 3
    rules.write_text("race\n")
    done = execute(programs["missing_syncthreads"], IGNORE=rules)
    assert done.returncode == 2 and 'line 1 of the rules, "race"' in done.stderr
    done = execute(programs["missing_syncthreads"], FINDINGS="keep")
    assert done.returncode == 2 and "FINDINGS is raise or collect, not keep" in done.stderr


@pytest.mark.parametrize(
    ("flags", "holds"),
    [
        (
            ["-gencode=arch=compute_80,code=[sm_80,compute_80]", "--compress-mode=speed"],
            "sm_80, compute_80 (compressed by LZ4)",
        ),
        (["-gencode=arch=compute_80,code=sm_80", "--compress-mode=none"], "sm_80"),
        (["-gencode=arch=compute_90a,code=compute_90a", "--compress-mode=none"], "compute_90a"),
    ],
    ids=["compressed", "no PTX", "for another"],
)
def test_a_program_without_ptx_for_the_device(tmp_path, flags, holds):
    package = pathlib.Path(gpuless.__file__).parent
    program, library = tmp_path / "program", package / "libgpuless.so"
    command = [NVCC, FOLDER / "missing_syncthreads.cu", "-o", program, "--cudart=none", *flags]
    subprocess.run([*command, package / "_standin.a", library, "-Xlinker", f"-rpath={package}"], check=True)
    done = execute(program, architecture="sm_89")
    assert done.returncode == 4
    words = " ".join(done.stderr.split())
    assert f"only {holds};" in words
    assert "-gencode=arch=compute_89,code=compute_89 --compress-mode=none" in words


def test_textures_are_refused(programs):
    done = execute(programs["textures"])
    assert done.returncode > 0
    assert "sampled" not in done.stdout
    assert re.search("texture.*not supported", done.stdout + done.stderr, re.I)


def test_the_architecture_has_to_be_one_that_is_known(programs):
    done = execute(programs["missing_syncthreads"], architecture="sm_75")
    assert done.returncode > 0
    assert "sm_75" in done.stderr
    assert all(architecture in done.stderr for architecture in ARCHITECTURES)  # what to say instead


def test_a_report_of_a_program_with_findings(programs):
    """Its status is 3, and the counts are written all the same."""
    command = [sys.executable, "-m", "gpuless", "report", "--arch", "sm_80", programs["missing_syncthreads"]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3 and "reverse" in done.stdout, done.stdout + done.stderr
