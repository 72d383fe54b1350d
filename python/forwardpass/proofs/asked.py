"""Which code reads the values of what `parameters()` gives, where a quantised layer has an empty one; and which asks for the class
of a layer, where that of a quantised one is another, and the code would go another way."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import lru_cache
from types import FunctionType, UnionType
from typing import Any, NamedTuple

from torch import nn

from ..common.syntax import mentioned
from .code import definition, generic, self_of

_WALKS = frozenset({"parameters", "named_parameters"})
#: What is asked of a parameter, or done to it, that does not take its values.
_ASKED = (
    "dtype",
    "device",
    "is_cuda",
    "requires_grad",
    "ndim",
    "is_meta",
    "is_floating_point",
    "requires_grad_",
    "grad",
    "numel",
)

#: Of layers that are replaced.
_CLASSES = frozenset({"Linear", "Conv1D"})
_QUESTIONS = frozenset({"isinstance", "issubclass", "type", "__class__"})
#: What is asked of a class instead of itself.
_NAMES = ("__name__", "__qualname__")


class Read(NamedTuple):
    """A read of the values of parameters."""

    path: tuple[str, ...]  #: names from the module on, to the one whose parameters they are
    words: tuple[str, ...]  #: of which one is in their names; none: of all

    def includes(self, names: tuple[str, ...]) -> bool:
        """Whether those of a layer, of these names from the module on, are among them."""
        if names[: len(self.path)] != self.path:
            return False
        tensors = [".".join((*names, x)) for x in ("weight", "bias")]
        return not self.words or any(word in name for word in self.words for name in tensors)


def values_read(cls: type[nn.Module]) -> tuple[Read, ...]:
    """What the forward of a class reads, or a method that it calls."""
    function = cls.forward
    return () if generic(cls.__module__) or not isinstance(function, FunctionType) else _values_read(cls, function)  # type: ignore[arg-type]


@lru_cache(maxsize=1024)
def _values_read(cls: Any, forward: FunctionType) -> tuple[Read, ...]:
    reads: list[Read] = []
    for function in called_by(cls, forward):
        walks = not _WALKS.isdisjoint(mentioned(function.__code__))
        if walks and (node := definition(function.__code__)) is not None:
            reads += _reads(node)
    return tuple(reads)


def called_by(cls: Any, forward: FunctionType) -> Iterator[FunctionType]:
    """The forward of a class, the methods that it names, and those that they name; with super(), those that the class derives
    from."""
    todo, visited = [forward], set()
    while todo:
        function = todo.pop()
        if function in visited:
            continue
        visited.add(function)
        yield function
        names = mentioned(function.__code__)
        if "super" in names:
            inherited = (vars(base).get(function.__name__) for base in cls.__mro__ if not generic(base.__module__))
            todo += (f for f in inherited if isinstance(f, FunctionType))
        for name in names:
            method = getattr(cls, name, None)
            if isinstance(method, FunctionType) and not hasattr(nn.Module, name):
                todo.append(method)


def _reads(method: Any) -> list[Read]:
    parents = {id(child): node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
    self_name = self_of(method)
    walks = (x for x in ast.walk(method) if isinstance(x, ast.Call) and getattr(x.func, "attr", None) in _WALKS)
    return [
        Read(path_of(x.func.value, self_name), _words(parents[id(x)]))  # type: ignore[attr-defined]
        for x in walks
        if not _only_asks(x, parents, method)
    ]


def _words(loop: ast.AST) -> tuple[str, ...]:
    """The constants in the condition on a parameter's name under which all of a loop is."""
    match loop:
        case ast.For(target=ast.Tuple(elts=[ast.Name(id=name), _]), body=[ast.If(test=test, orelse=[])]):
            tests: list[ast.expr] = [test]
        case ast.comprehension(target=ast.Tuple(elts=[ast.Name(id=name), _]), ifs=tests):
            pass
        case _:
            return ()
    nodes = [x for test in tests for x in ast.walk(test)]
    if not any(isinstance(x, ast.Name) and x.id == name for x in nodes) or any(isinstance(x, ast.Not) for x in nodes):
        return ()
    return tuple(x.value for x in nodes if isinstance(x, ast.Constant) and isinstance(x.value, str))


def path_of(node: ast.expr, self_name: str | None) -> tuple[str, ...]:
    """("layer", "0") of self.layer[0]; what is not of names alone is all that the module has."""
    names: list[str] = []
    while True:
        match node:
            case ast.Attribute(value=value, attr=name):
                names.insert(0, name)
            case ast.Subscript(value=value, slice=ast.Constant(value=key)):
                names.insert(0, str(key))
            case ast.Name(id=name):
                return tuple(names) if name == self_name else ()
            case _:
                return ()
        node = value


def _only_asks(node: ast.AST, parents: dict[int, ast.AST], method: ast.AST) -> bool:
    """Whether of what an expression gives, or what is iterated over, nothing but that is asked."""
    parent = parents[id(node)]
    match parent:
        case ast.Call(func=ast.Name(id="next" | "iter" | "list" | "tuple")):
            return _only_asks(parent, parents, method)
        case ast.Attribute(attr=name):
            return name in _ASKED
        case ast.Subscript(value=value) if value is node:
            return _only_asks(parent, parents, method)
        case ast.Assign(targets=[ast.Name(id=name)]):
            return _all_ask(name, parents, method)
        case ast.For(target=target) | ast.comprehension(target=target) if not isinstance(target, ast.Attribute):
            names = [x.id for x in ast.walk(target) if isinstance(x, ast.Name)]
            return bool(names) and _all_ask(names[-1], parents, method)
    return False


def _all_ask(name: str, parents: dict[int, ast.AST], method: ast.AST) -> bool:
    uses = (x for x in ast.walk(method) if isinstance(x, ast.Name) and x.id == name and isinstance(x.ctx, ast.Load))
    return all(isinstance(p := parents[id(x)], ast.Attribute) and p.attr in _ASKED for x in uses)


# ---- classes


def classes_asked(cls: type[nn.Module]) -> tuple[tuple[str, ...], ...]:
    """Names from a module of a class on, to what its forward, or a method that it calls, asks whether it is a Linear; () where that
    may be anything below the module."""
    function = cls.forward
    return () if generic(cls.__module__) or not isinstance(function, FunctionType) else _asked(cls, function)  # type: ignore[arg-type]


@lru_cache(maxsize=1024)
def _asked(cls: Any, forward: FunctionType) -> tuple[tuple[str, ...], ...]:
    paths: list[tuple[str, ...]] = []
    for function in called_by(cls, forward):
        if _QUESTIONS.isdisjoint(mentioned(function.__code__)) or not (words := _layer_words(function)):
            continue
        if (node := definition(function.__code__)) is not None:
            self_name = self_of(node)
            paths += (_resolved(subject, node, self_name) for subject in _subjects(node, words))
    return tuple(paths)


def _layer_words(function: FunctionType) -> set[str]:
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
