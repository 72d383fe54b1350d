"""What a device can do at best: operations a second for each dtype, bytes a second of its memory, each with its source."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .. import ops
from ..common.timing import interleave

#: products of this many rows, columns and depth, and copies of this many bytes: larger than caches, done in milliseconds
_GEMM, _GEMM_CUDA = 1024, 8192
_COPY_BYTES = 256 << 20


@dataclass
class Roofline:
    """The device's limits. `flops[dtype]` and `bytes_per_s`; `sources` says of each where it is from."""

    device: torch.device
    bytes_per_s: float
    flops: dict[str, float] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def least_seconds(self, flops: float, moved: float, dtype: str) -> tuple[float, str]:
        """The time that nothing can beat, and which limit sets it: "compute" or "memory"."""
        compute = flops / self.flops[dtype] if flops else 0.0
        memory = moved / self.bytes_per_s
        return max(compute, memory), "compute" if compute > memory else "memory"


def roofline(device: torch.device, dtypes: set[str]) -> Roofline:
    """The limits for these dtypes ("float32", "int8", …): from data sheets for GPUs of `_DATASHEETS`, else measured."""
    limits = _datasheet(device)
    if limits is None:
        limits = Roofline(device, _measured_copy(device), {}, {"bytes_per_s": f"measured: a copy of {_COPY_BYTES >> 20} MiB, "
                                                                            "bytes read and written"})  # fmt: skip
    for dtype in dtypes - set(limits.flops):
        limits.flops[dtype], limits.sources[dtype] = _measured_gemm(device, dtype)
    return limits


#: compute capability -> name, boost clock in MHz, GB/s of its memory, multiply-accumulates of a multiprocessor in a clock
#: NVIDIA's architecture papers and data sheets of the A100 (SXM4 80 GB), L40S, H100 (SXM5), B200 and RTX PRO 6000
_DATASHEETS: dict[tuple[int, int], tuple[str, int, int, dict[str, int]]] = {
    (8, 0): ("A100", 1410, 2039, {"float16": 1024, "bfloat16": 1024, "int8": 2048, "float32": 64}),
    (8, 9): ("L40S", 2520, 864, {"float16": 512, "bfloat16": 512, "float8_e4m3fn": 1024, "int8": 1024, "float32": 128}),
    (9, 0): ("H100", 1830, 3352, {"float16": 2048, "bfloat16": 2048, "float8_e4m3fn": 4096, "int8": 4096, "float32": 128}),
    (10, 0): ("B200", 1856, 7672, {"float16": 4096, "bfloat16": 4096, "float8_e4m3fn": 8192, "int8": 8192, "float32": 128}),
    (12, 0): ("RTX PRO 6000", 2617, 1792,
              {"float16": 512, "bfloat16": 512, "float8_e4m3fn": 1024, "int8": 1024, "float32": 128}),
}  # fmt: skip


def _datasheet(device: torch.device) -> Roofline | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    known = _DATASHEETS.get((properties.major, properties.minor))
    if known is None:
        return None
    name, clock, gigabytes, macs = known
    flops = {dtype: 2 * n * properties.multi_processor_count * clock * 1e6 for dtype, n in macs.items()}
    source = f"datasheet: rates of the {name}, dense, for {properties.multi_processor_count} multiprocessors"
    return Roofline(device, gigabytes * 1e9, flops, dict.fromkeys((*flops, "bytes_per_s"), source))


@functools.cache
def _measured_copy(device: torch.device) -> float:
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / _seconds(lambda: target.copy_(source), device)


@functools.cache
def _measured_gemm(device: torch.device, dtype: str) -> tuple[float, str]:
    n = _GEMM_CUDA if device.type == "cuda" else _GEMM
    kind = getattr(torch, dtype)
    call: Callable[[], object]
    if kind == torch.int8:
        a = torch.ones(n, n, dtype=kind, device=device)
        scale = torch.ones(1, device=device)
        call, name = lambda: ops.int8_gemm(a, a, scale, scale, out_dtype=torch.float32), "int8_gemm"
    elif kind.is_floating_point and kind.itemsize > 1:
        a = torch.ones(n, n, dtype=kind, device=device)
        call, name = lambda: torch.mm(a, a), "torch.mm"
    else:
        return _measured_gemm(device, "float32")
    return 2 * n**3 / _seconds(call, device), f"measured: {name} of {n} x {n} x {n}"


@torch.inference_mode()
def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, the lower quartile: a limit is what the device can do, not what other work left of it."""
    return interleave({"": call}, device, rounds=7, warmup=2)[""].low / 1e3
