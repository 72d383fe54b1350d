"""Which activation is applied to a Linear's output, and to nothing else: the swapped layer computes it in its epilogue.

It is read from the code of the module that holds both: `x = self.fc(x)` and then `x = self.act(x)`, or `self.act(self.fc(x))`,
the only mention of either. Two modules in a row of an `nn.Sequential` are such a pair too.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from .walker import Leaf

#: of transformers.activations, by class; what is not here has another formula or constants of its own
_TRANSFORMERS = {"GELUActivation": "gelu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh",
                 "NewGELUActivation": "gelu_tanh", "SiLUActivation": "silu"}  # fmt: skip
_SETUP = ("__init__", "_init_weights", "reset_parameters")


@dataclass(frozen=True)
class Activation:
    """A module that applies an activation, its formula by the name it has in `forwardpass.activations`."""

    fqn: str
    module: nn.Module
    formula: str


def formula_of(module: nn.Module) -> str | None:
    """The activation that a module is, where an epilogue has it."""
    cls = type(module)
    if cls is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    if cls in (nn.ReLU, nn.SiLU):
        return cls.__name__.lower()
    return _TRANSFORMERS.get(cls.__name__) if cls.__module__ == "transformers.activations" else None


def activation_behind(leaf: Leaf, shared: set[int]) -> Activation | None:
    """Of a Linear-like layer. shared: modules that stand in several places."""
    beside = {name: f for name, m in leaf.parent._modules.items() if m is not None and (f := _fusible(m, shared))}
    if not beside:  # in most modules: their code is not read, which takes milliseconds
        return None
    if type(leaf.parent) is nn.Sequential:
        behind = dict(itertools.pairwise(leaf.parent._modules)).get(leaf.name)
    else:
        behind = None if "forward" in vars(leaf.parent) else _behind(type(leaf.parent), leaf.name)  # type: ignore[arg-type]
    if behind not in beside:
        return None
    return Activation(leaf.fqn.removesuffix(leaf.name) + behind, leaf.parent.get_submodule(behind), beside[behind])


def _fusible(module: nn.Module, shared: set[int]) -> str | None:
    """Its formula, where it may be replaced."""
    watched = id(module) in shared or has_hooks(module) or "forward" in vars(module)
    return None if watched else formula_of(module)


def has_hooks(m: nn.Module) -> bool:
    """Around its forward or its backward."""
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


@lru_cache(maxsize=4096)
def _behind(cls: type[nn.Module], name: str) -> str | None:
    """The member that a class's forward calls on what `self.<name>` gives, and neither anywhere else."""
    functions = _methods(cls)  # type: ignore[arg-type]
    found = [behind for function in functions if function.name == "forward" for behind in _pairs(function, name)]
    mentions = [node.attr for function in functions for node in _members(function)]
    return found[0] if len(found) == 1 and mentions.count(name) == mentions.count(found[0]) == 1 else None


@lru_cache(maxsize=256)
def _methods(cls: type[nn.Module]) -> list[ast.FunctionDef]:
    """As written, but for those that set a module up; of what it derives from those that it does not override, or all where
    one calls another's through super().
    """
    methods = []
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # no source at hand: nothing is known
            return []
        methods += [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name not in _SETUP]
    if any(isinstance(node, ast.Name) and node.id == "super" for method in methods for node in ast.walk(method)):
        return methods
    return list({method.name: method for method in reversed(methods)}.values())


def _members(tree: ast.AST) -> Iterable[ast.Attribute]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            yield node


def _called(node: ast.AST | None) -> tuple[str, ast.expr] | None:
    """(name, argument) of `self.<name>(argument)`."""
    if (
        isinstance(node, ast.Call)
        and len(node.args) == 1
        and not node.keywords
        and isinstance(node.func, ast.Attribute)
    ):
        of = node.func.value
        if isinstance(of, ast.Name) and of.id == "self" and not isinstance(node.args[0], ast.Starred):
            return node.func.attr, node.args[0]
    return None


def _pairs(function: ast.FunctionDef, name: str) -> Iterator[str]:
    for node in ast.walk(function):
        outer = _called(node)
        if outer and (inner := _called(outer[1])) and inner[0] == name:
            yield outer[0]
        for block in (getattr(node, field, None) for field in ("body", "orelse", "finalbody")):
            if isinstance(block, list):
                for first, second in itertools.pairwise(block):
                    if behind := _in_a_row(first, second, name):
                        yield behind


def _in_a_row(first: ast.stmt, second: ast.stmt, name: str) -> str | None:
    """`v = self.<name>(…)` and then `v = self.<behind>(v)`, or `return self.<behind>(v)`: nothing else sees the first v."""
    if not (isinstance(first, ast.Assign) and len(first.targets) == 1 and isinstance(first.targets[0], ast.Name)):
        return None
    variable, inner = first.targets[0].id, _called(first.value)
    outer = _called(second.value) if isinstance(second, ast.Assign | ast.Return) else None
    if not inner or inner[0] != name or not outer or not isinstance(outer[1], ast.Name) or outer[1].id != variable:
        return None
    if isinstance(second, ast.Assign):
        targets = second.targets
        if not (len(targets) == 1 and isinstance(targets[0], ast.Name) and targets[0].id == variable):
            return None
    return outer[0]
