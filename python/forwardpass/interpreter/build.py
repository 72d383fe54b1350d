"""`python -m forwardpass.interpreter build`: a CUDA program, compiled by nvcc and linked against the stand-in for cudart."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess

from . import core

SOURCES = (".cu", ".c", ".cc", ".cpp", ".cxx")
LINKS_NOTHING = {"-c", "--compile", "-E", "--preprocess", "-ptx", "--ptx"}
#: of nvcc's, and what is said about each
REFUSED = {
    ("-arch", "--gpu-architecture", "-gencode", "--generate-code", "-code", "--gpu-code"):
        "the program is built for all that the interpreter knows, FORWARDPASS_INTERPRET=sm_90a chooses when it runs",
    ("-cudart", "--cudart", "-lcudart", "-lcudart_static"): "the stand-in takes the place of cudart",
    ("-dc", "--device-c", "-rdc", "--relocatable-device-code", "-dlink", "--device-link"):
        "device code of several files is linked in SASS, and the interpreter runs PTX: include the files in one",
    ("-dlto", "--dlink-time-opt", "-lto", "--lto"): "the interpreter runs PTX, and that leaves none",
}  # fmt: skip


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    path = shutil.which(f"{home}/bin/nvcc" if home else "nvcc")
    if path is None:
        raise FileNotFoundError("there is no nvcc: set CUDA_HOME or PATH to a CUDA toolkit of 12.8 or later")
    return path


def command(flags: list[str]) -> list[str]:
    """The nvcc command for what the user wrote; raises ValueError on flags that cannot be honoured."""
    for flag in flags:
        for names, why in REFUSED.items():
            if flag.partition("=")[0] in names and not flag.endswith(("=false", "=none")):
                raise ValueError(f"{flag} cannot be taken: {why}")
    command = [nvcc(), *flags, "--compress-mode=none", "--cudart=none"]
    for arch in core.ARCHITECTURES:
        virtual = arch.replace("sm", "compute")
        command.append(f"-gencode=arch={virtual},code={virtual}")
    if not {"-lineinfo", "--generate-line-info"} & set(flags):
        command.append("-lineinfo")
    if not LINKS_NOTHING & set(flags):
        # an absolute run path: the program runs where it was built, like any test
        command += [
            str(core.STANDIN),
            str(core.LIBRARY),
            "-Xlinker",
            f"-rpath={core.LIBRARY.parent}",
            "-ldl",
            "-lpthread",
        ]
    return command


def build(flags: list[str]) -> int:
    """nvcc's exit status."""
    missing = [p for p in (core.LIBRARY, core.STANDIN) if not p.exists()]
    if missing:
        raise FileNotFoundError(f"this installation has no {missing[0].name}: reinstall forwardpass")
    if not any(pathlib.Path(f).suffix in (*SOURCES, ".o", ".a") for f in flags):
        raise ValueError("there is nothing to build: name a .cu file")
    return subprocess.run(command(flags)).returncode
