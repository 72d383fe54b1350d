"""What a sweep measures on a GPU: kernel time from a cold L2, time with the host's part, beside peers and published bars."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import bench
from forwardpass.common import environment
from forwardpass.common.timing import FLUSH_BYTES, interleave
from forwardpass.dispatch import Operation

HOPPER, H200, A100, ADA = r"H100|H200", r"H200", r"A100", r"L40"
TFLOPS, OF_PEAK, OF_BANDWIDTH = "TFLOP/s", "% of peak", "% of bandwidth"
#: dense, 8 bits: TFLOP/s of the datasheets (L40S, L40)
PEAKS = {r"L40S": 733, r"L40\b": 362}
#: GB/s of the datasheets
BANDWIDTHS = {r"H100 80GB HBM3": 3352, r"H200": 4800, r"A100.*80GB": 2039, r"A100.*40GB": 1555, r"L40": 864}


@dataclass(frozen=True)
class Bar:
    """The highest figure that was found published for a problem."""

    operation: str
    variant: str
    gpu: str  # a pattern of its name
    shape: tuple[int, ...]  # a GEMM's M, N, K; attention's length and head dim
    least: float
    unit: str
    source: str


def value_of(table: dict[str, float], name: str) -> float | None:
    return next((value for pattern, value in table.items() if re.search(pattern, name)), None)


def achieved(bar: Bar, gpu: str, case: Any, ms: float) -> float | None:
    """In the bar's unit; None where this GPU's peak is not known."""
    tflops, gb_per_s = case.flops() / ms / 1e9, case.bytes() / ms / 1e6
    if bar.unit == TFLOPS:
        return tflops
    value, peak = (tflops, value_of(PEAKS, gpu)) if bar.unit == OF_PEAK else (gb_per_s, value_of(BANDWIDTHS, gpu))
    return None if peak is None else 100 * value / peak


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
    op: Operation,
    variant: str,
    case: Any,
    shape: tuple[int, ...],
    device: str,
    rounds: int,
    peers: Callable[[tuple[Any, ...]], Mapping[str, Callable[[], Any]]],
    bars: Collection[Bar],
    same_work: Collection[str],
) -> dict[str, Any]:
    """The time of each backend and peer, or why there is none.

    peers: of the call's arguments. same_work: those of them whose result is the operation's, and is compared with it.
    """
    call = bench.as_a_layer_has_them(case.arguments(device))
    torch.compiler.reset()
    candidates = {b: bench.on_backend(op, b, call) for b in ("cuda", "triton")} | dict(peers(call))
    missing: dict[str, str] = {}
    for name, candidate in candidates.items():
        try:
            actual = candidate()
            if name in same_work:
                bench.check_same_work(f"{name} of {op.name}", actual, op(*call))
        except (Exception, SystemExit) as e:  # whatever a peer raises, or is caught at, is said beside its name
            missing[name] = f"{type(e).__name__}: {str(e).splitlines()[0]}"
    clocks: list[int | None] = []
    timings = interleave(
        {n: c for n, c in candidates.items() if n not in missing}, device, rounds=rounds,
        on_round=lambda: clocks.append(environment.sm_clock(device)),
    )  # fmt: skip
    gpu = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    row: dict[str, Any] = {
        "operation": op.name,
        "variant": variant,
        "shape": shape,
        "missing": missing,
        "sm_mhz": bench.median_clock(clocks),
        "timings": {},
        "bars": [],
    }
    for name, t in timings.items():
        row["timings"][name] = {
            **t.to_json(),
            "with_host": host_inclusive(candidates[name], device, rounds),
            "sustained": bench.sustained_figures(case, candidates[name], device),
            "tflops": case.flops() / t.median / 1e9,
            "gb_per_s": case.bytes() / t.median / 1e6,
            "times_as_fast_as": bench.ratios(
                t.median, {n: p.median for n, p in timings.items() if n not in ("cuda", "triton")}
            ),
        }
    for bar in bars:
        if (
            (bar.operation, bar.variant, bar.shape) == (op.name, variant, shape)
            and re.search(bar.gpu, gpu)
            and "cuda" in timings
        ):
            reached = achieved(bar, gpu, case, timings["cuda"].median)
            busy = achieved(bar, gpu, case, row["timings"]["cuda"]["sustained"]["milliseconds"])
            row["bars"].append(
                {"least": bar.least, "unit": bar.unit, "source": bar.source, "achieved": reached, "sustained": busy}
            )
    return row


def verdict(least: float, reached: float | None) -> str:
    return "not known of this GPU" if reached is None else f"{reached:.0f}: {'ok' if reached >= least else 'MISSED'}"


def lines(row: dict[str, Any]) -> str:
    output = [f"{row['operation']} {row['variant']} {' x '.join(map(str, row['shape']))}".replace("  ", " ")]
    for name, t in row["timings"].items():
        beside = ", ".join(f"{r:.2f} x {peer}" for peer, r in t["times_as_fast_as"].items() if peer != name)
        output.append(f"  {name:<18}{t['median'] * 1e3:9.1f} us [{t['low'] * 1e3:.1f}, {t['high'] * 1e3:.1f}], with host "
                    f"{t['with_host'] * 1e3:8.1f} us {t['tflops']:8.1f} TFLOP/s {t['gb_per_s']:7.0f} GB/s  {beside}")  # fmt: skip
        output.append(f"  {'':<18}{bench.sustained_text(t['sustained'])}")
    output += [f"  {name:<18}not measured: {why}" for name, why in row["missing"].items()]
    for bar in row["bars"]:
        single, busy = (verdict(bar["least"], bar[name]) for name in ("achieved", "sustained"))
        output.append(
            f"  bar: at least {bar['least']:g} {bar['unit']} ({bar['source']}), cuda {single}, sustained {busy}"
        )
    return "\n".join(output)
