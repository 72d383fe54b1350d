"""Who looks on while the CPU does what torch asks of the interpreted GPU's tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

#: called with each operation on the device's tensors, its arguments and its result, in whatever thread it runs: a dispatch mode
#: sees one thread alone
watchers: list[Callable[[torch._ops.OpOverload, Sequence[Any], Any], None]] = []


def watched(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that carries out operations, so that the watchers see them."""

    @functools.wraps(function)
    def run(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
        result = function(op, *args, **kwargs)
        for watcher in watchers:
            watcher(op, args, result)
        return result

    return run
