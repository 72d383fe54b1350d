"""Runs CUDA and Triton kernels on the CPU, and checks them: csrc/interpreter/README.md.

Nothing in the rest of the package imports this, but for `fp.interpret` on first use; the seam is backend.Interpreter.
"""

from .device import Device, interpret
from .finding import InterpreterFinding
from .model import Modelled
from .module import Kernel, Module
from .profile import Counts, KernelProfile, LineProfile
from .tensor_map import TensorMap, tensor_map

__all__ = [
    "Counts", "Device", "InterpreterFinding", "Kernel", "KernelProfile", "LineProfile", "Modelled", "Module", "TensorMap",
    "interpret", "tensor_map",
]  # fmt: skip
