"""Runs CUDA and Triton kernels on the CPU, and checks them: csrc/interpreter/README.md.

The rest of the package imports it on first use alone, for `fp.interpret`, `forwardpass doctor` and what is known of the rates of
GPUs; operations reach it through the seam dispatch.Interpreter.
"""

from .device import Device, interpret
from .finding import InterpreterFinding, InterpreterTimeout, InterpreterWarning
from .model import Modelled
from .module import Kernel, Module
from .profile import Counts, KernelProfile, LineProfile
from .rules import Rule
from .tensor_map import TensorMap, tensor_map
from .timeline import KernelTimeline, LineTime, Timeline

__all__ = [
    "Counts", "Device", "InterpreterFinding", "InterpreterTimeout", "InterpreterWarning", "Kernel", "KernelProfile",
    "KernelTimeline", "LineProfile", "LineTime", "Modelled", "Module", "Rule", "TensorMap", "Timeline", "interpret",
    "tensor_map",
]  # fmt: skip
