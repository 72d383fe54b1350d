"""What benchmarks.gemm measures on a GPU: kernel time from a cold L2, time with the host's part, peers, and the bars."""

from __future__ import annotations

import importlib
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import bench
from forwardpass.backend import Operation
from forwardpass.timing import FLUSH_BYTES, interleave

#: swept on a GPU, with N x K of SIZES; the bars' own shapes of these rows come first
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
SIZES = ((4096, 4096), (8192, 8192))

HOPPER, A100, ADA = r"H100|H200", r"A100", r"L40"
TFLOPS, OF_PEAK, OF_BANDWIDTH = "TFLOP/s", "% of peak", "% of bandwidth"
#: dense, 8 bits: TFLOP/s of the datasheets (L40S, L40)
PEAKS = {r"L40S": 733, r"L40\b": 362}
#: GB/s of the datasheets
BANDWIDTHS = {r"H100 80GB HBM3": 3352, r"H200": 4800, r"A100.*80GB": 2039, r"A100.*40GB": 1555, r"L40": 864}


@dataclass(frozen=True)
class Bar:
    """The highest figure that was found published for a product, M x N x K."""

    operation: str
    variant: str
    gpu: str  # a pattern of its name
    shape: tuple[int, int, int]
    least: float
    unit: str
    source: str


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


def of_gpu(table: dict[str, float], name: str) -> float | None:
    return next((value for pattern, value in table.items() if re.search(pattern, name)), None)


def achieved(bar: Bar, gpu: str, case: Any, ms: float) -> float | None:
    """In the bar's unit; None where this GPU's peak is not known."""
    tflops, gb_per_s = case.flops() / ms / 1e9, case.bytes() / ms / 1e6
    if bar.unit == TFLOPS:
        return tflops
    value, most = (tflops, of_gpu(PEAKS, gpu)) if bar.unit == OF_PEAK else (gb_per_s, of_gpu(BANDWIDTHS, gpu))
    return None if most is None else 100 * value / most


def peers(op: Operation, variant: str, named: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """torch's own ways to the same product: the bare product of quantised operands, bf16, and compiled plain torch code."""
    baseline = importlib.import_module(f"benchmarks.{op.package.split('.')[-1]}").BASELINES[op]
    compiled = torch.compile(baseline, dynamic=False)
    found: dict[str, Callable[[], Any]] = {"torch.compile": lambda: compiled(**named)}
    x, weight = (named[op.parameters[i]] for i in (0, 1))
    wide, wide_weight = (torch.randn(t.shape, device=t.device).bfloat16() for t in (x, weight))
    found["bf16 F.linear"] = lambda: F.linear(wide, wide_weight)
    if op.name == "int8_gemm":
        found["torch._int_mm"] = lambda: torch._int_mm(x, weight.t())
    if op.name == "fp8_gemm":
        a_scale, b_scale = named["a_scale"], named["b_scale"]
        scales = (a_scale, b_scale.t()) if variant == "blocks" else (a_scale.reshape(-1, 1), b_scale.reshape(1, -1))
        found["torch._scaled_mm"] = lambda: torch._scaled_mm(x, weight.t(), *scales, out_dtype=torch.bfloat16)
    return found


def host_inclusive(call: Callable[[], Any], device: str, rounds: int) -> float:
    """Median milliseconds from the call to its result, the GPU idle before, its L2 cold."""
    cuda = device == "cuda"
    flush = torch.empty(FLUSH_BYTES if cuda else 0, dtype=torch.uint8, device=device)
    times = []
    for _ in range(rounds):
        if cuda:
            flush.zero_()
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


@torch.inference_mode()
def measure(
    op: Operation, variant: str, case: Any, shape: tuple[int, int, int], device: str, rounds: int
) -> dict[str, Any]:
    """Of each backend and peer the time, or why there is none."""
    call = bench.as_a_layer_has_them(case.arguments(device))
    torch.compiler.reset()
    candidates = {b: bench.on_backend(op, b, call) for b in ("cuda", "triton")}
    candidates |= peers(op, variant, dict(zip(op.parameters, call)))
    missing: dict[str, str] = {}
    for name, candidate in candidates.items():
        try:
            got = candidate()
            if name == "torch.compile":
                bench.check_same_work(f"torch.compile of {op.name}", got, op(*call))
        except (Exception, SystemExit) as e:  # whatever a peer raises, or is caught at, is said beside its name
            missing[name] = f"{type(e).__name__}: {str(e).splitlines()[0]}"
    timings = interleave({n: c for n, c in candidates.items() if n not in missing}, device, rounds=rounds)
    gpu = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    row: dict[str, Any] = {
        "operation": op.name,
        "variant": variant,
        "shape": shape,
        "missing": missing,
        "timings": {},
        "bars": [],
    }
    for name, t in timings.items():
        row["timings"][name] = {
            **t.to_json(),
            "with_host": host_inclusive(candidates[name], device, rounds),
            "tflops": case.flops() / t.median / 1e9,
            "gb_per_s": case.bytes() / t.median / 1e6,
            "times_as_fast_as": bench.ratios(
                t.median, {n: p.median for n, p in timings.items() if n not in ("cuda", "triton")}
            ),
        }
    for bar in BARS:
        if (
            (bar.operation, bar.variant, bar.shape) == (op.name, variant, shape)
            and re.search(bar.gpu, gpu)
            and "cuda" in timings
        ):
            reached = achieved(bar, gpu, case, timings["cuda"].median)
            row["bars"].append({"least": bar.least, "unit": bar.unit, "source": bar.source, "achieved": reached})
    return row


def lines(row: dict[str, Any]) -> str:
    said = [f"{row['operation']} {row['variant']} {' x '.join(map(str, row['shape']))}".replace("  ", " ")]
    for name, t in row["timings"].items():
        beside = ", ".join(f"{r:.2f} x {peer}" for peer, r in t["times_as_fast_as"].items() if peer != name)
        said.append(f"  {name:<18}{t['median'] * 1e3:9.1f} us [{t['low'] * 1e3:.1f}, {t['high'] * 1e3:.1f}], with host "
                    f"{t['with_host'] * 1e3:8.1f} us {t['tflops']:8.1f} TFLOP/s {t['gb_per_s']:7.0f} GB/s  {beside}")  # fmt: skip
    said += [f"  {name:<18}not measured: {why}" for name, why in row["missing"].items()]
    for bar in row["bars"]:
        reached = bar["achieved"]
        verdict = (
            "not known of this GPU"
            if reached is None
            else f"{reached:.0f}: {'ok' if reached >= bar['least'] else 'MISSED'}"
        )
        said.append(f"  bar: at least {bar['least']:g} {bar['unit']} ({bar['source']}), cuda {verdict}")
    return "\n".join(said)


def measure_all(
    problems: Sequence[tuple[Operation, str, dict[str, Any]]],
    make_case: Callable[[Operation, int, int, int, dict[str, Any]], Any],
    rows: Sequence[int],
    rounds: int,
) -> list[dict[str, Any]]:
    results = []
    for op, variant, options in problems:
        of_bars = [b.shape for b in BARS if (b.operation, b.variant) == (op.name, variant) and b.shape[0] in rows]
        for shape in dict.fromkeys([*of_bars, *((m, n, k) for n, k in SIZES for m in rows)]):
            row = measure(op, variant, make_case(op, *shape, options), shape, "cuda", rounds)
            results.append(row)
            print(lines(row), flush=True)
    return results
