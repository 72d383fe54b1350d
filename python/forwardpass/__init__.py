"""forwardpass: fused inference kernels in drop-in modules, held to numerical parity with plain torch."""

import gc as _gc
from typing import Any as _Any

# The modules of this package are enough new objects for a collection of garbage, which goes through torch's too: a third of the
# time of this import, 0.33 s and 0.21 s without.
_collects = _gc.isenabled()
_gc.disable()
try:
    from . import nn, ops, types
    from .checkpoints import export_pretrained, load_pretrained, save_pretrained
    from .checkpoints.auto_model import register_when_imported as _register_when_imported
    from .common.models.decoding import Decoding
    from .dispatch import Unsupported, explain, use_backend
    from .dispatch.calls import call_counts
    from .dispatch.interpreted import follow as _follow_interpreter
    from .dispatch.interpreted import interpret
    from .integrations.accelerate import register_when_imported as _keep_tensors_when_imported
    from .integrations.flash_attention import register_flash_attention_impl
    from .integrations.peft import register_when_imported as _check_adapters_when_imported
    from .integrations.sdpa import sdpa
    from .integrations.timesteps import timestep
    from .integrations.torch_fx import register_when_imported as _be_leaves_when_imported
    from .nn.linear.quantized_linear import register_linear
    from .planning.parity import parity
    from .planning.planner import plan
    from .profiling.profile import profile
    from .serving.pipeline import Pipeline
    from .serving.size_batch import size_batch
    from .swap import (
        Config,
        Plan,
        Precision,
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
    "Config", "Decoding", "KVCache", "Pipeline", "Plan", "Precision", "Unsupported", "call_counts", "explain",
    "export_pretrained", "interpret", "load_pretrained", "nn", "ops", "parity", "plan", "profile",
    "register_flash_attention_impl", "register_linear", "register_precision", "report", "restore", "save_pretrained", "sdpa",
    "size_batch", "swap", "timestep", "types", "use_backend",
]  # fmt: skip


def __dir__() -> list[str]:
    """The public names, without the packages that they come from."""
    return [*__all__, "__version__"]


_TYPES = frozenset(types.__all__)


def __getattr__(name: str) -> _Any:
    """What is made of transformers' classes is imported by whoever asks for it."""
    if name in _TYPES:
        raise AttributeError(f"fp.{name} is fp.types.{name}")
    if name == "KVCache":
        from .integrations.transformers.cache import KVCache

        return KVCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_register_when_imported()
_check_adapters_when_imported()
_be_leaves_when_imported()
_keep_tensors_when_imported()
_follow_interpreter()
