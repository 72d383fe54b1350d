"""Which activation is applied to a Linear's output, and to nothing else: the swapped layer computes it in its epilogue.

It is read from the code of the module that holds both: `x = self.fc(x)` and then `x = self.act(x)`, or `self.act(self.fc(x))`,
the only mention of either. Two modules in a row of an `nn.Sequential` are such a pair too, where it is only called as a whole.
Whatever else in the model may get at one of them (see `code`) is no proof, and then nothing is fused.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import nn

from ..common.models.modules import is_watched
from ..integrations.class_source import is_as_written, owner_of_forward
from ..nn.quantized_experts import experts_sizes
from ..ops.common.activations import GATED
from .code import CONTAINERS, SETUP, Function, Reach, is_attribute_of, self_of

if TYPE_CHECKING:
    from .walker import Leaf

_TORCH = {nn.ReLU: "relu", nn.SiLU: "silu", nn.ReLU6: "relu6", nn.Hardswish: "hard_swish"}
#: of transformers.activations, by class; what is not here has another formula or constants of its own
_TRANSFORMERS = {"GELUActivation": "gelu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh",
                 "NewGELUActivation": "gelu_tanh", "SiLUActivation": "silu"}  # fmt: skip

_DEFAULT_GATE = "transformers.integrations.moe._default_apply_gate"  #: act(gate) * up


@dataclass(frozen=True)
class Activation:
    """A module that applies an activation, its formula by the name it has in `forwardpass.activations`."""

    fqn: str
    module: nn.Module
    formula: str
    is_shared: bool = False  #: whether code calls it elsewhere too
    passed: tuple[str, ...] = ()  #: members between the two that are nn.Identity


def formula_of(module: nn.Module) -> str | None:
    """The activation that a module is, where an epilogue has it, and where nobody has put another function into its class."""
    cls = type(module)
    if cls is nn.GELU:
        formula = "gelu" if module.approximate == "none" else "gelu_tanh"
    elif cls in _TORCH:
        formula = _TORCH[cls]
    elif cls.__module__ == "transformers.activations" and cls.__name__ in _TRANSFORMERS:
        formula = _TRANSFORMERS[cls.__name__]
    else:
        return None
    return formula if is_as_written(owner_of_forward(cls), "forward") else None


def activation_within(experts: nn.Module) -> str | None:
    """The activation of a module of experts that an epilogue can apply, where it applies it as transformers does by default."""
    act = experts._modules.get("act_fn")
    formula = None if act is None else _fusible(act)
    if formula is None or not experts.has_gate:
        return formula
    gate = getattr(type(experts), "_apply_gate", None)
    place = f"{getattr(gate, '__module__', '')}.{getattr(gate, '__name__', '')}"
    return (
        f"{formula}_mul"
        if place == _DEFAULT_GATE and f"{formula}_mul" in GATED and experts_sizes(experts)[1] % 8 == 0
        else None
    )


def activation_behind(leaf: Leaf, reach: Reach) -> Activation | None:
    """The activation that a Linear-like layer can compute itself; `reach` looks through its model."""
    parent = leaf.parent
    beside = {name: f for name, m in parent._modules.items() if m is not None and (f := _fusible(m))}
    if not beside:  # in most modules: their code is not read, which takes milliseconds
        return None
    in_sequence = is_sequence(type(parent))
    if in_sequence:
        behind = dict(itertools.pairwise(parent._modules)).get(leaf.name)
    else:
        behind = None if is_watched(parent) else called_behind(reach.methods(type(parent)) or (), leaf.name)
    if behind not in beside or "." in behind:  # which no path leads to
        return None
    module = parent._modules[behind]
    assert module is not None
    proven = reach.has_one_place(leaf.module) and reach.has_one_place(module) and (
        called_as_a_whole(leaf, reach) if in_sequence else reach.only_named_by(parent, (leaf.name, behind))
    )  # fmt: skip
    return Activation(leaf.fqn.removesuffix(leaf.name) + behind, module, beside[behind]) if proven else None


def _fusible(module: nn.Module) -> str | None:
    """Its formula, where it may be replaced."""
    return None if is_watched(module) else formula_of(module)


# ---- the code of the module that holds both


@lru_cache(maxsize=4096)  # of layer after layer of a class
def called_behind(methods: tuple[Function, ...], name: str) -> str | None:
    """The member that forward calls on what `self.<name>` gives, and neither anywhere else in these methods."""
    forwards = [m for m in methods if isinstance(m, ast.FunctionDef) and m.name == "forward"]
    activations = [behind for forward in forwards for behind in pairs(forward, name)]
    all_words = [word for method in methods for word in words(method)]
    is_once = len(activations) == 1 and all_words.count(name) == all_words.count(activations[0]) == 1
    return activations[0] if is_once else None


def words(method: Function) -> Iterator[Any]:
    """Every attribute's name, of whatever it is one, and every constant."""
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant):
            yield node.value


def called(node: ast.AST | None, self_name: str | None) -> tuple[str, ast.expr] | None:
    """(name, argument) of `self.<name>(argument)`."""
    if not (
        isinstance(node, ast.Call)
        and len(node.args) == 1
        and not node.keywords
        and is_attribute_of(node.func, self_name)
    ):
        return None
    assert isinstance(node.func, ast.Attribute)
    return None if isinstance(node.args[0], ast.Starred) else (node.func.attr, node.args[0])


def pairs(function: ast.FunctionDef, name: str) -> Iterator[str]:
    """The members that a function calls on what `self.<name>` gives, and on nothing else with that."""
    self_name = self_of(function)
    for node in ast.walk(function):
        outer = called(node, self_name)
        if outer and (inner := called(outer[1], self_name)) and inner[0] == name:
            yield outer[0]
        for block in (getattr(node, field, None) for field in ("body", "orelse", "finalbody")):
            if isinstance(block, list):
                for i in range(len(block) - 1):
                    if behind := _in_a_row(function, block[i:], name):
                        yield behind


def _in_a_row(function: ast.FunctionDef, block: list[ast.stmt], name: str) -> str | None:
    """`v = self.<name>(…)` and then `v = self.<behind>(v)`, or `return self.<behind>(v)`, or `w = self.<behind>(v)` and v is bound
    anew before it is read again: nothing else sees the first v."""
    self_name, (first, second, *later) = self_of(function), block
    if not (isinstance(first, ast.Assign) and len(first.targets) == 1 and isinstance(first.targets[0], ast.Name)):
        return None
    variable, inner = first.targets[0].id, called(first.value, self_name)
    outer = called(second.value, self_name) if isinstance(second, ast.Assign | ast.Return) else None
    if not inner or inner[0] != name or not outer or not isinstance(outer[1], ast.Name) or outer[1].id != variable:
        return None
    if isinstance(second, ast.Assign):
        overwritten = _binds(second, variable) or _bound_anew(function, later, variable)
    else:
        overwritten = not _outlives_return(function, variable)
    return outer[0] if overwritten else None


def _binds(statement: ast.stmt, variable: str) -> bool:
    """Whether it is `variable = …`."""
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)]):
            return name == variable
    return False


def _bound_anew(function: ast.FunctionDef, later: list[ast.stmt], variable: str) -> bool:
    """Whether the first of these statements that mentions a variable binds it and does not read it."""
    for statement in later:
        uses = [x for x in ast.walk(statement) if isinstance(x, ast.Name) and x.id == variable]
        if uses:
            return len(uses) == 1 and _binds(statement, variable) and not _outlives_return(function, variable)
    return False


def _outlives_return(function: ast.FunctionDef, variable: str) -> bool:
    """Whether a `finally`, a function within or a global still sees what a variable held at a return."""
    for node in ast.walk(function):
        if isinstance(node, ast.Global | ast.Nonlocal) and variable in node.names:
            return True
        later: list[ast.AST] = []
        if isinstance(node, ast.Try):
            later = [*node.finalbody]
        elif isinstance(node, Function | ast.ClassDef) and node is not function:
            later = [node]
        if any(isinstance(x, ast.Name) and x.id == variable for part in later for x in ast.walk(part)):
            return True
    return False


# ---- an nn.Sequential, and the code of the module that holds it


#: Methods that a class which derives from nn.Sequential may have, and be one all the same: none that calls what it holds.
_BESIDE = (*SETUP, "_load_from_state_dict", "_save_to_state_dict", "extra_repr", "__repr__")


def is_sequence(cls: type[nn.Module]) -> bool:
    """Whether modules of a class are nn.Sequentials, or of a class that adds no way to call what they hold (torchvision's MLP)."""
    if not issubclass(cls, nn.Sequential) or cls.forward is not nn.Sequential.forward:
        return False
    added = cls.__mro__[: cls.__mro__.index(nn.Sequential)]
    return all(name in _BESIDE or not callable(x) for base in added for name, x in vars(base).items())


def _is_container(module: nn.Module) -> bool:
    return type(module) in CONTAINERS or is_sequence(type(module))


def called_as_a_whole(leaf: Leaf, reach: Reach) -> bool:
    """Whether the Sequential that holds a layer is, by the code that holds it and by what holds that: other Sequentials, lists."""
    chain = list(leaf.ancestors)
    containers: list[tuple[str, nn.Module]] = []
    while chain and _is_container(chain[-1][1]):
        containers.insert(0, chain.pop())
    if not all(reach.has_one_place(m) and not is_watched(m) for _, m in containers):
        return False
    kinds = [nn.Sequential if isinstance(m, nn.Sequential) else type(m) for _, m in containers]
    if not chain:  # the user calls it
        return set(kinds) == {nn.Sequential} and reach.only_named_by(reach.model, ())
    holder, name = chain[-1][1], containers[0][0]
    methods = reach.methods(type(holder))
    return (
        methods is not None
        and all(_uses_whole(method, name, kinds) for method in methods)
        and reach.only_named_by(holder, (name,))
    )


def _uses_whole(method: Function, name: str, kinds: list[type[nn.Module]]) -> bool:
    """Whether a method does nothing else with `self.<name>` than to call it, or what it holds; `kinds`: of containers, from this
    one to the one within that must be whole.
    """
    if name in (node.value for node in ast.walk(method) if isinstance(node, ast.Constant)):
        return False
    parents = {id(child): node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
    self_name = self_of(method)

    def stays_whole(node: ast.AST, kinds: list[type[nn.Module]]) -> bool:
        parent = parents[id(node)]
        if isinstance(parent, ast.Call) and parent.func is node:
            return kinds[0] is nn.Sequential
        if isinstance(parent, ast.Compare) and all(isinstance(op, ast.Is | ast.IsNot) for op in parent.ops):
            return True  # whether there is one
        if len(kinds) == 1:
            return False
        if isinstance(parent, ast.Subscript) and parent.value is node and not isinstance(parent.slice, ast.Slice):
            return stays_whole(parent, kinds[1:])
        if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id == "len":
            return True
        if isinstance(parent, ast.For | ast.comprehension) and isinstance(parent.target, ast.Name):
            element = parent.target.id
            uses = [x for x in ast.walk(method) if isinstance(x, ast.Name) and x.id == element]
            return kinds[0] is not nn.ModuleDict and all(
                isinstance(x.ctx, ast.Store) or stays_whole(x, kinds[1:]) for x in uses
            )
        return False

    mentions = [x for x in ast.walk(method) if isinstance(x, ast.Attribute) and x.attr == name]
    return all(is_attribute_of(x, self_name) and stays_whole(x, kinds) for x in mentions)
