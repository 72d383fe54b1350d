"""Triton's driver for the interpreted GPU: the compiler stops at PTX, launches go to the interpreter's core.

While any thread interprets, Triton's active driver and its NVIDIA compiler are those below; in threads that do not
interpret they are what they were.
"""

from __future__ import annotations

import functools
import re
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import _allocation
from triton.runtime.driver import driver as active

from . import current
from .capture import Capture
from .memory.guard import Guard
from .memory.tensor_maps import encode
from .module import Kernel, Module

#: what Triton asks of a device before it launches: shared memory a block, multiprocessors
PROPERTIES = {
    "sm_80": (163 << 10, 108),
    "sm_89": (99 << 10, 142),
    "sm_90a": (227 << 10, 132),
    "sm_100a": (227 << 10, 148),
    "sm_120": (99 << 10, 188),
}


class PtxCompiler(CUDABackend):
    """NVIDIA's, without ptxas: what is launched is the PTX."""

    def __init__(self, target: GPUTarget):
        super().__init__(target)
        self.binary_ext = "interpreted"

    def add_stages(self, stages: dict[str, Any], *args: Any) -> None:
        super().add_stages(stages, *args)
        del stages["cubin"]
        stages[self.binary_ext] = lambda ptx, metadata: ptx.encode()

    def hash(self) -> str:
        return f"interpreted-{super().hash()}"  # part of the key of Triton's cache on disk


def _compiler(target: GPUTarget) -> CUDABackend:
    return (PtxCompiler if current.device_or_none() else CUDABackend)(target)


_compiler.supports_target = CUDABackend.supports_target  # type: ignore[attr-defined]


class Driver:
    """What Triton asks for is this thread's interpreted GPU, or what the driver before would have said."""

    def __init__(self, before: Any):
        self._before = before

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """To `isinstance` NVIDIA's own, for which Inductor asks before it puts one in its place."""
        return backends["nvidia"].driver if current.device_or_none() else Driver

    def __getattr__(self, name: str) -> Any:
        if current.device_or_none():
            return getattr(_INTERPRETED, name)
        return getattr(self._before or active.default, name)


class InterpretedDriver:
    """The part of Triton's driver interface that it calls for CUDA."""

    def __init__(self) -> None:
        self.utils, self.launcher_cls = Utils(), Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(re.sub(r"\D", "", current.device().arch)), 32)

    def get_current_device(self) -> str:
        return current.device().arch  # the key of the caches of compiled kernels: no real device has such a number

    def get_device_capability(self, device: str) -> tuple[int, int]:
        return divmod(self.get_current_target().arch, 10)

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0) if current.device().memory == "cuda" else torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda if current.device().memory == "cuda" else Clock

    def get_benchmarker(self) -> Callable[..., Any]:
        if current.device().memory == "cuda":
            from .cuda.benchmark import do_bench

            return do_bench(current.device())
        return count

    def get_empty_cache_for_benchmark(self) -> None:
        return None

    def clear_cache(self, cache: None) -> None:
        pass

    def map_python_to_cpp_type(self, ty: str) -> str:
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(ty)


def count(call: Callable[[], Any], quantiles: Sequence[float] | None = None, **_: Any) -> Any:
    """What autotuning compares: warp instructions of a call, which are the same each time. They are no time on a GPU."""
    if (device := current.device_or_none()) is None:  # autotuners keep their benchmarker
        return active.active.get_benchmarker()(call, quantiles=quantiles, **_)
    before = device.counters["warp_instructions"]
    call()
    counted = float(device.counters["warp_instructions"] - before)
    return counted if quantiles is None else [counted] * len(quantiles)


class Clock:
    """As much of torch.cuda as triton.testing.do_bench needs; it measures the interpreter."""

    class Event:
        def __init__(self, enable_timing: bool = True):
            self.seconds = 0.0

        def record(self) -> None:
            self.seconds = time.perf_counter()

        def elapsed_time(self, end: Clock.Event) -> float:
            return 1e3 * (end.seconds - self.seconds)

    @staticmethod
    def synchronize() -> None:
        pass


class Utils:
    def get_device_properties(self, device: str | int | None) -> dict[str, int]:
        """Triton asks by what get_current_device returned, programs by torch's index, None included."""
        shared, multiprocessors = PROPERTIES[device if isinstance(device, str) else current.device().arch]
        return {
            "max_shared_mem": shared,
            "max_num_regs": 65536,
            "multiprocessor_count": multiprocessors,
            "warpSize": 32,
        }

    def load_binary(self, name: str, ptx: bytes, shared: int, device: str) -> tuple[None, Kernel, int, int, int]:
        """module, function, registers as assumed and no spills (ptxas would know), and the most threads of a block

        No module: Triton 3.9 would ask the driver to unload it, and by then that may be another one. Without one, Triton
        comes here again at each launch.
        """
        kernel = _kernel(name, ptx)
        return None, kernel, kernel.module.registers[name], 0, 1024


@functools.lru_cache(maxsize=1024)
def _kernel(name: str, ptx: bytes) -> Kernel:
    return Module(ptx.decode())[name]


class Launcher:
    """Made once for each compiled kernel."""

    def __init__(self, src: Any, metadata: Any):
        self.metadata = metadata
        self.signature = list(src.signature.items())

    def __call__(self, *launch: Any) -> None:
        if Capture.running:
            Capture.running.steps.append(functools.partial(self._launch, *launch))
        else:
            self._launch(*launch)

    def _launch(
        self, x: int, y: int, z: int, stream: int, kernel: Kernel, packed_metadata: Any, launch_metadata: Any,
        enter_hook: Any, exit_hook: Any, *args: Any,
    ) -> None:  # fmt: skip
        device, m = current.device(), self.metadata
        if enter_hook is not None:
            enter_hook(launch_metadata)
        if x * y * z > 0:
            with device.running() as scope:
                parameters = list(self._parameters(args))
                tensors = {name: t for _, name, v in parameters if isinstance(t := _tensor(v), Tensor)}
                guard = Guard(scope, read_only=False)
                if device.guard:
                    for name, tensor in tensors.items():
                        scope.check(tensor, f"argument {name} of {kernel.name}")
                    tensors = guard.rehome(tensors)
                else:
                    for name, tensor in tensors.items():
                        scope.add_tensor(tensor, f"argument {name} of {kernel.name}")
                descriptors = iter(getattr(m, "tensordesc_meta", None) or ())
                values: list[bytes] = []
                for type_, name, v in parameters:
                    values += self._values(type_, v, tensors.get(name), descriptors)
                buffers = []  # alive until the launch is over
                for name in ("global", "profile")[: len(kernel.parameters) - len(values)]:
                    buffers.append(buffer := self._scratch(name, x * y * z * m.num_ctas, stream))
                    if isinstance(buffer, Tensor):
                        scope.add_tensor(buffer, f"{name} scratch of {kernel.name}")
                    values.append(_pointer(buffer))
                cluster = (m.num_ctas, 1, 1)
                kernel.launch_values(
                    device, (x * m.num_ctas, y, z), (32 * m.num_warps, 1, 1), values, m.shared, cluster,
                    bool(getattr(m, "launch_pdl", False)),
                )  # fmt: skip
                device.finish(guard, kernel.name)
        if exit_hook is not None:
            exit_hook(launch_metadata)

    def _parameters(self, args: tuple[Any, ...]) -> Iterator[tuple[str, str, Any]]:
        """(type, name, value) of what the kernel takes at run time: tuples taken apart, constants left out."""
        if len(args) != len(self.signature):
            raise TypeError(
                f"the kernel takes {len(self.signature)} arguments, constexprs included, and was launched with {len(args)}"
            )
        for (name, type_), value in zip(self.signature, args):
            yield from _flat(type_, str(name), value)

    def _values(
        self, type_: str, value: Any, tensor: Tensor | None, metas: Iterator[dict[str, Any]]
    ) -> Iterator[bytes]:
        """The parameters that one argument becomes. Tensors come separately: they may be copies."""
        if type_.startswith("*"):
            yield _pointer(value if tensor is None else tensor)
        elif type_.startswith("tensordesc"):
            assert tensor is not None
            yield from self._descriptor(value, tensor, next(metas, None))
        else:
            yield _scalar(type_, value)

    def _descriptor(self, d: Any, base: Tensor, meta: dict[str, Any] | None) -> Iterator[bytes]:
        """As make_tensordesc_arg of Triton's own driver."""
        shape, strides = list(d.shape), list(d.strides)
        if meta is None:  # lowered to pointers: before sm_90
            yield _pointer(base)
            yield from (_scalar("i64", n) for n in (*shape, *strides))
            yield _scalar("i1", d.padding == "nan")
            if hasattr(d, "round_f32_to_tf32"):  # since Triton 3.7
                yield _scalar("i1", d.round_f32_to_tf32)
        else:
            if meta.get("is_im2col"):
                raise ValueError("the interpreter has no im2col tensor maps: use a tiled descriptor")
            # Numbers of 4 bits lie two in a byte: the map counts numbers, the kernel bytes (since Triton 3.7).
            elements = [*shape[:-1], shape[-1] * (2 if meta["fp4_padded"] else 1)]
            # Triton's numbers are the device's: the FTZ float32 has 8 there, and 10 in CUtensorMapDataType.
            data_type = {8: 10, 9: 8, 10: 9}.get(meta["elem_type"], meta["elem_type"])
            yield encode(
                base.data_ptr(), 11 if getattr(d, "round_f32_to_tf32", False) else data_type, elements,
                [n * meta["elem_size"] for n in strides], meta["block_size"], meta["swizzle"], int(d.padding == "nan"),
            )  # fmt: skip
            if not hasattr(d, "round_f32_to_tf32"):
                shape = elements
        yield from (_scalar("i32", n) for n in shape)
        yield from (_scalar("i64", n) for n in strides)

    def _scratch(self, name: str, programs: int, stream: int) -> Any:
        """Memory from the allocator that Triton was given; it refuses where there is none."""
        size = getattr(self.metadata, f"{name}_scratch_size")
        allocator = _allocation._allocator.get() if name == "global" else _allocation._profile_allocator
        return allocator(programs * size, getattr(self.metadata, f"{name}_scratch_align"), stream) if size else None


def _flat(type_: Any, name: str, value: Any) -> Iterator[tuple[str, str, Any]]:
    if isinstance(type_, tuple):
        for i, (t, v) in enumerate(zip(type_, value)):
            yield from _flat(t, f"{name}[{i}]", v)
    elif type_ != "constexpr":
        yield type_, name, value


def _tensor(value: Any) -> Any:
    """The tensor behind a tensor, a tensor seen as another type (triton.reinterpret) or a descriptor."""
    while not isinstance(value, Tensor) and hasattr(value, "base"):
        value = value.base
    return value


def _pointer(value: Any) -> bytes:
    address = 0 if value is None else value if isinstance(value, int) else value.data_ptr()
    return address.to_bytes(8, "little")


def _scalar(type_: str, value: Any) -> bytes:
    if type_ == "bf16":  # truncated, as Triton's own launcher does
        return struct.pack("<f", value)[2:]
    if floating := {"fp16": "<e", "fp32": "<f", "f32": "<f", "fp64": "<d"}.get(type_):
        return struct.pack(floating, value)
    size = max(int(type_[1:]) // 8, 1)
    return int(value).to_bytes(size, "little", signed=type_[0] == "i")


_INTERPRETED = InterpretedDriver()
_lock = threading.Lock()
_users = 0
_before: tuple[Any, Backend]


def install() -> None:
    global _users, _before
    with _lock:
        if _users == 0:
            try:
                before = active.active
            except RuntimeError:  # no GPU: there is no driver
                before = None
            _before = before, backends["nvidia"]
            active.set_active(Driver(before))
            backends["nvidia"] = Backend(_compiler, backends["nvidia"].driver)
        _users += 1


def uninstall() -> None:
    global _users
    with _lock:
        _users -= 1
        if _users == 0:
            before, backends["nvidia"] = _before
            active.set_active(before)
