"""`python -m forwardpass.interpreter`: builds CUDA programs for the interpreter, counts what programs do, and prints what it
knows."""

from __future__ import annotations

import sys

from . import core
from .build import build
from .report import report

USAGE = """\
usage: python -m forwardpass.interpreter build PROG.cu [nvcc flags] -o PROG
           then FORWARDPASS_INTERPRET=sm_90a ./PROG runs it; FORWARDPASS_INTERPRET_SEED=N chooses another schedule
       python -m forwardpass.interpreter report [--arch ARCH] [--kernel NAME] [--inlined] [--json FILE] [--timeline] [--trace FILE]
                                                PROG|SCRIPT.py [arguments]
           runs it and prints its kernels by source line: instructions, conflicts, bytes, waits, and a modelled time; with
           --timeline also what warps wait for, cycle by cycle
       python -m forwardpass.interpreter rows
           prints every instruction that it knows, with its section of the PTX ISA"""


def main(arguments: list[str]) -> int:
    command, options = (arguments[0], arguments[1:]) if arguments else ("", [])
    try:
        if command == "build":
            return build(options)
        if command == "report":
            return report(options)
        if command == "rows" and not options:
            for r in core.rows():
                print(f"{r['section']:<16}{r['pattern']}")
            return 0
    except (ValueError, OSError, RuntimeError) as e:
        print(f"forwardpass: {e}", file=sys.stderr)
        return 2
    print(USAGE, file=sys.stdout if command in ("-h", "--help") else sys.stderr)
    return 0 if command in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
