"""`fp.ops.<name>`: every operation. Each lives in the package of its own name, or of its family's."""

from .norm_quantize import add_norm_quantize, norm_quantize
from .quantize import quantize

__all__ = ["add_norm_quantize", "norm_quantize", "quantize"]
