"""Calls that forwardpass was offered and left to what ran before: counted with their reasons, and logged.

A compiled graph is counted when it is traced, once, whatever is in it: within it nothing but the model runs.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import Reason

_log = logging.getLogger("forwardpass.dispatch")


class Calls:
    """How many calls ran forwardpass's kernel, and how many fell back to what ran before, for which reason; `print` shows both.

    kernel_calls: of each kind of call, how many. fallbacks: of each kind and Reason, how many.
    """

    def __init__(self) -> None:
        self.kernel_calls: Counter[str] = Counter()
        self.fallbacks: Counter[tuple[str, Reason]] = Counter()

    def __str__(self) -> str:
        lines = [f"{n} x {call}: forwardpass" for call, n in self.kernel_calls.items()]
        lines += [f"{n} x {call}: left alone, {reason} [{reason.code}]" for (call, reason), n in self.fallbacks.items()]
        return "\n".join(lines) or "no call yet"


class _Open(threading.local):
    def __init__(self) -> None:
        self.calls: list[Calls] = []


_everywhere = Calls()
_lock = threading.Lock()
_open = _Open()


def call_counts() -> Calls:
    """The calls of swapped attention and of `fp.sdpa()` in every thread, since the process began."""
    return _everywhere


@contextmanager
def counted(calls: Calls) -> Iterator[Calls]:
    """Within the block and this thread, calls are counted in `calls` too."""
    _open.calls.append(calls)
    try:
        yield calls
    finally:
        _open.calls.remove(calls)


def counting() -> tuple[Calls, ...]:
    """Those of this thread that are open, for `counted` in another."""
    return tuple(_open.calls)


def take(call: str) -> None:
    if torch.compiler.is_compiling():
        _trace(call, "", "", "")
    else:
        _count(call, None)


def decline(call: str, reason: Reason) -> None:
    if torch.compiler.is_compiling():
        _trace(call, reason.code, reason.text, reason.fix)
    else:
        _count(call, reason)


def _trace(call: str, code: str, text: str, fix: str) -> bool:
    """Runs while a graph is traced, and leaves nothing in it."""
    _count(call, Reason(code, text, fix) if code else None)
    return True


# What torch.compiler.assume_constant_result does, which would import torch._dynamo, a second's work, here and now.
_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _count(call: str, reason: Reason | None) -> None:
    with _lock:
        new = reason is not None and (call, reason) not in _everywhere.fallbacks
        for calls in (_everywhere, *_open.calls):
            if reason is None:
                calls.kernel_calls[call] += 1
            else:
                calls.fallbacks[call, reason] += 1
    if new and _log.isEnabledFor(logging.INFO):
        _log.info("%s -> left alone: %s", call, reason)
