"""forwardpass: fused inference kernels in drop-in modules, held to numerical parity with plain torch."""

from . import nn, ops
from .backend import Reason, Unsupported, explain, use_backend
from .swap import Plan, Report, restore, swap

__version__ = "0.1.0"
__all__ = ["Plan", "Reason", "Report", "Unsupported", "explain", "nn", "ops", "restore", "swap", "use_backend"]
