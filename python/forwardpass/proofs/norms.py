"""Which norm is called right before an MLP, and read by nothing else: it then quantises for the MLP (`fp.nn.QuantizingNorm`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ..common.models.exchange import Replaced
from ..common.models.modules import is_watched
from ..integrations.transformers.norm_formulas import NormFormula, norm_formula
from ..nn import QuantizingNorm
from .activation import called_behind
from .code import Reach

if TYPE_CHECKING:
    from .walker import Leaf


@dataclass(frozen=True)
class NormBefore:
    """A norm, and the module that calls it and then the MLP."""

    fqn: str
    module: nn.Module
    holder: nn.Module
    mlp: str  #: the holder's name for it
    formula: NormFormula

    def replaced(self) -> Replaced:
        f = self.formula
        options = f.kind, getattr(self.module, f.eps), f.offset
        return Replaced(self.fqn, self.module, QuantizingNorm(self.module, self.holder, self.mlp, *options))


def norm_before(leaf: Leaf, reach: Reach) -> NormBefore | None:
    """The one before the module that holds a layer: `x = self.norm(x)` and then `x = self.mlp(x)`, or `self.mlp(self.norm(x))`."""
    if len(leaf.ancestors) < 2:
        return None
    (_, holder), (mlp, _) = leaf.ancestors[-2:]
    if holder is reach.model or "forward" in vars(holder):  # the table of what was replaced keeps a holder alive
        return None
    norms = {name: m for name, m in holder._modules.items() if m is not None and _may_be_norm(m)}
    methods = (reach.methods(type(holder)) or ()) if norms else ()
    for name, norm in norms.items():
        if called_behind(methods, name) != mlp or (formula := norm_formula(norm)) is None:
            continue
        if is_watched(norm) or not reach.has_one_place(norm) or not reach.only_named_by(holder, (name, mlp)):
            continue
        path = leaf.fqn.rpartition(".")[0].removesuffix(mlp)
        return NormBefore(path + name, norm, holder, mlp, formula)
    return None


def _may_be_norm(module: nn.Module) -> bool:
    """Whether its parts are those of one: asked before any code is read."""
    vectors = [p for p in module._parameters.values() if p is not None]
    return not module._modules and {*module._parameters} <= {"weight", "bias"} and all(p.dim() == 1 for p in vectors)
