"""Swapping a model's layers in place, undoing it, and storing the result."""

from .checkpoint import load_pretrained, save_pretrained
from .originals import restore
from .plan import Plan
from .report import Report
from .swapping import swap

__all__ = ["Plan", "Report", "load_pretrained", "restore", "save_pretrained", "swap"]
