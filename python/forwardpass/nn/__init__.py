"""`fp.nn`: drop-in modules."""

from typing import Any as _Any

from .deferred import DeferringNorm
from .float_conv2d import FloatConv2d
from .int8_conv2d import Int8Conv2d
from .linear.bf16_linear import Bf16Linear
from .linear.fp8_linear import Fp8Linear
from .linear.int8_linear import Int8Linear
from .linear.quantized_linear import QuantizedLinear, QuantizedModule
from .linear.w8a16_linear import W8A16Linear
from .mlp import MLP, GatedMLP
from .multihead_attention import MultiheadAttention
from .norm import QuantizingNorm
from .quantized_experts import Experts

__all__ = [
    "MLP",
    "Bf16Linear",
    "ColwiseParallel",
    "DeferringNorm",
    "Experts",
    "FloatConv2d",
    "Fp8Linear",
    "GatedMLP",
    "Int8Conv2d",
    "Int8Linear",
    "MultiheadAttention",
    "QuantizedLinear",
    "QuantizedModule",
    "QuantizingNorm",
    "RowwiseParallel",
    "W8A16Linear",
]


def __getattr__(name: str) -> _Any:
    """Styles derive from torch's, whose import takes half a second."""
    if name in ("ColwiseParallel", "RowwiseParallel"):
        from .linear import parallel

        return getattr(parallel, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
