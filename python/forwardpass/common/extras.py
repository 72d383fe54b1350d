"""The packages of the extras in pyproject.toml. Errors name these packages and not the extra, because no package index has
forwardpass itself."""

from __future__ import annotations

import shlex

PACKAGES = {
    "triton": ("triton>=3.6",),
    "hf": ("transformers>=5.24", "safetensors>=0.4"),
    "cli": ("typer>=0.12", "rich>=13", "matplotlib>=3.8"),
    "images": ("scikit-image>=0.22",),
    "generate": ("gguf>=0.10", "accelerate>=1.0"),
}


def pip_install(extra: str) -> str:
    """The command that installs an extra's own packages, without those of extras that it includes."""
    return shlex.join(["pip", "install", *PACKAGES[extra]])
