"""What a model that was stored in 8 bits computes in another way than its code says, layer by layer: what the model that was saved
did so, unless a run disproves it. The class that is loaded may be another one by now."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from ..dispatch import Reason
from ..nn import FloatConv2d, Int8Conv2d, QuantizedLinear, QuantizedModule, QuantizingNorm
from ..nn.mlp import TwoProducts, quantised_layers
from ..proofs.mlp_formulas import Block
from ..proofs.siblings import JoinedSwap, siblings
from ..proofs.walker import ConvolutionLeaf, Leaf
from ..swap.attention.attention_modules import AttentionDecision, AttentionSwap
from ..swap.attention.kv_cache import CacheDecision, CacheSwap
from ..swap.attention.unpadded_encoders import UnpaddingDecision, UnpaddingSwap
from ..swap.decision import Decision
from ..swap.precision import STORED, LayerPrecision
from ..swap.rules import Context
from ..swap.verdicts import prove

_APART = Reason("apart", "the model that was saved computes it by itself", "swap the model of floats again")

Layers = Mapping[str, tuple[Leaf, QuantizedModule]]


@dataclass(frozen=True)
class Changes:
    """What is put into a model besides layers."""

    attention: AttentionDecision
    unpadding: UnpaddingDecision
    kv_cache: CacheDecision

    def put(self, model: nn.Module) -> None:
        """After layers."""
        AttentionSwap(model, self.attention, self.unpadding.named).put()
        UnpaddingSwap(self.unpadding).put()
        CacheSwap(self.kv_cache).put()


def rewritten(model: nn.Module) -> list[str]:
    """The first layers of products, and of MLPs that are one unit, and norms that quantise: for a record."""
    layers = quantised_layers(model)
    units = [f"{fqn}.{m.members[0]}" for fqn, m in layers.items() if isinstance(m, TwoProducts)]
    joined = {m.joined for m in layers.values() if isinstance(m, QuantizedLinear) and m.joined is not None}
    first = {id(product.members[0]) for product in joined}  # of those that its code calls
    products = [fqn for fqn, m in layers.items() if id(m) in first]
    return [*units, *products, *(fqn for fqn, m in model.named_modules() if isinstance(m, QuantizingNorm))]


def folded(model: nn.Module) -> list[str]:
    """The convolutions in floats that compute the norm and the activation behind them: for a record."""
    return [fqn for fqn, m in model.named_modules() if isinstance(m, FloatConv2d)]


def proven(
    model: nn.Module,
    layers: Layers,
    changes: Changes,
    recorded: Collection[str] | None,
    *,
    believed: bool,
    in_floats: Sequence[ConvolutionLeaf] = (),
) -> tuple[JoinedSwap, Changes]:
    """(layers and what they are together, the other changes), of both what a run of the model does not disprove.

    Args:
        model: all that is no layer has its values.
        layers: quantised, with values, by their names. Where a run disproves an activation, its layer computes none.
        recorded: as `rewritten` has it: what else is found stays as the model has it. None: nobody knows.
        believed: what cannot be run is made. Else it is not.
        in_floats: convolutions as `folded` has them.

    Raises:
        ValueError: with its kv_cache the model computes something else.
    """
    stored = LayerPrecision(STORED)
    swapped = tuple((_as_made(leaf, layer, recorded), stored) for leaf, layer in layers.values())
    attention, unpadding, cache = changes.attention, changes.unpadding, changes.kv_cache
    leaves = tuple(leaf for leaf, _ in swapped)
    decision = Decision(Context(model), leaves, swapped, attention, unpadding, cache, (), (), tuple(in_floats))
    verdicts = prove(decision, True, replacements={fqn: layer for fqn, (_, layer) in layers.items()})
    if believed:
        verdicts = verdicts.but_unproven()
    decision = verdicts.applied(decision)
    fused = (
        {fqn for fqn, (_, x) in layers.items() if x.activation is not None or getattr(x, "folds_norm", False)}
        if recorded is not None
        else layers.keys()
    )
    remaining = {leaf.fqn: (leaf, layers[leaf.fqn][1]) for leaf, _ in decision.swapped}
    for leaf, layer in remaining.values():
        if leaf.fqn in verdicts.layers and not leaf.is_experts:
            layer.activation = None
            if isinstance(layer, Int8Conv2d):
                layer.fold(None)
    rewritten = {*fused, *(recorded or ()), *(leaf.fqn for leaf in in_floats)}
    changed = {fqn: reason for fqn, reason in verdicts.layers.items() if fqn in rewritten}
    others = {"its attention": verdicts.attention, "its padding": verdicts.unpadding}
    _warn(model, {**changed, **verdicts.rotation, **others})
    apart = {**verdicts.apart, **_not_made(remaining, recorded)}
    return JoinedSwap(remaining, apart, verdicts.deferrals, decision.folded), Changes(
        decision.attention, decision.unpadding, decision.kv_cache
    )


def _as_made(leaf: Leaf, layer: QuantizedModule, recorded: Collection[str] | None) -> Leaf:
    """Without what the model that was saved did not compute so."""
    if leaf.is_experts:
        return leaf
    if isinstance(leaf, ConvolutionLeaf) and not getattr(layer, "folds_norm", False):
        leaf = replace(leaf, norm=None)
    block = leaf.block
    if recorded is not None and isinstance(block, Block):
        if leaf.fqn not in recorded:
            block = None
        elif block.norm is not None and block.norm.fqn not in recorded:
            block = replace(block, norm=None)
    return replace(leaf, activation=leaf.activation if layer.activation is not None else None, block=block)


def _not_made(layers: Layers, recorded: Collection[str] | None) -> dict[str, Reason]:
    """Layers that are the first of no product of the model that was saved."""
    if recorded is None:
        return {}
    runs = siblings(leaf for leaf, _ in layers.values())
    return {leaf.fqn: _APART for run in runs for leaf in run if leaf.fqn not in recorded}


def _warn(model: nn.Module, reasons: Mapping[str, Reason | None]) -> None:
    disproved = [(name, x) for name, x in reasons.items() if x is not None and x.code == "disproved"]
    if disproved:
        name, reason = disproved[0]
        more = f" (and {len(disproved) - 1} more)" if len(disproved) > 1 else ""
        warnings.warn(f"load_pretrained: this {type(model).__name__} is not rewritten at {name}{more}, as the model that was saved "
                      f"was: {reason.text}", stacklevel=4)  # fmt: skip
