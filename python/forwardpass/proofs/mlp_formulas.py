"""Which modules compute `down(act(up(x)))` or `down(act(gate(x)) * up(x))` and nothing else: `fp.nn.MLP` and `fp.nn.GatedMLP` then
stand for them.

It is read from their code, whose one method is that formula, in one line or in several; dropouts may be in it. What holds them, and
whatever else is in the model, takes none of the layers by name (see `code`).
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..common.memory import give_back_freed
from ..common.models.exchange import Replaced
from ..common.models.modules import is_watched, tensor_bytes
from ..dispatch import Reason
from ..integrations.tensor_parallel import sharding_of
from ..nn import MLP, GatedMLP, QuantizedLinear, QuantizedModule
from ..nn.linear.quantized_linear import is_conv1d
from ..nn.mlp import TwoProducts
from .activation import Activation, called, formula_of, is_sequence
from .code import Function, Reach, is_attribute_of, self_of
from .norms import NormBefore, norm_before

if TYPE_CHECKING:
    from .walker import Leaf

#: What may be between the two products and behind them: it goes into the new module as it is.
_PASSED = (nn.Dropout, nn.Identity)
#: What no layer may be called in the new module.
_TAKEN = {*dir(MLP), *dir(GatedMLP), *vars(nn.Module()), "activation", "members"}
_ALONE = "write both layers and the activation as one module of their own"


@dataclass(frozen=True)
class Formula:
    """What a module computes, by the names of what it calls."""

    layers: tuple[str, ...]  #: those that are called with the input, then the one that is called with what they give
    activation: str
    gated: bool  #: of two layers the first is gate and up, one half of its outputs each
    between: tuple[str, ...]
    behind: tuple[str, ...]
    converted: frozenset[str]  #: layers whose input it converts to their dtype, where that is another one

    @property
    def modules(self) -> tuple[str, ...]:
        return *self.layers, self.activation, *self.between, *self.behind


@dataclass(frozen=True)
class Block:
    """A module that computes that."""

    fqn: str
    module: nn.Module
    formula: Formula
    activation: str  #: by the name that it has in `forwardpass.activations`
    norm: NormBefore | None  #: that nothing but this reads

    @property
    def names(self) -> tuple[str, ...]:
        """Its layers', in the model."""
        return tuple(f"{self.fqn}.{name}" for name in self.formula.layers)

    @property
    def behind_first(self) -> Activation | None:
        """What its first layer computes besides, where that is a layer's whole output."""
        f, act = self.formula, self.module._modules[self.formula.activation]
        assert act is not None
        halves = f.gated and len(f.layers) == 2
        return None if halves else Activation(f"{self.fqn}.{f.activation}", act, self.activation)

    def why_not(self, layers: list[QuantizedLinear]) -> str | None:
        """None where these, that its layers became, make one module, else the reason."""
        first, last = layers[0].sharding, layers[-1].sharding
        if (first is not None and not first.is_local) or (last is not None and not last.takes_local):
            return "processes add or exchange what is between its products"
        if self.formula.gated:
            if len(layers) == 2:
                return GatedMLP.why_no_halves(layers[0], self.activation)
            return GatedMLP.why_not(*layers[:2])
        return None if layers[0].activation else "its activation is not computed by it"  # of an older checkpoint

    def build(self, layers: list[QuantizedLinear]) -> TwoProducts:
        modules, f = self.module._modules, self.formula
        between, behind = ({n: m for n in names if (m := modules[n]) is not None} for names in (f.between, f.behind))
        options: dict[str, Any] = {"names": f.layers, "between": between, "behind": behind}
        act: Any = f.activation, modules[f.activation]
        if not f.gated:
            new: TwoProducts = MLP.from_layers(*layers, activation=act, **options)
        elif len(layers) == 2:
            new = GatedMLP.from_halves(layers[0], layers[1], self.activation, module=act, **options)
        else:
            new = GatedMLP.from_layers(*layers, activation=act, **options)
        new.training = self.module.training  # and of dropouts what it was
        if new.layers[0] is not layers[0]:
            new.layers[0].adopt(layers[0])
        new.adopt(self.module)
        new.stands_for(self.module)
        vars(new).update((name, x) for name, x in vars(layers[0]).items() if name.startswith("precision"))
        return new


def _is_linear_like(module: nn.Module | None) -> bool:
    return module is not None and (isinstance(module, nn.Linear) or is_conv1d(module))


def block_of(leaf: Leaf, activation: Activation | None, reach: Reach) -> Block | Reason | None:
    """The module whose first layer a layer is, with the activation behind it, if any; the reason for which there is none where an
    activation is; None where it is no such layer."""
    holder, name = leaf.parent, type(leaf.parent).__name__
    if activation is None and not any(m is not None and formula_of(m) for m in holder._modules.values()):
        return None  # of most layers: no code is read
    formula = None if holder is reach.model else formula_in(holder, reach)
    if formula is None or formula.layers[0] != leaf.name:
        if activation is None:
            return None
        if holder is reach.model:
            return Reason("in_model", "it is of the model itself, which is not replaced", _ALONE)
        if is_sequence(type(holder)):
            return Reason("sequential", "an nn.Sequential stays one, as layers of it are asked for by number", _ALONE)
        if sum(map(_is_linear_like, holder._modules.values())) == 1:
            return Reason(
                "other_module", f"its {name} has no second layer: what its output goes to is elsewhere", _ALONE
            )
        return Reason("other_code", f"{name} computes something besides, or in another way", _ALONE)
    act = holder._modules[formula.activation]
    assert act is not None
    used = [m for name in formula.modules if (m := holder._modules[name]) is not None]
    alone = all(not _is_watched(m) and reach.has_one_place(m) for m in (holder, *used))
    if not alone or not reach.only_named_by(holder, (*formula.layers, formula.activation)):  # dropouts keep their names
        return _reached(holder)
    applied = formula_of(act)
    if applied is None:
        return None
    return Block(leaf.fqn.rpartition(".")[0], holder, formula, applied, norm_before(leaf, reach))


def _is_watched(m: nn.Module) -> bool:
    """But by what divides it between processes."""
    return is_watched(m) and sharding_of(m) is None


def _reached(holder: nn.Module) -> Reason:
    return Reason("reached", f"hooks or other code may get at the parts of its {type(holder).__name__}", "remove them")


# ---- the code of the module


def formula_in(holder: nn.Module, reach: Reach) -> Formula | None:
    """What a module computes, where that is one of the two formulas, of modules that are all it has."""
    methods = reach.methods(type(holder))
    if methods is None or len(methods) != 1 or holder._parameters or holder._buffers:
        return None
    try:
        value, converted = _value(methods[0])
    except _Other:
        return None
    value, behind = _passed(value, holder)
    match value:
        case ("call", down, inner):
            inner, between = _passed(inner, holder)
        case _:
            return None
    product = _product(inner)
    if product is None:
        return None
    first, act, gated = product
    formula = Formula((*first, down), act, gated, between, behind, converted)
    names = [*formula.modules]
    if set(names) != set(holder._modules) or len(set(names)) < len(names) or not converted <= {*formula.layers}:
        return None
    if not all(_is_linear_like(holder._modules[name]) for name in formula.layers):
        return None
    reserved = _TAKEN | {"gate_up", "gate_up_interleaved"}
    if {*between, *behind, act} & reserved or {*formula.layers} & _TAKEN:
        return None
    return formula


_Value = tuple[Any, ...]  #: ("input",), ("call", name, value), ("half", 0 or 1, value), ("times", value, value)
_INPUT: _Value = ("input",)


class _Other(Exception):
    """Code of another kind."""


def _passed(value: _Value, holder: nn.Module) -> tuple[_Value, tuple[str, ...]]:
    """What dropouts are applied to, and their names, the last one last."""
    names: list[str] = []
    while value[0] == "call" and type(holder._modules.get(value[1])) in _PASSED:
        names.insert(0, value[1])
        value = value[2]
    return value, tuple(names)


def _product(value: _Value) -> tuple[tuple[str, ...], str, bool] | None:
    """(layers that are called with the input, activation, gated)."""
    match value:
        case ("call", act, ("call", up, ("input",))):
            return (up,), act, False
        case ("times", ("call", act, gate), up) if other := _gate(gate, up):
            return other, act, True
        case ("times", up, ("call", act, gate)) if other := _gate(gate, up):
            return other, act, True
    return None


def _gate(gate: _Value, up: _Value) -> tuple[str, ...] | None:
    match gate, up:
        case ("call", name, ("input",)), ("call", other, ("input",)):
            return name, other
        case ("half", 0, ("call", name, ("input",)) as both), ("half", 1, whole) if both is whole:
            return (name,)
    return None


def _value(forward: Function) -> tuple[_Value, frozenset[str]]:
    """(what a method returns of its one argument, names of layers to whose dtype it converts); each member is called once
    at most, and in no branch."""
    if not isinstance(forward, ast.FunctionDef) or forward.name != "forward" or forward.decorator_list:
        raise _Other
    self_name, arguments = self_of(forward), forward.args
    others = arguments.posonlyargs, arguments.kwonlyargs, arguments.vararg, arguments.kwarg, arguments.defaults
    if self_name is None or len(arguments.args) != 2 or any(others):
        raise _Other
    variables = {arguments.args[1].arg: _INPUT}
    done: set[str] = set()
    converted: set[str] = set()

    def of(node: ast.expr) -> _Value:
        if isinstance(node, ast.Name) and node.id in variables:
            return variables[node.id]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            return "times", of(node.left), of(node.right)
        call = called(node, self_name)
        if call is None or call[0] in done:
            raise _Other
        done.add(call[0])
        return "call", call[0], of(call[1])

    for statement in forward.body:
        match statement:
            case ast.Expr(value=ast.Constant()):
                pass
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                variables[name] = of(value)
            case ast.Assign(
                targets=[ast.Tuple(elts=[ast.Name(id=name), ast.Name(id=other)])],
                value=ast.Call(func=ast.Attribute(value=value, attr="chunk")) as call,
            ) if ast.unparse(call).endswith((".chunk(2, dim=-1)", ".chunk(2, -1)")):
                both = of(value)
                variables[name], variables[other] = ("half", 0, both), ("half", 1, both)
            case ast.If(test=ast.BoolOp(op=ast.And()) as test, body=body, orelse=[]) if layer := _converted(
                test, body, self_name
            ):
                converted.add(layer)
            case ast.Return(value=ast.expr() as value):
                return of(value), frozenset(converted)
            case _:
                break
    raise _Other


def _converted(test: ast.BoolOp, body: list[ast.stmt], self_name: str) -> str | None:
    """The layer to whose dtype, where a variable has another one, code converts that: T5, before its `wo`."""
    match body:
        case [
            ast.Assign(
                targets=[ast.Name(id=name)],
                value=ast.Call(
                    func=ast.Attribute(value=ast.Name(id=variable), attr="to"),
                    args=[ast.Attribute(value=ast.Attribute(value=member, attr="weight"), attr="dtype")],
                    keywords=[],
                ),
            )
        ] if name == variable and is_attribute_of(member, self_name):
            layer = member.attr  # type: ignore[attr-defined]
        case _:
            return None
    if any(isinstance(x, ast.NamedExpr) for x in ast.walk(test)):
        return None
    if any(isinstance(x, ast.Call) and ast.unparse(x.func) != "isinstance" for x in ast.walk(test)):
        return None
    another = f"{name}.dtype != {self_name}.{layer}.weight.dtype"
    return layer if another in map(ast.unparse, test.values) else None


# ---- what the layers became


class MLPs:
    """Swapped layers that make such a module, and why others do not."""

    def __init__(self, layers: Mapping[str, tuple[Leaf, QuantizedModule]]) -> None:
        self._blocks: list[tuple[Block, list[QuantizedLinear]]] = []
        self.apart: list[tuple[str, Reason]] = []  #: first layers of MLPs that stay single ones, with the reason
        for fqn, (leaf, _) in layers.items():
            block = leaf.block
            if isinstance(block, Reason):
                self.apart.append((fqn, block))
            elif block is not None and any(map(_is_watched, block.module.modules())):  # accelerate came meanwhile
                self.apart.append((fqn, _reached(block.module)))
            elif block is not None:
                became = {name: layers[name][1] for name in block.names if name in layers}
                if missing := [name for name in block.names if name not in became]:
                    self.apart.append(
                        (fqn, Reason("layer_stays", f"{missing[0]} stays as it is", "see why it is skipped"))
                    )
                    continue
                modules = [m for m in became.values() if isinstance(m, QuantizedLinear)]
                converted = (m for n, m in zip(block.formula.layers, modules) if n in block.formula.converted)
                reason = block.why_not(modules)
                if any(m.anchor.dtype != modules[0].anchor.dtype for m in converted):
                    reason = "its weights have several dtypes, and it converts what is between them"
                if reason:
                    self.apart.append((fqn, Reason("unlike", reason, "leave it")))
                else:
                    self._blocks.append((block, modules))

    @property
    def names(self) -> list[tuple[str, ...]]:
        """Names of the layers of each."""
        return [block.names for block, _ in self._blocks]

    @property
    def joined(self) -> list[tuple[str, ...]]:
        """Names of gates and ups."""
        return [names[:2] for names in self.names if len(names) == 3]

    @property
    def members(self) -> set[str]:
        return {name for names in self.names for name in names}

    @property
    def peak(self) -> int:
        """Bytes that are held twice while one module after another is made."""
        return max((tensor_bytes(layers[:-1]) for block, layers in self._blocks if block.formula.gated), default=0)

    @property
    def norms(self) -> list[NormBefore]:
        """Those that quantise as a first layer would."""
        return [
            block.norm
            for block, layers in self._blocks
            if block.norm is not None and not is_watched(block.norm.module) and layers[0].row_quantization() is not None
        ]

    def build(self) -> tuple[tuple[Replaced, ...], tuple[Replaced, ...]]:
        """(MLPs, norms before them) that stand for the originals; the separate layers are freed one after another."""
        norms = tuple(norm.replaced() for norm in self.norms)
        replaced = []
        blocks, self._blocks = self._blocks, []
        for block, layers in blocks:
            replaced.append(Replaced(block.fqn, block.module, block.build(layers)))
            layers.clear()
            give_back_freed()  # else a swap of a 1.1B model holds 0.5 GB more in the end
        return tuple(replaced), norms
