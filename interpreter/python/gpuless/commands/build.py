"""`python -m gpuless build`: a CUDA program, compiled by nvcc and linked against the stand-in for cudart."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess

from .. import core

SOURCES = (".cu", ".c", ".cc", ".cpp", ".cxx")
LINKS_NOTHING = {"-c", "--compile", "-E", "--preprocess", "-ptx", "--ptx", "-lib", "--lib", "-M", "-MM"}
#: of nvcc's, and what is said about each
REFUSED = {
    ("-dc", "--device-c", "-rdc", "--relocatable-device-code", "-dlink", "--device-link"):
        "device code of several files is linked in SASS, and the interpreter runs PTX: include the files in one",
    ("-dlto", "--dlink-time-opt", "-lto", "--lto"): "the interpreter runs PTX, and that leaves none",
    ("-cubin", "--cubin", "-fatbin", "--fatbin"): "the interpreter runs PTX: -ptx makes it",
}  # fmt: skip
ARCHITECTURE = ("-arch", "--gpu-architecture", "-gencode", "--generate-code", "-code", "--gpu-code")
#: libraries whose place the stand-in takes, those that it has a part of, and those that there are none of
STOOD_IN = {"cuda", "cudart", "cudart_static", "cudadevrt", "nvToolsExt", "culibos"}
CUBLAS = {"cublas", "cublasLt", "cublas_static", "cublasLt_static"}
NO_STANDIN = {
    "curand", "cufft", "cufftw", "cusparse", "cusparseLt", "cusolver", "cudnn", "nccl", "nvrtc", "nvJitLink", "npp", "nvjpeg",
    "nvidia-ml", "cupti", "nvshmem",
}  # fmt: skip


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    path = shutil.which(f"{home}/bin/nvcc" if home else "nvcc")
    if path is None:
        raise FileNotFoundError("there is no nvcc: set CUDA_HOME or PATH to a CUDA toolkit of 12.8 or later")
    return path


def joined(flags: list[str]) -> list[str]:
    """A flag and its value as one, `-arch sm_90` as `-arch=sm_90`, where the value decides what is done."""
    result: list[str] = []
    rest = iter(flags)
    for flag in rest:
        if flag in (*ARCHITECTURE, "-cudart", "--cudart", "--library"):
            result.append(f"{flag}={next(rest, '')}")
        elif flag == "-l":
            result.append(f"-l{next(rest, '')}")
        else:
            result.append(flag)
    return result


def virtual(flag: str) -> list[str]:
    """The compute_XX that a flag about architectures has PTX made of."""
    name, _, value = flag.partition("=")
    if name in ("-code", "--gpu-code"):
        return []  # which of them SASS is made of
    if name in ("-gencode", "--generate-code"):
        match = re.search(r"arch=([^,\s]+)", value)
        value = match[1] if match else value
    if value in ("native", "all", "all-major"):
        value = ",".join(core.ARCHITECTURES)
    result = []
    for arch in value.split(","):
        # of "sm_90a" the number, and whether it is for that GPU alone; what is not may run on any that is newer
        match = re.fullmatch(r"(?:sm|compute|lto)_(\d+)([af]?)", arch)
        numbers = [int(re.sub(r"\D", "", known)) for known in core.ARCHITECTURES]
        if not match or (int(match[1]) not in numbers if match[2] else int(match[1]) > max(numbers)):
            raise ValueError(
                f"{flag} cannot be taken: of {arch} none is interpreted; there are {', '.join(core.ARCHITECTURES)}"
            )
        result.append(f"compute_{match[1]}{match[2]}")
    return result


def library_of(flag: str) -> str:
    """`cuda` of -lcuda and --library=cuda; "" for anything else."""
    if flag.startswith("--library="):
        return flag.partition("=")[2]
    return flag[2:] if flag.startswith("-l") and not flag.startswith("-lineinfo") else ""


def command(flags: list[str], standin: pathlib.Path = core.STANDIN) -> list[str]:
    """The nvcc command for what the user wrote; raises ValueError on flags that cannot be honoured."""
    architectures: list[str] = []
    passed: list[str] = []
    standins = [standin]
    for flag in joined(flags):
        name, library = flag.partition("=")[0], library_of(flag)
        for names, why in REFUSED.items():
            if name in names and not flag.endswith("=false"):
                raise ValueError(f"{flag} cannot be taken: {why}")
        if library.removesuffix("_static") in NO_STANDIN:
            raise ValueError(f"{flag} cannot be taken: of {library} there is no stand-in, its kernels are SASS")
        if name in ARCHITECTURE:
            architectures += virtual(flag)
        elif library in CUBLAS:
            standins = [core.CUBLAS, standin]
        elif library not in STOOD_IN and name not in ("-cudart", "--cudart"):
            passed.append(flag)
    command = [nvcc(), *passed, "--compress-mode=none", "--cudart=none"]
    for arch in dict.fromkeys(architectures or (a.replace("sm", "compute") for a in core.ARCHITECTURES)):
        command.append(f"-gencode=arch={arch},code={arch}")
    if not {"-lineinfo", "--generate-line-info"} & set(flags):
        command.append("-lineinfo")
    if not LINKS_NOTHING & set(flags):
        # For the linker alone, wherever nvcc puts that: a -x is not for these files, and CMake takes none of them for nvcc's own
        # libraries. An absolute run path: the program runs where it was built, like any test
        words = ["--whole-archive", *standins, "--no-whole-archive", core.LIBRARY, f"-rpath={core.LIBRARY.parent}"]
        command += [f"-Xlinker={word}" for word in words] + ["-ldl", "-lpthread"]
    return command


def names_files(flags: list[str]) -> bool:
    return any(pathlib.Path(f).suffix in (*SOURCES, ".o", ".a") and not f.startswith("-") for f in flags)


def installed() -> None:
    missing = [p for p in (core.LIBRARY, core.STANDIN, core.CUBLAS) if not p.exists()]
    if missing:
        raise FileNotFoundError(f"this installation has no {missing[0].name}: reinstall gpuless where `nvcc` is found")


def build(flags: list[str], standin: pathlib.Path = core.STANDIN) -> int:
    """nvcc's exit status. `standin`: CUDART for a library that Python loads, which has its GPU from there."""
    installed()
    if not names_files(flags):
        raise ValueError("there is nothing to build: name a .cu file")
    return subprocess.run(command(flags, standin)).returncode


def as_nvcc(flags: list[str]) -> int:
    """nvcc for build systems, which also ask it things: --version, say.

    A cubin that is asked for is PTX, because TileLang, say, asks for one, and loads it by a function that takes both.
    """
    installed()
    flags = ["--ptx" if flag in ("-cubin", "--cubin") else flag for flag in flags]
    return subprocess.run(command(flags) if names_files(flags) else [nvcc(), *flags]).returncode
