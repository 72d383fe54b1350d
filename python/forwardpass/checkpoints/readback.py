"""What reads an export again, asked before anything is written: the model's class as transformers builds it, without values."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..dispatch import Unsupported
from ..formats import Header, Refused, compressed_tensors
from ..formats.stored_linear import StoredLinear
from ..integrations.transformers import model_config
from ..nn.linear.quantized_linear import is_conv1d, is_linear
from .stored import StoredCheckpoint

_OTHER = "use fp.save_pretrained(model, folder) and load it with model="
_FIX = "use fp.save_pretrained, or exclude it from the swap"


def as_built(model: nn.Module, config: Mapping[str, Any], tensors: int) -> nn.Module:
    """The model on the meta device as readers build it. ValueError where they cannot."""
    content = {name: value for name, value in config.items() if name != "quantization_config"}
    return model_config.build(type(model).__name__, None, content, None, tensors, "this export")


def check_layer(fqn: str, built: nn.Module) -> None:
    """Unsupported where the layer that stands there is no Linear to those who quantise Linears alone."""
    try:
        module: Any = built.get_submodule(fqn)
    except AttributeError:
        raise Unsupported(f"transformers builds a {type(built).__name__} without a layer {fqn}: {_FIX}", {}) from None
    kind = type(module).__name__
    if is_conv1d(module):
        raise Unsupported(f"{fqn} is a {kind} in transformers, whose weight is transposed, and readers of compressed-tensors "
                          f"know nn.Linear alone: {_FIX}", {})  # fmt: skip
    if not (isinstance(module, nn.Linear) and is_linear(module)):
        raise Unsupported(f"{fqn} is a {kind} in transformers, and readers of compressed-tensors know nn.Linear alone: "
                          f"{_FIX}", {})  # fmt: skip


def takes_packed(built: nn.Module, fqns: Iterable[str]) -> bool:
    """Whether transformers loads these layers without a `weight`, which packed ones have not: T5, Falcon and GPT-BigCode initialise
    it by its name (5.24)."""
    weights = [(built.get_submodule(fqn)._parameters, built.get_submodule(fqn).weight) for fqn in fqns]
    for parameters, _ in weights:
        del parameters["weight"]
    for module in built.modules():
        vars(module).pop("_is_hf_initialized", None)
    try:
        built.initialize_weights()  # type: ignore[operator]
    except AttributeError:
        return False
    finally:
        for parameters, weight in weights:
            parameters["weight"] = weight  # type: ignore[assignment]
    return True


def check(
    built: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor], layers: Mapping[str, Any]
) -> None:
    """Reads the headers of an export into a model of `as_built`, which it changes. Unsupported where a tensor finds no place or has
    another shape there, or something gets no value.

    Args:
        tensors: by their names in the file; layers: those that are quantised, by their names in the model.
    """
    name = type(built).__name__
    if halves := next(_halved(built), None):
        raise Unsupported(f"the files of a {name} hold {halves} as one, which transformers' reader of compressed-tensors (5.24) "
                          "does not divide: use fp.save_pretrained", {})  # fmt: skip
    quantization = config["quantization_config"]
    matrices = {tensor: t for tensor, t in tensors.items() if compressed_tensors.is_matrix(quantization, tensor)}
    headers = {tensor: Header(tuple(t.shape), t.dtype) for tensor, t in tensors.items() if tensor not in matrices}
    quantization = {**quantization, "header": {}, "matrices": matrices}
    stored = StoredCheckpoint(pathlib.Path(), config, quantization, headers)
    renamed = stored.renamed(built)
    _check_places(built, renamed, headers, with_those_of_layers=False)
    try:
        stored.put_layers(built)
    except Refused as e:
        raise Unsupported(f"forwardpass does not read it again ({str(e).partition(';')[0]}): {_FIX}", {}) from None
    for fqn in layers:
        if not isinstance(built.get_submodule(fqn), StoredLinear):
            raise Unsupported(f"{fqn} would be read as floats: {_FIX}", {})
    places = _check_places(built, renamed, headers, with_those_of_layers=True)
    filled = {id(places[in_model]) for in_model in renamed.values()}  # what is tied is one object
    if missing := [in_model for in_model, place in places.items() if id(place) not in filled]:
        raise Unsupported(f"a {name} that transformers builds has {missing[0]}, and this model has not: {_OTHER}", {})


def _check_places(
    built: nn.Module, renamed: Mapping[str, str], headers: Mapping[str, Header], with_those_of_layers: bool
) -> dict[str, Tensor]:
    """The tensors of the model by their names. Unsupported where the file has one in another shape, or one too many."""
    places: dict[str, Tensor] = built.state_dict(keep_vars=True)
    for in_file, in_model in renamed.items():
        place, shape = places.get(in_model), headers[in_file].shape
        if place is None and not with_those_of_layers:
            continue
        if place is None or tuple(place.shape) != shape:
            has = "no such tensor" if place is None else f"one of {list(place.shape)}"
            raise Unsupported(f"{in_model} is {list(shape)} here, and a {type(built).__name__} that transformers builds has {has}: "
                              f"{_OTHER}", {})  # fmt: skip
    return places


def _halved(built: Any) -> Iterator[str]:
    """Weights that are several in the model and one in files."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # before transformers 5 files have the model's names
        return
    for transform in get_model_conversion_mapping(built):
        if isinstance(transform, WeightConverter) and len(transform.target_patterns) > len(transform.source_patterns):
            yield from (name for name in transform.source_patterns if name.endswith(".weight"))
