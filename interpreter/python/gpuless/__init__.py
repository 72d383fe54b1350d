"""gpuless: runs CUDA and Triton kernels without a GPU, and checks them. README.md and docs/ say how.

    with gpuless.gpu("sm_90a", seed=3) as gpu:
        my_triton_kernel[grid](x, y)          # CPU tensors; a race, a bad address, ... raises gpuless.Finding

It needs torch for tensors, and neither torch nor Triton to build CUDA programs and to run them: each name is imported by whoever
asks for it. GPULESS_ARCH=sm_90a makes the whole process's GPU an interpreted one.
"""

import importlib as _importlib
import importlib.util as _util
import os as _os
from typing import Any as _Any

from .version import __version__ as __version__

_MODULES = {
    "core": ("ARCHITECTURES", "Unavailable"),
    "device": ("Device", "gpu"),
    "finding": ("Explored", "Finding", "FindingWarning", "TimeLimit"),
    "timing.model": ("Modelled",),
    "module": ("Kernel", "Module"),
    "timing.profile": ("Counts", "KernelProfile", "LineProfile"),
    "rules": ("Rule",),
    "memory.tensor_maps": ("TensorMap", "tensor_map"),
    "timing.timeline": ("KernelTimeline", "LineTime", "Timeline"),
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "ARCHITECTURES", "Counts", "Device", "Explored", "Finding", "FindingWarning", "Kernel", "KernelProfile",
    "KernelTimeline", "LineProfile", "LineTime", "Modelled", "Module", "Rule", "TensorMap", "TimeLimit", "Timeline",
    "Unavailable", "gpu", "tensor_map",
]  # fmt: skip


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> _Any:
    if name in _PLACES:
        return getattr(_importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if _os.environ.get("GPULESS_ARCH") and _util.find_spec("torch"):
    from .device import interpret_process as _interpret_process

    _interpret_process()
