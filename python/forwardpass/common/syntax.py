"""Python source as syntax trees, by one thread at a time; the names in what was compiled."""

from __future__ import annotations

import ast
import inspect
import threading
from functools import lru_cache
from types import CodeType
from typing import Any

#: Python 3.11 counts the depth of a tree for all threads together, and two that parse at the same time end in a SystemError
#: (python/cpython#106905).
_PARSING = threading.RLock()


def tree_of(source: str) -> ast.Module:
    """As ast.parse, and raises what it raises."""
    with _PARSING:
        return ast.parse(source)


def source_of_class(cls: Any) -> str:
    """As inspect.getsource, which parses the module of a class to find it; raises OSError and TypeError as it does."""
    with _PARSING:
        return inspect.getsource(cls)


@lru_cache(maxsize=4096)
def mentioned(code: CodeType) -> frozenset[str]:
    """Names of attributes and globals in a function, and in those within it."""
    return frozenset(code.co_names).union(*(mentioned(c) for c in code.co_consts if isinstance(c, CodeType)))
