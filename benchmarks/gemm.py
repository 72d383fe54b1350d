"""The GEMMs, our CUDA kernels and our Triton kernels: counted and modelled by the interpreter, or measured on a GPU.

    python -m benchmarks.gemm --interpret sm_90a [--op int8_gemm ...] [--json FILE]
    python -m benchmarks.gemm --device cuda [--op int8_gemm ...] [--m 1 16 ...] [--rounds N] [--json FILE]

Interpreted figures are counts of PTX; times are modelled from them (interpreter/python/gpuless/timing/model.py), no measurement.
On a GPU each is timed from a cold L2, by itself and with the host's part, beside torch's kernels for the same product.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from typing import Any

import torch

from benchmarks import bench, gemm_on_gpu, interpreted
from benchmarks.interpreted import IMPLEMENTATIONS, Interpreted, number, run
from forwardpass import dispatch
from forwardpass.dispatch import Operation
from gpuless import core

#: operation -> variants: what its case takes besides M, N, K and 16-bit inputs and outputs
OPERATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "int8_gemm": {"": {}},
    "int8_gemm_quantize": {"": {"quantized": True}},
    "int8_linear": {"": {"symmetric": True}},
    "fp8_gemm": {"rows": {}, "blocks": {"blocks": True}},
    "fp8_gemm_quantize": {"blocks": {"blocks": True, "quantized": True}},
    "fp8_linear": {"rows": {"scales": "row"}, "blocks": {"scales": "block"}},
    "w8a16_gemm": {"int8": {"w_dtype": torch.int8}, "e4m3": {"w_dtype": torch.float8_e4m3fn}},
}
#: M x N x K that is interpreted: decode, a small batch, and enough tiles for every multiprocessor
SHAPES = ((1, 1024, 1024), (16, 1024, 1024), (64, 1024, 1024), (1024, 2048, 512))
MI = 2**20


def make_case(op: Operation, m: int, n: int, k: int, options: dict[str, Any]) -> Any:
    """A case of the operation's cases.py: bf16 in and out, a scale a row and a column, no activation."""
    cases = importlib.import_module(f"{op.package}.cases")
    fields = {f.name for f in dataclasses.fields(cases.Case)}
    settings = {"m": m} if "m" in fields else {"lead": (m,)}
    settings |= {"n": n, "k": k, "x_dtype": torch.bfloat16, "out_dtype": torch.bfloat16, **options}
    if "epilogue" in fields:
        settings["epilogue"] = importlib.import_module("forwardpass.ops.dequant_activation.cases").EpilogueCase(
            bias=torch.bfloat16, out_dtype=torch.bfloat16
        )
    return cases.Case(**{name: value for name, value in settings.items() if name in fields})


def problems(names: list[str] | None) -> list[tuple[Operation, str, dict[str, Any]]]:
    """(operation, variant, options) of those that this build has; a name is an operation's or its package's."""
    available = [dispatch.operations[n] for n in OPERATIONS if n in dispatch.operations]
    operations = [op for op in available if not names or {op.name, op.package.split(".")[-1]} & set(names)]
    return [(op, variant, options) for op in operations for variant, options in OPERATIONS[op.name].items()]


def main_loop(op: Operation, implementation: str, arch: str, case: Any, once: Interpreted) -> dict[str, Any]:
    """Counts of the main loop alone, which is what twice the depth adds to a kernel with tensor-core work launched the same way."""
    twice = run(op, implementation, arch, dataclasses.replace(case, k=2 * case.k))
    before, after = ([k for k in result.kernels if k.counts.macs] for result in (once, twice))
    if [(k.kernel, k.grid, k.launches) for k in before] != [(k.kernel, k.grid, k.launches) for k in after]:
        return {}

    def added(name: str) -> int:
        return sum(getattr(b.counts, name) - getattr(a.counts, name) for a, b in zip(before, after))

    ideal = added("ideal_wavefronts")
    return {
        "ptx_per_mi_mac": added("issued") / (case.flops() / 2 / MI),
        "wavefronts_per_ideal": added("wavefronts") / ideal if ideal else None,
    }


def interpreted_row(op: Operation, variant: str, implementation: str, arch: str, case: Any, shape: tuple[int, int, int],
                    loop: bool) -> dict[str, Any]:  # fmt: skip
    row: dict[str, Any] = {"operation": op.name, "variant": variant, "implementation": implementation, "shape": shape}
    try:
        result = run(op, implementation, arch, case)
    except RuntimeError as e:
        return {**row, "missing": str(e).splitlines()[0]}
    return {
        **row,
        **result.row(case),
        "ptx_per_mi_mac": result.counts.issued / (case.flops() / 2 / MI),
        "main_loop": main_loop(op, implementation, arch, case, result) if loop else {},
    }


def interpreted_line(row: dict[str, Any]) -> str:
    if "missing" in row:
        return f"  {row['implementation']:<8}not there: {row['missing']}"

    loop = row["main_loop"]
    return (
        f"  {row['implementation']:<8}{row['modelled_us']:9.2f} us by {row['binding']:<22}"
        f"{row['dram_bytes'] / row['least_bytes']:7.2f} x{row['l2_bytes'] / row['least_bytes']:8.2f} x"
        f"{row['ptx_per_mi_mac']:9.0f}{number(loop.get('ptx_per_mi_mac'), '.0f'):>7}"
        f"{number(row['wavefronts_per_ideal'], '.2f'):>9}{number(loop.get('wavefronts_per_ideal'), '.2f'):>6}"
        f"  {len(row['launches'])} launch{'es' * (len(row['launches']) != 1)}"
    )


def interpret_all(arch: str, names: list[str] | None) -> list[dict[str, Any]]:
    print(interpreted.heading(arch))
    print(
        f"{'':10}{'modelled':>12}    {'bound by':<20}{'DRAM':>8}{'L2':>10} of least bytes  PTX/Mi MAC  (loop) wavefronts (loop)"
    )
    rows = []
    for op, variant, options in problems(names):
        absent: dict[str, str] = {}  # implementation -> why, said once
        for shape in SHAPES:
            case = make_case(op, *shape, options)
            print(f"{title(op, variant, shape)}, {case.bytes() / 1e6:.2f} MB at least")
            for implementation in IMPLEMENTATIONS:
                row = interpreted_row(op, variant, implementation, arch, case, shape, loop=shape == SHAPES[-1])
                rows.append(row)
                if "missing" not in row or absent.get(implementation) != row["missing"]:
                    print(interpreted_line(row), flush=True)
                if "missing" in row:
                    absent[implementation] = row["missing"]
    return rows


def title(op: Operation, variant: str, shape: tuple[int, int, int]) -> str:
    return " ".join(filter(None, (op.name, variant, " x ".join(map(str, shape)))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--interpret", choices=core.ARCHITECTURES, help="the GPU that is interpreted")
    where.add_argument("--device", choices=("cuda",))
    parser.add_argument(
        "--op", nargs="+", choices=OPERATIONS, metavar="OP", help=f"of {', '.join(OPERATIONS)}; all by default"
    )
    parser.add_argument("--m", nargs="+", type=int, help="rows, on a GPU", default=gemm_on_gpu.ROWS)
    parser.add_argument("--rounds", type=int, default=15, help="timed samples of each, on a GPU")
    parser.add_argument("--json", metavar="FILE", help="also write the result to this file")
    args = parser.parse_args()
    if args.device and not torch.cuda.is_available():
        parser.error("torch finds no GPU: run it where nvidia-smi lists one, or with --interpret")
    if args.interpret:
        result = interpreted.result("gemm", args.interpret, interpret_all(args.interpret, args.op))
    else:
        result = bench.header("gemm", "cuda", ["results"])
        result["results"] = gemm_on_gpu.measure_all(problems(args.op), make_case, args.m, args.rounds)
    bench.write(result, args.json)


if __name__ == "__main__":
    main()
