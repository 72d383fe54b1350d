"""The types of results, of reasons and of errors, which nobody makes by hand: for annotations, `isinstance` and `except`."""

from typing import Any as _Any

from .dispatch import Reason
from .dispatch.interpreted import load as _load_interpreter
from .planning.parity import ParityReport
from .profiling.profile import Profile
from .serving.pipeline import ItemError
from .serving.size_batch import BatchSizing
from .swap.report import Report

__all__ = [
    "BatchSizing", "InterpreterFinding", "InterpreterWarning", "ItemError", "ParityReport", "Profile", "Reason", "Report",  # noqa: F822
]  # fmt: skip


def __dir__() -> list[str]:
    return [*__all__]


def __getattr__(name: str) -> _Any:
    """Those of gpuless, which is imported by whoever asks for them."""
    if name not in ("InterpreterFinding", "InterpreterWarning"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        gpuless = _load_interpreter()
    except ImportError as e:
        raise AttributeError(str(e)) from None
    return gpuless.Finding if name == "InterpreterFinding" else gpuless.FindingWarning
