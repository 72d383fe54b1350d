"""`python -m gpuless toolkit FOLDER`: a folder that build systems take for a CUDA toolkit.

Its nvcc is `python -m gpuless nvcc`, its libraries are the stand-ins. CMake gets its toolchain file, anything else
its folder as CUDA_HOME.
"""

from __future__ import annotations

import pathlib
import re
import shlex
import subprocess
import sys

from .. import core
from . import build

TOOLCHAIN = """\
# CMake's: cmake -DCMAKE_TOOLCHAIN_FILE=…/toolchain.cmake. Written by python -m gpuless toolkit.
set(CMAKE_CUDA_COMPILER "{folder}/bin/nvcc")
set(CUDAToolkit_ROOT "{folder}")
set(CMAKE_CUDA_RUNTIME_LIBRARY None)
set(CMAKE_CUDA_STANDARD_LIBRARIES_INIT "{standin} {interpreter} -ldl -lpthread")
set(CMAKE_BUILD_RPATH "{package}")
set(CMAKE_INSTALL_RPATH "{package}")
"""


def home() -> pathlib.Path:
    """The root of the real toolkit, as nvcc itself reports it."""
    dry = [build.nvcc(), "--dryrun", "-x", "cu", "-c", "/dev/null", "-o", "/dev/null"]
    top = re.search(r"^#\$ TOP=(.*)$", subprocess.run(dry, capture_output=True, text=True).stderr, re.M)
    if not top:
        raise RuntimeError(f"{build.nvcc()} does not say where its toolkit is")
    return pathlib.Path(top[1]).resolve()


def write_toolkit(folder: pathlib.Path, standin: pathlib.Path = core.STANDIN) -> None:
    """`standin`: CUDART for libraries that Python loads, which have their GPU from there."""
    build.installed()
    real = home()
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    (folder / "lib64").mkdir(exist_ok=True)
    nvcc = folder / "bin" / "nvcc"
    # the real one, which CUDA_HOME may name no longer
    python = shlex.join([f"CUDA_HOME={real}", sys.executable, "-m", "gpuless", "nvcc"])
    nvcc.write_text(f'#!/bin/sh\nexec env {python} "$@"\n')
    nvcc.chmod(0o755)
    for name in ("include", "lib"):
        (folder / name).unlink(missing_ok=True)
    (folder / "include").symlink_to(real / "include")
    (folder / "lib").symlink_to("lib64")
    for library in ("libcudart.so", "libcudart_static.a", "libcuda.so"):
        (folder / "lib64" / library).write_text(f"INPUT({standin} {core.LIBRARY} -ldl -lpthread)\n")
    for library in ("libcublas.so", "libcublasLt.so"):
        (folder / "lib64" / library).write_text(f"INPUT({core.CUBLAS} {standin} {core.LIBRARY} -ldl -lpthread)\n")


def toolkit(folder: pathlib.Path) -> int:
    folder = folder.resolve()
    write_toolkit(folder)
    text = TOOLCHAIN.format(folder=folder, standin=core.STANDIN, interpreter=core.LIBRARY, package=core.LIBRARY.parent)
    (folder / "toolchain.cmake").write_text(text)
    print(f"CMake: -DCMAKE_TOOLCHAIN_FILE={folder}/toolchain.cmake; others: CUDA_HOME={folder}")
    return 0
