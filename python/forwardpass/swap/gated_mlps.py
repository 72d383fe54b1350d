"""Which modules compute `down(act(gate(x)) * up(x))` and nothing else: `fp.nn.GatedMLP` then stands for them.

It is read from their code, whose one method is that formula; what holds them, and whatever else is in the model, takes none of the
layers by name (see `reach`).
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ..common.modules import tensor_bytes
from ..nn import GatedMLP, QuantizedLinear, QuantizedModule
from . import originals
from .fusion import Activation, called, is_watched
from .reach import Reach, self_of

if TYPE_CHECKING:
    from .walker import Leaf


@dataclass(frozen=True)
class GatedBlock:
    """A module that computes that formula, and the names of the two layers beside the gate."""

    fqn: str
    module: nn.Module
    up: str
    down: str


def gated_block(gate: Leaf, activation: Activation, reach: Reach) -> GatedBlock | None:
    """The module whose gate a layer is, with the activation behind it; None where it is no gate of such a module."""
    holder, act = gate.parent, activation.fqn.rpartition(".")[2]
    methods = None if holder is reach.model else reach.methods(type(holder))
    if methods is None or len(methods) != 1 or not isinstance(methods[0], ast.FunctionDef):
        return None
    names = _formula(methods[0], gate.name, act)
    if names is None or set(holder._modules) != {gate.name, act, *names} or holder._parameters or holder._buffers:
        return None
    layers = [holder._modules[name] for name in names]
    proven = (
        not any(m is None or is_watched(m) or not reach.has_one_place(m) for m in (holder, gate.module, *layers))
        and reach.only_named_by(holder, (gate.name, act, *names))
    )  # fmt: skip
    return GatedBlock(gate.fqn.rpartition(".")[0], holder, *names) if proven else None


def _formula(forward: ast.FunctionDef, gate: str, act: str) -> tuple[str, str] | None:
    """(up, down) where all that it computes is `self.down(self.act(self.gate(x)) * self.up(x))`, x its one argument."""
    self_name, arguments = self_of(forward), forward.args
    if forward.name != "forward" or forward.decorator_list or len(arguments.args) != 2 or any(
        (arguments.posonlyargs, arguments.kwonlyargs, arguments.vararg, arguments.kwarg, arguments.defaults)
    ):  # fmt: skip
        return None
    x = arguments.args[1].arg
    body = [s for s in forward.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    match body:
        case [ast.Return(value=value)]:
            pass
        case [ast.Assign(targets=[ast.Name(id=variable)], value=value), ast.Return(value=ast.Name(id=returned))] if (
            variable == returned
        ):
            pass
        case _:
            return None
    outer = called(value, self_name)
    match outer:
        case (down, ast.BinOp(left=left, op=ast.Mult(), right=right)):
            activated, beside = called(left, self_name), called(right, self_name)
        case _:
            return None
    inner = called(activated[1], self_name) if activated and activated[0] == act else None
    is_input = [isinstance(call[1], ast.Name) and call[1].id == x for call in (inner, beside) if call]
    if not inner or not beside or inner[0] != gate or not all(is_input) or len({gate, act, beside[0], down}) < 4:
        return None
    return beside[0], down


class GatedMLPs:
    """Swapped layers that make such a module: gate, up and down that became what goes together."""

    def __init__(self, layers: Mapping[str, tuple[Leaf, QuantizedModule]]) -> None:
        self._blocks: list[tuple[GatedBlock, tuple[str, str, str], list[QuantizedLinear]]] = []
        for fqn, (leaf, _) in layers.items():
            if leaf.block is None:
                continue
            names = (fqn, f"{leaf.block.fqn}.{leaf.block.up}", f"{leaf.block.fqn}.{leaf.block.down}")
            three = [m for name in names if name in layers and isinstance(m := layers[name][1], QuantizedLinear)]
            if len(three) == 3 and GatedMLP.why_not(*three[:2]) is None:
                self._blocks.append((leaf.block, names, three))

    @property
    def names(self) -> list[tuple[str, ...]]:
        """Names of gates and ups."""
        return [names[:2] for _, names, _ in self._blocks]

    @property
    def members(self) -> set[str]:
        return {name for _, names, _ in self._blocks for name in names}

    @property
    def peak(self) -> int:
        """Bytes that are held twice while one module after another is made."""
        return max((tensor_bytes(three[:2]) for _, _, three in self._blocks), default=0)

    def build(self) -> tuple[originals.Replaced, ...]:
        """The modules that stand for the originals; the separate layers are freed one after another."""
        replaced = []
        blocks, self._blocks = self._blocks, []
        for block, names, three in blocks:
            new = GatedMLP.from_layers(*three).train(block.module.training)
            new.gate_up.adopt(three[0])
            new.adopt(block.module)
            new.members = (names[0].rpartition(".")[2], block.up, block.down)
            vars(new).update((name, x) for name, x in vars(three[0]).items() if name.startswith("precision"))
            replaced.append(originals.Replaced(block.fqn, block.module, new))
            three.clear()
        return tuple(replaced)
