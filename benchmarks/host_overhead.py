"""Host time of a call in microseconds, Python to launch, each beside its bar; the launch itself does nothing.

CPU tensors take the code that CUDA tensors take: the operation's table, torch's dispatcher, the torch side in C++, nvcc's
host stub, and a stand-in for cudart whose launches return at once (interpreter/csrc/profile.h: gpuless_drop_launches). A
call on a GPU pays besides for torch's device guard and current stream, for CUDA's allocator in place of the CPU's, and for
the driver's launches.

    python -m benchmarks.host_overhead [--calls 50000] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import forwardpass as fp
from benchmarks import bench
from forwardpass import dispatch
from forwardpass.common import environment
from forwardpass.dispatch import Operation, Reason
from gpuless import core

#: microseconds, by operation and by module; what is not here has no bar
BARS = {
    **dict.fromkeys(("quantize", "int8_gemm", "fp8_gemm"), 6.0),
    **dict.fromkeys(("int8_linear", "fp8_linear", "Int8Linear", "Fp8Linear"), 10.0),
}
CALLS = 50000
M, N, K = 16, 256, 256  # of no influence: nothing is computed


class HostOnly:
    """In gpuless's place: a call goes to what a CUDA tensor's call goes to."""

    memory = "cpu"

    def __init__(self, arch: str):
        # Bound for an architecture: another one's name than gpuless's, which must not find what is bound here.
        self.arch = arch.rstrip("a")

    def why_not(self, name: str) -> Reason | None:
        return None if name == "cuda" else Reason("host_time", "what is timed is the host code of CUDA kernels", "")

    def active(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def bind(self, operation: Operation, run: Callable[..., Any]) -> Callable[..., Any]:
        return run


@contextlib.contextmanager
def launching_nothing(arch: str = "sm_90a") -> Iterator[Callable[[], int]]:
    """Within the block CUDA kernels are launched and not run; yields a function: how many since it was last called."""
    drop = core.load().gpuless_drop_launches
    with fp.interpret(arch), dispatch.interpreted_by(HostOnly(arch)), fp.use_backend("cuda"):
        drop(1)
        try:
            yield lambda: drop(1)
        finally:
            drop(0)


def calls() -> dict[str, Callable[[], Any]]:
    """A call of each operation as a user writes it, and of each module."""
    ops = fp.ops
    x, gate_up, bias = torch.randn(M, K).bfloat16(), torch.randn(M, 2 * K).bfloat16(), torch.randn(N).bfloat16()
    a, b = torch.ones(M, K, dtype=torch.int8), torch.ones(N, K, dtype=torch.int8)
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    a_scale, b_scale, weight = torch.ones(M), torch.ones(N), torch.ones(K).bfloat16()
    q, kv = torch.randn(1, M, 8, 64).bfloat16(), torch.randn(1, M, 2, 64).bfloat16()
    cache, v_cache, length = kv.clone(), kv.clone(), torch.full((1,), M, dtype=torch.int32)
    index = torch.arange(2 * M).reshape(M, 2) % 8
    position, weights = index.int(), torch.ones(M, 2)
    acc, out = torch.ones(M, N, dtype=torch.int32), torch.bfloat16
    experts, ends = torch.stack([b] * 4), torch.tensor([4, 4, 9, M], dtype=torch.int32)
    experts8, experts_scale = experts.to(a8.dtype), b_scale.expand(4, N).contiguous()
    image, window = (
        torch.ones(n, K, *side, dtype=torch.int8).contiguous(memory_format=torch.channels_last)
        for n, side in ((1, (4, M // 4)), (N, (3, 3)))
    )
    one = torch.ones(1)
    experts_bias, one_q, one_kv = bias.expand(4, N).contiguous(), q[:, :1], kv[:, :1]
    return {
        "quantize": lambda: ops.quantize(x, torch.int8),
        "norm_quantize": lambda: ops.norm_quantize(x, weight, 1e-5, torch.int8),
        "add_norm_quantize": lambda: ops.add_norm_quantize(x, x, weight, 1e-5, torch.int8),
        "activation_quantize": lambda: ops.activation_quantize(gate_up, "silu_mul", torch.int8),
        "dequant_activation": lambda: ops.dequant_activation(acc, a_scale, b_scale, bias=bias, out_dtype=out),
        "int8_gemm": lambda: ops.int8_gemm(a, b, a_scale, b_scale, bias=bias, out_dtype=out),
        "int8_gemm_quantize": lambda: ops.int8_gemm_quantize(a, b, a_scale, b_scale, bias=bias),
        "int8_grouped_gemm": lambda: ops.int8_grouped_gemm(
            a, experts, a_scale, experts_scale, ends, bias=experts_bias, out_dtype=out
        ),
        "fp8_gemm": lambda: ops.fp8_gemm(a8, b8, a_scale, b_scale, bias=bias, out_dtype=out),
        "fp8_grouped_gemm": lambda: ops.fp8_grouped_gemm(
            a8, experts8, a_scale, experts_scale, ends, bias=experts_bias, out_dtype=out
        ),
        "fp8_gemm_quantize": lambda: ops.fp8_gemm_quantize(a8, b8, a_scale, b_scale, bias=bias),
        "int8_conv2d": lambda: ops.int8_conv2d(image, window, one, b_scale, padding=1, bias=bias, out_dtype=out),
        "int8_linear": lambda: ops.int8_linear(x, b, b_scale, bias=bias),
        "fp8_linear": lambda: ops.fp8_linear(x, b8, b_scale, bias=bias),
        "w8a16_gemm": lambda: ops.w8a16_gemm(x, b, b_scale, bias=bias),
        "w8a16_grouped_gemm": lambda: ops.w8a16_grouped_gemm(x, experts, experts_scale, ends, bias=experts_bias),
        "attention": lambda: ops.attention(q, kv, kv, causal=True),
        "attention_with_lse": lambda: ops.attention_with_lse(q, kv, kv, causal=True),
        "attention_8bit": lambda: ops.attention_8bit(q, kv, kv, causal=True),
        "attention_8bit_with_lse": lambda: ops.attention_8bit_with_lse(q, kv, kv, causal=True),
        "quantize_attention": lambda: ops.quantize_attention(q, kv, kv),
        "attention_decode": lambda: ops.attention_decode(one_q, kv, kv, length),
        "attention_decode_with_lse": lambda: ops.attention_decode_with_lse(one_q, kv, kv, length),
        "append_kv": lambda: ops.append_kv(one_kv, one_kv, cache, v_cache, length),
        "permute_quantize": lambda: ops.permute_quantize(x, index, 8, torch.int8),
        "unpermute": lambda: ops.unpermute(x, position, weights),
        **{name: module(name) for name in fp.nn.__all__ if getattr(getattr(fp.nn, name), "operation", None)},
    }


def module(name: str) -> Callable[[], Any]:
    x: torch.Tensor = torch.randn(M, K, dtype=torch.bfloat16)
    original: torch.nn.Module = torch.nn.Linear(K, N).bfloat16()
    if name == "Int8Conv2d":
        x = torch.randn(1, K, 4, M // 4, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        original = torch.nn.Conv2d(K, N, 3, padding=1).bfloat16()
    layer = getattr(fp.nn, name).from_torch(original)
    return lambda: layer(x)


def microseconds(call: Callable[[], Any], n: int) -> float:
    """Median of n calls, each timed on its own."""
    clock, times = time.perf_counter_ns, []
    for _ in range(n // 10):
        call()
    for _ in range(n):
        start = clock()
        call()
        times.append(clock() - start)
    return statistics.median(times) / 1e3


@torch.inference_mode()
def measure(n: int) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """name -> microseconds and launches of a call; name -> why it was not measured."""
    cases, results = calls(), {}
    missing = {name: "it does not exist yet" for name in BARS if name not in cases}
    with launching_nothing() as launches:
        for name, call in cases.items():
            try:
                launches()
                call()
            except (AttributeError, RuntimeError) as e:  # not in this build
                missing[name] = str(e).splitlines()[0]
                continue
            results[name] = {"launches": launches(), "us": microseconds(call, n)}
            if not results[name]["launches"]:
                raise RuntimeError(f"{name} launched nothing: what was timed is not the way to a kernel")
    return results, missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=CALLS, help="of each operation")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    machine = environment.device("cpu")
    print(
        f"host time on {machine['name']}, median of {args.calls} calls; clock {microseconds(lambda: None, args.calls):.2f} us"
    )
    results, missing = measure(args.calls)
    missed = 0
    for name, f in results.items():
        bar = BARS.get(name)
        missed += bar is not None and f["us"] >= bar
        beside = "" if bar is None else f"   bar < {bar:g}   {'ok' if f['us'] < bar else 'MISSED'}"
        print(f"{name:<22}{f['us']:7.2f} us   {f['launches']} launch{'es' * (f['launches'] != 1):<2}{beside}")
    for name, why in missing.items():
        print(f"{name:<22}not measured: {why}")
    print(f"{missed} bars missed, {len(BARS.keys() & missing.keys())} not measured")
    figures = {f"{name}_us": f["us"] for name, f in results.items()}
    bench.write({**bench.header("host-overhead", "cpu", list(figures)), **figures, "calls": args.calls, "bars_us": BARS,
                 "launches": {name: f["launches"] for name, f in results.items()}, "missing": missing, "missed": missed},
                args.json)  # fmt: skip


if __name__ == "__main__":
    main()
