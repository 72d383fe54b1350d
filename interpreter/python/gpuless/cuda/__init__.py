"""The interpreted GPU as torch's `cuda` device, so that programs and tests that say device="cuda" run unchanged.

It is asked for (`present`, `pytest --gpu=sm_90a`, `python -m gpuless run`), never there by itself, and then
for the rest of the process: torch's functions and its table of devices are the process's.
"""

from __future__ import annotations

import importlib.util

import torch

from .. import core
from ..device import Device, install_process
from . import benchmark, cublas, extensions, graphs, inductor, tensors, torch_cuda

_presented: Device | None = None


def present(device: Device) -> None:
    """From now on, `cuda` is this interpreted GPU: in every thread, for the rest of the process.

    Raises:
        RuntimeError: another one is already, or this process has a real GPU.
    """
    global _presented
    if _presented is device:
        return
    if _presented is not None:
        raise RuntimeError(f"cuda is {_presented!r} in this process already: set its seed, or start another process")
    if torch.cuda.is_available():
        raise RuntimeError(
            f"this machine has a GPU, {torch.cuda.get_device_name()}, and cuda means that one: hide it with "
            "CUDA_VISIBLE_DEVICES= to have the interpreted one"
        )
    device.memory = "cuda"
    install_process(device)
    core.offer_libraries()
    tensors.install()
    torch_cuda.install(device)
    graphs.install()
    inductor.install()
    extensions.install(device)
    if importlib.util.find_spec("triton"):
        import triton.testing

        triton.testing.do_bench = triton.testing.do_bench_cudagraph = benchmark.do_bench(device)
        benchmark.refuse_proton()
        cublas.install()
    _presented = device
