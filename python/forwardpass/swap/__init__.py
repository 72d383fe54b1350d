"""Swapping a model's layers in place, undoing it, and storing the result."""

from .checkpoint import load_pretrained, save_pretrained
from .config import Config
from .export import export_pretrained
from .originals import restore
from .plan import Plan
from .precision import Precision, register_precision
from .report import Report, report
from .swapping import swap

__all__ = [
    "Config", "Plan", "Precision", "Report", "export_pretrained", "load_pretrained", "register_precision", "report", "restore",
    "save_pretrained", "swap",
]  # fmt: skip
