"""Each file of the library includes what it needs. The build does not tell: a precompiled header comes before all of them."""

import os
import pathlib
import shlex
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(
    p.relative_to(ROOT).as_posix() for folder in ("csrc", "csrc/rows") for p in (ROOT / folder).glob("*.cpp")
)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_file_compiles_by_itself(name):
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    flags = ["-std=c++20", "-march=x86-64-v3", "-iquote", "csrc", '-DGPULESS_VERSION="0"', "-w", "-fsyntax-only"]
    done = subprocess.run([*compiler, *flags, name], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
