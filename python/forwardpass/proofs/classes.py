"""Which code asks for the class of a layer: that of a quantised one is another, and the code would go another way."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import lru_cache
from types import FunctionType, UnionType
from typing import Any

from torch import nn

from ..common.syntax import mentioned
from .code import definition, generic, self_of
from .parameters import called_by, path_of

#: Of layers that are replaced.
_CLASSES = frozenset({"Linear", "Conv1D"})
_QUESTIONS = frozenset({"isinstance", "issubclass", "type", "__class__"})
#: What is asked of a class instead of itself.
_NAMES = ("__name__", "__qualname__")


def classes_asked(cls: type[nn.Module]) -> tuple[tuple[str, ...], ...]:
    """Names from a module of a class on, to what its forward, or a method that it calls, asks whether it is a Linear; () where that
    may be anything below the module."""
    function = cls.forward
    return () if generic(cls.__module__) or not isinstance(function, FunctionType) else _asked(cls, function)  # type: ignore[arg-type]


@lru_cache(maxsize=1024)
def _asked(cls: Any, forward: FunctionType) -> tuple[tuple[str, ...], ...]:
    paths: list[tuple[str, ...]] = []
    for function in called_by(cls, forward):
        if _QUESTIONS.isdisjoint(mentioned(function.__code__)) or not (words := _words(function)):
            continue
        if (node := definition(function.__code__)) is not None:
            self_name = self_of(node)
            paths += (_resolved(subject, node, self_name) for subject in _subjects(node, words))
    return tuple(paths)


def _words(function: FunctionType) -> set[str]:
    """Names and texts in a function that are those of layers' classes, or of globals that are one or several of them."""
    code = function.__code__
    texts = {x for constant in code.co_consts for x in (constant if isinstance(constant, tuple) else (constant,))}
    named = {name for name in mentioned(code) if _is_a_layers(function.__globals__.get(name))}
    return named | (_CLASSES & (mentioned(code) | texts))


def _is_a_layers(value: Any) -> bool:
    """Whether it is nn.Linear, or a tuple or a union with it."""
    classes = value if isinstance(value, tuple) else value.__args__ if isinstance(value, UnionType) else (value,)
    return any(x is nn.Linear for x in classes)


def _subjects(method: ast.AST, words: set[str]) -> Iterator[ast.expr]:
    """The x of `isinstance(x, nn.Linear)`, `type(x) is nn.Linear` and `x.__class__.__name__ == "Linear"`."""

    def names_a_layer(classes: ast.expr) -> bool:
        mentions = (getattr(x, field, None) for x in ast.walk(classes) for field in ("id", "attr", "value"))
        return any(word in words for word in mentions if isinstance(word, str))

    for node in ast.walk(method):
        match node:
            case ast.Call(func=ast.Name(id="isinstance"), args=[subject, classes]) if names_a_layer(classes):
                yield subject
            case ast.Call(func=ast.Name(id="issubclass"), args=[asked, classes]) if names_a_layer(classes):
                yield _instance_of(asked)
            case ast.Compare(left=asked, comparators=classes) if any(map(names_a_layer, classes)):
                yield _instance_of(asked)


def _instance_of(asked: ast.expr) -> ast.expr:
    """The x of `type(x)` and `x.__class__`, and of their names."""
    match asked:
        case ast.Attribute(value=inner, attr=attribute) if attribute in _NAMES:
            return _instance_of(inner)
        case ast.Call(func=ast.Name(id="type"), args=[subject]) | ast.Attribute(value=subject, attr="__class__"):
            return subject
    return asked


def _resolved(subject: ast.expr, method: ast.AST, self_name: str | None) -> tuple[str, ...]:
    """The names that lead to it; where it is the variable of a loop, to what the loop is over."""
    if isinstance(subject, ast.Name):
        for node in ast.walk(method):
            if isinstance(node, ast.For | ast.comprehension) and subject.id in (
                x.id for x in ast.walk(node.target) if isinstance(x, ast.Name)
            ):
                return path_of(_looped_over(node.iter), self_name)
    return path_of(subject, self_name)


def _looped_over(node: ast.expr) -> ast.expr:
    match node:
        case ast.Call(func=ast.Name(id="enumerate" | "reversed" | "list" | "tuple"), args=[inner, *_]):
            return _looped_over(inner)
        case ast.Call(func=ast.Attribute(value=inner, attr="children" | "modules" | "values")):
            return inner
    return node
