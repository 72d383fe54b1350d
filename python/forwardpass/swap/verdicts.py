"""What running the model says of a decision, before anything is built: what of it is not made, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.batches import Forward
from ..common.models.modules import hooked, is_compressed
from ..dispatch import Reason
from ..formats.loaded import is_stored
from ..integrations.sentence_transformers import class_of
from ..integrations.tensor_parallel import sharding_of
from ..integrations.transformers.unpadding import current
from ..nn import Int8Conv2d, QuantizedModule
from ..nn.unread_image import Steps
from ..ops.common.quantized_rows import FLOATS
from ..proofs import inputs, run
from ..proofs.mlp_formulas import Block
from ..proofs.norms import Deferrals, Deferring
from ..proofs.rewritings import Rewriting, rewritings
from ..proofs.walker import ConvolutionLeaf, Leaf
from .attention.attention_modules import AttentionDecision, AttentionSwap
from .attention.kv_cache import CacheSwap
from .attention.unpadded_encoders import UnpaddingDecision, UnpaddingSwap
from .decision import Decision
from .precision import Early
from .report import Skipped

_RETURNED = Reason(
    "returned",
    "the model returns what it computes at padding, which would be another thing without it",
    "pass unpad=True if whatever reads its result leaves padding out",
)
_UNSEEN = Reason(
    "unproven",
    "no input could be made up with which it runs without padding",
    "call fp.swap with calibrate= and a batch of your own that is padded",
)


_NO_LAYERS: Mapping[str, QuantizedModule] = {}


@dataclass(frozen=True)
class Verdicts:
    """What is not made, and why."""

    layers: Mapping[str, Reason] = field(default_factory=dict)  #: by the first layers of products and MLPs, and norms
    attention: Reason | None = None
    unpadding: Reason | None = None
    rotation: Mapping[str, Reason] = field(default_factory=dict)  #: by the attention whose cache does not rotate
    deferrals: Deferrals = field(default_factory=Deferrals)  #: what may be deferred

    @property
    def apart(self) -> dict[str, Reason]:
        return {**self.layers, **self.rotation}

    def but_unproven(self) -> Verdicts:
        """The same where what cannot be run is believed."""

        def known(reasons: Mapping[str, Reason]) -> dict[str, Reason]:
            return {fqn: reason for fqn, reason in reasons.items() if reason.code != run.UNPROVEN.code}

        attention, unpadding = (
            r if r and r.code != run.UNPROVEN.code else None for r in (self.attention, self.unpadding)
        )
        return Verdicts(known(self.layers), attention, unpadding, known(self.rotation), self.deferrals)

    def applied(self, decision: Decision) -> Decision:
        """The decision without it."""

        def without(leaf: Leaf) -> Leaf:
            reason, block = self.layers.get(leaf.fqn), leaf.block
            if isinstance(block, Block) and block.norm is not None and block.norm.fqn in self.layers:
                leaf = replace(leaf, block=replace(block, norm=None))
            if reason is None or leaf.is_experts:
                return leaf
            if isinstance(leaf, ConvolutionLeaf):
                leaf = replace(leaf, norm=None)
            return replace(leaf, activation=None, block=reason if block is not None else None)

        attention, cache = decision.attention, decision.kv_cache
        if self.attention is not None:
            skipped = (Skipped(leaf.fqn, self.attention) for leaf in attention.swapped)
            attention = AttentionDecision(attention.leaves, (), (*attention.skipped, *skipped))
        if self.rotation:
            names = {m: fqn for fqn, m in decision.model.named_modules()}
            cache = replace(cache, rotating=tuple(m for m in cache.rotating if names[m] not in self.rotation))
        return replace(
            decision,
            swapped=tuple((without(leaf), p) for leaf, p in decision.swapped),
            folded=tuple(leaf for leaf in decision.folded if leaf.fqn not in self.layers),
            attention=attention,
            unpadding=decision.unpadding if self.unpadding is None else UnpaddingDecision((), self.unpadding),
            kv_cache=cache,
        )


@dataclass(frozen=True)
class _Change:
    """What is put into a model besides layers."""

    parts: Sequence[AttentionSwap | UnpaddingSwap | CacheSwap]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        with ExitStack() as stack:
            for part in self.parts:
                stack.callback(part.undo)
                part.put()
            yield


def _attention(decision: Decision) -> _Change:
    """In the model's own floats, as all that is proven."""
    return _Change([AttentionSwap(decision.model, decision.attention.in_floats)])


@dataclass(frozen=True)
class _Unpadded(_Change):
    """And which stacks were seen to run without padding, by their first layers."""

    decision: UnpaddingDecision
    seen: set[nn.Module] = field(default_factory=set)

    @staticmethod
    def of(decision: Decision) -> _Unpadded:
        named = AttentionSwap(decision.model, decision.attention.in_floats, decision.unpadding.named)
        return _Unpadded([named, UnpaddingSwap(decision.unpadding)], decision=decision.unpadding)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        def note(layer: nn.Module, *_: Any) -> None:
            if (rows := current()) is not None and rows.are_out:
                self.seen.add(layer)

        with super().in_place(), hooked(((x.layers[0], x.layers[0]) for x in self.decision.stacks), before=note):
            yield

    def verdict(self, error: run.Error, prover: run.Prover, unpad: str | bool) -> Reason | None:
        """Where tokens are what they were. A call of sentence-transformers gives its users no padding."""
        if not all(x.layers[0] in self.seen for x in self.decision.stacks):
            return _UNSEEN
        returned = error.everywhere > 1 and class_of(prover.model) is None
        return _RETURNED if unpad == "auto" and returned else None


def _cached(decision: Decision, rotating: Iterable[nn.Module]) -> _Change:
    """In the model's own floats, whatever the cache is to hold."""
    cache = replace(decision.kv_cache, kv_cache="auto", rotating=tuple(rotating))
    return _Change([AttentionSwap(decision.model, decision.attention.in_floats), CacheSwap(cache)])


def prove(
    decision: Decision,
    unpad: str | bool,
    batch: Any = None,
    forward: Forward | None = None,
    replacements: Mapping[str, QuantizedModule] = _NO_LAYERS,
) -> Verdicts:
    """Runs the model as it is and as it is to be: on a user's batch, and on what is made up.

    Args:
        unpad: of `fp.swap`.
        replacements: layers that are quantised already, by name, whose floats are not at hand.

    Raises:
        ValueError: with kv_cache= the model computes something else.
    """
    stacks = decision.unpadding.stacks
    unpadded, candidates = _Unpadded.of(decision), _candidates(decision)
    if stacks:
        candidates.append(unpadded)
    if (deferring := _deferring(decision)) is not None:
        candidates.append(deferring)
    if not candidates:
        return Verdicts()
    stand_ins, runs_whole = _stand_ins(decision, replacements)

    def prover_of(again: bool) -> run.Prover:
        users = inputs.of_batch(batch, forward) if batch is not None else ()
        sources = (users, inputs.made_up(decision.model)) if runs_whole else ()
        return run.Prover(decision.model, *sources, stand_ins=stand_ins, again=again)

    prover = prover_of(bool(replacements))
    if replacements and not prover.runs:  # its code may take no float32
        prover = prover_of(False)
    if prover.runs:
        try:
            error = prover.error(candidates)
        except Exception:  # whatever its code raises so
            error = None
        if error is not None and error.tokens <= 1:
            unpadding = unpadded.verdict(error, prover, unpad) if stacks else None
            return Verdicts(unpadding=unpadding, deferrals=_outcome(deferring))
        if not prover.is_steady():
            prover = prover.of(decision.model)
    layers = run.disproved(prover, _rewritten(decision))
    if not prover.runs:
        return Verdicts(layers, None, _UNSEEN if stacks else None, _rotation(decision, run.UNPROVEN))
    verdicts = _separately(decision, unpad, prover, layers)
    remaining = verdicts.applied(decision)
    candidates = [*_candidates(remaining), *([_Unpadded.of(remaining)] if remaining.unpadding.stacks else [])]
    if candidates and (reason := prover.why_not(candidates)):  # of which each by itself gives what the model gives
        nothing = {x.fqn: reason for x in _rewritten(decision)}
        return Verdicts(nothing, verdicts.attention, reason if stacks else None, _rotation(decision, reason))
    deferring = _deferring(remaining)
    if deferring is None or prover.why_not([*candidates, deferring]):
        return verdicts
    return replace(verdicts, deferrals=_outcome(deferring))


def _deferring(decision: Decision) -> Deferring | None:
    return Deferring.of(decision.model, [leaf for leaf, _ in decision.swapped])


def _outcome(deferring: Deferring | None) -> Deferrals:
    return Deferrals() if deferring is None else deferring.outcome


def _gains_by_waiting(layer: Int8Conv2d) -> bool:
    """On a CPU the product of 1 x 1 takes longer with what is added to it than the addition: 16 of ResNet-50's 3 % of its time."""
    return not (layer.is_pointwise and layer.qweight.device.type == "cpu")


def let_outputs_wait(model: nn.Module, batch: Any = None, forward: Forward | None = None) -> Reason | None:
    """Finds what is done with the outputs of a swapped model's convolutions, by running it: what their epilogues can compute, they
    compute from here on (`UnreadImage`). Where the model then gives something else, nothing is: returns why.

    Args:
        batch, forward: a user's, of `fp.swap`.
    """
    layers = [m for m in model.modules() if isinstance(m, Int8Conv2d) and _gains_by_waiting(m)]
    if not layers:
        return None
    users = inputs.of_batch(batch, forward) if batch is not None else ()
    prover = run.Prover(model, users, inputs.made_up(model))
    if not prover.runs:
        return run.UNPROVEN
    notes = [Steps(None) for _ in layers]
    for layer, steps in zip(layers, notes):
        layer.steps = steps
    reason: Reason | None = run.UNPROVEN
    try:
        prover.run_once()
        for layer, steps in zip(layers, notes):
            layer.then = steps.chain()
        reason = prover.why_not(()) if any(layer.then for layer in layers) else None
    except Exception as e:  # whatever its code raises so
        reason = Reason("disproved", f"run so, its code raises {type(e).__name__}", "leave it")
    finally:
        if reason is not None:
            for layer in layers:
                layer.then = ()
    return reason


def _rewritten(decision: Decision) -> Iterator[Rewriting]:
    return rewritings([*(leaf for leaf, _ in decision.swapped), *decision.folded])


def _candidates(decision: Decision) -> list[run.Candidate]:
    """All that is done at once, but for padding."""
    cache = decision.kv_cache
    return [
        *([_attention(decision)] if decision.attention.swapped else []),
        *([_cached(decision, cache.rotating)] if cache.kv_cache is not None else []),
        *_rewritten(decision),
    ]


def _rotation(decision: Decision, reason: Reason, cls: type[nn.Module] = nn.Module) -> dict[str, Reason]:
    """By the names of attention of this class whose cache would rotate what it appends."""
    names = {m: fqn for fqn, m in decision.model.named_modules()}
    reason = replace(reason, text=f"its cache does not rotate what it appends: {reason.text}")
    return {names[m]: reason for m in decision.kv_cache.rotating if isinstance(m, cls)}


def _separately(decision: Decision, unpad: str | bool, prover: run.Prover, layers: Mapping[str, Reason]) -> Verdicts:
    """One change after another, where all of them together are none."""
    attention = prover.why_not([_attention(decision)]) if decision.attention.swapped else None
    unpadding, cache = None, decision.kv_cache
    if decision.unpadding.stacks:
        unpadded = _Unpadded.of(decision)
        unpadding = attention or prover.why_not([unpadded])
        if unpadding is None:
            unpadding = unpadded.verdict(prover.error([unpadded]), prover, unpad)
    rotation: dict[str, Reason] = {}
    if cache.kv_cache is not None:
        if reason := attention or prover.why_not([_cached(decision, ())]):
            raise ValueError(
                f"kv_cache={cache.kv_cache!r} does not go with this {type(decision.model).__name__}, as {reason.text}: drop it"
            )
        for cls in dict.fromkeys(map(type, cache.rotating)):
            if reason := prover.why_not([_cached(decision, (m for m in cache.rotating if isinstance(m, cls)))]):
                rotation |= _rotation(decision, reason, cls)
    return Verdicts(layers, attention, unpadding, rotation)


def _stand_ins(
    decision: Decision, replacements: Mapping[str, QuantizedModule]
) -> tuple[list[tuple[nn.Module, str, nn.Module]], bool]:
    """(floats in the place of layers that a run would change, that several processes are together, or that are quantised already;
    whether the model then runs). The same ones in all places that are alike. Quantised experts stand for themselves."""
    model = decision.model
    kinds: dict[tuple[Any, ...], nn.Module] = {}
    dtype = next((p.dtype for p in model.parameters() if p.dtype in FLOATS), torch.get_default_dtype())
    stand_ins: list[tuple[nn.Module, str, nn.Module]] = []
    for leaf in decision.layers:
        layer = replacements.get(leaf.fqn)
        if layer is not None and leaf.is_experts:
            stand_ins.append((leaf.parent, leaf.name, layer))
        elif isinstance(layer, Int8Conv2d):
            stand_ins.append((leaf.parent, leaf.name, _ConvolutionInFloats(layer)))
        elif (layer is not None or _stays(leaf.module) or Early.of(leaf.module)) and not (
            leaf.is_experts or leaf.is_convolution
        ):
            values = leaf.module if layer is None else layer
            device = next((t.device for t in (*values.buffers(), *values.parameters())), torch.device("cpu"))
            stated = layer.anchor.dtype if layer is not None else leaf.weight.dtype if Early.of(leaf.module) else dtype
            of_layer = stated if stated in FLOATS else dtype
            sizes = leaf.in_features, leaf.out_features, leaf.has_bias
            key = type(leaf.parent), leaf.name, sizes, device, of_layer
            if key not in kinds:
                kinds[key] = _StandIn(*sizes, device, of_layer, len(kinds))
            stand_ins.append((leaf.parent, leaf.name, kinds[key]))
    replaced = {id(leaf.module) for leaf in decision.layers if not leaf.is_experts or leaf.fqn in replacements}
    return stand_ins, not any(_stays(m) and id(m) not in replaced for m in model.modules())


class _StandIn(nn.Linear):
    """A layer of made-up values in a few kilobytes, in the place of one whose floats are not at hand. It multiplies by few rows and
    gives their results again and again: their number is prime, so that no two heads are alike."""

    OWN = 127

    def __init__(
        self, in_features: int, out_features: int, bias: bool, device: torch.device, dtype: torch.dtype, seed: int
    ) -> None:
        super().__init__(in_features, out_features, bias, device="meta")
        weight = inputs.made_up_weight(out_features, in_features, dtype, device, seed)
        self.weight = nn.Parameter(weight, False)
        if bias:
            self.bias = nn.Parameter(inputs.made_up_weight(1, out_features, dtype, device, seed).flatten(), False)

    def forward(self, input: Tensor) -> Tensor:
        y = F.linear(input, self.weight[: self.OWN])
        y = torch.cat([y] * -(-self.out_features // self.OWN), -1)[..., : self.out_features].contiguous()
        return y if self.bias is None else y + self.bias


class _ConvolutionInFloats(nn.Module):
    """A convolution of a quantised one's own values, whose floats are made for each call. In a model on the meta device the
    convolution itself has none, and torch raises nothing: its result is then memory that nobody wrote."""

    def __init__(self, layer: Int8Conv2d) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, which holds no child: the model runs in floats

    def forward(self, input: Tensor) -> Tensor:
        return self._layer[0].in_floats(input)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_layer"][0], name)


def _stays(module: nn.Module) -> bool:
    return is_stored(module) or is_compressed(module) or sharding_of(module) is not None
