"""Which encoders of a swapped model run their layers as one operation on a CPU, and what that changes in the model.

What runs then, and when a call goes layer by layer all the same, is in `integrations.transformers.encoder_stack`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ...common.batches import Forward, device_of
from ...common.environment import cpu_tier
from ...common.printing.quiet import warn_once
from ...dispatch import Reason
from ...integrations.transformers import encoder_stack
from ...integrations.transformers.attention import register
from ...integrations.transformers.encoder_stack import Stack, stack_of
from ...integrations.transformers.stacks import rotary_encoder_stack
from ...integrations.transformers.stacks.rotary_encoder_stack import RotaryEncoderStack
from ...integrations.transformers.unpadding import why_replaced
from ...ops.common.activations import PLAIN
from ...proofs import inputs, run
from ...proofs.activation import formula_of
from .. import rules
from .unpadded_encoders import stacks_of

if TYPE_CHECKING:
    from ..decision import Decision

_OFF = Reason("encoder_off", "encoder=False keeps them", "drop it")
_NO_ENCODER = Reason("no_encoder", "there is no text encoder of a known form in transformers' code", "leave it")
_NOT_CALLED = Reason(
    "not_called",
    "run on made-up inputs, its layers were not called by the module that holds their list, or a decoder's without a cache",
    "pass calibrate= with a batch of your own, or leave it",
)


@dataclass(frozen=True)
class EncoderDecision:
    """The stacks whose layers are one operation, by the names of their lists, and why others are not, or all. A model without a
    text encoder in int8 has the reason `no_encoder`."""

    stacks: tuple[tuple[str, Stack], ...]
    reason: Reason | None


def decide_encoder(
    decision: Decision, asked: bool, batch: Any = None, forward: Forward | None = None
) -> EncoderDecision:
    """Stacks by the names of their parts, proven: the model runs so in floats, on a user's batch and on made-up inputs.

    decision: one whose own rewritings are proven.
    """
    if not asked:
        return EncoderDecision((), _OFF)
    int8 = {id(leaf.module) for leaf, p in decision.swapped if p.precision.name == "int8" and p.rotate is None}
    candidates: list[tuple[str, Stack | Reason]] = []
    for fqn, layers in stacks_of(decision.model, decision.attention):
        if any(id(m) in int8 for layer in layers for m in layer.modules()):
            reason = _why_not(decision, layers, int8)
            candidates.append((fqn, reason or _stack(decision.model, fqn, in_floats=True)))
    return decide_by_running(decision, candidates, _NO_ENCODER, batch, forward)


def decide_by_running(
    decision: Decision,
    candidates: Sequence[tuple[str, Stack | Reason]],
    no_stack: Reason,
    batch: Any,
    forward: Forward | None,
) -> EncoderDecision:
    """candidates: by name, stacks in floats, or the reason why one is none. All are stacks of the model, or none is.

    no_stack: the reason where there is no candidate.
    """
    stacks = [(fqn, x) for fqn, x in candidates if isinstance(x, Stack)]
    reasons = [x for _, x in candidates if isinstance(x, Reason)]
    if stacks:
        users = inputs.of_batch(batch, forward) if batch is not None else ()
        prover = run.Prover(decision.model, users, inputs.made_up(decision.model))
        reason = prover.why_not([InOrder(tuple(x for _, x in stacks))]) if prover.runs else run.UNPROVEN
        if reason is None and not all(x.calls for _, x in stacks):
            reason = _NOT_CALLED
        if reason is None:
            return EncoderDecision(tuple((fqn, x.in_8_bits()) for fqn, x in stacks), next(iter(reasons), None))
        reasons.append(reason)
    return EncoderDecision((), next(iter(reasons), no_stack))


def put_encoders(model: nn.Module, names: Iterable[str]) -> None:
    """Those of a loaded model."""
    put_loaded(model, names, _why_not_layers, _stack)


def put_loaded(
    model: nn.Module,
    names: Iterable[str],
    why_not: Callable[[nn.ModuleList], Reason | None],
    stack_named: Callable[[nn.Module, str, bool], Stack],
) -> None:
    """The stacks of a loaded model in 8 bits that `stacks_in` named in the model that was saved. Those that cannot be one operation
    here (a GPU, a CPU without AVX2) run layer by layer. So do, with a warning, all of them where a run disproves them.

    stack_named: of a model, the name of a list of layers, and whether it computes in floats.
    """
    lists = {fqn: m for fqn, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    stacks = [(fqn, stack_named(model, fqn, False)) for fqn in names if fqn in lists and why_not(lists[fqn]) is None]
    ready = {fqn: stack for fqn, stack in stacks if stack.is_ready()}
    if not ready:
        return
    prover = run.Prover(model, inputs.made_up(model), again=True)
    in_order = InOrder(tuple(stack_named(model, fqn, True) for fqn in ready))
    reason = prover.why_not([in_order]) if prover.runs else None
    if reason is None:
        EncoderSwap(EncoderDecision(tuple(ready.items()), None)).put()
    else:
        warnings.warn(f"load: the layers of {', '.join(ready)} run one by one: {reason.text}", stacklevel=2)


def stacks_in(model: nn.Module, *kinds: type[Stack]) -> list[str]:
    """The names of lists whose layers are one operation, an encoder's or of other kinds, for a record."""
    lists = ((fqn, m) for fqn, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m))
    return [fqn for fqn, m in lists if type(stack_of(m[0])) in (kinds or (Stack, RotaryEncoderStack))]


def _stack(model: nn.Module, fqn: str, in_floats: bool = False) -> Stack:
    holder, layers = model.get_submodule(fqn.rpartition(".")[0]), model.get_submodule(fqn)
    assert isinstance(layers, nn.ModuleList)
    form: Any = form_of(layers[0])
    assert form is not None
    kind = RotaryEncoderStack if isinstance(form, rotary_encoder_stack.Form) else Stack
    return kind(holder, [*layers], form, formula_of(layers[0].get_submodule(form.activation)), in_floats)


def form_of(layer: nn.Module) -> encoder_stack.Form | rotary_encoder_stack.Form | None:
    """None where its parts are none that are known."""
    return encoder_stack.form_of(layer) or rotary_encoder_stack.form_of(layer)


def _why_not_layers(layers: nn.ModuleList) -> Reason | None:
    return why_not_layers(layers, form_of, f"the parts of a {type(layers[0]).__name__} are none that are known")


def why_not_layers(layers: nn.ModuleList, form_of: Callable[[nn.Module], Any], unknown: str) -> Reason | None:
    """The reasons that hold for layers of any precision.

    form_of: of a layer, which parts it has; None for a layer of another kind, of which `unknown` is said.
    """
    form = form_of(layers[0])
    if form is None or any(form_of(layer) != form for layer in layers):
        return Reason("other_layers", unknown, "leave it")
    if device_of(layers[0]).type != "cpu":
        return Reason("on_gpu", "it is an operation of CPUs", "leave it")
    if cpu_tier() in (None, "baseline"):
        return Reason("instructions", "this CPU has no AVX2", "leave it")
    if reason := register():
        return reason
    classes = dict.fromkeys(type(m) for layer in layers for m in layer.modules())
    if (replaced := why_replaced(classes)) is not None:
        return Reason(
            "replaced", f"the code of {replaced} is not what transformers has in its file", "undo what replaced it"
        )
    if any("forward" in vars(m) for layer in layers for m in layer.modules()):
        return Reason("replaced", "a forward of its layers was replaced", "undo what replaced it")
    return None


def _why_not(decision: Decision, layers: nn.ModuleList, int8: Container[int]) -> Reason | None:
    """int8: the ids of layers that become int8."""
    if (reason := _why_not_layers(layers)) is not None:
        return reason
    form = form_of(layers[0])
    assert form is not None
    by_users = {s.fqn for s in decision.attention.skipped if rules.KINDS.get(s.reason.code) == "user"}
    staying = {id(leaf.module) for leaf in decision.attention.leaves if leaf.fqn in by_users}
    for layer in layers:
        for name in form.linears:
            if id(layer.get_submodule(name)) not in int8:
                return Reason("precision", f"its {name} is not in int8", "swap all of its layers into int8")
        if formula_of(layer.get_submodule(form.activation)) not in PLAIN:
            return Reason("activation", f"its {form.activation} is none that the operation has", "leave it")
        if id(layer.get_submodule(form.attention)) in staying:
            return Reason("attention_kept", "its attention is to stay as it is", "let it be swapped")
    if decision.attention.bits:
        return Reason("attention_8bit", "its attention is asked for in 8 bits", "drop attention=")
    return None


@dataclass(frozen=True)
class InOrder:
    """By the layers' own modules, in the order that the operation has."""

    stacks: tuple[Stack, ...]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        try:
            for stack in self.stacks:
                stack.put()
            yield
        finally:
            for stack in self.stacks:
                stack.undo()


class EncoderSwap:
    """What that changes in a model: the forward of each layer, in its instance."""

    def __init__(self, decision: EncoderDecision) -> None:
        """Changes nothing."""
        self._stacks = decision.stacks

    def put(self) -> None:
        """After all others, whose layers it takes."""
        for fqn, stack in self._stacks:
            stack.put()
            if not stack.is_ready():
                warn_once(
                    f"the layers of {fqn} run one by one: not all of their products quantise each row by itself, or their MLP is "
                    "not one unit"
                )

    def undo(self) -> None:
        for _, stack in self._stacks:
            stack.undo()
