"""forwardpass: fused inference kernels in drop-in modules, held to numerical parity with plain torch."""

import gc as _gc
from typing import Any as _Any

# The modules of this package are enough new objects for a collection of garbage, which goes through torch's too: a third of the
# time of this import, 0.33 s and 0.21 s without.
_collects = _gc.isenabled()
_gc.disable()
try:
    from . import nn, ops
    from .checkpoints import export_pretrained, load_pretrained, save_pretrained
    from .checkpoints.auto_model import register_when_imported as _register_when_imported
    from .common.decoding import Decoding
    from .dispatch import Reason, Unsupported, explain, use_backend
    from .dispatch.calls import call_counts
    from .dispatch.interpreted import follow as _follow_interpreter
    from .dispatch.interpreted import interpret
    from .dispatch.interpreted import load as _load_interpreter
    from .integrations.flash_attention import register_flash_attention_impl
    from .integrations.peft import register_when_imported as _check_adapters_when_imported
    from .integrations.sdpa import sdpa
    from .nn.layer import register_linear
    from .planning.parity import ParityReport, parity
    from .planning.planner import plan
    from .profiling.profile import Profile, profile
    from .serving.pipeline import ItemError, Pipeline
    from .serving.size_batch import BatchSizing, size_batch
    from .swap import (
        Config,
        Plan,
        Precision,
        Report,
        register_precision,
        report,
        restore,
        swap,
    )
    from .version import __version__ as __version__
finally:
    if _collects:
        _gc.enable()

__all__ = [
    "BatchSizing", "Config", "Decoding", "InterpreterFinding", "InterpreterWarning", "ItemError", "KVCache", "ParityReport",
    "Pipeline", "Plan", "Precision", "Profile",
    "Reason", "Report", "Unsupported", "call_counts", "explain", "export_pretrained", "interpret", "load_pretrained", "nn", "ops",
    "parity", "plan", "profile", "register_flash_attention_impl", "register_linear", "register_precision",
    "report", "restore", "save_pretrained", "sdpa", "size_batch", "swap", "use_backend",
]  # fmt: skip


def __dir__() -> list[str]:
    """The public names, without the packages that they come from."""
    return [*__all__, "__version__"]


def __getattr__(name: str) -> _Any:
    """gpuless, and what is made of transformers' classes, are imported by whoever asks for them."""
    if name in ("InterpreterFinding", "InterpreterWarning"):
        try:
            gpuless = _load_interpreter()
        except ImportError as e:
            raise AttributeError(str(e)) from None
        return gpuless.Finding if name == "InterpreterFinding" else gpuless.FindingWarning
    if name == "KVCache":
        from .integrations.transformers.cache import KVCache

        return KVCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_register_when_imported()
_check_adapters_when_imported()
_follow_interpreter()
