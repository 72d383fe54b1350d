"""Swapping a model's layers in place, and undoing it."""

from .config import Config
from .originals import restore
from .plan import Plan
from .precision import Precision, register_precision
from .report import Report, report
from .swapping import swap

__all__ = [
    "Config", "Plan", "Precision", "Report", "register_precision", "report", "restore", "swap",
]  # fmt: skip
