"""`python -m gpuless`: what it builds, what it refuses, what it prints. Programs are in test_programs.py."""

import configparser
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from gpuless import core
from gpuless.__main__ import main
from gpuless.commands.build import command

pytestmark = pytest.mark.interpreted
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None or not core.STANDIN.exists(), reason="there is no nvcc")

KERNEL = "__global__ void fill(float* y) { y[threadIdx.x] = 2; }\nvoid launch(float* y) { fill<<<1, 32>>>(y); }\n"
MAIN = """
#include <cstdio>
void launch(float*);
int main() {
  float* y;
  cudaMallocManaged(&y, 32 * sizeof(float));
  launch(y);
  cudaDeviceSynchronize();
  std::printf("%g\\n", y[31]);
  return y[31] != EXPECTED;
}
"""


def execute(program, architecture="sm_80"):
    environment = {**os.environ, "GPULESS_ARCH": architecture}
    done = subprocess.run([program], capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout


@needs_nvcc
def test_programs_of_several_files_and_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kernel.cu").write_text(KERNEL)
    (tmp_path / "main.cu").write_text(MAIN)
    assert main(["build", "kernel.cu", "main.cu", "-DEXPECTED=2", "-o", "at_once"]) == 0
    assert execute(tmp_path / "at_once") == (0, "2\n")
    assert main(["build", "-c", "kernel.cu", "-lineinfo", "-o", "kernel.o"]) == 0
    assert main(["build", "kernel.o", "main.cu", "-DEXPECTED=3", "-o", "in_steps"]) == 0
    assert execute(tmp_path / "in_steps") == (1, "2\n")


@needs_nvcc
def test_an_error_of_the_compiler_is_an_error(tmp_path, capfd):
    source = tmp_path / "wrong.cu"
    source.write_text("int main() { return nonsense; }")
    assert main(["build", str(source), "-o", str(tmp_path / "wrong")]) != 0
    assert "nonsense" in capfd.readouterr().err


@needs_nvcc
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["-arch=sm_103a"], "-arch=sm_103a cannot be taken: .* there are sm_80, sm_89, sm_90a, sm_100a, sm_120"),
        (["-gencode", "arch=compute_130,code=sm_130"], "of compute_130 none is interpreted"),
        (["-lcudnn"], "-lcudnn cannot be taken: of cudnn there is no stand-in"),
        (["-l", "curand_static"], "of curand_static there is no stand-in"),
        (["-cubin"], "-ptx makes it"),
        (["-rdc=true"], "include the files in one"),
        (["-dlto"], "leaves none"),
    ],
)
def test_flags_that_are_refused(flags, words, capsys):
    assert main(["build", "prog.cu", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(words, line)


@pytest.mark.parametrize("command", ["run", "report"])
@pytest.mark.parametrize(
    ("name", "words"),
    [("prog.cu", "prog.cu -o PROG` makes one of CUDA source"), ("prog", "no program that"), ("no.py", "there is no ")],
)
def test_what_is_no_program_is_refused(command, name, words, tmp_path, capsys):
    for source in ("prog.cu", "prog"):
        (tmp_path / source).write_text("__global__ void nothing() {}\n")
    assert main([command, str(tmp_path / name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


ALL = ["80", "89", "90a", "100a", "120"]


@needs_nvcc
@pytest.mark.parametrize(
    ("flags", "architectures"),
    [
        ([], ALL),
        (["-arch=native"], ALL),
        (["-code=sm_90"], ALL),
        (["-arch=sm_90"], ["90"]),
        (["-arch", "sm_90a"], ["90a"]),
        (["--gpu-architecture=compute_86", "-code=sm_86,sm_89"], ["86"]),
        (["-arch=sm_120a"], ["120a"]),
        (
            ["-gencode=arch=compute_90a,code=sm_90a", "-gencode", "arch=compute_80,code=[sm_80,compute_80]"],
            ["90a", "80"],
        ),
        (["--generate-code=arch=compute_80,code=sm_80", "-gencode=arch=compute_80,code=compute_80"], ["80"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_architectures(flags, architectures):
    flags = [f for f in command(["prog.cu", *flags, "-lineinfo"]) if "arch=" in f or "code=" in f or "sm_" in f]
    assert flags == [f"-gencode=arch=compute_{a},code=compute_{a}" for a in architectures]


@needs_nvcc
def test_libraries_whose_place_the_standin_takes():
    flags = ["prog.cu", "-lcuda", "-l", "cudart", "--cudart=shared", "-cudart", "static", "--library=nvToolsExt", "-lm"]
    libraries = [f for f in command(flags) if f.startswith(("-l", "-cudart", "--cudart", "--library"))]
    assert libraries == ["-lm", "--cudart=none", "-lineinfo", "-ldl", "-lpthread"]
    assert f"-Xlinker={core.CUBLAS}" in command(["prog.cu", "-lcublas", "-lcublasLt"])


CLUSTER = """
#include <cooperative_groups.h>
#include <cstdio>
__global__ void __cluster_dims__(2, 1, 1) ranks(int* y) {
  y[blockIdx.x] = cooperative_groups::this_cluster().block_rank();
}
int main() {
  int* y;
  cudaMallocManaged(&y, 4 * sizeof(int));
  ranks<<<4, 1>>>(y);
  if (cudaDeviceSynchronize()) return 1;
  std::printf("%d%d%d%d\\n", y[0], y[1], y[2], y[3]);
}
"""


@needs_nvcc
def test_a_program_for_one_gpu_alone(tmp_path, capfd):
    source, program = tmp_path / "cluster.cu", tmp_path / "cluster"
    source.write_text(CLUSTER)
    assert main(["build", str(source), "-arch=sm_90a", "-o", str(program)]) == 0
    assert execute(program, "sm_90a") == (0, "0101\n")
    assert execute(program)[0] > 0  # a signal would be below
    assert main(["build", str(source), "-arch=sm_90", "-o", str(program)]) == 0
    assert execute(program, "sm_90a") == execute(program, "sm_120") == (0, "0101\n")
    assert main(["build", str(source), "-arch=sm_120a", "-o", str(program)]) == 0
    assert execute(program, "sm_120") == (0, "0101\n")
    assert execute(program, "sm_90a")[0] > 0


@needs_nvcc
def test_a_shared_library(tmp_path):
    """That Python loads, say, with no torch and no gpuless."""
    source, library = tmp_path / "fill.cpp", tmp_path / "libfill.so"
    source.write_text(
        KERNEL + 'extern "C" float filled() { float* y; cudaMallocManaged(&y, 128); launch(y); return y[31]; }'
    )
    flags = ["-x", "cu", "-shared", "-Xcompiler", "-fPIC", "-lcudart", "-o", str(library)]
    assert main(["build", str(source), *flags]) == 0
    code = f"import ctypes; f = ctypes.CDLL({str(library)!r}).filled; f.restype = ctypes.c_float; print(f())"
    environment = {**os.environ, "GPULESS_ARCH": "sm_80"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "2.0\n"), done.stderr


def test_usage(capsys):
    assert main([]) == main(["bild", "prog.cu"]) == main(["rows", "x"]) == 2
    assert capsys.readouterr().err.count("usage: python -m gpuless build") == 3
    assert main(["--help"]) == 0
    assert "rows" in capsys.readouterr().out


@needs_nvcc
def test_nothing_to_build(capsys):
    assert main(["build", "-O3"]) == 2
    assert "name a .cu file" in capsys.readouterr().err


def test_no_nvcc(capsys, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    if core.STANDIN.exists():
        assert main(["build", "prog.cu"]) == 2
        assert "there is no nvcc" in capsys.readouterr().err


def test_rows(capsys):
    assert main(["rows"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(core.rows()) > 100
    assert all(line[0].isdigit() for line in lines)


PROJECT = """
import sys
import torch
import triton
import triton.language as tl

@triton.jit
def double(x_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + i, 2 * tl.load(x_ptr + i))

def test_double():
    x = torch.ones(256)
    double[(2,)](x, BLOCK=128)
    assert x.sum() == 512

def test_beyond_the_end():
    double[(2,)](torch.ones(200), BLOCK=128)

if __name__ == "__main__" and sys.argv[1:]:
    globals()[sys.argv[1]]()
"""


def python(folder, *arguments, **environment):
    """In a project that never imports gpuless."""
    (folder / "test_double.py").write_text(PROJECT)
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, env=environment)


@needs_triton
def test_pytest_interprets_a_whole_process(tmp_path):
    plugin = ("-p", "gpuless.pytest_plugin")  # as the entry point does, which an installation may not have yet
    environment = {"GPULESS_ARCH": "sm_80", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = python(tmp_path, "-m", "pytest", "-q", *plugin, **environment)
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "out_of_bounds: read of 4 bytes" in done.stdout


def test_pytest_s_plugin_costs_nothing_where_nothing_is_interpreted():
    root = pathlib.Path(__file__).parents[1]
    declared = (root / "pyproject.toml").read_text().split("[project.entry-points.pytest11]")[1].split("\n[")[0]
    parser = configparser.ConfigParser()
    parser.read_string("[pytest11]" + declared)
    plugin = parser["pytest11"]["gpuless"].strip('"')
    code = f"import sys, {plugin}; print('torch' in sys.modules)"
    environment = {k: v for k, v in os.environ.items() if k != "GPULESS_ARCH"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=root / "python"
    )
    assert done.stdout == "False\n", done.stderr


@needs_triton
def test_a_report_of_a_script_that_does_not_import_gpuless(tmp_path, monkeypatch, capfd):
    (tmp_path / "test_double.py").write_text(PROJECT)
    monkeypatch.chdir(tmp_path)

    def report(*arguments):
        """(status, stdout, stderr); the script has a process of its own."""
        return main(["report", *arguments]), *capfd.readouterr()

    status, table, messages = report("test_double.py", "test_double")
    assert status == 0, messages
    assert re.search(r"test_double.py:10 .* tl.store\(x_ptr", table), table
    status, _, messages = report("test_double.py", "test_beyond_the_end")
    assert status == 1 and "out_of_bounds" in messages
    assert report("test_double.py")[:2] == (0, "test_double.py launched no kernel on the interpreted GPU\n")
    _, nothing, _ = report("--kernel=triple", "test_double.py", "test_double")
    assert "no kernel that was launched has 'triple' in its name; there are double\n" in nothing
