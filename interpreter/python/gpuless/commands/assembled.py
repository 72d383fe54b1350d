"""`python -m gpuless sass FILE`: what the assembler makes of kernels, checked in its machine code."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

from .machine_code import Overwritten, local_accesses, overwritten, parse

#: ptxas repairs what a wgmma needs, and says so: the products then wait for each other
_ADVISORY = re.compile(r".*\b(C75\d\d)\b.*")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_TARGET = re.compile(r"^\s*\.target\s+(sm_\w+)", re.M)


def tool(name: str) -> str:
    """A toolkit, or of a wheel that carries it: Triton's, NVIDIA's own."""
    folders = [pathlib.Path(os.environ["CUDA_HOME"], "bin")] if os.environ.get("CUDA_HOME") else []
    if path := shutil.which(name, path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")])):
        return path
    for package, within in (("triton", "backends/nvidia/bin"), ("nvidia", "cu13/bin"), ("nvidia", f"cuda_{name}/bin")):
        spec = importlib.util.find_spec(package)
        for base in (spec.submodule_search_locations or ()) if spec else ():
            if (program := pathlib.Path(base, within, name)).is_file():
                return str(program)
    raise FileNotFoundError(
        f"there is no {name}, which reads machine code: put a CUDA toolkit on PATH, or pip install triton"
    )


def assembled(source: pathlib.Path, flags: list[str], folder: pathlib.Path) -> tuple[pathlib.Path, str]:
    """The cubin, and the report of the assembler: "" for a file that is a cubin already."""
    if source.suffix == ".cubin":
        return source, ""
    cubin = folder / "checked.cubin"
    if source.suffix == ".ptx":
        target = _TARGET.search(source.read_text())
        if not target:
            raise ValueError(f"{source} has no .target")
        command = [tool("ptxas"), "-v", f"-arch={target[1]}", *flags, "-o", str(cubin), str(source)]
    elif source.suffix == ".cu":
        command = [tool("nvcc"), "-cubin", "-lineinfo", "-Xptxas=-v", *flags, "-o", str(cubin), str(source)]
    else:
        raise ValueError(f"{source} is no .cu, .ptx or .cubin")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{source} does not assemble:\n{done.stdout}{done.stderr}")
    return cubin, done.stdout + done.stderr


def _by_place(conflicts: list[Overwritten]) -> list[str]:
    """A line of source that fills several registers once."""
    groups: dict[tuple[str, int, str], Overwritten] = {}
    for o in conflicts:
        key = o.writer.file, o.writer.line, str(o.reader)
        first = groups.get(key, o)
        registers = tuple(sorted({*first.registers, *o.registers}))
        groups[key] = dataclasses.replace(first, registers=registers)
    return list(map(str, groups.values()))


def findings(source: pathlib.Path, flags: list[str]) -> list[str]:
    """The findings of a file, in the order of its kernels."""
    with tempfile.TemporaryDirectory() as name:
        cubin, report = assembled(source, flags, pathlib.Path(name))
        text = subprocess.run([tool("nvdisasm"), "-c", "-g", cubin], capture_output=True, text=True, check=True).stdout
    texts = [f"ptxas {match[1]}: {match[0].strip()}" for match in _ADVISORY.finditer(report)]
    spills = [match for match in _SPILLS.finditer(report) if int(match[1]) or int(match[2])]
    for function in parse(text):
        texts += _by_place(overwritten(function))
        local = local_accesses(function)
        if local and (spills or not report):  # a cubin does not tell a spill from an array that is indexed
            what = "spills" if spills else "local memory: spills, or an array that is indexed"
            texts.append(f"{what}: {len(local)} loads and stores\n  kernel {function.name}\n  the first at {local[0]}")
    return texts


def sass(arguments: list[str]) -> int:
    """3 where there is a finding."""
    parser = argparse.ArgumentParser(
        prog="python -m gpuless sass",
        description="Checks machine code for what PTX cannot show: registers of a wgmma's A that are written before its wait, "
        "spills, and advice of ptxas (C75xx) that wgmmas wait for each other.",
    )
    parser.add_argument("--json", action="store_true", help="findings as a list of strings")
    parser.add_argument("file", type=pathlib.Path, help="FILE.cu, FILE.ptx or FILE.cubin")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="nvcc's or ptxas's own, such as -arch=sm_90a")
    options = parser.parse_args(arguments)
    if not options.file.is_file():
        raise ValueError(f"there is no {options.file}")
    texts = findings(options.file, options.flags)
    if options.json:
        print(json.dumps(texts, indent=1))
    else:
        print("\n\n".join([*texts, f"gpuless: {len(texts)} finding{'s' * (len(texts) != 1)} in machine code"]))
    return 3 if texts else 0
