"""Why something is not done, and the error that carries it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """Why something is not done: a stable code to test for, a sentence, and what to do about it."""

    code: str
    text: str
    fix: str

    def __str__(self) -> str:
        return f"{self.text}; {self.fix}" if self.fix else self.text


class Unsupported(RuntimeError):
    """No implementation that was allowed can run these arguments. `reasons` maps each backend to its Reason."""

    def __init__(self, message: str, reasons: dict[str, Reason]):
        super().__init__(message)
        self.reasons = reasons
