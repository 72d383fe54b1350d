"""What a result was obtained with: versions, device, driver, compiler. Every JSON that we write carries it."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import pathlib
import platform
import shutil
import subprocess
from typing import Any

import torch

#: what multiplies int8 in each tier of the CPU kernels; sgemm in the others
INT8_INSTRUCTIONS = {"avx2": "AVX2", "avx_vnni": "AVX-VNNI", "avx512": "AVX2", "avx512_vnni": "VNNI", "amx": "AMX"}
#: the lowest Linux driver for each CUDA major version (NVIDIA, "CUDA compatibility", minor version compatibility)
DRIVERS = {12: 525, 13: 580}


def versions() -> dict[str, str | None]:
    """Package -> version, None where it is not installed."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    packages = {p: version(p) for p in ("forwardpass", "triton", "transformers")}
    return {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda, **packages}


def device(where: torch.device | str = "cpu") -> dict[str, Any]:
    """Type and name of a device; of a CPU also the vector instructions and threads that torch uses, the tier of our kernels, and
    the instructions that multiply int8: "AMX", "VNNI", "AVX-VNNI", "AVX2", or None where int8 products are sgemm's.
    """
    where = torch.device(where)
    if where.type == "cuda":
        p = torch.cuda.get_device_properties(where)
        return {"type": "cuda", "name": p.name, "arch": f"sm_{p.major}{p.minor}", "memory_bytes": p.total_memory}
    try:
        info = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in info.splitlines())}
    return {
        "type": "cpu",
        "name": fields.get("model name", platform.machine()),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "tier": cpu_tier(),
        "int8": int8_instructions(),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
    }


def cpu_tier() -> str | None:
    """The instruction sets that the CPU kernels use: "baseline", "avx2", "avx_vnni", "avx512", "avx512_vnni" or "amx".

    Each has those before it. It is the best that the CPU and ATEN_CPU_CAPABILITY allow, or the one that FORWARDPASS_CPU names, and
    None where the op library did not load.
    """
    try:
        return torch.ops.forwardpass._cpu_tier()
    except AttributeError:
        return None


def has_bfloat16_products() -> bool:
    """Whether the CPU kernels multiply bfloat16 in half of the time of float32 (AVX512_BF16)."""
    return cpu_tier() in ("avx512_vnni", "amx") and torch.cpu._is_avx512_bf16_supported()


def int8_instructions() -> str | None:
    """What multiplies int8 on this CPU, None where it is sgemm."""
    return INT8_INSTRUCTIONS.get(cpu_tier() or "baseline")


def driver() -> str | None:
    """The NVIDIA driver's version as its management library says it, None where there is no driver."""
    text = ctypes.create_string_buffer(96)
    if (nvml := _nvml()) is None or nvml.nvmlSystemGetDriverVersion(text, 96):
        return None
    return text.value.decode()


@functools.cache
def _nvml() -> ctypes.CDLL | None:
    """NVIDIA's management library, open for the rest of the process; None where there is no driver."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return None if nvml.nvmlInit_v2() else nvml


def sm_clock(where: torch.device | str = "cuda") -> int | None:
    """MHz of a GPU's multiprocessors at this moment, None where NVML does not say."""
    if (nvml := _nvml()) is None or torch.device(where).type != "cuda":
        return None
    handle, mhz, sm = ctypes.c_void_p(), ctypes.c_uint(), 1  # NVML_CLOCK_SM
    uuid = f"GPU-{torch.cuda.get_device_properties(where).uuid}"  # NVML's numbers are not those of CUDA_VISIBLE_DEVICES
    if nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)):
        return None
    return None if nvml.nvmlDeviceGetClockInfo(handle, sm, ctypes.byref(mhz)) else mhz.value


def nvcc() -> str | None:
    """Path and version of the nvcc that a build would take, None where CUDA_HOME and PATH have none."""
    home = os.environ.get("CUDA_HOME")
    path = shutil.which(f"{home}/bin/nvcc" if home else "nvcc")
    if path is None:
        return None
    parts = subprocess.run([path, "--version"], capture_output=True, text=True).stdout.split("release ")
    return f"{path} ({parts[1].split(',')[0] if len(parts) > 1 else 'version unknown'})"
