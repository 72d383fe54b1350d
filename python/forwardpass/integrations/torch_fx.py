"""torch.fx: modules of ours are leaves of a trace, as those of torch.nn are.

A trace that went on inside one would end at its first question about a shape. torchvision's `create_feature_extractor` is such a
trace, of an nn.Linear or a convolution as one node.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from ..common.imports import when_imported
from . import patches


def register_when_imported() -> None:
    """As soon as torch.fx's traces are imported, or now."""
    when_imported("torch.fx._symbolic_trace", _register)


def _register() -> None:
    from torch.fx import Tracer

    patches.put(Tracer, "is_leaf_module", _with_ours)


def _with_ours(is_leaf_module: Callable[[Any, nn.Module, str], bool]) -> Callable[[Any, nn.Module, str], bool]:
    package = __name__.split(".")[0] + "."

    @functools.wraps(is_leaf_module)
    def is_leaf_or_ours(self: Any, m: nn.Module, module_qualified_name: str) -> bool:
        ours = any(cls.__module__.startswith(package) for cls in type(m).__mro__)
        return ours or is_leaf_module(self, m, module_qualified_name)

    return is_leaf_or_ours
