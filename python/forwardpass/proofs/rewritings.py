"""What would be rewritten in a model, of what was read from its code: each as modules that compute in floats, in the order that the
rewriting has, and stand in the places of the model's own while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activation import is_sequence
from .inputs import features_in, pictures_in
from .mlp_formulas import Block
from .norms import NormBefore
from .siblings import siblings
from .walker import ConvolutionLeaf, Leaf

#: (holder, name of a module, what makes lists of inputs for the module)
_Alone = tuple[nn.Module, str, Callable[[nn.Module], Iterable[list[Tensor]]]]


@dataclass(frozen=True)
class Rewriting:
    """One place that would be rewritten: its first layer's name, what is alike in others, and what stands where meanwhile."""

    fqn: str
    key: tuple[Any, ...]
    modules: Callable[[], Iterable[tuple[nn.Module, str, nn.Module]]]  #: makes (holder, name, module)
    alone: _Alone | None  #: (holder, name of a module that may run alone, what makes inputs for it)
    needs_proof: bool = True

    @contextmanager
    def in_place(self) -> Iterator[None]:
        with ExitStack() as stack:
            for holder, name, module in self.modules():
                put(stack, holder, name, module)
            yield


def put(stack: ExitStack, holder: nn.Module, name: str, module: nn.Module) -> None:
    """In a module's place until the stack ends."""
    stack.callback(holder._modules.__setitem__, name, holder._modules[name])
    holder._modules[name] = module.eval()


class _WithActivation(nn.Module):
    """A layer and the activation behind it."""

    def __init__(self, layer: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.layer, self.activation = layer, activation

    def forward(self, x: Any) -> Any:
        return self.activation(self.layer(x))

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name in ("layer", "activation") else getattr(self.layer, name)


class _OneUnit(nn.Module):
    """The formula of an MLP, of the members that it has."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self._block = block

    def forward(self, x: Any) -> Any:
        f, modules = self._block.formula, self._block.module._modules

        def applied(names: Sequence[str], x: Any) -> Any:
            for name in names:
                module: Any = modules[name]
                x = module(x.to(module.weight.dtype) if name in f.converted else x)
            return x

        first = [modules[name](x) for name in f.layers[:-1]]  # type: ignore[misc]
        if not f.gated:
            h = applied([f.activation], first[0])
        else:
            gate, up = first if len(first) == 2 else first[0].chunk(2, -1)
            h = applied([f.activation], gate) * up
        return applied((*f.between, f.layers[-1], *f.behind), h)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "_block" else getattr(vars(self)["_block"].module, name)


class _Product:
    """Layers of one input: the first call computes for all, and gives columns of one tensor: code may ask for their strides."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = tuple(layers)
        self.result: tuple[Any, Sequence[Any]] | None = None

    def __call__(self, i: int, x: Any) -> Any:
        if i == 0:
            parts = [layer(x) for layer in self.layers]
            self.result = x, torch.cat(parts, -1).split([part.shape[-1] for part in parts], -1)
        if self.result is None or self.result[0] is not x:
            return self.layers[i](x)
        return self.result[1][i]


class _OfProduct(nn.Module):
    def __init__(self, product: _Product, i: int) -> None:
        super().__init__()
        self._product, self._i = product, i

    def forward(self, x: Any) -> Any:
        return self._product(self._i, x)

    def __getattr__(self, name: str) -> Any:
        attributes = vars(self)
        return getattr(attributes["_product"].layers[attributes["_i"]], name)


class _Handing(nn.Module):
    """A norm by its formula, of which others than the MLP behind it get nothing but NaN."""

    def __init__(self, norm: NormBefore) -> None:
        super().__init__()
        self._norm = norm
        self.result: tuple[Any, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        formula, norm = self._norm.formula, self._norm.module
        eps, y = getattr(norm, formula.eps), x.float()
        if formula.kind == "layer":
            y = F.layer_norm(y, y.shape[-1:], eps=eps)
        else:
            y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        dtype = norm(x).dtype  # T5's own is that of its weight
        for name, p in norm._parameters.items():
            if p is not None:
                y = y * (p.float() + formula.offset) if name == "weight" else y + p.float()
        self.result = torch.full_like(y, torch.nan, dtype=dtype), y.to(dtype)
        return self.result[0]

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_norm"].module, name)


class _Handed(nn.Module):
    """The MLP behind it."""

    def __init__(self, norm: _Handing, mlp: nn.Module) -> None:
        super().__init__()
        self._norm, self._mlp = (norm,), (mlp,)  # in tuples, which hold no children

    def forward(self, x: Any) -> Any:
        result = self._norm[0].result
        return self._mlp[0](result[1] if result is not None and x is result[0] else x)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_mlp"][0], name)


def rewritings(leaves: Sequence[Leaf]) -> Iterator[Rewriting]:
    """Those of layers that are swapped together."""
    units = [leaf for leaf in leaves if isinstance(leaf.block, Block)]
    within = {name for leaf in units if isinstance(leaf.block, Block) for name in leaf.block.names}
    for leaf in units:
        block, (_, holder) = leaf.block, leaf.ancestors[-2]
        assert isinstance(block, Block)
        name = leaf.ancestors[-1][0]
        yield Rewriting(leaf.fqn, ("mlp", type(block.module), block.formula), _unit(holder, name, block), _alone(leaf))
        if (norm := block.norm) is not None:
            key = "norm", type(norm.holder), type(norm.module), norm.mlp, norm.formula
            yield Rewriting(norm.fqn, key, _handed(norm), None)
    for leaf in leaves:
        if isinstance(leaf, ConvolutionLeaf) and (leaf.norm or leaf.activation):
            kind = None if leaf.norm is None else type(leaf.norm.module)
            key = "convolution", type(leaf.parent), leaf.name, kind, leaf.formula  # type: ignore[assignment]
            yield Rewriting(leaf.fqn, key, _convolved(leaf), _alone(leaf), not is_sequence(type(leaf.parent)))
    others = [leaf for leaf in leaves if leaf.fqn not in within and not leaf.is_convolution]
    for leaf in others:
        if leaf.activation is not None and not leaf.is_experts:
            key = "activation", type(leaf.parent), leaf.name  # type: ignore[assignment]
            in_sequence = type(leaf.parent) is nn.Sequential  # whose code is torch's
            yield Rewriting(leaf.fqn, key, _activated(leaf), _alone(leaf), not in_sequence)
    for run in siblings(others):
        key = "product", type(run[0].parent), tuple(leaf.name for leaf in run)  # type: ignore[assignment]
        yield Rewriting(run[0].fqn, key, _one_product(run), _alone(run[0]))


_Modules = Callable[[], Iterable[tuple[nn.Module, str, nn.Module]]]


def _unit(holder: nn.Module, name: str, block: Block) -> _Modules:
    return lambda: [(holder, name, _OneUnit(block))]


def _handed(norm: NormBefore) -> _Modules:
    def modules() -> Iterator[tuple[nn.Module, str, nn.Module]]:
        name, mlp, handing = norm.fqn.rpartition(".")[2], norm.holder._modules[norm.mlp], _Handing(norm)
        assert mlp is not None
        return iter([(norm.holder, name, handing), (norm.holder, norm.mlp, _Handed(handing, mlp))])

    return modules


def _activated(leaf: Leaf) -> _Modules:
    act = leaf.activation
    assert act is not None
    return lambda: [
        (leaf.parent, leaf.name, _WithActivation(_member(leaf), act.module)),
        (leaf.parent, act.fqn.rpartition(".")[2], nn.Identity()),
    ]


def _convolved(leaf: ConvolutionLeaf) -> _Modules:
    """A convolution with the norm and the activation behind it. One that is called elsewhere too stays in its place."""

    def modules() -> Iterator[tuple[nn.Module, str, nn.Module]]:
        behind = [(x.fqn.rpartition(".")[2], x.module) for x in (leaf.norm, leaf.activation) if x is not None]
        yield leaf.parent, leaf.name, _WithActivation(_member(leaf), nn.Sequential(*(m for _, m in behind)))
        for name, module in behind:
            if not (leaf.activation is not None and leaf.activation.is_shared and module is leaf.activation.module):
                yield leaf.parent, name, nn.Identity()

    return modules


def _one_product(run: Sequence[Leaf]) -> _Modules:
    def modules() -> Iterator[tuple[nn.Module, str, nn.Module]]:
        product = _Product([_member(leaf) for leaf in run])
        for i, leaf in enumerate(run):
            yield leaf.parent, leaf.name, _OfProduct(product, i)

    return modules


def _member(leaf: Leaf) -> nn.Module:
    """What stands in a layer's place now."""
    module = leaf.parent._modules[leaf.name]
    assert module is not None
    return module


def _alone(leaf: Leaf) -> _Alone | None:
    if len(leaf.ancestors) < 2:
        return None
    make, size = (pictures_in, leaf.module.in_channels) if leaf.is_convolution else (features_in, leaf.in_features)
    return leaf.ancestors[-2][1], leaf.ancestors[-1][0], lambda module: make(module, size)  # type: ignore[arg-type]
