"""CMake, make and setuptools, to which the interpreter's toolkit is a CUDA toolkit."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from gpuless import core
from gpuless.__main__ import main

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.skipif(shutil.which("nvcc") is None or not core.STANDIN.exists(), reason="there is no nvcc"),
]

KERNEL = """
#include <cuda.h>
#include <cuda_runtime.h>
#include <cstdio>
__global__ void fill(float* y) { y[threadIdx.x] = 2; }
extern "C" float filled() {
  float* y;
  if (cuInit(0) || cudaMallocManaged(&y, 32 * sizeof(float))) return -1;
  fill<<<1, 32>>>(y);
  cudaDeviceSynchronize();
  return y[31];
}
"""
MAIN = 'extern "C" float filled();\n#include <cstdio>\nint main() { std::printf("%g\\n", filled()); }\n'
CMAKE = """
cmake_minimum_required(VERSION 3.24)
project(prog LANGUAGES CXX CUDA)
find_package(CUDAToolkit REQUIRED)
add_library(kernel STATIC kernel.cu)
target_link_libraries(kernel PUBLIC CUDA::cudart CUDA::cuda_driver)
add_executable(prog main.cpp)
target_link_libraries(prog PRIVATE kernel)
"""
MAKE = """
prog: kernel.cu main.cpp
\t$(CUDA_HOME)/bin/nvcc -gencode=arch=compute_90a,code=sm_90a $^ -o $@ -lcuda -lcudart
"""
SETUP = """
import os, subprocess
from setuptools import Extension, setup
home = os.environ["CUDA_HOME"]
subprocess.run([f"{home}/bin/nvcc", "-c", "kernel.cu", "-Xcompiler", "-fPIC", "-o", "kernel.o"], check=True)
setup(name="prog", py_modules=[], ext_modules=[Extension(
    "prog", ["python.cpp"], extra_objects=["kernel.o"], include_dirs=[f"{home}/include"], library_dirs=[f"{home}/lib64"],
    libraries=["cudart", "cuda"])])
"""
PYTHON = """
#include <Python.h>
extern "C" float filled();
static PyObject* call(PyObject*, PyObject*) { return PyFloat_FromDouble(filled()); }
static PyMethodDef methods[] = {{"filled", call, METH_NOARGS, nullptr}, {}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "prog", nullptr, -1, methods};
PyMODINIT_FUNC PyInit_prog() { return PyModule_Create(&module); }
"""


@pytest.fixture
def project(tmp_path):
    texts = {"kernel.cu": KERNEL, "main.cpp": MAIN, "CMakeLists.txt": CMAKE, "Makefile": MAKE, "setup.py": SETUP}
    for name, text in {**texts, "python.cpp": PYTHON}.items():
        (tmp_path / name).write_text(text)
    assert main(["toolkit", str(tmp_path / "toolkit")]) == 0
    return tmp_path


def run(folder, *command, **environment):
    environment = {**os.environ, "GPULESS_ARCH": "sm_90a", **environment}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="there is no cmake")
def test_cmake(project):
    run(project, "cmake", "-B", "build", f"-DCMAKE_TOOLCHAIN_FILE={project}/toolkit/toolchain.cmake")
    run(project, "cmake", "--build", "build")
    assert run(project, "build/prog") == "2\n"


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make(project):
    run(project, "make", CUDA_HOME=str(project / "toolkit"))
    assert run(project, "./prog") == "2\n"


def test_setuptools(project):
    environment = {"CUDA_HOME": str(project / "toolkit"), "LDFLAGS": f"-Wl,-rpath,{core.LIBRARY.parent}"}
    run(project, sys.executable, "setup.py", "build_ext", "--inplace", **environment)
    assert run(project, sys.executable, "-c", "import prog; print(prog.filled())") == "2.0\n"


def test_nvcc_answers_what_it_is_asked(project):
    nvcc = pathlib.Path(shutil.which("nvcc"))
    assert run(project, "toolkit/bin/nvcc", "--version") == run(project, str(nvcc), "--version")
