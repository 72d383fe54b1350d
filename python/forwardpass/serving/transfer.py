"""Batches to the model's device and results back to the host: plainly, or beside the computation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..common.batches import map_tensors, tensors


def bytes_of(tree: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors(tree))


@contextmanager
def named(phase: str, device: torch.device) -> Iterator[None]:
    """An NVTX range of this name on a GPU, so that Nsight shows what `fp.profile` prints; nothing elsewhere."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.nvtx.range_push(phase)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


class Transfer:
    """Where model and batches are in one memory: nothing is moved."""

    def stage(self, batch: Any) -> Any:
        """What a thread beside the computation may do before the transfer."""
        return batch

    def to_device(self, batch: Any) -> Any:
        return batch

    def to_host(self, result: Any) -> Any:
        """Begins the way back."""
        return result

    def wait(self, result: Any) -> Any:
        """Ends it: the result can be read on the host."""
        return result


class CudaTransfer(Transfer):
    """Through pinned memory and on streams of their own, so that copies run beside kernels.

    Pinned blocks come from torch's caching host allocator, which gives none out again before the copies from it are over.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.inward, self.outward = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def stage(self, batch: Any) -> Any:
        return map_tensors(batch, lambda t: t if t.is_cuda or t.is_pinned() else t.contiguous().pin_memory())

    def to_device(self, batch: Any) -> Any:
        compute = torch.cuda.current_stream(self.device)

        def move(t: Tensor) -> Tensor:
            if t.device == self.device:
                return t
            moved = t.to(self.device, non_blocking=True)
            moved.record_stream(compute)  # it is allocated on `inward`, and its block is in use until compute is done
            return moved

        with torch.cuda.stream(self.inward):
            moved = map_tensors(batch, move)
        compute.wait_stream(self.inward)
        return moved

    def to_host(self, result: Any) -> Any:
        self.outward.wait_stream(torch.cuda.current_stream(self.device))

        def move(t: Tensor) -> Tensor:
            if not t.is_cuda:
                return t
            t.record_stream(self.outward)
            return t.to("cpu", non_blocking=True)  # into pinned memory

        with torch.cuda.stream(self.outward):
            moved = map_tensors(result, move)
            event = torch.cuda.Event(blocking=True)  # who waits for it leaves the core to others
            event.record(self.outward)
        return moved, event

    def wait(self, result: Any) -> Any:
        moved, event = result
        event.synchronize()
        return moved


def transfer_for(device: torch.device) -> Transfer:
    """How batches made on the host come to `device`."""
    return CudaTransfer(device) if device.type == "cuda" else Transfer()
