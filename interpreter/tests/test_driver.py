"""A program of the driver's API, which loads PTX when it runs."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest

from gpuless.__main__ import main

NVCC = shutil.which(f"{os.environ['CUDA_HOME']}/bin/nvcc" if "CUDA_HOME" in os.environ else "nvcc")
pytestmark = [pytest.mark.interpreted, pytest.mark.skipif(NVCC is None, reason="there is no nvcc")]
FOLDER = pathlib.Path(__file__).parent / "programs"


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """(the program, the PTX)"""
    folder = tmp_path_factory.mktemp("driver")
    program, ptx = folder / "driver", folder / "module.ptx"
    assert main(["build", str(FOLDER / "driver.cu"), "-arch=sm_80", "-lcuda", "-o", str(program)]) == 0
    assert main(["build", str(FOLDER / "driver_module.cu"), "-ptx", "-arch=sm_80", "-o", str(ptx)]) == 0
    return program, ptx


def execute(driver, *arguments, architecture="sm_80"):
    environment = {**os.environ, "GPULESS_ARCH": architecture}
    return subprocess.run([*driver, *arguments], capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90a"])
def test_driver(driver, architecture):
    done = execute(driver, architecture=architecture)
    assert (done.returncode, done.stdout) == (0, "PASS\n"), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("what", "error", "words"),
    [
        ("cubin", "CUDA_ERROR_INVALID_IMAGE", "cubin.* runs PTX: load the PTX that it was made of"),
        ("newer", "CUDA_ERROR_NO_BINARY_FOR_GPU", "no PTX that the interpreter can run on sm_80, only compute_100a"),
        ("syntax", "CUDA_ERROR_INVALID_PTX", "the PTX does not parse"),
        ("nothing", "CUDA_ERROR_INVALID_IMAGE", "is no PTX"),
        ("unknown", "CUDA_ERROR_NOT_FOUND", ""),
    ],
)
def test_what_is_refused(driver, what, error, words):
    done = execute(driver, what)
    assert done.stdout.startswith(f"{error}: "), done.stdout
    assert re.search(words, " ".join(done.stderr.split())), done.stderr
