"""forwardpass: fused inference kernels in drop-in modules, held to numerical parity with plain torch."""

from . import nn, ops
from .backend import Reason, Unsupported, explain, use_backend

__version__ = "0.1.0"
__all__ = ["Reason", "Unsupported", "explain", "nn", "ops", "use_backend"]
