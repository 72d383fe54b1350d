"""Which norm and which activation are applied to a convolution's output, and to nothing else: the swapped layer computes them.

Read as `activation` reads it: `x = self.conv(x)`, `x = self.bn(x)`, `x = self.act(x)`, in lines of their own, as calls within
calls, or as members of an nn.Sequential. An activation that is called more than once (a block's ReLU) may be among them where to
apply it twice is to apply it once.
"""

from __future__ import annotations

import ast
import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import nn

from ..common.models.exchange import Replaced
from ..common.models.modules import is_watched
from ..integrations.class_source import is_as_written, owner_of_forward
from ..nn import FloatConv2d, Int8Conv2d
from ..nn.folded import FoldedNorm, InConvolution, InShared, SharedActivation
from ..nn.linear.quantized_linear import qualified
from ..ops.common.activations import PLAIN
from .activation import Activation, called_as_a_whole, formula_of, is_sequence, pairs, words
from .code import CONTAINERS, Function, Reach

if TYPE_CHECKING:
    from .walker import ConvolutionLeaf, Leaf

#: Norms of which it was read that they are torch's BatchNorm2d in eval mode, or that and what `_within` finds.
_NORMS = {
    "torch.nn.modules.batchnorm.BatchNorm2d",
    "timm.layers.norm_act.BatchNormAct2d",
    "torchvision.ops.misc.FrozenBatchNorm2d",
}
#: Of which twice is once.
_IDEMPOTENT = ("relu", "relu6")


@dataclass(frozen=True)
class NormBehind:
    """A norm that reads a convolution's output, and the activation that is within it, if any."""

    fqn: str
    module: nn.Module
    activation: str | None


def chain_behind(leaf: Leaf, reach: Reach) -> tuple[NormBehind | None, Activation | None]:
    """What a convolution can compute itself; `reach` looks through its model."""
    parent = leaf.parent
    follows = _follower(leaf, reach)
    names, norm, act = [leaf.name], None, None
    name, is_alone = follows(leaf.name)
    if name and (within := _norm(parent, name)) and is_alone:
        norm = NormBehind(_beside(leaf, name), within[0], within[1])
        names.append(name)
        name, is_alone = (None, True) if norm.activation else follows(name)
    passed: list[str] = []
    while name and is_alone and type(parent._modules.get(name)) is nn.Identity:
        passed.append(name)
        name, is_alone = follows(name)
    module = parent._modules.get(name) if name else None
    formula = None if module is None or is_watched(module) else formula_of(module)
    if name and module is not None and formula in PLAIN and (is_alone or formula in _IDEMPOTENT):
        act = Activation(_beside(leaf, name), module, formula, not is_alone, tuple(passed))
        names += [*passed, name]
    if len(names) == 1:
        return None, None
    used = [m for name in names if (m := parent._modules[name]) is not None]
    in_sequence = is_sequence(type(parent))
    proven = all(map(reach.has_one_place, used)) and (
        called_as_a_whole(leaf, reach) if in_sequence else reach.only_named_by(parent, names, in_forward=True)
    )
    return (norm, act) if proven else (None, None)


def _beside(leaf: Leaf, name: str) -> str:
    return leaf.fqn.removesuffix(leaf.name) + name


def _follower(leaf: Leaf, reach: Reach) -> Callable[[str], tuple[str | None, bool]]:
    """What says of a member's name (the member that is called on what that one gives, and nothing else; whether with nothing
    else)."""
    parent = leaf.parent
    if is_sequence(type(parent)):
        behind = dict(itertools.pairwise(parent._modules))
        return lambda name: (behind.get(name), True)
    if is_watched(parent) or isinstance(parent, CONTAINERS) or not _may_be_chain(parent):
        return lambda name: (None, False)
    methods = _from_forward(reach.methods(type(parent)) or ())
    return lambda name: called_next(methods, name)


def _may_be_chain(parent: nn.Module) -> bool:
    """Asked before any code is read."""
    return any(m is not None and (formula_of(m) or _is_norm(m)) for m in parent._modules.values())


def _is_norm(module: nn.Module) -> bool:
    return qualified(type(module)) in _NORMS


def _norm(parent: nn.Module, name: str) -> tuple[nn.Module, str | None] | None:
    """(the norm of this name, the activation within it); None where it is none, or computes something else besides."""
    module: Any = parent._modules.get(name)
    if "." in name or module is None or not _is_norm(module) or is_watched(module):
        return None
    if not is_as_written(owner_of_forward(type(module)), "forward") or module._buffers.get("running_mean") is None:
        return None
    if not module._modules:
        return module, None
    act, drop = module._modules.get("act"), module._modules.get("drop")
    others = {*module._modules} - {"act", "drop"}
    if others or type(drop) is not nn.Identity or act is None or is_watched(act):
        return None
    formula = formula_of(act)
    return (module, formula) if type(act) is nn.Identity or formula in PLAIN else None


# ---- the code of the module that holds them


@lru_cache(maxsize=4096)
def _from_forward(methods: tuple[Function, ...]) -> tuple[Function, ...]:
    """forward and those that it calls, and that those call: YOLO's Conv has another for when its norm is gone."""
    by_name = {m.name: m for m in methods if not isinstance(m, ast.Lambda)}
    todo, reached = ["forward"], {}
    while todo:
        name = todo.pop()
        if name in by_name and name not in reached:
            reached[name] = by_name[name]
            todo += [word for word in words(by_name[name]) if isinstance(word, str)]
    lambdas = (m for m in methods if isinstance(m, ast.Lambda))
    return (*reached.values(), *lambdas)


@lru_cache(maxsize=4096)
def called_next(methods: tuple[Function, ...], name: str) -> tuple[str | None, bool]:
    """(the member that is called on what `self.<name>` gives, which is mentioned nowhere else; whether the other is so too)."""
    behind = [other for m in methods if isinstance(m, ast.FunctionDef) for other in pairs(m, name)]
    mentioned = [word for method in methods for word in words(method)]
    if len(behind) != 1 or mentioned.count(name) != 1:
        return None, False
    return behind[0], mentioned.count(behind[0]) == 1


# ---- what stands in their places


def stand_ins(
    leaf: ConvolutionLeaf, new: Int8Conv2d | FloatConv2d, shared: dict[str, SharedActivation]
) -> Iterator[tuple[Replaced | None, weakref.ref[nn.Module], Callable[..., None]]]:
    """(what is replaced behind a convolution, if anything; the module whose forward begins with that; what it then calls). shared:
    by name, what stands for several already."""
    chain, path = [m for _, m in leaf.ancestors], [name for name, _ in leaf.ancestors]
    while len(chain) > 1 and type(chain[-1]) in CONTAINERS:
        chain.pop()
    holder, within = chain[-1], tuple(path[len(chain) :])

    def instead(cls: type[InConvolution], fqn: str, module: nn.Module) -> InConvolution:
        return cls(module, new, (leaf.name, fqn.rpartition(".")[2]), type(holder), within)

    norm, act = leaf.norm, leaf.activation
    if norm is not None and new.norm is not None:
        folded = instead(FoldedNorm, norm.fqn, norm.module)
        yield Replaced(norm.fqn, norm.module, folded), weakref.ref(holder), folded.begin
    if act is None or new.activation is None:
        return
    applied = instead(InShared if act.is_shared else InConvolution, act.fqn, act.module)
    applied.passed = act.passed
    if not isinstance(applied, InShared):
        yield Replaced(act.fqn, act.module, applied), weakref.ref(holder), applied.begin
        return
    is_first = act.fqn not in shared
    applied.shared = (shared.setdefault(act.fqn, SharedActivation(act.module)),)
    replaced = Replaced(act.fqn, act.module, applied.shared[0]) if is_first else None
    yield replaced, weakref.ref(holder), applied.begin
