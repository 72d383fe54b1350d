"""`python -m gpuless`: builds CUDA programs for the interpreter, counts what programs do, and prints what it
knows."""

from __future__ import annotations

import pathlib
import sys

from . import core
from .commands.assembled import sass
from .commands.build import as_nvcc, build
from .commands.mcp import mcp
from .commands.report import report
from .commands.run import run
from .commands.toolkit import toolkit

USAGE = """\
usage: python -m gpuless build PROG.cu [nvcc flags] -o PROG
           then GPULESS_ARCH=sm_90a ./PROG runs it; GPULESS_SEED=N chooses another schedule,
           ..._EXPLORE=N tries N orders of each launch's synchronisation, ..._SCHEDULE=... repeats one,
           ..._FINDINGS=collect goes on behind findings, ..._IGNORE=FILE has rules of those that are known, and ..._STRICT=1
           counts those against the letter of the ISA alone too; it exits with 3 if something is left
       python -m gpuless run [--gpu ARCH] [--seed N] [--explore N] [--json FILE] [--sarif FILE] [--junit FILE]
                             [--coverage] [--time-limit SECONDS] SCRIPT.py|PROG [arguments]
           runs a Python script with torch's cuda device being the interpreted GPU, or a program that build made; exits
           with the verdict: 0 clean, 2 error, 3 finding, 4 incomplete
       python -m gpuless verify KERNEL.py|KERNEL.cu --reference FILE [--gpu ARCH] [--keep-going] [--json FILE] ...
           compares a kernel with a reference on inputs that kernels are wrong on; exits with the verdict
       python -m gpuless nvcc ...
           is nvcc for a build system, which builds for the interpreter
       python -m gpuless toolkit FOLDER
           makes a folder that build systems take for a CUDA toolkit: CMake by its toolchain.cmake, others as CUDA_HOME
       python -m gpuless report [--arch ARCH] [--kernel NAME] [--inlined] [--json FILE] [--timeline] [--trace FILE]
                                                PROG|SCRIPT.py [arguments]
           runs it and prints its kernels by source line: instructions, conflicts, bytes, waits, and a modelled time; with
           --timeline also what warps wait for, cycle by cycle
       python -m gpuless sass FILE.cu|FILE.ptx|FILE.cubin [flags]
           reads the machine code: registers of a wgmma that are written too early, spills, ptxas's C75xx
       python -m gpuless mcp
           verify, run and build as tools for agents: the Model Context Protocol on stdin and stdout
       python -m gpuless rows
           prints every instruction that it knows, with its section of the PTX ISA"""


def main(arguments: list[str]) -> int:
    command, options = (arguments[0], arguments[1:]) if arguments else ("", [])
    try:
        if command == "build":
            return build(options)
        if command == "nvcc":
            return as_nvcc(options)
        if command == "toolkit" and len(options) == 1:
            return toolkit(pathlib.Path(options[0]))
        if command == "report":
            return report(options)
        if command == "run":
            return run(options)
        if command == "sass":
            return sass(options)
        if command == "verify":
            from .commands.verify import verify  # which needs torch

            return verify(options)
        if command == "mcp" and not options:
            return mcp()
        if command == "rows" and not options:
            for r in core.rows():
                print(f"{r['section']:<16}{r['pattern']}")
            return 0
    except (ValueError, OSError, RuntimeError) as e:
        print(f"gpuless: {e}", file=sys.stderr)
        return 2
    print(USAGE, file=sys.stdout if command in ("-h", "--help") else sys.stderr)
    return 0 if command in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
