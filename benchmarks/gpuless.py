"""How fast the interpreter is, each figure beside its bar: kernels that Triton's compiler makes, one core unless said.

A rate is warp instructions per second with the time inside mma and wgmma arithmetic taken out; the arithmetic's own rate
is multiply-accumulates per second of that time. Whole kernels count all their time, as the process spends it: other
processes do not slow them. Launches are timed from Triton's call to its return, and what a kernel new to the process costs
besides (parsing and decoding its PTX) by the megabyte.
"""

import argparse
import ctypes
import importlib.util
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import gpuless
from benchmarks import bench
from gpuless import core

# The kernels that the tests take as witnesses: nobody chose them for speed.
_SPEC = importlib.util.spec_from_file_location(
    "witness_kernels", pathlib.Path(__file__).parents[1] / "interpreter/tests/witness_kernels.py"
)
assert _SPEC and _SPEC.loader
kernels = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(kernels)

#: bar, in millions of warp instructions or billions of multiply-accumulates a second
WITHOUT_MATRIX, WITHOUT_CHECKS = 10.0, 15.0
ARITHMETIC = {"f16": 10.0, "bf16": 10.0, "e4m3": 10.0, "s8": 25.0}
WHOLE = {
    ("attention f16", "sm_80"): 5.0,
    ("matmul s8", "sm_80"): 5.0,
    ("attention f16", "sm_90a"): 4.0,
    ("matmul s8", "sm_90a"): 1.5,
}
ATTENTION_1024_SECONDS = 0.08
LAUNCH_MICROSECONDS, DECODE_MILLISECONDS = 100.0, 20.0


def attention(dtype: torch.dtype, n: int = 1024) -> Callable[[], Any]:
    q, k, v = torch.randn(3, 1, n, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.empty_like(q)
    return lambda: kernels.attention[(n // 128, 1)](
        q, k, v, out, 0.088, n, n * 128, 128, D=128, BM=128, BN=64, num_warps=8
    )


def matmul(dtype: torch.dtype) -> Callable[[], Any]:
    import triton.language as tl

    m = n = 256
    k = 512
    generator = torch.Generator().manual_seed(0)
    integers = dtype == torch.int8

    def operand(rows: int) -> Tensor:
        if integers:
            return torch.randint(-127, 128, (rows, k), generator=generator, dtype=torch.int8)
        return torch.randn(rows, k, generator=generator).to(dtype)

    a, b = operand(m), operand(n).T
    c = torch.empty(m, n, dtype=torch.int32 if integers else torch.float32)
    acc = tl.int32 if integers else tl.float32
    return lambda: kernels.matmul[(m // 128, n // 128)](
        a, b, c, m, n, k, k, 1, k, n, ACC=acc, BM=128, BN=128, BK=128 if dtype.itemsize == 1 else 64, num_warps=4
    )


def layer_norm() -> Callable[[], Any]:
    x, weight, bias = torch.randn(32, 4096), torch.randn(4096), torch.randn(4096)
    y = torch.empty_like(x)
    return lambda: kernels.layer_norm[(32,)](x, y, weight, bias, 4096, 4096, 1e-5, BLOCK=1024)


KERNELS: dict[str, tuple[Callable[[], Callable[[], Any]], str, tuple[str, ...]]] = {
    # name: (kernel, type of its products, architectures)
    "attention f16": (lambda: attention(torch.float16), "f16", ("sm_80", "sm_90a")),
    "attention bf16": (lambda: attention(torch.bfloat16), "bf16", ("sm_80", "sm_90a")),
    "matmul s8": (lambda: matmul(torch.int8), "s8", ("sm_80", "sm_90a")),
    "matmul f16": (lambda: matmul(torch.float16), "f16", ("sm_80", "sm_90a")),
    "matmul bf16": (lambda: matmul(torch.bfloat16), "bf16", ("sm_80", "sm_90a")),
    "matmul e4m3": (lambda: matmul(torch.float8_e4m3fn), "e4m3", ("sm_89", "sm_90a")),
    "layer norm": (layer_norm, "", ("sm_80", "sm_90a")),
}


def measure(call: Callable[[], Any], arch: str, rounds: int, **options: Any) -> dict[str, float]:
    """Medians over rounds: seconds, those that the process had of them, instructions, and what of it is matrix arithmetic."""
    samples = []
    with gpuless.gpu(arch, **options) as device:
        call()  # compiles and decodes
        for _ in range(rounds):
            before = dict(device.counters)
            start, spent = time.perf_counter(), time.process_time()
            call()
            seconds, spent = time.perf_counter() - start, time.process_time() - spent
            instructions, matrix_ns, macs = (
                device.counters[n] - before[n] for n in ("warp_instructions", "matrix_ns", "matrix_macs")
            )
            # The core measures by the clock on the wall, which other processes stretch, here as elsewhere.
            samples.append([seconds, spent, instructions, matrix_ns / 1e9 / seconds * spent, macs])
    names = ("seconds", "process_seconds", "instructions", "matrix_seconds", "macs")
    return dict(zip(names, map(statistics.median, zip(*samples))))


def launch(blocks: int, arch: str, threads: int) -> float:
    """Microseconds of a launch of so many small blocks, the median of many."""
    x, weight, bias = torch.randn(blocks, 128), torch.randn(128), torch.randn(128)
    y = torch.empty_like(x)
    times = []
    with gpuless.gpu(arch, threads=threads):
        for _ in range(1000):
            start = time.perf_counter()
            kernels.layer_norm[(blocks,)](x, y, weight, bias, 128, 128, 1e-5, BLOCK=128)
            times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def decode(arch: str, rounds: int) -> dict[str, float]:
    """Bytes of a kernel's PTX, and seconds of the process to parse and to decode it."""
    api = core.load()
    one = core.Dim3(1, 1, 1)
    samples = []
    with gpuless.gpu(arch):
        ptx = attention(torch.float16)().asm["ptx"].encode()
        for _ in range(rounds):
            start = time.process_time()
            module = api.gpuless_module_load(ptx)
            error = api.gpuless_module_launch(module, None, core.Dim3(0, 1, 1), one, one, 0, b"", 0, False)
            samples.append(time.process_time() - start)
            assert error  # it is decoded, and then has no blocks
            api.gpuless_module_unload(ctypes.c_void_p(module))
    return {"bytes": len(ptx), "process_seconds": statistics.median(samples)}


def line(label: str, value: float, bar: float | None, unit: str, is_maximum: bool = False) -> bool:
    met = bar is None or (value <= bar if is_maximum else value >= bar)
    text = "" if bar is None else f"{'at most' if is_maximum else 'at least'} {bar:g}   {'ok' if met else 'MISSED'}"
    print(f"{label:<58}{value:>8.3g} {unit:<12}{text}")
    return met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args()
    result = bench.header("benchmark-interpreter", "cpu", ["figures"])
    figures: dict[str, Any] = {}
    missed = 0
    for name, (make, products, arches) in KERNELS.items():
        for arch in arches:
            call = make()
            checked = measure(call, arch, args.rounds, threads=1)
            unchecked = measure(call, arch, args.rounds, threads=1, checks=False)
            figures[f"{name} {arch}"] = {"checked": checked, "unchecked": unchecked}
            where = f"{name}, {arch}"

            def outside(m: dict[str, float]) -> float:
                return m["instructions"] / (m["process_seconds"] - m["matrix_seconds"]) / 1e6

            missed += not line(f"{where}: outside matrix arithmetic", outside(checked), WITHOUT_MATRIX, "M/s")
            missed += not line(f"{where}: the same, checks off", outside(unchecked), WITHOUT_CHECKS, "M/s")
            if products:
                rate = checked["macs"] / checked["matrix_seconds"] / 1e9
                missed += not line(f"{where}: arithmetic", rate, ARITHMETIC[products], "GMAC/s")
            whole = checked["instructions"] / checked["process_seconds"] / 1e6
            missed += not line(f"{where}: whole kernel", whole, WHOLE.get((name, arch)), "M/s")
    for arch in ("sm_80", "sm_90a"):
        for threads in (1, 0):
            m = measure(attention(torch.float16), arch, args.rounds, threads=threads)
            figures[f"attention 1024 {arch}, threads {threads}"] = m
            bar = None if threads else ATTENTION_1024_SECONDS
            missed += not line(
                f"causal attention 1024 x 128, one head, {arch}, {'one core' if threads else 'every core'}",
                m["seconds"], bar, "s", is_maximum=True,
            )  # fmt: skip
    for blocks, threads in ((1, 1), (2, 1), (2, 0), (16, 1), (16, 0)):
        microseconds = launch(blocks, "sm_80", threads)
        figures[f"launch of {blocks} blocks sm_80, threads {threads}"] = {"microseconds": microseconds}
        missed += not line(
            f"launch of {blocks} small blocks, {'one core' if threads else 'every core'}",
            microseconds, LAUNCH_MICROSECONDS if blocks == 1 else None, "us", is_maximum=True,
        )  # fmt: skip
    for arch in ("sm_80", "sm_90a"):
        d = figures[f"decode attention {arch}"] = decode(arch, args.rounds)
        rate = d["process_seconds"] * 1e3 / (d["bytes"] / 1e6)
        missed += not line(f"parse and decode attention, {arch}", rate, DECODE_MILLISECONDS, "ms/MB", is_maximum=True)
    m = measure(matmul(torch.float8_e4m3fn), "sm_90a", args.rounds, threads=1, truncating=True)
    figures["matmul e4m3 sm_90a, truncating"] = m
    line("matmul e4m3, sm_90a: truncating accumulator", m["macs"] / m["matrix_seconds"] / 1e9, None, "GMAC/s")
    print(f"{missed} bars missed" if missed else "every bar met")
    bench.write({**result, "missed": missed, "figures": figures}, args.json)


if __name__ == "__main__":
    main()
