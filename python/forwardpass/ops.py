"""`fp.ops.<name>`: every operation. Each lives in the package of its own name."""

from .activation_quantize import activation_quantize
from .activations import interleave_gate_up, separate_gate_up
from .dequant_activation import dequant_activation
from .int8_gemm import int8_gemm
from .int8_linear import int8_linear
from .quantize import quantize
from .w8a16_gemm import w8a16_gemm

__all__ = [
    "activation_quantize",
    "dequant_activation",
    "int8_gemm",
    "int8_linear",
    "interleave_gate_up",
    "quantize",
    "separate_gate_up",
    "w8a16_gemm",
]
