"""Which memory a kernel may touch: tensors' storages, under the names of the arguments that they came by."""

from __future__ import annotations

import ctypes

from torch import Tensor

from ..core import load


class Scope:
    """The intervals of one operation or launch. What an enclosing one has registered keeps its name and its protection."""

    def __init__(self, outer: Scope | None, memory: str):
        self._memory = memory  # the device type of tensors that kernels take
        self._ranges: set[tuple[int, int]] = set(outer._ranges) if outer else set()

    def add(self, begin: int, size: int, name: str, read_only: bool = False) -> None:
        if size and (begin, size) not in self._ranges:
            self._ranges.add((begin, size))
            load().gpuless_storage_add(begin, size, name.encode(), read_only)

    def check(self, tensor: Tensor, name: str) -> None:
        """Raises where it is on another device than the kernel."""
        if tensor.device.type == self._memory or (tensor.device.type == "cpu" and not tensor.numel()):
            return  # an empty one is a null pointer, to Triton too
        if self._memory == "cuda":  # Triton's own words, for which projects test
            raise ValueError(f"Pointer argument cannot be accessed from Triton (cpu tensor?): {name}")
        raise ValueError(f"{name} is on {tensor.device}, and the interpreter takes CPU tensors: move it to the CPU")

    def add_tensor(self, tensor: Tensor, name: str, read_only: bool = False) -> None:
        """All of its storage: on a GPU, too, the kernel of a view can reach the rest of what it is a view of."""
        self.check(tensor, name)
        storage = tensor.untyped_storage()
        if tensor.device.type == self._memory:
            self.add(storage.data_ptr(), storage.nbytes(), name, read_only)


def on_host(tensor: Tensor) -> Tensor:
    """The tensor, or the CPU's of the same memory where it is the interpreted GPU's."""
    if not tensor.is_cuda:
        return tensor
    from ..cuda.tensors import host_view

    return host_view(tensor)


def add_function() -> int:
    """The address of gpuless_storage_add."""
    return ctypes.cast(load().gpuless_storage_add, ctypes.c_void_p).value or 0
