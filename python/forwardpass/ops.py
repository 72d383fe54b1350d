"""`fp.ops.<name>`: every operation. Each lives in the package of its own name."""

from .quantize import quantize

__all__ = ["quantize"]
