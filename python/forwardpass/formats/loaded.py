"""Layers of a model that is loaded, which another library holds in 8 bits."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..common.models.modules import is_compressed
from ..dispatch import Reason
from ..nn import QuantizedLinear
from ..nn.linear.quantized_linear import is_linear
from ..nn.quantized_experts import is_experts
from . import FORMATS, NOTES
from .expert_tensors import StoredExperts, read_experts
from .recipe import Header, Recipe, Refused

#: What a layer's library would write of it: the method, what of `quantization_config` its format asks for, and its tensors.
_Written = tuple[str, Mapping[str, Any], Mapping[str, Tensor | None]]


def _fine_grained(module: Any) -> _Written:
    return "fp8", {"activation_scheme": module.activation_scheme}, module._parameters


def _compressed(module: Any) -> _Written:
    weights, inputs = ({"num_bits": 8, "dynamic": dynamic} for dynamic in (False, True))
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return "compressed-tensors", {"config_groups": {"all": group}}, module._parameters


def _compressed_linear(module: Any) -> _Written:
    def said(args: Any) -> dict[str, Any] | None:
        if args is None:
            return None
        names = ("num_bits", "symmetric", "dynamic", "strategy")
        return {name: getattr(value := getattr(args, name), "value", value) for name in names}

    scheme = module.quantization_scheme
    group = {
        "targets": ["Linear"],
        "weights": said(scheme.weights),
        "input_activations": said(scheme.input_activations),
        "output_activations": said(scheme.output_activations),
    }
    return "compressed-tensors", {"config_groups": {"all": group}}, module._parameters


def _bitsandbytes(module: Any) -> _Written:
    weight, state = module.weight, module.state
    scale = state.SCB if getattr(weight, "SCB", None) is None else weight.SCB
    return "bitsandbytes", {}, {"weight": weight.data.as_subclass(Tensor), "SCB": scale, "bias": module.bias}


def _torchao(module: Any) -> _Written:
    weight = module.weight
    names = ("qdata", "scale", "zero_point", "act_quant_scale", "act_quant_zero_point", "act_pre_scale")
    tensors = {f"_weight_{name}": getattr(weight, name, None) for name in names}
    inputs = None if weight.act_quant_kwargs is None else str(weight.act_quant_kwargs)
    about = json.dumps({"_type": type(weight).__name__, "_data": {"act_quant_kwargs": inputs}})
    return "torchao", {"header": {"weight": about}}, {**tensors, "bias": module.bias}


#: By the class of a module, or of its weight.
_READERS: dict[str, Callable[[Any], _Written]] = {
    "transformers.integrations.finegrained_fp8.FP8Linear": _fine_grained,
    "transformers.integrations.finegrained_fp8.FP8Experts": _fine_grained,
    "transformers.integrations.compressed_tensors.CompressedTensorsFP8Linear": _compressed,
    "bitsandbytes.nn.modules.Linear8bitLt": _bitsandbytes,
    "torchao.quantization.Int8Tensor": _torchao,
    "torchao.quantization.Float8Tensor": _torchao,
}


def is_stored(module: nn.Module) -> bool:
    """Whether it is a layer of another library that holds 8 bits, or experts."""
    reader = _reader(module)
    eight_bits = any(p is not None and p.dtype.itemsize == 1 for p in module._parameters.values())
    return reader is not None and (reader is _torchao or eight_bits)


def refuse_inference_mode(model: nn.Module) -> None:
    """ValueError where torch detaches no tensor of torchao, and the model has some."""
    if torch.is_inference_mode_enabled() and any(_reader(m) is _torchao for m in model.modules()):
        raise ValueError(
            "swap reads no tensors of torchao under torch.inference_mode(): call it outside, or under no_grad()"
        )


def note_on(module: nn.Module) -> str | None:
    """What is done in another way than by its library."""
    reader = _reader(module)
    return NOTES.get(reader(module)[0]) if reader is not None and is_stored(module) else None


def _reader(module: nn.Module) -> Callable[[Any], _Written] | None:
    if is_linear(module) and is_compressed(module):
        return _compressed_linear
    classes = (type(module), type(module._parameters.get("weight")) if is_linear(module) else type(module))
    return next((r for cls in classes if (r := _READERS.get(f"{cls.__module__}.{cls.__qualname__}"))), None)


class TakenOver(QuantizedLinear):
    """What a precision's module would be for such layers: it makes those of other classes, which take their bytes over."""

    operation: ClassVar[str | None] = None

    @classmethod
    def why_not(cls, module: nn.Module) -> Reason | None:
        if not is_stored(module):
            return Reason("floats", "it holds no 8 bits that could be taken over", 'pass a precision, e.g. "int8"')
        try:
            _recipe(module)
        except Refused as e:
            return Reason("stored", str(e), "leave it")
        return None

    @classmethod
    def from_torch(cls, module: nn.Module, *, activation: str | None = None) -> Any:
        """The layer, or the experts, that compute with the bytes of this one. Raises ValueError where there are none, and why."""
        if reason := cls.why_not(module):
            raise ValueError(f"TakenOver.from_torch: {reason}")
        recipe, tensors = _recipe(module)
        new = recipe.module(module) if isinstance(recipe, StoredExperts) else recipe.layer(tensors, activation)
        return new.train(module.training)


def _recipe(module: nn.Module) -> tuple[Recipe | StoredExperts, dict[str, Tensor]]:
    reader = _reader(module)
    assert reader is not None
    method, config, parameters = reader(module)
    tensors = {name: t.detach() for name, t in parameters.items() if t is not None}
    headers = {name: Header(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    recipe: Recipe | StoredExperts | None
    if is_experts(module):
        recipe = read_experts(module, headers, config, "", FORMATS[method])
    else:
        recipe = FORMATS[method](headers, config, "")
    if recipe is None:
        raise Refused("it holds no 8 bits")
    return recipe, tensors


class Decompression:
    """What is to be done for layers of compressed-tensors when they come back: it decompresses a model at its first call, once."""

    def __init__(self, model: nn.Module, layers: Iterable[nn.Module]) -> None:
        self._model, self._layers = weakref.ref(model), [m for m in layers if is_compressed(m)]

    def put(self) -> None:
        pass

    def undo(self) -> None:
        model = self._model()
        if not self._layers or model is None or any("ct_decompress_hook" in vars(m) for m in model.modules()):
            return
        from compressed_tensors.compressors import decompress_module

        for layer in self._layers:
            if is_compressed(layer):
                decompress_module(layer)
