"""The C API of csrc/interpreter/interpreter.h, by ctypes: _interpreter.so is loaded here, once, on first use."""

from __future__ import annotations

import ctypes
import functools
import json
import pathlib
from ctypes import POINTER, c_char_p, c_double, c_int, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from typing import Any

from ..dispatch import Reason, library
from .finding import InterpreterFinding

#: architecture -> the GPU that is modelled
ARCHITECTURES = {"sm_80": "A100", "sm_89": "L40S", "sm_90a": "H100", "sm_100a": "B200", "sm_120": "RTX PRO 6000"}
LIBRARY = library.FOLDER / "_interpreter.so"
#: the objects of _kernels.so, linked against the interpreter's stand-in for cudart
KERNELS = library.FOLDER / "_kernels_interpreted.so"
STANDIN = library.FOLDER / "_standin.a"
CUBLAS = library.FOLDER / "_cublas.a"

#: cudaErrorLaunchTimeout: fpi_set_time_limit's
LAUNCH_TIMEOUT = 702

Dim3 = c_uint32 * 3


class Options(ctypes.Structure):
    _fields_ = [
        ("seed", c_uint64), ("checks", c_int32), ("truncating", c_int32), ("approximate", c_int32), ("threads", c_int32),
        ("step_limit", c_uint64), ("counters", c_uint64), ("timeline", c_int32), ("sample", c_int32), ("findings", c_int32),
        ("isa", c_int32),
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
    "fpi_set_device": (c_int, [c_char_p]),
    "fpi_set_options": (None, [POINTER(Options)]),
    "fpi_set_time_limit": (None, [c_double]),
    "fpi_storage_enter": (None, []),
    "fpi_storage_add": (None, [c_void_p, c_int64, c_char_p, c_int]),
    "fpi_storage_leave": (None, []),
    "fpi_storage_region": (c_int, [c_uint64, POINTER(c_uint64), POINTER(c_int64)]),
    "fpi_device_get": (POINTER(DeviceProperties), []),
    "fpi_memory_free": (c_int64, []),
    "fpi_memory_peak": (c_int64, [c_int]),
    "fpi_dlpack_allocate": (c_void_p, [c_int64]),
    "fpi_dlpack_host_view": (c_void_p, [c_void_p, c_int64]),
    "fpi_capture_begin": (c_int, [c_void_p, c_int, c_int]),
    "fpi_capture_end": (c_int, [c_void_p, POINTER(c_void_p)]),
    "fpi_graph_launch": (c_int, [c_void_p]),
    "fpi_graph_release": (None, [c_void_p]),
    "fpi_drop_launches": (c_int64, [c_int]),
    "fpi_on_launch": (None, [Recorder]),
    "fpi_module_load": (c_void_p, [c_char_p]),
    "fpi_module_unload": (None, [c_void_p]),
    "fpi_module_json": (c_char_p, [c_void_p]),
    "fpi_module_launch": (c_int, [c_void_p, c_char_p, Dim3, Dim3, Dim3, c_int64, c_char_p, c_int64, c_int]),
    "fpi_tensor_map_encode_tiled": (
        c_int,
        [c_void_p, c_int, c_uint32, c_void_p, POINTER(c_uint64), POINTER(c_uint64), POINTER(c_uint32), POINTER(c_uint32),
         c_int, c_int, c_int, c_int],
    ),
    "fpi_tensor_map_error": (c_char_p, []),
    "fpi_take_refusal": (c_char_p, [c_int]),
    "fpi_finding_json": (c_char_p, []),
    "fpi_finding_clear": (None, []),
    "fpi_findings_json": (c_char_p, []),
    "fpi_ignore": (c_char_p, [c_char_p]),
    "fpi_counters_read": (None, [POINTER(Counters)]),
    "fpi_profile_json": (c_char_p, [c_uint64]),
    "fpi_profile_forget": (None, [c_uint64]),
    "fpi_timeline_json": (c_char_p, [c_uint64, c_char_p, c_char_p, c_int]),
    "fpi_timeline_forget": (None, [c_uint64]),
    "fpi_rows_json": (c_char_p, []),
}  # fmt: skip


@functools.cache
def why_not() -> Reason | None:
    """None where this machine can interpret."""
    if not LIBRARY.exists():
        if skipped := library.build_info.get("interpreter_skipped"):
            return Reason("not_built", f"this installation has no interpreter: it was {skipped}", "run it on one")
        return Reason(
            "not_built", "this installation has no interpreter (_interpreter.so is missing)", "reinstall forwardpass"
        )
    try:
        flags = set(pathlib.Path("/proc/cpuinfo").read_text().partition("\nflags")[2].partition("\n")[0].split())
    except OSError as e:
        return Reason("cpu", f"the interpreter needs an x86-64 CPU with AVX2, and this one is unknown: {e}", "")
    if missing := {"avx2", "fma", "f16c", "bmi2"} - flags:  # what -march=x86-64-v3 takes for granted
        return Reason(
            "cpu", f"the interpreter needs an x86-64 CPU with AVX2, and this one lacks {', '.join(sorted(missing))}",
            "run it on one from 2013 or later",
        )  # fmt: skip
    try:
        ctypes.CDLL(str(LIBRARY))
    except OSError as e:
        return Reason("not_loaded", f"the interpreter does not load: {e}", "reinstall forwardpass")
    return None


@functools.cache
def load() -> ctypes.CDLL:
    if reason := why_not():
        raise RuntimeError(str(reason))
    core = ctypes.CDLL(str(LIBRARY))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(core, name)
        function.restype, function.argtypes = result, arguments
    return core


def device_properties() -> DeviceProperties:
    """The installed device's; raises where there is none."""
    properties = load().fpi_device_get()
    if not properties:
        raise RuntimeError("no GPU is interpreted")
    return properties.contents


def finding() -> InterpreterFinding | None:
    """The last of this thread that was an error."""
    text = load().fpi_finding_json()
    return InterpreterFinding(**json.loads(text.decode(errors="replace"))) if text else None


def findings() -> list[InterpreterFinding]:
    """Those behind which launches went on since this was asked last."""
    text = load().fpi_findings_json()
    if text == b"[]":  # as after nearly every launch
        return []
    return [InterpreterFinding(**fields) for fields in json.loads(text.decode(errors="replace"))]


def rows() -> list[dict[str, str]]:
    """The instruction table: every pattern with its section of the PTX ISA."""
    return json.loads(load().fpi_rows_json())


def counters() -> dict[str, int]:
    """What the process has counted so far."""
    read = Counters()
    load().fpi_counters_read(ctypes.byref(read))
    return {name: getattr(read, name) for name in COUNTERS}
