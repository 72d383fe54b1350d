"""The C API (csrc/gpuless.h, cudart.h, profile.h) by ctypes: libgpuless.so is loaded here, once, on first use."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import pathlib
from ctypes import POINTER, c_char_p, c_double, c_int, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from typing import Any

from .finding import Explored, Finding
from .version import __version__

#: architecture -> the GPU that is modelled
ARCHITECTURES = {"sm_80": "A100", "sm_89": "L40S", "sm_90a": "H100", "sm_100a": "B200", "sm_120": "RTX PRO 6000"}
FOLDER = pathlib.Path(__file__).parent
LIBRARY = FOLDER / "libgpuless.so"
#: what stands in for cudart and cuBLAS in programs, and for cudart in libraries; where there was no toolkit, there is none
STANDIN, CUBLAS, CUDART = FOLDER / "_standin.a", FOLDER / "_cublas.a", FOLDER / "_cudart.a"
#: the driver's and cudart's functions, for libraries that open them; where there was no toolkit, there are none
DRIVER, OPENED = FOLDER / "libcuda.so.1", (FOLDER / "libcuda.so.1", FOLDER / "_cudart.so")

#: cudaErrorLaunchTimeout: gpuless_set_time_limit's
LAUNCH_TIMEOUT = 702

Dim3 = c_uint32 * 3


class Options(ctypes.Structure):
    _fields_ = [
        ("seed", c_uint64), ("checks", c_int32), ("truncating", c_int32), ("approximate", c_int32), ("threads", c_int32),
        ("step_limit", c_uint64), ("counters", c_uint64), ("timeline", c_int32), ("sample", c_int32), ("findings", c_int32),
        ("isa", c_int32), ("largest", c_int64),
    ]  # fmt: skip


class LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", Dim3), ("block", Dim3), ("cluster", Dim3), ("dynamic_shared", c_int64), ("programmatic", c_int32),
        ("cooperative", c_int32),
    ]  # fmt: skip


class LaunchRecord(ctypes.Structure):
    _fields_ = [
        ("ptx", c_char_p), ("kernel", c_char_p), ("config", LaunchConfig), ("parameters", c_void_p),
        ("parameter_bytes", c_int64),
    ]  # fmt: skip


class DeviceProperties(ctypes.Structure):
    _fields_ = [
        ("arch", c_char_p), ("name", c_char_p), ("major", c_int32), ("minor", c_int32), ("multiprocessors", c_int32),
        *((name, c_int64) for name in ("shared_per_block", "shared_per_block_optin", "shared_per_multiprocessor",
                                       "shared_reserved_per_block")),
        *((name, c_int32) for name in ("registers_per_block", "registers_per_multiprocessor", "threads_per_block",
                                       "threads_per_multiprocessor", "blocks_per_multiprocessor", "clusters")),
        *((name, c_int64) for name in ("memory", "l2_cache", "persisting_l2_cache")),
        ("clock", c_int32), ("memory_clock", c_int32), ("memory_bus_bits", c_int32),
    ]  # fmt: skip


Recorder = ctypes.CFUNCTYPE(None, POINTER(LaunchRecord))
COUNTERS = ("launches", "warp_instructions", "matrix_ns", "matrix_macs")


class Counters(ctypes.Structure):
    _fields_ = [(name, c_uint64) for name in COUNTERS]


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "gpuless_set_device": (c_int, [c_char_p]),
    "gpuless_set_options": (None, [POINTER(Options)]),
    "gpuless_set_time_limit": (None, [c_double]),
    "gpuless_storage_enter": (None, []),
    "gpuless_storage_add": (None, [c_void_p, c_int64, c_char_p, c_int]),
    "gpuless_storage_leave": (None, []),
    "gpuless_storage_region": (c_int, [c_uint64, POINTER(c_uint64), POINTER(c_int64)]),
    "gpuless_device_get": (POINTER(DeviceProperties), []),
    "gpuless_memory_free": (c_int64, []),
    "gpuless_memory_peak": (c_int64, [c_int]),
    "gpuless_fill": (c_int, [c_void_p, c_int, c_int64]),
    "gpuless_dlpack_allocate": (c_void_p, [c_int64]),
    "gpuless_dlpack_host_view": (c_void_p, [c_void_p, c_int64]),
    "gpuless_capture_begin": (c_int, [c_void_p, c_int, c_int]),
    "gpuless_capture_end": (c_int, [c_void_p, POINTER(c_void_p)]),
    "gpuless_graph_launch": (c_int, [c_void_p]),
    "gpuless_graph_release": (None, [c_void_p]),
    "gpuless_drop_launches": (c_int64, [c_int]),
    "gpuless_on_launch": (None, [Recorder]),
    "gpuless_module_load": (c_void_p, [c_char_p]),
    "gpuless_module_unload": (None, [c_void_p]),
    "gpuless_module_json": (c_char_p, [c_void_p]),
    "gpuless_module_launch": (c_int, [c_void_p, c_char_p, Dim3, Dim3, Dim3, c_int64, c_char_p, c_int64, c_int]),
    "gpuless_tensor_map_encode_tiled": (
        c_int,
        [c_void_p, c_int, c_uint32, c_void_p, POINTER(c_uint64), POINTER(c_uint64), POINTER(c_uint32), POINTER(c_uint32),
         c_int, c_int, c_int, c_int],
    ),
    "gpuless_tensor_map_encode_im2col": (
        c_int,
        [c_void_p, c_int, c_uint32, c_void_p, POINTER(c_uint64), POINTER(c_uint64), POINTER(c_int), POINTER(c_int),
         c_uint32, c_uint32, POINTER(c_uint32), c_int, c_int, c_int, c_int],
    ),
    "gpuless_tensor_map_error": (c_char_p, []),
    "gpuless_take_refusal": (c_char_p, [c_int]),
    "gpuless_finding_json": (c_char_p, []),
    "gpuless_finding_clear": (None, []),
    "gpuless_findings_json": (c_char_p, []),
    "gpuless_ignore": (c_char_p, [c_char_p]),
    "gpuless_explore": (None, [c_uint64, c_char_p]),
    "gpuless_wrong_schedule": (c_char_p, [c_char_p]),
    "gpuless_explored_json": (c_char_p, []),
    "gpuless_counters_read": (None, [POINTER(Counters)]),
    "gpuless_profile_json": (c_char_p, [c_uint64]),
    "gpuless_profile_forget": (None, [c_uint64]),
    "gpuless_coverage_json": (c_char_p, [c_uint64]),
    "gpuless_timeline_json": (c_char_p, [c_uint64, c_char_p, c_char_p, c_int]),
    "gpuless_timeline_forget": (None, [c_uint64]),
    "gpuless_rows_json": (c_char_p, []),
}  # fmt: skip


class Unavailable(RuntimeError):
    """This machine or this installation cannot interpret: the sentence says why, and what to do."""


@functools.cache
def why_not() -> str | None:
    """None where this machine can interpret, else the reason and what to do."""
    if not LIBRARY.exists():
        return f"this installation has no {LIBRARY.name}: reinstall gpuless"
    try:
        flags = set(pathlib.Path("/proc/cpuinfo").read_text().partition("\nflags")[2].partition("\n")[0].split())
    except OSError as e:
        return f"gpuless needs an x86-64 CPU with AVX2, and this one is unknown: {e}"
    if missing := {"avx2", "fma", "f16c", "bmi2"} - flags:  # what -march=x86-64-v3 takes for granted
        return (f"gpuless needs an x86-64 CPU with AVX2, and this one lacks {', '.join(sorted(missing))}: run it on one from "
                "2013 or later")  # fmt: skip
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as e:
        return f"{LIBRARY.name} does not load: {e}; reinstall gpuless"
    library.gpuless_version.restype = c_char_p
    if (version := library.gpuless_version().decode()) != __version__:
        return f"{LIBRARY.name} is of gpuless {version}, and these files are of {__version__}: reinstall gpuless"
    return None


@functools.cache
def load() -> ctypes.CDLL:
    if reason := why_not():
        raise Unavailable(reason)
    core = ctypes.CDLL(str(LIBRARY))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(core, name)
        function.restype, function.argtypes = result, arguments
    return core


@functools.cache
def offer_libraries() -> list[ctypes.CDLL]:
    """Opens the stand-ins for the driver and for cudart. From then on, whoever opens libcuda.so.1 or libcudart.so by its name
    gets these, because the loader compares names with those of the libraries that are there."""
    load()
    return [ctypes.CDLL(str(file)) for file in OPENED if file.exists()]


def device_properties() -> DeviceProperties:
    """The installed device's; raises where there is none."""
    properties = load().gpuless_device_get()
    if not properties:
        raise RuntimeError("no GPU is interpreted")
    return properties.contents


def finding() -> Finding | None:
    """The last of this thread that was an error."""
    text = load().gpuless_finding_json()
    return Finding(**json.loads(text.decode(errors="replace"))) if text else None


def findings() -> list[Finding]:
    """Those behind which launches went on since this was asked last."""
    text = load().gpuless_findings_json()
    if text == b"[]":  # as after nearly every launch
        return []
    return [Finding(**fields) for fields in json.loads(text.decode(errors="replace"))]


def log(event: str, **fields: Any) -> None:
    """A line of what Python alone knows in the file of GPULESS_LOG, beside those of the core (csrc/finding_log.h)."""
    if path := os.environ.get("GPULESS_LOG"):
        with open(path, "a") as file:
            file.write(json.dumps({"event": event, **fields}) + "\n")


def explored() -> list[Explored]:
    """What was explored since this was asked last."""
    return [Explored(**fields) for fields in json.loads(load().gpuless_explored_json().decode(errors="replace"))]


def rows() -> list[dict[str, str]]:
    """The instruction table: every pattern with its section of the PTX ISA."""
    return json.loads(load().gpuless_rows_json())


def counters() -> dict[str, int]:
    """What the process has counted so far."""
    read = Counters()
    load().gpuless_counters_read(ctypes.byref(read))
    return {name: getattr(read, name) for name in COUNTERS}
