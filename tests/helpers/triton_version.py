"""The Triton that is installed."""

import importlib.metadata
import os


def triton_version():
    """Its "major.minor", "" where there is none."""
    try:
        return ".".join(importlib.metadata.version("triton").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return ""


def what_is_against_the_isa_is_an_error():
    """What is against its letter alone: gpuless reads the variables as it is loaded. But Triton 3.6 has no fence.proxy.async
    between a copy and the wgmma that reads it, which no kernel can add."""
    os.environ.setdefault(*("GPULESS_ISA_FINDINGS", "ignore") if triton_version() == "3.6" else ("GPULESS_STRICT", "1"))
