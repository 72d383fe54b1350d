"""The tables of GEMM kernels in the kernel library (csrc/kernels/gemm), by ctypes: its rows, and which one a shape gets."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import pathlib
from collections.abc import Iterator

import torch

import forwardpass as fp

LIBRARY = pathlib.Path(fp.__file__).parent / "_kernels_interpreted.so"
SUCCESS, INVALID_VALUE, NO_KERNEL = 0, 1, 209  # of cudaError_t
KINDS = ("int8", "fp8", "w8a16", "int8_conv2d")  # of GemmKind


class Shape(ctypes.Structure):
    _fields_ = [("m", ctypes.c_int64), ("n", ctypes.c_int64), ("k", ctypes.c_int64), ("kind", ctypes.c_int32),
                ("group", ctypes.c_int32), ("gated_blocks", ctypes.c_bool), ("experts", ctypes.c_int32),
                ("windows", ctypes.c_void_p)]  # fmt: skip


class Windows(ctypes.Structure):
    """Conv2dShape (csrc/params/int8_conv2d.h)."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "images", "height", "width", "channels", "image_stride", "row_stride", "pixel_stride", "kernel_h", "kernel_w",
            "stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w", "groups", "out_height", "out_width",
        )
    ]  # fmt: skip


def every_second_pixel(m: int, channels: int) -> Windows:
    """Of one row of pixels; a convolution of 1 x 1 with m outputs."""
    width = 2 * m - 1
    strides = (width * channels, width * channels, channels)
    return Windows(1, 1, width, channels, *strides, 1, 1, 1, 2, 0, 0, 1, 1, 1, 1, m)


class Device(ctypes.Structure):
    _fields_ = [
        ("sms", ctypes.c_int16),
        ("index", ctypes.c_int16),
        ("arch", ctypes.c_int16),
        ("shared_kib", ctypes.c_int16),
    ]


class Limits(ctypes.Structure):
    """GemmLimits (csrc/kernels/gemm/kernel.h)."""

    _fields_ = [("experts", ctypes.c_int32), ("rows", ctypes.c_int64), ("columns", ctypes.c_int64), ("k", ctypes.c_int64),
                ("tiles", ctypes.c_int64)]  # fmt: skip


class Kernel(ctypes.Structure):
    """The first fields of a GemmKernel (csrc/kernels/gemm/kernel.h)."""

    _fields_ = [
        ("arch", ctypes.c_int32),
        ("only", ctypes.c_bool),
        ("tile_m", ctypes.c_int32),
        ("tile_n", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("limits", Limits),
    ]


class Choice(ctypes.Structure):
    _fields_ = [("kernel", ctypes.POINTER(Kernel)), ("quantizes", ctypes.c_bool), ("splits", ctypes.c_int64),
                ("split_k", ctypes.c_int64), ("cluster", ctypes.c_int32), ("blocks", ctypes.c_int32),
                ("cluster_sums", ctypes.c_bool), ("arch", ctypes.c_int32)]  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL:
    """Opened by the package first: opened here first, a process that launches kernels later ends with a broken heap."""
    with fp.interpret("sm_80"), fp.use_backend("cuda"):
        fp.ops.quantize(torch.ones(1, 16), dtype=torch.int8)
    opened = ctypes.CDLL(str(LIBRARY))
    opened.forwardpass_gemm_row.restype = ctypes.POINTER(Kernel)
    return opened


def select(
    kind: str, device: tuple[int, int], m: int, n: int, k: int, group: int = 0, experts: int = 0
) -> tuple[int, Choice]:
    """(a cudaError_t, what is chosen); device: multiprocessors, architecture. Of int8_conv2d windows are single pixels."""
    sms, arch = device
    choice = Choice()
    windows = ctypes.byref(every_second_pixel(m, k)) if kind == "int8_conv2d" else None
    shape = Shape(m, n, k, KINDS.index(kind), group, False, experts, ctypes.cast(windows, ctypes.c_void_p))
    with contextlib.ExitStack() as stack:
        if arch == 90:  # how many clusters fit is asked of the device
            stack.enter_context(fp.interpret("sm_90a", multiprocessors=sms))
        error = library().forwardpass_select_gemm(
            ctypes.byref(shape), ctypes.byref(Device(sms, 0, arch)), ctypes.byref(choice)
        )
    return error, choice


def is_within(row: int, m: int, n: int, k: int, experts: int = 0) -> bool:
    """Whether the kernel of this row computes a shape."""
    within = ctypes.c_int()
    assert library().forwardpass_gemm_row(row, ctypes.byref(Shape(m, n, k, 0, 0, False, experts)), ctypes.byref(within))
    return bool(within.value)


def rows() -> Iterator[Kernel]:
    """Of all tables, in the order of their numbers."""
    shape, within = Shape(), ctypes.c_int()
    for i in range(1000):
        kernel = library().forwardpass_gemm_row(i, ctypes.byref(shape), ctypes.byref(within))
        if not kernel:
            return
        yield kernel.contents
