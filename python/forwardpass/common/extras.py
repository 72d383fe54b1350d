"""What the extras of pyproject.toml ask for. Errors name these packages, as no package index has forwardpass itself: `pip install
forwardpass[hf]` finds nothing."""

from __future__ import annotations

import shlex

PACKAGES = {
    "triton": ("triton>=3.6",),
    "hf": ("transformers>=4.50", "safetensors>=0.4"),
    "cli": ("typer>=0.12", "rich>=13", "matplotlib>=3.8"),
    "generate": ("gguf>=0.10", "accelerate>=1.0"),
}


def pip_install(extra: str) -> str:
    """The command that installs what an extra has beside other extras."""
    return shlex.join(["pip", "install", *PACKAGES[extra]])
