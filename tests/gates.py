"""Static budgets of the compiled kernels: python tests/gates.py WHEEL. Prints every figure, exits 1 above a budget.

An instance is one kernel template on one architecture's machine code. Registers and local memory are what the assembler
reports; local memory is spilled registers, and none is allowed. Compile time is that of the last build of each file.
"""

import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile

import triton

ROOT = pathlib.Path(__file__).parents[1]
BUDGETS = {"compiled instances": 190, "compile time, core seconds": 600, "wheel, MB": 25, "bytes of local memory": 0}


def kernels(library: pathlib.Path) -> list[tuple[str, str, int, int]]:
    """(architecture, kernel, registers, bytes of stack and local memory) of each instance in a library."""
    cuobjdump = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    dump = subprocess.run(
        [cuobjdump, "--dump-resource-usage", library], capture_output=True, text=True, check=True
    ).stdout
    names = subprocess.run(["c++filt"], input=dump, capture_output=True, text=True, check=True).stdout
    found, arch = [], ""
    for line, usage in zip(names.splitlines(), names.splitlines()[1:]):
        if m := re.match(r"arch = (\w+)", line):
            arch = m[1]
        elif m := re.match(r" Function (.*):$", line):
            use = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
            found.append(
                (arch, re.sub(r"\([^()]*\)$|^void |forwardpass::", "", m[1]), use["REG"], use["STACK"] + use["LOCAL"])
            )
    return found


def compile_seconds(log: pathlib.Path) -> float:
    """The nvcc processes of ninja's log, one core each."""
    took = {}
    for line in log.read_text().splitlines()[1:]:
        start, end, _, output, _ = line.split("\t")
        if output.endswith(".cu.o"):
            took[output] = (int(end) - int(start)) / 1000
    return sum(took.values())


def main(wheel: str) -> int:
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as z:
        if "forwardpass/_kernels.so" not in z.namelist():
            sys.exit(f"{wheel} has no CUDA kernels: build it where there is an nvcc")
        found = kernels(pathlib.Path(z.extract("forwardpass/_kernels.so", folder)))
    for arch, name, registers, local in sorted(found):
        print(f"{arch:<8}{registers:>4} registers {local:>5} B local  {name}")
    figures = {
        "compiled instances": len(found),
        "compile time, core seconds": compile_seconds(ROOT / "build/ninja/.ninja_log"),
        "wheel, MB": pathlib.Path(wheel).stat().st_size / 1e6,
        "bytes of local memory": sum(local for *_, local in found),
    }
    failed = [name for name, n in figures.items() if n > BUDGETS[name]]
    for name, n in figures.items():
        print(f"{name:<28}{n:>8.1f} of {BUDGETS[name]:>4}  {'FAILS' if name in failed else 'ok'}")
    if not found:
        sys.exit("no kernel was found: the gates measured nothing")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
