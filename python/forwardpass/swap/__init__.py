"""Swapping a model's layers in place, undoing it, and storing the result."""

from .originals import restore
from .plan import Plan
from .report import Report
from .swapping import swap

__all__ = ["Plan", "Report", "restore", "swap"]
