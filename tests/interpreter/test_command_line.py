"""`python -m forwardpass.interpreter`: what it builds, what it refuses, what it prints. Programs are in test_programs.py."""

import os
import re
import shutil
import subprocess

import pytest

from forwardpass.interpreter import core
from forwardpass.interpreter.__main__ import main

pytestmark = pytest.mark.interpreted
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


def execute(program):
    environment = {**os.environ, "FORWARDPASS_INTERPRET": "sm_80"}
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
        (["-arch=sm_90"], "-arch=sm_90 cannot be taken: .* FORWARDPASS_INTERPRET"),
        (["-arch", "sm_90"], "-arch cannot be taken"),
        (["-gencode=arch=compute_80,code=sm_80"], "cannot be taken"),
        (["--cudart=shared"], "stand-in takes the place of cudart"),
        (["-lcudart"], "stand-in"),
        (["-rdc=true"], "include the files in one"),
        (["-dlto"], "leaves none"),
    ],
)
def test_flags_that_are_refused(flags, words, capsys):
    assert main(["build", "prog.cu", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(words, line)


def test_usage(capsys):
    assert main([]) == main(["bild", "prog.cu"]) == main(["rows", "x"]) == 2
    assert capsys.readouterr().err.count("usage: python -m forwardpass.interpreter build") == 3
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
