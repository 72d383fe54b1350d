"""Operators of torch libraries whose CUDA kernels are linked against the stand-in for cudart: on an interpreted GPU they are
launched, on tensors of its memory, and their arguments are what their kernels may touch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Operator:
    """One of them.

    Attributes:
        name: what findings call it.
        parameters: the names of its arguments, in order.
        kernel: the overload of its CUDA kernel, which takes CPU tensors too and is then interpreted.
        written: those of the parameters that it writes.
        report_storage: is called with the address of a C function, void(const void*, int64_t, const char*, int), to which the
            library reports what it allocates (outputs, workspace), and with 0 when it need no longer.
    """

    name: str
    parameters: tuple[str, ...]
    kernel: Callable[..., Any]
    written: frozenset[str] = field(default_factory=frozenset)
    report_storage: Callable[[int], None] = lambda address: None


#: by their kernels
known: dict[Callable[..., Any], Operator] = {}
#: told of each that is added: torch's cuda device, once it is an interpreted one
_listeners: list[Callable[[Operator], None]] = []


def add(operators: Iterable[Operator]) -> None:
    """From now on these are operators whose kernels an interpreted GPU launches."""
    for operator in operators:
        if operator.kernel in known:
            continue
        if not isinstance(operator.kernel, torch._ops.OpOverload):
            raise TypeError(f"{operator.name}'s kernel is an overload of torch.ops, not {operator.kernel!r}")
        known[operator.kernel] = operator
        for listener in _listeners:
            listener(operator)


def when_added(listener: Callable[[Operator], None]) -> None:
    """Calls it with each that there is and each that will be."""
    _listeners.append(listener)
    for operator in list(known.values()):
        listener(operator)
