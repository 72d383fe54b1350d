"""Python source as syntax trees, by one thread at a time; the names in what was compiled."""

from __future__ import annotations

import ast
import inspect
import linecache
import sys
import threading
from collections.abc import Iterator
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
    """As inspect.getsource, and raises OSError and TypeError as it does. Before Python 3.13 that parses a module anew for each of
    its classes, which takes 10 to 150 ms; here it is parsed once."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    lines = linecache.getlines(file) if isinstance(file, str) else []
    with _PARSING:
        where = _classes("".join(lines)).get(cls.__qualname__)
        return inspect.getsource(cls) if where is None else "".join(lines[where[0] - 1 : where[1]])


@lru_cache(maxsize=64)
def _classes(source: str) -> dict[str, tuple[int, int] | None]:
    """The first and the last line of each class of a module, by its qualified name; None where it has two of that name."""
    classes: dict[str, tuple[int, int] | None] = {}
    try:
        todo: list[tuple[str, ast.AST]] = [("", ast.parse(source))]
    except SyntaxError:
        return {}
    while todo:
        prefix, parent = todo.pop()
        for node in _statements(parent):
            if isinstance(node, ast.ClassDef):
                name = prefix + node.name
                first = min([node.lineno, *(x.lineno for x in node.decorator_list)])
                classes[name] = None if name in classes else (first, node.end_lineno or first)
                todo.append((f"{name}.", node))
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                todo.append((f"{prefix}{node.name}.<locals>.", node))
            else:
                todo.append((prefix, node))
    return classes


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Those directly below another."""
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        children = getattr(node, field, ())
        yield from children if isinstance(children, list) else ()


@lru_cache(maxsize=4096)
def mentioned(code: CodeType) -> frozenset[str]:
    """Names of attributes and globals in a function, and in those within it."""
    return frozenset(code.co_names).union(*(mentioned(c) for c in code.co_consts if isinstance(c, CodeType)))
