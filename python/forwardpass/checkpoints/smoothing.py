"""Calibrated layers without the scales of their input's channels, for formats that have no place for them.

The scales go into what is before the layer. Behind a norm that is its weight, where nothing but such layers reads it. q, k and v,
or gate and up, then share one scale, for which their weights are rounded once more. Behind another layer (v before the sum of
attention, up before the product with the gate) it is that layer's rows: exactly, except where several heads of queries share one
of v.

One run of the model shows what is before each layer. A second run, of the folded model, proves that every layer gets its input
times the scale, and that the outcome is the same.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.formulas import SMOOTHING_LIMIT, round_weight
from ..common.batches import device_of, evaluating, main_output
from ..common.models.modules import hooked
from ..dispatch import Unsupported
from ..integrations.transformers.norm_formulas import norm_formula
from ..nn import Int8Linear, QuantizedModule
from ..nn.linear.quantized_linear import as_multiplied, is_linear, linear_weight
from ..ops.common.rotation import rotate
from ..swap import originals

_FIX = "swap without calibrate=, exclude it from the swap, or use fp.save_pretrained"
#: How far an input may be from what it was, times the scale, relative: fp32, and 16 bits, in which weights of norms are rounded.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
#: How far a layer's output may be from what it was, by roundings of 8 bits: .0125 at most measured (random Llama, Qwen, Gemma, T5).
ROUNDING = 0.05


@dataclass
class _Observed:
    """One run: inputs and outputs of quantised layers in the order of their calls, and the norm behind which each is."""

    calls: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)
    result: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass
class _Scales:
    """By the names of layers: of the channels of an input, of the rows of an output; of norms by theirs."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)


def fold(model: Any, layers: Mapping[str, QuantizedModule]) -> tuple[dict[str, QuantizedModule], dict[str, Tensor]]:
    """(layers, none of which has a channel_scale; parameters of norms, by their names in the model). The model stays as it is.

    Raises Unsupported, with the layer and the reason, where a scale has no place before it.
    """
    smoothed = [fqn for fqn, layer in layers.items() if getattr(layer, "channel_scale", None) is not None]
    if not smoothed:
        return dict(layers), {}
    modules = dict(model.named_modules())
    for fqn in smoothed:
        if not isinstance(modules.get(fqn), Int8Linear):
            raise _refusal(fqn, "it is part of an MLP that became one module")
        if modules[fqn].input_scale is not None:
            raise _refusal(fqn, "its input has a static scale")
        if not bool((modules[fqn].channel_scale > 0).all()):
            raise _refusal(fqn, "channels change their signs before they are rotated")
    alone = {fqn: m for fqn, m in modules.items() if isinstance(m, QuantizedModule) and fqn in layers}
    observed = _observe(model, alone, smoothed[0])
    scales = _scales(smoothed, alone, modules, observed)
    floats = _floats(model, alone)
    folded: dict[str, QuantizedModule] = {
        fqn: _rescaled(alone[fqn], scales.inputs.get(fqn), scales.rows.get(fqn), floats.get(fqn))  # type: ignore[arg-type]
        for fqn in {**scales.inputs, **scales.rows}
    }
    parameters = {f"{fqn}.{n}": t for fqn, c in scales.norms.items() for n, t in _scaled_norm(modules[fqn], c).items()}
    _prove(model, folded, parameters, scales, observed)
    return {**layers, **folded}, parameters


def _refusal(fqn: str, reason: str) -> Unsupported:
    return Unsupported(f"{fqn} multiplies its input by a scale for each channel (it is calibrated), for which compressed-tensors "
                       f"has no place, nor has what is before it: {reason}; {_FIX}", {})  # fmt: skip


# ---- what is behind what


def _probe(model: Any) -> dict[str, Tensor]:
    config = model.config.get_text_config()
    ids = torch.arange(16, device=device_of(model))[None] % config.vocab_size
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


def _observe(model: Any, alone: Mapping[str, nn.Module], first: str) -> _Observed:
    if getattr(model, "main_input_name", None) != "input_ids":
        raise _refusal(
            first, f"where it could go is found by a run on tokens, which a {type(model).__name__} does not take"
        )
    norms = [
        (fqn, m) for fqn, m in model.named_modules() if norm_formula(m) and m._parameters.get("weight") is not None
    ]
    outputs: list[tuple[str, Tensor]] = []
    observed = _Observed()

    def before(fqn: str, module: nn.Module, x: Any) -> None:
        if (norm := next((name for name, y in outputs if y is x), None)) is not None:
            observed.norms[fqn] = norm

    def after(fqn: str, module: nn.Module, x: Any, y: Any) -> None:
        observed.calls.setdefault(fqn, []).append((x, y))

    with (
        evaluating(model),
        hooked(norms, after=lambda fqn, m, x, y: outputs.append((fqn, y))),
        hooked(alone.items(), before, after),
    ):
        observed.result = main_output(model(**_probe(model)))
    return observed


def _scales(
    smoothed: Iterable[str], alone: Mapping[str, nn.Module], modules: Mapping[str, Any], observed: _Observed
) -> _Scales:
    scales, behind = _Scales(), dict[str, list[str]]()
    for fqn in smoothed:
        if fqn not in observed.calls:
            raise _refusal(fqn, "a run on tokens does not call it")
        if norm := observed.norms.get(fqn):
            behind.setdefault(norm, []).append(fqn)
            continue
        source = _before(fqn, alone, observed)
        if source is None or source in scales.rows:
            raise _refusal(fqn, "no norm and no layer of its own module gives its input but for factors")
        scales.rows[source], scales.inputs[fqn] = _of_rows(
            modules[fqn], modules[source], modules[fqn.rpartition(".")[0]]
        )
    for norm, fqns in behind.items():
        scales.norms[norm] = common = _common([modules[fqn] for fqn in fqns])
        scales.inputs |= dict.fromkeys(fqns, common)
    return scales


def _before(fqn: str, alone: Mapping[str, nn.Module], observed: _Observed) -> str | None:
    """The layer of the same module that is called last before this one: v before attention's, up before the gated one's. Whether
    its rows are those channels is proven later."""
    names = [*observed.calls]
    earlier = [name for name in names[: names.index(fqn)] if name.rpartition(".")[0] == fqn.rpartition(".")[0]]
    source: Any = alone[earlier[-1]] if earlier else None
    is_one = isinstance(source, Int8Linear) and source.activation is None
    return earlier[-1] if is_one and alone[fqn].in_features % source.out_features == 0 else None


def _of_rows(layer: Int8Linear, source: Int8Linear, holder: Any) -> tuple[Tensor, Tensor]:
    """(of the source's rows, of the layer's channels): the same, or the mean, of the logarithm, of heads that share one of v."""
    scale, shared = layer.channel_scale, layer.in_features // source.out_features
    assert scale is not None
    if shared == 1:
        return scale, scale
    size = getattr(holder, "head_dim", source.out_features)
    rows = scale.log().view(-1, shared, size).mean(1, keepdim=True).exp()
    return rows.reshape(-1), rows.expand(-1, shared, -1).reshape(-1)


def _common(layers: list[Int8Linear]) -> Tensor:
    """The scale that `smoothing_scale` gives these layers' weights in one, as near as it follows from what each one has."""
    scales = [c for layer in layers if (c := layer.channel_scale) is not None]
    if len(layers) == 1:
        return scales[0]
    norms = torch.stack([(_dequantised(layer) * c).norm(dim=0) for layer, c in zip(layers, scales)])
    norms = norms.clamp_min(norms.amax().clamp_min(1e-30) * 1e-6)
    rms = (norms.log() - 2 * torch.stack([c.log() for c in scales])).mean(0)
    log_scale = (norms.square().sum(0).log() / 2 - rms) / 2
    limit = math.log(SMOOTHING_LIMIT)
    return (log_scale - log_scale.mean()).clamp(-limit, limit).exp()


# ---- the folded parts


def _dequantised(layer: Int8Linear) -> Tensor:
    """As it multiplies the smoothed input, before that is rotated."""
    weight = layer.qweight.float() * layer.weight_scale[:, None]
    return weight if layer.rotate is None else rotate(weight, layer.rotate)  # the matrix is its own inverse


def _floats(model: nn.Module, alone: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules that layers were made of, where the swap kept them. Rounding their weights loses less than rounding the rounded
    ones again: a random Llama has an error of .0104 calibrated, .0105 as exported so, .0145 without them."""
    swapped = originals.find(model)
    replaced = (x for swap in swapped.all() for x in swap.layers) if swapped is not None else ()
    return {
        x.fqn: x.original
        for x in replaced
        if x.replacement is alone.get(x.fqn) and isinstance(x.replacement, Int8Linear)
        if is_linear(x.original) and not x.replacement.is_loaded
    }


def _rescaled(layer: Int8Linear, inputs: Tensor | None, rows: Tensor | None, floats: nn.Module | None) -> Int8Linear:
    """The same for an input that is scaled already, and with scaled outputs."""
    weight, scale, bias, smoothing = layer.qweight, layer.weight_scale, layer.bias, layer.channel_scale
    if inputs is not None and smoothing is not None and not torch.equal(inputs, smoothing):
        whole = _dequantised(layer) * smoothing if floats is None else linear_weight(floats).to(inputs.device).float()
        weight, scale = round_weight(as_multiplied(whole, inputs, layer.rotate))
    if rows is not None:
        scale, bias = scale * rows, None if bias is None else (bias * rows).to(bias.dtype)
    options = layer.config() | {"channel_scale": inputs is None and smoothing is not None}
    new = Int8Linear(**options, device="meta")
    return new.filled(weight, scale, bias, channel_scale=smoothing if inputs is None else None).train(layer.training)


def _scaled_norm(norm: nn.Module, scale: Tensor) -> dict[str, Tensor]:
    formula = norm_formula(norm)
    assert formula is not None
    offset = {"weight": formula.offset, "bias": 0.0}
    return {
        name: ((p.detach().float() + offset[name]) * scale - offset[name]).to(p.dtype)
        for name, p in norm._parameters.items()
        if p is not None
    }


def _prove(
    model: Any,
    folded: Mapping[str, QuantizedModule],
    parameters: Mapping[str, Tensor],
    scales: _Scales,
    observed: _Observed,
) -> None:
    """Runs the folded model, each layer giving what it gave before, so that roundings do not add up, and compares."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, shared)
    for fqn, layer in folded.items():
        other.set_submodule(fqn, layer)
    for name, t in parameters.items():
        fqn, _, parameter = name.rpartition(".")
        other.get_submodule(fqn)._parameters[parameter] = nn.Parameter(t, requires_grad=False)
    left = {fqn: list(calls) for fqn, calls in observed.calls.items()}

    def check(what: str, x: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
        difference = (x.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30)
        if not difference <= (_TOLERANCE.get(x.dtype, 1e-4) if tolerance is None else tolerance):
            reason = f"{what} would be another, as other code reads the norm or the layer before it"
            raise _refusal(next(iter(scales.inputs)), reason)

    def override(fqn: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor:
            x, y = left[fqn].pop(0)
            argument = (*args, *kwargs.values())[0]
            check(f"the input of {fqn}", argument, x.float() * scales.inputs[fqn] if fqn in scales.inputs else x)
            expected = (y.float() * scales.rows[fqn]).to(y.dtype) if fqn in scales.rows else y
            check(f"the output of {fqn}", output, expected, ROUNDING)
            return expected

        return hook

    with ExitStack() as stack, evaluating(other):
        for fqn in observed.calls:
            handle = other.get_submodule(fqn).register_forward_hook(override(fqn), with_kwargs=True)
            stack.callback(handle.remove)
        check("the outcome", main_output(other(**_probe(other))), observed.result)
