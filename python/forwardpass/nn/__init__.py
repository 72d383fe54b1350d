"""`fp.nn`: drop-in modules."""

from .bf16_linear import Bf16Linear
from .fp8_linear import Fp8Linear
from .int8_linear import Int8Linear
from .layer import QuantizedLinear
from .multihead_attention import MultiheadAttention
from .w8a16_linear import W8A16Linear

__all__ = ["Bf16Linear", "Fp8Linear", "Int8Linear", "MultiheadAttention", "QuantizedLinear", "W8A16Linear"]
