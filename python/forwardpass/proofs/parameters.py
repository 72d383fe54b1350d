"""Which code reads the values of what `parameters()` gives: those of a quantised layer are not there, and an empty parameter is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import lru_cache
from types import FunctionType
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
