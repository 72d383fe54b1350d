"""The compiled libraries: loaded here, once, and never a reason for `import forwardpass` to fail.

`load_error` keeps what went wrong; `forwardpass doctor` shows it, and so does the first call that needed the library.
"""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import torch

from ..version import __version__

FOLDER = pathlib.Path(__file__).parents[1]
KERNELS = FOLDER / "_kernels.so"

load_error: Exception | None = None


def _build_info() -> dict[str, Any]:
    try:
        return json.loads((FOLDER / "_build.json").read_text())
    except (OSError, ValueError) as e:
        return {
            "cuda_skipped": f"_build.json is missing or broken ({e}): install forwardpass, do not import it from its source folder"
        }


#: what the build wrote about itself: version, torch, machine, nvcc, arches, arches_left_out (of TORCH_CUDA_ARCH_LIST, and why),
#: cuda_skipped (None, or the reason for having no CUDA kernels), gpuless (the version that they are linked against besides) and
#: gpuless_skipped (None, or the reason for none)
build_info = _build_info()

try:
    if (built := build_info.get("version", __version__)) != __version__:
        raise RuntimeError(
            f"_ops.so is of forwardpass {built}, and these files are of {__version__}: reinstall forwardpass"
        )
    torch.ops.load_library(FOLDER / "_ops.so")
    if KERNELS.exists():
        torch.ops.forwardpass._set_library(0, str(KERNELS))
except Exception as e:  # OSError, RuntimeError: wrong torch, wrong platform, missing file
    load_error = e

if load_error is None and (request := os.environ.get("FORWARDPASS_CPU")):
    _tiers = torch.ops.forwardpass._cpu_tiers().split(",")
    if request not in _tiers:
        raise ValueError(
            f"FORWARDPASS_CPU is one of {', '.join(_tiers)} here, not {request!r}: unset it for the last of them"
        )


def why_no_ops() -> str | None:
    """None, or the reason for which there are no compiled ops at all."""
    return f"the op library did not load: {load_error}" if load_error else None


def why_no_kernels() -> str | None:
    """None, or the reason for which this installation has no CUDA kernels."""
    if load_error:
        return why_no_ops()
    if not KERNELS.exists():
        return f"built without CUDA kernels: {build_info.get('cuda_skipped') or '_kernels.so is missing'}"
    return None


def runs_on(capability: tuple[int, int]) -> bool:
    """Whether the portable kernels were built for a GPU of this compute capability, as machine code or as PTX.

    Machine code runs on its own major version from its minor on; PTX, which is there of each, on anything later. A build for 9.0a
    alone has not all of the portable ones.
    """
    # sm_80; compute_80 where PTX alone was built
    built = [a.partition("_")[2] for a in build_info.get("arches", ())]
    if built == ["90a"]:
        return capability == (9, 0)
    built = [a.rstrip("af") for a in built]
    return any((int(a[:-1]), int(a[-1])) <= capability for a in built)
