"""Which norm is called right before an MLP, and read by nothing else: it then quantises for the MLP (`fp.nn.QuantizingNorm`).

And, in models with adaLN, which norms layers alone read, and which layers have a gate and a residual behind them: found by running
the model with all of them deferred (`nn.deferred`), in its own floats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..common.models.exchange import Replaced
from ..common.models.modules import is_watched
from ..integrations.transformers.norm_formulas import NormFormula, norm_formula
from ..nn import DeferringNorm, QuantizingNorm
from ..nn.deferred import Deferred, DeferredNorm, DeferredProduct, computed
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


# ---- adaLN


@dataclass(frozen=True)
class AdaptiveNorm:
    """A norm without weights, which adaLN may follow."""

    fqn: str
    module: nn.Module
    holder: nn.Module
    formula: NormFormula

    def replaced(self) -> Replaced:
        eps = getattr(self.module, self.formula.eps)
        return Replaced(self.fqn, self.module, DeferringNorm(self.module, self.formula.kind, eps))


def adaptive_norms(model: nn.Module) -> list[AdaptiveNorm]:
    """In their one place each, with nothing around them."""
    places: dict[nn.Module, list[str]] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        if fqn and not module._modules and not module._parameters.keys() - {"weight", "bias"}:
            places.setdefault(module, []).append(fqn)
    return [
        AdaptiveNorm(fqns[0], module, model.get_submodule(fqns[0].rpartition(".")[0]), formula)
        for module, fqns in places.items()
        if len(fqns) == 1 and not any(p is not None for p in module._parameters.values()) and not is_watched(module)
        and (formula := norm_formula(module)) is not None
    ]  # fmt: skip


@dataclass(frozen=True)
class Deferrals:
    """What may be deferred, as a run has shown."""

    layers: frozenset[str] = frozenset()  #: whose result went into a sum each time
    norms: tuple[tuple[AdaptiveNorm, frozenset[str]], ...] = ()  #: with the layers, which alone read them


@dataclass
class Deferring:
    """A model whose norms without weights, and layers, are deferred; `outcome` is what came of it."""

    leaves: Sequence[Leaf]
    norms: Sequence[AdaptiveNorm]
    outcome: Deferrals = field(default_factory=Deferrals)

    @staticmethod
    def of(model: nn.Module, leaves: Sequence[Leaf]) -> Deferring | None:
        """None of a model without such norms, which has no adaLN."""
        layers = [x for x in leaves if len(x.places) == 1 and not (x.is_experts or x.is_convolution)]
        norms = adaptive_norms(model) if layers else []
        return Deferring(layers, norms) if norms else None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Around what stands in the places meanwhile."""
        with ExitStack() as stack:
            layers = {leaf.fqn: _SeenLayer(leaf.fqn, leaf.parent._modules[leaf.name]) for leaf in self.leaves}
            norms = [(norm, _SeenNorm(norm.module)) for norm in self.norms]
            stand_ins: list[tuple[nn.Module, str, nn.Module]] = [
                (leaf.parent, leaf.name, layers[leaf.fqn]) for leaf in self.leaves
            ]
            stand_ins += [(norm.holder, norm.fqn.rpartition(".")[2], x) for norm, x in norms]
            for holder, name, module in stand_ins:
                stack.callback(holder._modules.__setitem__, name, holder._modules[name])
                holder._modules[name] = module.eval()
            yield
        summed = (fqn for fqn, x in layers.items() if x.seen.sums and not x.seen.misses)
        read = ((norm, frozenset(x.seen.readers)) for norm, x in norms if x.seen.readers and not x.seen.misses)
        self.outcome = Deferrals(frozenset(summed), tuple(read))


@dataclass
class _Uses:
    """How often the result went into a sum, and was computed by itself; who else took it. What a module counts itself is put back
    after each run."""

    sums: int = 0
    misses: int = 0
    readers: set[str] = field(default_factory=set)


class _Seen(nn.Module):
    """Around a module, whose result is deferred."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self._module = (module,)  # in a tuple, which holds no children
        self.seen = _Uses()

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_module"][0], name)


class _SeenLayer(_Seen):
    def __init__(self, fqn: str, layer: Any) -> None:
        super().__init__(layer)
        self.fqn = fqn

    def forward(self, input: Any) -> Any:
        x = input.rows_for(self) if isinstance(input, Deferred) else input
        if type(x) is not Tensor or x.dim() != 3:
            self.seen.misses += 1
            return self._module[0](x)
        layer = self._module[0]
        columns = layer.nf if hasattr(layer, "nf") else layer.out_features
        return _SeenProduct(self, x, torch.Size((*x.shape[:-1], columns)))

    def product(self, x: Tensor, residual: Tensor | None = None, ada_gate: Tensor | None = None) -> Tensor:
        y: Tensor = self._module[0](x)
        if residual is None:
            return y
        self.seen.sums += 1
        return (y if ada_gate is None else y * ada_gate[:, None]) + residual


class _SeenProduct(DeferredProduct):
    def floats(self) -> Tensor:
        self.owner.seen.misses += 1
        return super().floats()


class _SeenNorm(_Seen):
    def normed(self, x: Tensor) -> Tensor:
        y: Tensor = self._module[0](x)
        return y

    def forward(self, x: Tensor) -> Tensor:
        x = computed(x)
        if type(x) is not Tensor or x.dim() != 3:
            self.seen.misses += 1
            return self.normed(x)
        return _SeenRows(self, x, x.shape)


class _SeenRows(DeferredNorm):
    def rows_for(self, layer: Any) -> Tensor:
        self.owner.seen.readers.add(layer.fqn)
        return super().floats()

    def floats(self) -> Tensor:
        self.owner.seen.misses += 1
        return super().floats()
