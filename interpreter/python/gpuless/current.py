"""Which GPU this thread's kernels run on: that of a block of `gpuless.gpu`, or the process's."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from .device import Device


class _Thread(threading.local):
    everywhere: ClassVar[Device | None] = None  # what threads begin with

    def __init__(self) -> None:
        self.device = _Thread.everywhere


_thread = _Thread()
_listeners: list[Callable[[Device], None]] = []


def device_or_none() -> Device | None:
    """This thread's, None where no GPU is interpreted."""
    return _thread.device


def device() -> Device:
    """This thread's device; raises where it has none."""
    if _thread.device is None:
        raise RuntimeError("no GPU is interpreted in this thread: launch within `with gpuless.gpu('sm_90a'):`")
    return _thread.device


@contextlib.contextmanager
def using(its: Device) -> Iterator[None]:
    """Within the block, this thread's."""
    before, _thread.device = _thread.device, its
    try:
        yield
    finally:
        _thread.device = before


def use_everywhere(device: Device) -> None:
    """In this thread and in those that begin later, outside of blocks of `using`."""
    _Thread.everywhere = _thread.device = device
    for listener in _listeners:
        listener(device)


def when_everywhere(listener: Callable[[Device], None]) -> None:
    """Calls it with the process's device, now where there is one and whenever there is another."""
    _listeners.append(listener)
    if _Thread.everywhere is not None:
        listener(_Thread.everywhere)
