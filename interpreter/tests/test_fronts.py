"""What compiles kernels by itself and loads them by libcuda.so.1: the driver's API, NVRTC, Numba. What cannot: a static cudart."""

import importlib.util
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
    pytest.mark.skipif(not core.DRIVER.exists(), reason="gpuless was built without a CUDA toolkit"),
]
FOLDER = pathlib.Path(__file__).parent / "fronts"


def nvrtc() -> str | None:
    """The libnvrtc of a wheel or of the toolkit."""
    spec = importlib.util.find_spec("nvidia")
    folders = [pathlib.Path(base) for base in spec.submodule_search_locations or ()] if spec else []
    folders.append(pathlib.Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")))
    files = [file for folder in folders for file in sorted(folder.glob("**/libnvrtc.so.1[23]"))]
    return str(files[0]) if files else None


NVRTC = nvrtc()
needs_nvrtc = pytest.mark.skipif(NVRTC is None, reason="there is no libnvrtc: pip install nvidia-cuda-nvrtc")
needs_numba = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None or importlib.util.find_spec("numba.cuda") is None,
    reason="there is no Numba with CUDA",
)
CUDA = pathlib.Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))


def run(script, *arguments):
    command = [sys.executable, "-m", "gpuless", "run", "--gpu", "sm_80", str(FOLDER / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("how", ["load", "link", pytest.param("nvrtc", marks=needs_nvrtc)])
def test_a_script_of_the_driver(how):
    done = run("driver_script.py", how, NVRTC or "")
    assert (done.returncode, done.stdout) == (4 if how == "link" else 0, "PASS\n"), done.stdout + done.stderr
    if how == "link":  # it tries a second text
        assert "incomplete: cuLink of several PTX texts is not supported" in done.stderr
    assert "1 launch on sm_80" in done.stderr


@pytest.mark.parametrize("how", ["load", pytest.param("nvrtc", marks=needs_nvrtc)])
def test_its_kernels_are_checked(how):
    done = run("driver_script.py", how, "past", NVRTC or "")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "out_of_bounds: read of 4 bytes" in done.stderr and "(4000 bytes)" in done.stderr
    if how == "nvrtc":
        assert "at twice.cu:3" in done.stderr


def test_the_toolkit_s_nvcc_makes_ptx_where_a_cubin_is_asked_for(tmp_path):
    source, cubin = tmp_path / "twice.cu", tmp_path / "twice.cubin"
    source.write_text('extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2; }')
    assert main(["nvcc", "--cubin", "-O3", "-arch=sm_90a", "-o", str(cubin), str(source)]) == 0
    assert ".target sm_90a" in cubin.read_text() and ".entry twice" in cubin.read_text()


@needs_numba
def test_numba():
    done = run("numba_script.py")
    assert (done.returncode, done.stdout) == (0, "PASS\n"), done.stdout + done.stderr


@needs_numba
def test_a_race_in_a_kernel_of_numba():
    done = run("numba_script.py", "race")
    assert done.returncode == 3 and "race: " in done.stderr, done.stdout + done.stderr


@pytest.mark.skipif(
    not (CUDA / "lib64" / "libcudart_static.a").exists() or shutil.which("cc") is None,
    reason="there is no static cudart",
)
def test_a_library_with_a_cudart_of_its_own_is_refused_in_a_sentence(tmp_path):
    library, script = tmp_path / "static.so", tmp_path / "script.py"
    flags = ["-shared", "-fPIC", f"-I{CUDA}/include", f"-L{CUDA}/lib64", "-o", str(library)]
    subprocess.run(
        ["cc", str(FOLDER / "static_cudart.c"), *flags, "-lcudart_static", "-ldl", "-lrt", "-lpthread"], check=True
    )
    script.write_text(f"import ctypes; print(ctypes.CDLL({str(library)!r}).device_count())")
    done = run(script)
    assert (done.returncode, done.stdout) == (4, "500\n"), done.stdout + done.stderr
    assert f"incomplete: NVIDIA's cudart in {library} needs private tables" in done.stderr
    assert "give gpuless the kernel's PTX" in done.stderr
