"""What each backend asks of a device, and of what is installed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable

import torch

from ..common.extras import pip_install
from . import library
from .choice import Interpreter, selected
from .reason import Reason

#: FORWARDPASS_DEBUG=1: what tensors on a GPU hold is checked too, before each call
DEBUG = os.environ.get("FORWARDPASS_DEBUG", "0") not in ("", "0")


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def why_no_triton() -> str | None:
    """None, or why Triton cannot be used."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        importlib.import_module("triton")
    except Exception as e:
        return f"Triton does not import: {e}"
    return library.why_no_ops()


def gpu_capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of the GPU that runs kernels on tensors of this device: the interpreted one for CPU tensors."""
    if device.type == "cpu" and selected.arch:
        digits = selected.arch[3:].rstrip("af")
        return int(digits[:-1]), int(digits[-1])
    return _capability(device.index)


def gpu_takes(device: torch.device) -> bool:
    """Whether this device's tensors are for CUDA and Triton kernels: on a GPU, or interpreted as if they were."""
    kind = device.type
    return kind == "cuda" or (kind == "cpu" and selected.arch is not None)


def _interpreter_of(device: torch.device) -> Interpreter | None:
    """What runs CUDA and Triton kernels on tensors of this device, where no GPU does."""
    interpreter = selected.interpreter
    return interpreter if interpreter is not None and interpreter.memory == device.type else None


def _why_not_gpu(device: torch.device, kernels: str) -> Reason | None:
    if gpu_takes(device):
        return None
    return Reason(
        "device", f"the {kernels} kernels take CUDA tensors, and this one is on {device.type}", "move it to a GPU"
    )


def _why_no_gpu() -> Reason | None:
    """For `doctor`, and for fake CUDA tensors: a real one proves that there is a GPU."""
    if torch.version.cuda is None:
        return Reason("no_gpu", "this torch was built without CUDA", "install a CUDA build of torch")
    if not torch.cuda.is_available():
        return Reason("no_gpu", "torch finds no GPU", "run it where nvidia-smi lists one")
    return None


def _why_not_cuda(device: torch.device) -> Reason | None:
    if reason := _why_not_gpu(device, "CUDA"):
        return reason
    if interpreter := _interpreter_of(device):
        return interpreter.why_not("cuda")
    if problem := library.why_no_kernels():
        return Reason(
            "not_built", problem, "reinstall where `nvcc` is found, or with FORWARDPASS_BUILD_CUDA=1 to see the error"
        )
    if reason := _why_no_gpu():
        return reason
    if not library.runs_on(capability := _capability(device.index)):
        major, minor = capability
        return Reason("arch", f"built for {', '.join(library.build_info['arches'])}, and this GPU is sm_{major}{minor}",
                      f"reinstall with TORCH_CUDA_ARCH_LIST={major}.{minor}")  # fmt: skip
    return None


def _why_not_triton(device: torch.device) -> Reason | None:
    if reason := _why_not_gpu(device, "Triton"):
        return reason
    if problem := why_no_triton():
        return Reason("not_installed", problem, pip_install("triton"))
    if interpreter := _interpreter_of(device):
        return interpreter.why_not("triton")
    if reason := _why_no_gpu():
        return reason
    if _capability(device.index) < (8, 0):
        return Reason("arch", "the Triton kernels need compute capability 8.0", "use a GPU from A100 or RTX 30 on")
    return None


def _why_not_cpu(device: torch.device) -> Reason | None:
    if device.type != "cpu":
        return Reason(
            "device", f"the cpu kernels take CPU tensors, and this one is on {device.type}", "move it to the CPU"
        )
    if problem := library.why_no_ops():
        return Reason("not_built", problem, "reinstall forwardpass for this torch")
    return None


WHY_NOT: dict[str, Callable[[torch.device], Reason | None]] = {
    "cuda": _why_not_cuda,
    "triton": _why_not_triton,
    "cpu": _why_not_cpu,
    "reference": lambda device: None,
}
