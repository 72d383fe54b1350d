"""Which decoders of a swapped model run their layers as one operation on a CPU, and what that changes in the model.

What runs then, and when a call goes layer by layer all the same, is in `integrations.transformers.stacks.decoder_stack`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from ...common.batches import Forward
from ...dispatch import Reason
from ...integrations.transformers.kv_scales import KV_CACHES
from ...integrations.transformers.stacks.decoder_stack import DecoderStack, form_of
from ...proofs.activation import formula_of
from .encoder_layers import EncoderDecision, decide_by_running, put_loaded, why_not_layers
from .unpadded_encoders import is_pretrained

if TYPE_CHECKING:
    from ..decision import Decision

#: Of all linear layers of a layer: one of these.
PRECISIONS = ("int8", "w8a16")
_OFF = Reason("decoder_off", "decoder=False keeps them", "drop it")
_NO_DECODER = Reason("no_decoder", "there is no decoder of transformers with layers in int8 or w8a16", "leave it")


def decide_decoder(
    decision: Decision, asked: bool, batch: Any = None, forward: Forward | None = None
) -> EncoderDecision:
    """Stacks by the names of their parts, proven: the model runs so in floats, on a user's batch and on made-up inputs.

    decision: one whose own rewritings are proven.
    """
    if not asked:
        return EncoderDecision((), _OFF)
    model = decision.model
    swapped = {id(leaf.module) for leaf, p in decision.swapped if p.precision.name in PRECISIONS}
    candidates = [
        (fqn, _why_not(decision, layers) or _stack(model, fqn, in_floats=True))
        for fqn, layers in _stacks_of(model)
        if any(id(m) in swapped for m in layers.modules())
    ]
    return decide_by_running(decision, candidates, _NO_DECODER, batch, forward)


def _stacks_of(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """The lists of a decoder's layers, by name, each held by a model of transformers."""
    for fqn, layers in model.named_modules():
        if not isinstance(layers, nn.ModuleList) or len({type(layer) for layer in layers}) != 1:
            continue
        holder = model.get_submodule(fqn.rpartition(".")[0])
        attention = [m for m in layers[0].modules() if getattr(m, "is_causal", False) is True]
        if attention and is_pretrained(holder):
            yield fqn, layers


def put_decoders(model: nn.Module, names: Iterable[str]) -> None:
    """Those of a loaded model."""
    put_loaded(model, names, _why_not_layers, _stack)


def _stack(model: nn.Module, fqn: str, in_floats: bool) -> DecoderStack:
    holder, layers = model.get_submodule(fqn.rpartition(".")[0]), model.get_submodule(fqn)
    assert isinstance(layers, nn.ModuleList)
    form = form_of(layers[0])
    assert form is not None
    return DecoderStack(holder, [*layers], form, in_floats=in_floats)  # type: ignore[arg-type]


def _why_not_layers(layers: nn.ModuleList) -> Reason | None:
    return why_not_layers(layers, form_of, f"the code of a {type(layers[0]).__name__} is none that is known, Llama's")


def _why_not(decision: Decision, layers: nn.ModuleList) -> Reason | None:
    if (reason := _why_not_layers(layers)) is not None:
        return reason
    form = form_of(layers[0])
    assert form is not None
    if decision.kv_cache.kv_cache is None or KV_CACHES[decision.kv_cache.kv_cache] is not None:
        text = f"it writes into a cache of the model's dtype in place, and kv_cache is {decision.kv_cache.kv_cache!r}"
        return Reason("kv_cache", text, 'pass kv_cache="auto"')
    if decision.attention.bits:
        return Reason("attention_8bit", "its attention is asked for in 8 bits", "drop attention=")
    precisions = {id(leaf.module): p for leaf, p in decision.swapped}
    names = {precisions[i].precision.name for i in map(id, layers.modules()) if i in precisions}
    if len(names) > 1:
        return Reason(
            "precision", f"its layers are in {' and '.join(sorted(names))}", "swap all of them into one precision"
        )
    for layer in layers:
        for name in form.linears:
            p = precisions.get(id(layer.get_submodule(name)))
            if p is None or p.precision.name not in PRECISIONS or p.rotate is not None:
                return Reason(
                    "precision", f"its {name} is not in int8 or w8a16", "swap all of its layers into one of these"
                )
        if any(precisions[id(layer.get_submodule(name))].calibrated for name in (*form.qkv, form.gate, form.up)):
            text = "calibrated layers of one input scale it each in its own way"
            return Reason("calibrated", text, "leave out calibrate=, or keep them layer by layer")
        if formula_of(layer.get_submodule(form.activation)) not in ("silu", "gelu", "gelu_tanh"):
            return Reason("activation", f"its {form.activation} is none of a gate that the operation has", "leave it")
    return None
