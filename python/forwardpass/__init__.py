"""forwardpass: fused inference kernels in drop-in modules, held to numerical parity with plain torch."""

from . import nn, ops
from .backend import Reason, Unsupported, explain, use_backend
from .planning.parity import ParityReport, parity
from .swap import Plan, Report, load_pretrained, restore, save_pretrained, swap

__version__ = "0.1.0"
__all__ = [
    "ParityReport", "Plan", "Reason", "Report", "Unsupported", "explain", "load_pretrained", "nn", "ops", "parity", "restore",
    "save_pretrained", "swap", "use_backend",
]  # fmt: skip
