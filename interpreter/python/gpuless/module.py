"""PTX modules, launched on the interpreted GPU: for tests, and for whoever has PTX and no launch code."""

from __future__ import annotations

import json
import struct
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from . import core, current
from .device import Device, make
from .memory.guard import Guard
from .memory.tensor_maps import TensorMap


class Module:
    """PTX text, parsed; `module["name"]` is a kernel of it.

    Args:
        ptx: the text.
        arch: launch on a GPU of its own; by default, and within a block of `gpuless.gpu`, on that one.
    """

    def __init__(self, ptx: str, arch: str | None = None):
        api = core.load()
        api.gpuless_finding_clear()
        self._device = make(arch) if arch else None
        self.handle = api.gpuless_module_load(ptx.encode())
        if not self.handle:
            raise core.finding() or RuntimeError("the PTX module did not load, and no reason was given")
        weakref.finalize(self, api.gpuless_module_unload, self.handle)
        #: kernel -> (offset, bytes) of each parameter
        self.kernels: dict[str, list[tuple[int, int]]] = {}
        #: kernel -> registers of a thread, as they are assumed where ptxas has not said
        self.registers: dict[str, int] = {}
        for e in json.loads(api.gpuless_module_json(self.handle))["entries"]:
            self.kernels[e["name"]] = [(p["offset"], p["size"]) for p in e["parameters"]]
            self.registers[e["name"]] = e["registers"]

    def __getitem__(self, name: str) -> Kernel:
        if name not in self.kernels:
            raise KeyError(f"the module has no kernel {name!r}; it has {', '.join(self.kernels)}")
        return Kernel(self, name)

    def device(self) -> Device:
        return self._device if self._device and current.device_or_none() is None else current.device()


class Kernel:
    """An entry of a module."""

    def __init__(self, module: Module, name: str):
        self.module, self.name = module, name
        self.parameters = module.kernels[name]

    def launch(
        self,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Iterable[Any],
        shared: int = 0,
        cluster: int | Sequence[int] = 1,
        programmatic: bool = False,
    ) -> None:
        """Runs it to its end.

        Args:
            grid, block, cluster: one to three numbers.
            args: in the order of the parameters: a tensor (its address; the kernel may touch its storage), a tensor map,
                None (a null pointer), an int, a float (32 or 64 bits), or the bytes of anything else.
            shared: bytes of dynamic shared memory.
            programmatic: with programmatic stream serialisation (PDL): before the previous launch has ended.

        Raises:
            Finding: what was wrong.
        """
        device = self.module.device()
        args = list(args)
        if len(args) != len(self.parameters):
            raise TypeError(f"{self.name} takes {len(self.parameters)} arguments, not {len(args)}")
        with device.running() as scope:
            tensors = {
                f"argument {i} of {self.name}": a.tensor if isinstance(a, TensorMap) else a
                for i, a in enumerate(args)
                if isinstance(a, (Tensor, TensorMap))
            }
            guard = Guard(scope, read_only=False)
            if device.guard:
                tensors = guard.rehome(tensors)
            values = [
                _bytes(self.name, i, tensors.get(f"argument {i} of {self.name}"), a, size)
                for i, (a, (_, size)) in enumerate(zip(args, self.parameters))
            ]
            if not device.guard:
                for name, tensor in tensors.items():
                    scope.add_tensor(tensor, name)
            self.launch_values(device, _three(grid), _three(block), values, shared, _three(cluster), programmatic)
            device.finish(guard, self.name)

    def launch_values(
        self,
        device: Device,
        grid: Sequence[int],
        block: Sequence[int],
        values: list[bytes],
        shared: int,
        cluster: Sequence[int],
        programmatic: bool,
    ) -> None:
        """Launches it with the bytes of each parameter, within `device.running()`."""
        packed = bytearray(max((offset + size for offset, size in self.parameters), default=0))
        for (offset, size), value in zip(self.parameters, values):
            assert len(value) == size
            packed[offset : offset + size] = value
        api = core.load()
        api.gpuless_finding_clear()
        error = api.gpuless_module_launch(
            self.module.handle, self.name.encode(), core.Dim3(*grid), core.Dim3(*block), core.Dim3(*cluster), shared,
            bytes(packed), len(packed), programmatic,
        )  # fmt: skip
        device.check(error, self.name)


def _three(n: int | Sequence[int]) -> tuple[int, int, int]:
    sizes = (n,) if isinstance(n, int) else tuple(n)
    if not 1 <= len(sizes) <= 3 or not all(0 <= d < 2**32 for d in sizes):
        raise ValueError(f"grid, block and cluster are one to three numbers, not {n!r}")
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z


def _bytes(kernel: str, i: int, tensor: Tensor | None, value: Any, size: int) -> bytes:
    """The bytes of one argument, as many as its parameter has."""
    if isinstance(value, TensorMap):
        assert tensor is not None
        packed = value.encode(tensor)
    elif tensor is not None:
        packed = tensor.data_ptr().to_bytes(8, "little")
    elif value is None:
        packed = bytes(8)
    elif isinstance(value, int):
        if not -(2 ** (8 * size - 1)) <= value < 2 ** (8 * size):
            raise OverflowError(f"argument {i} of {kernel} has {size} bytes, and {value} does not fit")
        return (value % 2 ** (8 * size)).to_bytes(size, "little")
    elif isinstance(value, float):
        packed = struct.pack("<f" if size == 4 else "<d", value)
    elif isinstance(value, (bytes, bytearray)):
        packed = bytes(value)
    else:
        raise TypeError(f"argument {i} of {kernel} is a tensor, a tensor map, None, an int, a float or bytes, "
                        f"not {type(value).__name__}")  # fmt: skip
    if len(packed) != size:
        raise TypeError(
            f"argument {i} of {kernel} has {size} bytes, and a {type(value).__name__} of {len(packed)} was given"
        )
    return packed
