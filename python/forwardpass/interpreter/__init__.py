"""Runs CUDA and Triton kernels on the CPU, and checks them: csrc/interpreter/README.md.

Nothing in the rest of the package imports this, but for `fp.interpret` on first use; the seam is backend.Interpreter.
"""

from .device import Device, interpret
from .finding import InterpreterFinding
from .module import Kernel, Module
from .tensor_map import TensorMap, tensor_map

__all__ = ["Device", "InterpreterFinding", "Kernel", "Module", "TensorMap", "interpret", "tensor_map"]
