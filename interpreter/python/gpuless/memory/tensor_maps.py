"""Tensor maps (CUtensorMap) without a driver: what TMA instructions take for a tensor."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core import load

#: CUtensorMapDataType
DATA_TYPES = {
    torch.uint8: 0, torch.int8: 0, torch.bool: 0, torch.float8_e4m3fn: 0, torch.float8_e5m2: 0, torch.uint16: 1,
    torch.int16: 1, torch.uint32: 2, torch.int32: 3, torch.uint64: 4, torch.int64: 5, torch.float16: 6, torch.float32: 7,
    torch.float64: 8, torch.bfloat16: 9,
}  # fmt: skip
Swizzle = int | tuple[int, int]
#: bytes, and bytes that stay together where those are not 16 -> CUtensorMapSwizzle
SWIZZLES: dict[Swizzle, int] = {0: 0, 32: 1, 64: 2, 128: 3, (128, 32): 4}
#: CUtensorMapFloatOOBfill
FILLS = {"zero": 0, "nan": 1}


def encode(
    address: int,
    data_type: int,
    shape: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    swizzle: int,
    fill: int,
    element_strides: Sequence[int] | None = None,
) -> bytes:
    """cuTensorMapEncodeTiled's 128 bytes. Outermost dimension first, as in torch; strides in bytes; enumerations as numbers."""
    rank = len(shape)
    n64, n32 = ctypes.c_uint64 * max(rank, 1), ctypes.c_uint32 * max(rank, 1)
    encoded = ctypes.create_string_buffer(128 + 64)
    aligned = ctypes.addressof(encoded) + -ctypes.addressof(encoded) % 64
    error = load().gpuless_tensor_map_encode_tiled(
        aligned, data_type, rank, address, n64(*shape[::-1]), n64(*strides[:-1][::-1]), n32(*box[::-1]),
        n32(*(element_strides or [1] * rank)[::-1]), 0, swizzle, 0, fill,
    )  # fmt: skip
    if error:
        raise ValueError(f"no tensor map: {load().gpuless_tensor_map_error().decode()}")
    return ctypes.string_at(aligned, 128)


class TensorMap:
    """A tensor and how TMA sees it; made by `tensor_map`. Kernels take it by value."""

    def __init__(
        self, tensor: Tensor, box: Sequence[int], swizzle: Swizzle, fill: str, element_strides: Sequence[int] | None
    ):
        self.tensor = tensor
        self._how = box, swizzle, fill, element_strides
        self.encode(tensor)

    def encode(self, tensor: Tensor) -> bytes:
        """The 128 bytes of the map of this tensor, or of a copy of it."""
        box, swizzle, fill, element_strides = self._how
        size = tensor.element_size()
        return encode(
            tensor.data_ptr(), DATA_TYPES[tensor.dtype], tensor.shape, [s * size for s in tensor.stride()], box,
            SWIZZLES[swizzle], FILLS[fill], element_strides,
        )  # fmt: skip


def tensor_map(
    tensor: Tensor,
    box: Sequence[int],
    swizzle: Swizzle = 0,
    fill: str = "zero",
    element_strides: Sequence[int] | None = None,
) -> TensorMap:
    """Describes a tensor to TMA, in boxes.

    Args:
        tensor: on the CPU; its last dimension has stride 1, the strides of the others are multiples of 16 bytes.
        box: elements of a box in each dimension of the tensor, outermost first.
        swizzle: 0, 32, 64 or 128 bytes; (128, 32): of 128 bytes, by atoms of 32 (CU_TENSOR_MAP_SWIZZLE_128B_ATOM_32B).
        fill: what is read outside of the tensor: "zero", or "nan".
        element_strides: the step between elements in each dimension, 1 by default.

    Raises:
        TypeError, ValueError: what cuTensorMapEncodeTiled would refuse, and why.
    """
    if not isinstance(tensor, Tensor) or tensor.dtype not in DATA_TYPES:
        raise TypeError(f"there are no tensor maps of {getattr(tensor, 'dtype', type(tensor).__name__)}")
    if len(box) != tensor.dim() or (element_strides is not None and len(element_strides) != tensor.dim()):
        raise ValueError(
            f"box and element_strides have one number for each of the {tensor.dim()} dimensions of the tensor"
        )
    if tensor.dim() and tensor.stride(-1) != 1:
        raise ValueError(f"the last dimension must have stride 1, not {tensor.stride(-1)}: make the tensor contiguous")
    if swizzle not in SWIZZLES or fill not in FILLS:
        raise ValueError(
            f"swizzle is one of {list(SWIZZLES)} and fill one of {list(FILLS)}, not {swizzle!r} and {fill!r}"
        )
    return TensorMap(tensor, tuple(box), swizzle, fill, element_strides)
