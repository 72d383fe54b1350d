"""The Triton that is installed."""

import importlib.metadata


def triton_version():
    """Its "major.minor", "" where there is none."""
    try:
        return ".".join(importlib.metadata.version("triton").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return ""
