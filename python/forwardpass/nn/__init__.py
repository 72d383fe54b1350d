"""`fp.nn`: drop-in modules."""

from .int8_linear import Int8Linear
from .layer import QuantizedLinear
from .w8a16_linear import W8A16Linear

__all__ = ["Int8Linear", "QuantizedLinear", "W8A16Linear"]
