"""Finds modules of a model: the Linear-like ones are `nn.Linear`, Hugging Face's `Conv1D` (GPT-2), and what derives from them;
and modules of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from ..dispatch import Reason
from ..integrations.peft import BASE
from ..integrations.tensor_parallel import is_row_wise
from ..nn.linear.quantized_linear import is_conv1d, linear_weight
from ..nn.quantized_experts import experts_sizes, is_experts
from .activation import Activation, activation_behind, activation_within
from .code import Reach
from .convolution import NormBehind, chain_behind
from .mlp_formulas import Block, block_of


@dataclass(frozen=True)
class Leaf:
    """A module that may be replaced, Linear-like or attention, and where it is."""

    fqn: str
    module: nn.Module
    parent: nn.Module
    name: str
    ancestors: tuple[tuple[str, nn.Module], ...]  #: from the root, (name in its parent, module); the root's name is ""
    places: tuple[str, ...]  #: every name of the module; more than one where it is shared
    activation: Activation | None = None  #: what its output goes into, and nothing else does
    block: Block | Reason | None = None  #: the MLP whose first layer it is, or why that is no module of its own

    is_experts: ClassVar[bool] = False
    is_convolution: ClassVar[bool] = False

    @property
    def outermost(self) -> Leaf:
        """What the model knows it as: the outermost of the adapters that hold it as `base_layer`, or itself."""
        if self.name != BASE or len(self.ancestors) < 2:
            return self
        (name, adapter), parent = self.ancestors[-1], self.ancestors[-2][1]
        fqn = self.fqn.removesuffix(f".{BASE}")
        return Leaf(fqn, adapter, parent, name, self.ancestors[:-1], (fqn,)).outermost

    @property
    def weight(self) -> Tensor:
        """[N, K]"""
        return linear_weight(self.module)

    @property
    def in_features(self) -> int:
        return self.module.nx if is_conv1d(self.module) else self.module.in_features  # type: ignore[return-value]

    @property
    def out_features(self) -> int:
        return self.module.nf if is_conv1d(self.module) else self.module.out_features  # type: ignore[return-value]

    @property
    def has_bias(self) -> bool:
        return self.module.bias is not None

    @property
    def formula(self) -> str | None:
        """The formula of its activation."""
        return self.activation.formula if self.activation is not None else None


L = TypeVar("L", bound=Leaf)


class ExpertsLeaf(Leaf):
    """A module of experts."""

    is_experts: ClassVar[bool] = True

    @property
    def weight(self) -> Tensor:
        """[E, N, K], or transposed: the first of the two."""
        return next(self.module.parameters()).detach()

    @property
    def in_features(self) -> int:
        return experts_sizes(self.module)[2]

    @property
    def out_features(self) -> int:
        """What is between the two projections."""
        return experts_sizes(self.module)[1]

    @property
    def has_bias(self) -> bool:
        return bool(self.module.has_bias)

    @property
    def formula(self) -> str | None:
        return activation_within(self.module)


@dataclass(frozen=True)
class ConvolutionLeaf(Leaf):
    """An nn.Conv2d, or what derives from it."""

    norm: NormBehind | None = None  #: what its output goes into, before the activation

    is_convolution: ClassVar[bool] = True

    @property
    def weight(self) -> Tensor:
        """[C_out, C_in / groups, kh, kw]"""
        return self.module.weight.detach()  # type: ignore[operator]

    @property
    def in_features(self) -> int:
        """K of the product that it is: channels of a group times the pixels of a window."""
        return self.weight[0].numel()

    @property
    def out_features(self) -> int:
        return self.module.out_channels  # type: ignore[return-value]

    @property
    def formula(self) -> str | None:
        within = self.norm.activation if self.norm is not None else None
        return within if self.activation is None else self.activation.formula


def all_leaves(model: nn.Module) -> list[Leaf]:
    """All that a swap takes below `model`: Linear-like layers, then convolutions, then modules of experts."""
    reach = Reach(model)
    return [*linear_like(model, reach), *convolutions(model, reach), *experts_leaves(model)]


def linear_like(model: nn.Module, reach: Reach | None = None) -> list[Leaf]:
    """Every Linear-like module below `model`, once, under its first name, in the model's order. reach: into the model, which others
    share."""
    reach = Reach(model) if reach is None else reach
    return [_proven(leaf, reach) for leaf in linear_leaves(model)]


def _proven(leaf: Leaf, reach: Reach) -> Leaf:
    """With what the model's code says of it."""
    if is_row_wise(leaf.module):  # what it computes itself are parts of sums
        return leaf
    activation = activation_behind(leaf, reach)
    block = block_of(leaf, activation, reach)
    if activation is None and isinstance(block, Block):
        activation = block.behind_first
    return replace(leaf, activation=activation, block=block) if activation or block else leaf


def convolutions(model: nn.Module, reach: Reach | None = None) -> list[ConvolutionLeaf]:
    """Every nn.Conv2d below `model`, with what it can compute besides, as `linear_like` has Linears."""
    reach = Reach(model) if reach is None else reach
    modules = leaves(model, lambda m: isinstance(m, nn.Conv2d) and BASE not in m._modules, ConvolutionLeaf)
    chains = (chain_behind(leaf, reach) for leaf in modules)
    return [replace(leaf, norm=norm, activation=act) for leaf, (norm, act) in zip(modules, chains)]


def experts_leaves(model: nn.Module) -> list[Leaf]:
    """The modules of experts below `model`, as `linear_like` has Linears."""
    return leaves(model, is_experts, ExpertsLeaf)


def linear_leaves(model: nn.Module) -> list[Leaf]:
    """The same without their activations, whose proof reads the model's code: for names and shapes."""
    return leaves(
        model, lambda m: (isinstance(m, nn.Linear) or is_conv1d(m)) and BASE not in m._modules, Leaf
    )  # no adapter


def leaves(model: nn.Module, predicate: Callable[[nn.Module], bool], kind: type[L]) -> list[L]:
    """The modules below `model` for which `predicate` holds, as `linear_like` has them."""
    first_places: dict[int, tuple[str, nn.Module, nn.Module, str, tuple[Any, ...]]] = {}
    places: dict[int, list[str]] = {}
    for fqn, name, module, parent, ancestors in _walk("", model, (("", model),), set()):
        if predicate(module):
            first_places.setdefault(id(module), (fqn, module, parent, name, ancestors))
            places.setdefault(id(module), []).append(fqn)
    return [kind(*leaf, tuple(places[key])) for key, leaf in first_places.items()]


def _walk(
    prefix: str, module: nn.Module, ancestors: tuple[tuple[str, nn.Module], ...], visited: set[int]
) -> Iterator[tuple[str, str, nn.Module, nn.Module, tuple[tuple[str, nn.Module], ...]]]:
    """(fqn, name, child, parent, ancestors) of every edge of the module tree; what is below a shared module, once."""
    visited.add(id(module))
    for name, child in module._modules.items():
        if child is None:
            continue
        fqn = f"{prefix}.{name}" if prefix else name
        yield fqn, name, child, module, ancestors
        if id(child) not in visited:
            yield from _walk(fqn, child, (*ancestors, (name, child)), visited)
