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
    """The limits for these dtypes ("float32", "int8", …): from data sheets for GPUs that rates.py knows, else measured."""
    limits = _datasheet(device)
    if limits is None:
        limits = Roofline(device, _measured_copy(device), {}, {"bytes_per_s": f"measured: a copy of {_COPY_BYTES >> 20} MiB, "
                                                                            "bytes read and written"})  # fmt: skip
    for dtype in dtypes - set(limits.flops):
        limits.flops[dtype], limits.sources[dtype] = _measured_gemm(device, dtype)
    return limits


def _datasheet(device: torch.device) -> Roofline | None:
    if device.type != "cuda":
        return None
    from ..interpreter.core import ARCHITECTURES
    from ..interpreter.rates import rates

    properties = torch.cuda.get_device_properties(device)
    capability = f"sm_{properties.major}{properties.minor}"
    arch = next((a for a in ARCHITECTURES if a.rstrip("a") == capability), None)
    if arch is None:
        return None
    rate = rates(arch)
    per_mac = 2 * properties.multi_processor_count * rate["clock"] * 1e6
    kinds = {
        "float16": "mma f16",
        "bfloat16": "mma bf16",
        "float8_e4m3fn": "mma e4m3",
        "int8": "mma s8",
        "float32": "float",
    }
    flops = {dtype: rate[kind] * per_mac for dtype, kind in kinds.items() if rate[kind]}
    source = f"datasheet: rates of {arch}, dense, for {properties.multi_processor_count} multiprocessors"
    return Roofline(device, rate["DRAM"] * 1e9, flops, dict.fromkeys((*flops, "bytes_per_s"), source))


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
