"""The code of a class as an abstract syntax tree, for what is read from it."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from types import ModuleType
from typing import Any

from ..common.syntax import tree_of


def owner_of_forward(cls: Any) -> Any:
    """The class, of those that it derives from or itself, whose forward it has."""
    return next(c for c in cls.__mro__ if "forward" in vars(c))  # nn.Module has one


def tree_of_module(cls: Any) -> ast.Module | None:
    """The Python module of a class; None where its code is not at hand."""
    module = sys.modules.get(cls.__module__)
    return None if module is None else _parsed(module)


@functools.lru_cache(maxsize=1)  # questions about a model's classes are of one module, one after another
def _parsed(module: ModuleType) -> ast.Module | None:
    try:
        return tree_of(inspect.getsource(module))
    except (OSError, TypeError):
        return None


def named(tree: ast.AST | None, name: str) -> ast.AST | None:
    """The function or class of a name in the body of another."""
    return next((x for x in getattr(tree, "body", ()) if getattr(x, "name", None) == name), None)


def body_of(function: ast.AST | None) -> str:
    """Without its docstring, as ast.dump has it; empty where it is no function."""
    if not isinstance(function, ast.FunctionDef):
        return ""
    first = 1 if ast.get_docstring(function, clean=False) is not None else 0
    return ast.dump(ast.Module(body=function.body[first:], type_ignores=[]))


def dump(code: str) -> str:
    """What `body_of` gives for a function of these lines."""
    return ast.dump(tree_of(textwrap.dedent(code)))
