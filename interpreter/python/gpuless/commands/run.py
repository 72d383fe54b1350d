"""`python -m gpuless run`: a Python script that says device="cuda", on the interpreted GPU."""

from __future__ import annotations

import argparse
import pathlib
import runpy
import sys

from .. import core, cuda, device


def run(arguments: list[str]) -> int:
    """The script's exit status where that is not 0; 3 where a kernel had a finding."""
    parser = argparse.ArgumentParser(
        prog="python -m gpuless run",
        description="Runs a Python script with torch's cuda device being an interpreted GPU. Its kernels are checked, and what "
        "they do wrong is listed at the end; what Triton benchmarks is modelled time.",
    )
    parser.add_argument("--gpu", default="sm_90a", choices=core.ARCHITECTURES, help="which (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of its schedule: repeats a finding")
    parser.add_argument("--guard", action="store_true", help="kernels get padded, poisoned copies of their arguments")
    parser.add_argument(
        "--ignore", type=pathlib.Path, action="append", default=[], metavar="FILE", help="rules of what is known"
    )
    parser.add_argument("--strict", action="store_true", help="also what is against the letter of the PTX ISA alone")
    parser.add_argument("script", type=pathlib.Path, help="SCRIPT.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own")
    options = parser.parse_args(arguments)
    if not options.script.is_file():
        raise ValueError(f"there is no {options.script}")
    gpu = device.make(options.gpu, seed=options.seed, guard=options.guard, findings="collect", ignore=options.ignore)
    cuda.present(gpu)
    sys.argv = [str(options.script), *options.arguments]
    sys.path[0] = str(options.script.absolute().parent)
    try:
        runpy.run_path(str(options.script), run_name="__main__")
    finally:
        faults = [f for f in gpu.findings if options.strict or f.breaks == "hardware"]
        for fault in faults:
            print(f"{fault}\n", file=sys.stderr)
        n, tolerated = gpu.counters, len(gpu.findings) - len(faults)
        print(
            f"gpuless: {n['launches']} launch{'es' * (n['launches'] != 1)} on {gpu!r}, "
            f"{n['warp_instructions'] / 1e6:.1f} million warp instructions, {len(faults)} finding{'s' * (len(faults) != 1)}"
            + (f", {tolerated} more against the letter of the ISA (--strict)" if tolerated else ""),
            file=sys.stderr,
        )
    return 3 if faults else 0
