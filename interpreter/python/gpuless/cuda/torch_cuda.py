"""What `torch.cuda` and its like say of the interpreted GPU: it is there, it is cuda:0, and it does all at once and in order."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from .. import core
from ..capture import prohibit_in_capture
from ..device import Device
from . import clock, generator
from .tensors import check_ordinal, empty_strided, resize_storage

#: of torch.cuda: what needs a driver, other processes or code for CUDA that torch does not have here
REFUSED = (
    "GreenContext", "MemPool", "use_mem_pool",
    "CUDAPluggableAllocator", "change_current_allocator", "caching_allocator_alloc", "caching_allocator_delete",
    "cudart", "current_blas_handle", "current_solver_handle", "get_stream_from_external", "memory_snapshot",
    "list_gpu_processes", "utilization", "temperature", "power_draw", "clock_rate", "device_memory_used", "memory_usage",
)  # fmt: skip
NAME = "cuda:0"


def refuse(name: str) -> NoReturn:
    raise NotImplementedError(f"{name} is not there on an interpreted GPU, which has no driver")


def refused(name: str, original: Any = None) -> type:
    """A class that stands for `original`, because some of what is refused is instantiated, subclassed or asked about by
    isinstance. It has a `__wrapped__` if the original has one: torch 2.15 lists that of `use_mem_pool` when it imports dynamo.
    """

    def __new__(cls: type, *_: Any, **__: Any) -> NoReturn:
        refuse(name)

    wrapped = {"__wrapped__": lambda *_, **__: refuse(name)} if hasattr(original, "__wrapped__") else {}
    return type(name.rpartition(".")[2], (), {"__new__": __new__, **wrapped})


class Stream(torch.Stream):
    """A stream of the interpreted GPU. What is put into it is done before the call returns."""

    def __new__(cls, device: Any = None, priority: int = 0, **_: Any) -> Stream:
        _index(device)
        stream = super().__new__(cls, stream_id=0, device_index=0, device_type=1)
        stream._priority = priority
        return stream

    _priority: int
    cuda_stream = 0

    @property
    def priority(self) -> int:
        return self._priority

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, -5

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        prohibit_in_capture("Stream.synchronize")

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Event:  # type: ignore[override]
        event = event or Event()
        event.record(self)
        return event


class Event:
    """An event of the interpreted GPU; the time between two is modelled: clock.py."""

    cuda_event = 0

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, **_: Any):
        if interprocess:
            refuse("torch.cuda.Event(interprocess=True)")
        self._timed = enable_timing
        self._seconds: float | None = None

    def record(self, stream: Any = None) -> None:
        self._seconds = clock.seconds()

    def elapsed_time(self, end: Event) -> float:
        if not (self._timed and end._timed):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self._seconds is None or end._seconds is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        return 1e3 * (end._seconds - self._seconds)

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        prohibit_in_capture("Event.synchronize")


class StreamContext:
    def __init__(self, stream: Stream | None):
        self.stream = stream

    def __enter__(self) -> None:
        self.before = _current.stream
        if self.stream is not None:
            _current.stream = self.stream

    def __exit__(self, *_: Any) -> None:
        _current.stream = self.before


class _Current:
    stream: Stream


_current = _Current()


def _index(device: Any) -> int:
    """The index of the device that was named, which can only be 0."""
    index = device if isinstance(device, int) else None
    if isinstance(device, (str, torch.device)):
        named = torch.device(device)
        if named.type != "cuda":
            raise ValueError(f"Expected a cuda device, but got: {device}")
        index = named.index
    if index not in (None, 0, -1):
        raise RuntimeError(f"CUDA error: invalid device ordinal: the interpreted GPU is {NAME}, not cuda:{index}")
    return 0


def properties(device: Device) -> types.SimpleNamespace:
    """As torch.cuda.get_device_properties: what the driver of such a GPU says."""
    p = core.device_properties()
    return types.SimpleNamespace(
        name=p.name.decode(),
        major=p.major, minor=p.minor, total_memory=p.memory, multi_processor_count=p.multiprocessors,
        max_threads_per_multi_processor=p.threads_per_multiprocessor, max_threads_per_block=p.threads_per_block,
        warp_size=32, regs_per_multiprocessor=p.registers_per_multiprocessor,
        shared_memory_per_block=p.shared_per_block, shared_memory_per_block_optin=p.shared_per_block_optin,
        shared_memory_per_multiprocessor=p.shared_per_multiprocessor, L2_cache_size=p.l2_cache,
        is_integrated=0, is_multi_gpu_board=0, clock_rate=p.clock, memory_clock_rate=p.memory_clock,
        memory_bus_width=p.memory_bus_bits, gcnArchName=device.arch, uuid="00000000-0000-0000-0000-000000000000",
        pci_bus_id=0, pci_device_id=0, pci_domain_id=0,
    )  # fmt: skip


def _memory(device: Device) -> dict[str, Callable[..., Any]]:
    def total() -> int:
        return int(core.device_properties().memory)

    def used(_: Any = None) -> int:
        return total() - core.load().gpuless_memory_free()

    def peak(_: Any = None) -> int:
        return core.load().gpuless_memory_peak(0)

    def reset(_: Any = None) -> None:
        core.load().gpuless_memory_peak(1)

    def stats(_: Any = None) -> dict[str, int]:
        return {
            f"{what}_bytes.all.{when}": n
            for what in ("allocated", "reserved", "active")
            for when, n in (("current", used()), ("peak", peak()))
        }

    return {
        "memory_allocated": used, "memory_reserved": used, "memory_cached": used,
        "max_memory_allocated": peak, "max_memory_reserved": peak, "max_memory_cached": peak,
        "reset_peak_memory_stats": reset, "reset_max_memory_allocated": reset, "reset_max_memory_cached": reset,
        "reset_accumulated_memory_stats": lambda _=None: None, "memory_stats": stats,
        "memory_summary": lambda _=None, abbreviated=False: f"{used()} bytes of the interpreted GPU are in use, {peak()} at most",
        "mem_get_info": lambda _=None: (core.load().gpuless_memory_free(), total()),
        "empty_cache": lambda: None, "ipc_collect": lambda: None,
        "set_per_process_memory_fraction": lambda fraction, device=None: None,
    }  # fmt: skip


def _seeds() -> dict[str, Callable[..., Any]]:
    default = generator.default

    def manual_seed(seed: int) -> None:
        default.manual_seed(seed)

    return {
        "manual_seed": manual_seed, "manual_seed_all": manual_seed,
        "seed": lambda: default.seed() and None, "seed_all": lambda: default.seed() and None,
        "initial_seed": default.initial_seed,
        "get_rng_state": lambda device="cuda": default.get_state(),
        "get_rng_state_all": lambda: [default.get_state()],
        "set_rng_state": lambda state, device="cuda": default.set_state(state) and None,
        "set_rng_state_all": lambda states: default.set_state(states[0]) and None,
    }  # fmt: skip


def _storage(cls: type, *args: Any, device: Any = None, **kwargs: Any) -> Any:
    """torch.UntypedStorage(bytes, device="cuda"), by which tensors are copied deeply and loaded."""
    if device is None or torch.device(device).type != "cuda":
        return torch._C.StorageBase.__new__(cls, *args, device=device, **kwargs)  # type: ignore[call-arg]
    check_ordinal(torch.device(device))
    return empty_strided((int(args[0]) if args else 0,), (1,), torch.uint8).untyped_storage()


def _resize_storage(storage: torch.UntypedStorage, nbytes: int) -> torch.UntypedStorage:
    if storage.device.type != "cuda":
        return torch._C.StorageBase.resize_(storage, nbytes)  # type: ignore[attr-defined]
    resize_storage(storage, nbytes)
    return storage


def _share(storage: torch.UntypedStorage, *_: Any) -> NoReturn:
    refuse("sharing a cuda tensor with another process")


def _named(name: str, value: Any) -> Any:
    """A function of its own: torch.compile has rules for each name, and takes one function under two names for an error."""
    if isinstance(value, type) or not callable(value):
        return value

    def function(*args: Any, **kwargs: Any) -> Any:
        return value(*args, **kwargs)

    function.__name__ = function.__qualname__ = name
    return function


def install(device: Device) -> None:
    """Puts it all in place of torch's own, for the rest of the process."""
    cuda = torch.cuda
    _current.stream = Stream()
    major, minor = (core.device_properties().major, core.device_properties().minor)

    def nothing(*_: Any, **__: Any) -> None:
        pass

    def stream_of(_: Any = None) -> Stream:
        return _current.stream

    def synchronize(device: Any = None) -> None:
        _index(device)
        prohibit_in_capture("torch.cuda.synchronize")

    def set_stream(stream: Stream | None) -> None:
        _current.stream = stream or _current.stream

    here: dict[str, Any] = {
        "is_available": lambda: True, "is_initialized": lambda: True, "init": nothing, "_lazy_init": nothing,
        "_lazy_call": lambda call, **_: call(), "device_count": lambda: 1, "current_device": lambda: 0,
        "set_device": lambda d: _index(d) and None, "_exchange_device": lambda d: 0, "_maybe_exchange_device": lambda d: 0,
        "synchronize": synchronize, "get_device_name": lambda d=None: properties(device).name,
        "get_device_capability": lambda d=None: (major, minor) if _index(d) == 0 else None,
        "get_device_properties": lambda d=None: properties(device) if _index(d) == 0 else None,
        "get_arch_list": lambda: [f"sm_{major}{minor}"], "get_gencode_flags": lambda: "",
        "is_bf16_supported": lambda including_emulation=True: True, "is_tf32_supported": lambda: True,
        "can_device_access_peer": lambda d, peer: False,
        "Stream": Stream, "ExternalStream": Stream, "Event": Event, "StreamContext": StreamContext,
        "stream": StreamContext, "current_stream": stream_of, "default_stream": lambda d=None: Stream(),
        "set_stream": set_stream, "default_generators": (generator.default,),
        "get_sync_debug_mode": lambda: 0, "set_sync_debug_mode": nothing,
        **_memory(device), **_seeds(),
        **{name: refused(f"torch.cuda.{name}", getattr(cuda, name, None)) for name in REFUSED},
    }  # fmt: skip
    here = {name: _named(name, value) for name, value in here.items()}
    for module in (cuda, cuda.memory, cuda.random, cuda.streams):
        for name, value in here.items():
            if module is cuda or hasattr(module, name):
                setattr(module, name, value)
    for name in ("range_push", "range_pop", "range_start", "range_end", "mark"):
        setattr(cuda.nvtx, name, nothing)
    accelerator = {
        "current_accelerator": lambda check_available=False: torch.device("cuda"), "is_available": lambda: True,
        "device_count": lambda: 1, "current_device_index": lambda: 0, "current_device_idx": lambda: 0,
        "set_device_index": lambda d: _index(d) and None, "set_device_idx": lambda d: _index(d) and None,
        "synchronize": synchronize, "current_stream": stream_of, "set_stream": set_stream,
        "get_memory_info": here["mem_get_info"], "get_device_capability": here["get_device_capability"],
        **{n: f for n, f in _memory(device).items() if n in torch.accelerator.__all__},
    }  # fmt: skip
    for name, value in accelerator.items():
        setattr(torch.accelerator, name, _named(name, value))
    torch.backends.cuda.is_built = lambda: True
    torch.backends.cudnn.enabled = False
    torch.version.cuda = "13.0"
    torch.UntypedStorage.__new__ = staticmethod(_storage)  # type: ignore[method-assign]
    torch.UntypedStorage.resize_ = _resize_storage  # type: ignore[method-assign, assignment]
    torch.UntypedStorage.new = lambda self: torch.UntypedStorage(device=self.device)  # type: ignore[method-assign]
    torch.UntypedStorage._share_cuda_ = _share  # type: ignore[method-assign, assignment]
    torch.Generator = generator.Generator  # type: ignore[misc]
    torch.Tensor.pin_memory = lambda self, device=None: self.clone()  # type: ignore[method-assign]
    state = "_cuda_CUDAAllocator_AllocatorState"  # which torch._dynamo.reset imports
    if not hasattr(torch._C, state):
        setattr(torch._C, state, refused(f"torch._C.{state}"))
    raw: dict[str, Any] = {
        "_cuda_getCurrentRawStream": lambda index: 0, "_cuda_isInBadFork": lambda: False,
        "_cuda_getDeviceCount": lambda: 1, "_cuda_getDevice": lambda: 0, "_cuda_setDevice": nothing,
        "_cuda_cudaCachingAllocator_is_enabled": lambda: False,  # so Inductor says that it leaves CUDA graphs out
        "_cuda_synchronize": synchronize, "_cuda_getArchFlags": lambda: f"sm_{major}{minor}",
    }  # fmt: skip
    for name, value in raw.items():
        setattr(torch._C, name, value)
