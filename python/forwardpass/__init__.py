"""forwardpass: fused inference kernels in drop-in modules, held to numerical parity with plain torch."""

import os as _os
from typing import Any as _Any

from . import nn, ops
from .backend import Reason, Unsupported, explain, use_backend
from .declined import declined
from .flash_attention_impl import register_flash_attention_impl
from .planning.parity import ParityReport, parity
from .planning.pipeline import ItemError, Pipeline
from .planning.plan import plan
from .planning.profile import Profile, profile
from .planning.size_batch import BatchSizing, size_batch
from .sdpa import sdpa
from .swap import Plan, Report, load_pretrained, restore, save_pretrained, swap

__version__ = "0.1.0"
__all__ = [
    "BatchSizing", "InterpreterFinding", "ItemError", "ParityReport", "Pipeline", "Plan", "Profile", "Reason", "Report",
    "Unsupported", "declined", "explain", "interpret", "load_pretrained", "nn", "ops", "parity", "plan", "profile",
    "register_flash_attention_impl", "restore", "save_pretrained", "sdpa", "size_batch", "swap", "use_backend",
]  # fmt: skip


def __getattr__(name: str) -> _Any:
    """The interpreter is imported by whoever asks for it."""
    if name in ("InterpreterFinding", "interpret"):
        from . import interpreter

        return getattr(interpreter, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if _os.environ.get("FORWARDPASS_INTERPRET"):
    from .interpreter.device import interpret_process as _interpret_process

    _interpret_process()
