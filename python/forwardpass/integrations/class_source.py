"""The code of a class as an abstract syntax tree, for what is read from it."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from types import CodeType, FunctionType, ModuleType
from typing import Any

from ..common.syntax import tree_of
from . import patches

#: Whose decorators are part of what their own classes are.
_DECORATING = ("transformers", "torch")


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


def is_as_written(owner: Any, name: str) -> bool:
    """Whether the function of a module or class is the one in its file. Libraries (Liger, Unsloth) and users put others in the
    place of transformers' own, of which nothing is known by what the file has."""
    function = patches.below(owner, name)
    return _is_as_written(owner, name, function, getattr(function, "__code__", None))


@functools.lru_cache(maxsize=4096)
def _is_as_written(owner: Any, name: str, function: Any, code: Any) -> bool:
    """code: the function's, in whose place somebody may put another one."""
    module = owner if isinstance(owner, ModuleType) else sys.modules.get(owner.__module__)
    while hasattr(function, "__wrapped__") and _package(function) in _DECORATING:
        function = function.__wrapped__
    if module is None or not isinstance(function, FunctionType):
        return False
    tree = _parsed(module)
    within = tree if owner is module else named(tree, owner.__name__)
    return _is_in(function.__code__, getattr(module, "__file__", None), named(within, name))


def _package(function: Any) -> str:
    return str(getattr(function, "__globals__", {}).get("__name__", "")).partition(".")[0]


def _is_in(code: CodeType, file: str | None, node: Any) -> bool:
    """Whether it is compiled from that definition."""
    return (
        code.co_filename == file
        and node is not None
        and node.lineno <= code.co_firstlineno + len(node.decorator_list)
        and (code.co_firstlineno <= node.end_lineno and code.co_name == node.name)
    )


@functools.lru_cache(maxsize=4096)
def _are_as_written(cls: Any, functions: tuple[Any, ...]) -> bool:
    return all(
        is_as_written(cls, name) for name, x in vars(cls).items() if isinstance(x, FunctionType) and name != "__init__"
    )


def class_is_as_written(cls: Any) -> bool:
    """Whether the functions of a class of transformers, and of those of its models that it derives from, are those in their files.
    It costs little to ask again: classes are looked through when their functions have changed."""
    return all(
        _are_as_written(base, tuple(x for x in vars(base).values() if isinstance(x, FunctionType)))
        for base in cls.__mro__
        if base.__module__.startswith("transformers.models.")
    )


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
