"""The stand-in for cuBLAS, of which a program gets what it links with -lcublas: products on the host, none of them checked."""

import os
import pathlib
import shutil
import subprocess

import pytest

from gpuless.__main__ import main

NVCC = shutil.which(f"{os.environ['CUDA_HOME']}/bin/nvcc" if "CUDA_HOME" in os.environ else "nvcc")
pytestmark = [pytest.mark.interpreted, pytest.mark.skipif(NVCC is None, reason="there is no nvcc")]


def test_cublas(tmp_path):
    source, program = pathlib.Path(__file__).parent / "programs" / "blas.cu", tmp_path / "blas"
    assert (
        main(["build", str(source), "-std=c++20", "-O2", "-lcublas", "-lcublasLt", "-arch=sm_80", "-o", str(program)])
        == 0
    )
    environment = {**os.environ, "GPULESS_ARCH": "sm_80"}
    done = subprocess.run([program], capture_output=True, text=True, env=environment, timeout=120)
    # 4: it calls what is refused
    assert (done.returncode, done.stdout) == (4, "PASS\n"), done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert lines[0] == (
        "cublasGemmStridedBatchedEx is computed on the host: no kernel of cuBLAS runs, and nothing of it is checked"
    )
    assert lines[1:] == [
        "cublasLtMatmul with cublasLtEpilogue_t 512 is not supported by gpuless",
        "cublasSgemm: the leading dimension of a is 3, and it has 4 rows",
        "cublasSgemm: b reaches beyond the memory that was allocated",
        "cublasGemmStridedBatchedEx with cudaDataType_t 4 is not supported by gpuless",
        "cublasGemmStridedBatchedEx with cublasComputeType_t 64 is not supported by gpuless",
    ]
