"""The projections of nn.MultiheadAttention as layers, which whatever swaps an nn.Linear then finds, measures and swaps.

torch's module holds in_proj_weight as a parameter, and its functions and the fast paths of nn.TransformerEncoder read that and
out_proj.weight themselves. So each such module makes way for an fp.nn.MultiheadAttention on the same parameters, whose in_proj is
an nn.Linear and which calls both; the fast paths pass it by. Where nothing of it is swapped in the end, torch's comes back.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import nn

from ...common.models.patterns import Pattern
from ...dispatch import Reason
from ...nn import MultiheadAttention
from ...proofs.walker import Leaf, leaves
from .. import rules
from ..report import Skipped

IN_PROJ, OUT_PROJ = "in_proj", "out_proj"  #: names in the attention
_SEPARATE = Reason(
    "separate_projections", "with kdim and vdim it holds three projections whose biases are one parameter", "leave it"
)


def why_not_replaced(leaf: Leaf, context: rules.Context, on_meta: bool = False) -> Reason | None:
    """Why another module cannot take the place of this nn.MultiheadAttention. on_meta: whether its values may come later."""
    for rule in (rules.dotted, rules.shared, rules.adapter, rules.tensor_class, rules.offloaded, rules.meta,
                 rules.hooks, rules.dtype):  # fmt: skip
        if rule is rules.meta and on_meta:
            continue
        if finding := rule(leaf, context, None):
            return Reason(rule.__name__, *finding)
    return MultiheadAttention.why_not(leaf.module)


@dataclass(eq=False)
class _Opened:
    """One module, and what stands in its place. It is in the table of originals, and may not keep the model alive."""

    fqn: str
    name: str
    parent: weakref.ref[nn.Module]
    original: nn.Module
    opened: MultiheadAttention  #: the original itself, where that is one of ours
    in_proj: nn.Linear | None  #: None: it stays a parameter

    def layers(self) -> Iterator[nn.Module]:
        """The layers that may be swapped where this is in its place: torch's encoder layer reads the others' weights too, in a fast
        path that is on where the attention is torch's."""
        yield from self.opened.children()
        parent = self.parent()
        if isinstance(parent, nn.TransformerEncoderLayer):
            yield from parent.children()

    def put(self) -> None:
        self._stand(self.opened)
        if self.in_proj is not None:
            _open(self.opened, self.in_proj)

    def undo(self) -> None:
        if self.in_proj is not None:
            _close(self.opened)
        original, opened = self.original, self.opened
        if original is not opened:
            original.training = opened.training
            original._parameters.update({n: p for n, p in opened._parameters.items() if n in original._parameters})
            original._modules[OUT_PROJ] = opened._modules[OUT_PROJ]
        self._stand(original)

    def _stand(self, module: nn.Module) -> None:
        if (parent := self.parent()) is not None:
            parent._modules[self.name] = module


class Projections:
    """Those of a model: `put` into it, and taken out by `undo`, all of them. As a context they are in it, and stay there where
    `stays` was set. on_meta: of modules without values, too."""

    def __init__(self, model: nn.Module, on_meta: bool = False) -> None:
        self._others: list[Skipped] = []
        self._modules: list[_Opened] = []
        self._nested: list[weakref.ref[nn.TransformerEncoder]] = []
        self._model = weakref.ref(model)
        self.stays = False
        self._is_put = False
        attention_leaves = leaves(model, lambda m: isinstance(m, nn.MultiheadAttention), Leaf)
        context = rules.Context(model) if attention_leaves else None
        for leaf in attention_leaves:
            assert context is not None
            if (opened := why_not_replaced(leaf, context, on_meta) or _opened(leaf)) is None:
                continue
            if isinstance(opened, Reason):
                self._others.append(Skipped(f"{leaf.fqn}.{IN_PROJ}", opened))
                continue
            self._modules.append(opened)
            if opened.in_proj is None:
                self._others.append(Skipped(f"{leaf.fqn}.{IN_PROJ}", _SEPARATE))

    def __enter__(self) -> Projections:
        self.put()
        return self

    def __exit__(self, *_: object) -> None:
        if not self.stays:
            self.undo()

    def narrow(self, modules: Iterable[nn.Module]) -> None:
        """Leaves in place what has one of these, attention or layers, and as layers those projections that are among them."""
        ids = {id(m) for m in modules}
        stay = [x for x in self._modules if id(x.opened) in ids or any(id(m) in ids for m in x.layers())]
        self.undo()
        self._modules = [replace(x, in_proj=x.in_proj if id(x.in_proj) in ids else None) for x in stay]
        self.put()

    def places(self) -> Iterator[nn.Module]:
        """The modules that stand there, and those that hold them."""
        for x in self._modules:
            yield x.opened
            if (parent := x.parent()) is not None:
                yield parent

    def skipped(self, context: rules.Context) -> list[Skipped]:
        """Projections that cannot be layers, of those that the user did not leave out."""

        def named(patterns: Iterable[Pattern], fqn: str) -> bool:
            return any(p.matches(fqn) for p in patterns)

        return [
            s
            for s in self._others
            if not named(context.exclude, s.fqn) and (not context.include or named(context.include, s.fqn))
        ]

    def put(self) -> None:
        if self._is_put:
            return
        self._is_put = True
        for x in self._modules:
            x.put()
        for encoder in [*self._making_nested()]:
            encoder.use_nested_tensor = False
            self._nested.append(weakref.ref(encoder))

    def _making_nested(self) -> Iterator[nn.TransformerEncoder]:
        """Encoders that make nested tensors of padded ones for torch's fast paths, which ours do not take."""
        ids, model = {id(x.opened) for x in self._modules}, self._model()
        for m in model.modules() if model is not None and ids else ():
            if isinstance(m, nn.TransformerEncoder) and getattr(m, "use_nested_tensor", False):
                attention = [id(getattr(layer, "self_attn", None)) for layer in m.layers]
                if not ids.isdisjoint(attention):
                    yield m

    def undo(self) -> None:
        if not self._is_put:
            return
        self._is_put = False
        while self._nested:
            if (encoder := self._nested.pop()()) is not None:
                encoder.use_nested_tensor = True
        for x in reversed(self._modules):
            x.undo()


def _opened(leaf: Leaf) -> _Opened | None:
    """None for one of ours whose projections are layers already, or are three."""
    module = leaf.module
    ours = module if isinstance(module, MultiheadAttention) else MultiheadAttention.from_torch(module, fused=False)
    in_proj = None
    weight, bias = ours._parameters["in_proj_weight"], ours._parameters["in_proj_bias"]
    if weight is not None:
        in_proj = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta").train(module.training)
    elif ours is module:
        return None
    return _Opened(leaf.fqn, leaf.name, weakref.ref(leaf.parent), module, ours, in_proj)


def _open(attention: MultiheadAttention, in_proj: nn.Linear) -> None:
    """in_proj_weight and in_proj_bias become the layer's: the same parameters."""
    parameters = attention._parameters
    in_proj._parameters.update(weight=parameters["in_proj_weight"], bias=parameters["in_proj_bias"])
    parameters.update(in_proj_weight=None, in_proj_bias=None)
    attention._modules = {IN_PROJ: in_proj, **attention._modules}  # in the order of calls


def _close(attention: MultiheadAttention) -> None:
    in_proj = attention._modules.pop(IN_PROJ)
    assert isinstance(in_proj, nn.Linear)
    attention._parameters.update(in_proj_weight=in_proj._parameters["weight"], in_proj_bias=in_proj._parameters["bias"])
