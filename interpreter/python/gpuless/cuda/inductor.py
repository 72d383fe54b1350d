"""torch.compile on the interpreted GPU: Inductor makes its Triton kernels as for any GPU, and they are launched like others.

Triton's driver and torch's answers about the GPU are all that it needs, but for what is set here. CUDA graphs it leaves out,
and says so (`_cuda_cudaCachingAllocator_is_enabled` in torch_cuda.py), where torch asks whether it can; else CUDAGraph refuses.
"""

from __future__ import annotations

import os
import pathlib
import sys
import tempfile
import warnings

import torch

from .tensors import empty_strided

ENVIRONMENT = {
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # others are processes, in which cuda is not this GPU
    "TORCHINDUCTOR_USE_EXPERIMENTAL_BENCHMARKER": "0",  # which reads the host's clock: triton.testing.do_bench instead
}


def install() -> None:
    if "torch._inductor.config" in sys.modules:
        warnings.warn(
            "torch._inductor is imported already and was told that there is no GPU: torch.compile for cuda will fail in "
            "this process, unless the interpreted GPU is asked for before that import",
            RuntimeWarning,
            stacklevel=3,
        )
    os.environ.update(ENVIRONMENT)
    # what autotuning finds here is kept there, and is no measurement of the real GPU
    cache = pathlib.Path(tempfile.gettempdir(), f"torchinductor_interpreted_{os.getuid()}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    torch._C._dynamo.guards._empty_strided_cuda = empty_strided  # type: ignore[attr-defined]
