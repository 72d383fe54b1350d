"""What benchmarks.gemm measures on a GPU: M swept, torch's ways to the same product, and the bars of published figures."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import on_gpu
from benchmarks.on_gpu import A100, ADA, HOPPER, OF_BANDWIDTH, OF_PEAK, TFLOPS, Bar
from forwardpass.dispatch import Operation

#: swept, with N x K of SIZES; the bars' own shapes of these rows come first
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
SIZES = ((4096, 4096), (8192, 8192))

BARS = [
    Bar("fp8_gemm", "rows", HOPPER, (4096, 4096, 4096), 1216, TFLOPS, "cuBLAS on an H100, tritonbench PR #1149"),
    Bar("fp8_gemm", "rows", HOPPER, (8192, 8192, 8192), 1391, TFLOPS, "CUTLASS, pytorch PR #155507"),
    Bar("fp8_gemm", "blocks", HOPPER, (4096, 4096, 7168), 1410, TFLOPS, "DeepGEMM on an H800, its README at a9967bc"),
    Bar("int8_gemm", "", HOPPER, (1024, 8192, 21760), 1357, TFLOPS, "sgl-kernel on an H100, sglang PR #3035"),
    Bar("int8_gemm", "", A100, (1024, 8192, 21760), 508, TFLOPS, "sgl-kernel on an A100, sglang PR #2752"),
    Bar("fp8_gemm", "rows", ADA, (2048, 6144, 4096), 78, OF_PEAK, "sgl-kernel on an L40, sglang PR #3047"),
    *(
        Bar(op, variant, "", (1, 43008, 5376), 91, OF_BANDWIDTH, "vLLM's fp8 on an H100, vLLM PR #49363")
        for op, variant in (("fp8_gemm", "rows"), ("int8_gemm", ""), ("w8a16_gemm", "int8"), ("w8a16_gemm", "e4m3"))
    ),
]


def peers(op: Operation, variant: str, call: tuple[Any, ...]) -> dict[str, Callable[[], Any]]:
    """torch's own ways to the same product: the bare product of quantised operands, bf16, and compiled plain torch code."""
    named = dict(zip(op.parameters, call))
    baseline = importlib.import_module(f"benchmarks.{op.package.split('.')[-1]}").BASELINES[op]
    compiled = torch.compile(baseline, dynamic=False)
    calls: dict[str, Callable[[], Any]] = {"torch.compile": lambda: compiled(**named)}
    x, weight = (named[op.parameters[i]] for i in (0, 1))
    wide, wide_weight = (torch.randn(t.shape, device=t.device).bfloat16() for t in (x, weight))
    calls["bf16 F.linear"] = lambda: F.linear(wide, wide_weight)
    if op.name == "int8_gemm":
        calls["torch._int_mm"] = lambda: torch._int_mm(x, weight.t())
    if op.name == "fp8_gemm":
        a_scale, b_scale = named["a_scale"], named["b_scale"]
        scales = (a_scale, b_scale.t()) if variant == "blocks" else (a_scale.reshape(-1, 1), b_scale.reshape(1, -1))
        calls["torch._scaled_mm"] = lambda: torch._scaled_mm(x, weight.t(), *scales, out_dtype=torch.bfloat16)
    return calls


def measure(
    op: Operation, variant: str, case: Any, shape: tuple[int, int, int], device: str, rounds: int
) -> dict[str, Any]:
    make_peers = functools.partial(peers, op, variant)
    return on_gpu.measure(op, variant, case, shape, device, rounds, make_peers, BARS, same_work=("torch.compile",))


def measure_all(
    problems: Sequence[tuple[Operation, str, dict[str, Any]]],
    make_case: Callable[[Operation, int, int, int, dict[str, Any]], Any],
    rows: Sequence[int],
    rounds: int,
) -> list[dict[str, Any]]:
    results = []
    for op, variant, options in problems:
        bar_shapes = [b.shape for b in BARS if (b.operation, b.variant) == (op.name, variant) and b.shape[0] in rows]
        for shape in dict.fromkeys([*bar_shapes, *((m, n, k) for n, k in SIZES for m in rows)]):
            case = make_case(op, *shape, options)  # type: ignore[call-arg]  # its length is not known
            row = measure(op, variant, case, shape, "cuda", rounds)
            results.append(row)
            print(on_gpu.lines(row), flush=True)
    return results
