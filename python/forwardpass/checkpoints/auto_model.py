"""`AutoModel.from_pretrained` on a folder of `save_pretrained`, once forwardpass is imported: a quantizer of transformers.

config.json has the record of forwardpass.json as its `quantization_config`. Without forwardpass transformers finds no file of
weights in such a folder, and says so. With it the quantizer names the file, puts empty layers into the model, which transformers
fills, and then does what else the record says.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..common.files.tensor_files import TensorFiles
from ..common.imports import when_imported
from ..common.models.exchange import put_in_place
from ..integrations.tensor_parallel import take_over
from ..nn import QuantizedModule
from ..swap import methods
from ..swap.attention.decoder_layers import put_decoders
from ..swap.attention.encoder_layers import put_encoders
from ..swap.attention.projections import Projections
from ..swap.config import METHOD, Config
from ..swap.while_loading import WhileLoading
from .floats import (
    check_config,
    check_files,
    check_loaded,
    is_as_saved,
    is_loaded,
    put_operation,
    swap_loaded,
    while_loading,
)
from .load import as_recorded, convolutions_in_floats, decide_changes, empty_layers
from .record import EARLIER, checked, names_now, weights_of

_QUANTIZERS = "transformers.quantizers.auto"
_ENTRIES = ("schema", "forwardpass", "weights", "layers", "attention", "unpad", "kv_cache", "attention_8bit", "aliases",
            "rewritten", "encoders", "decoders", "folded")  # fmt: skip
_NO_MODEL = {"class": "", "attention": None, "config": None, "generation_config": None}
_FIX = "load it with fp.load_pretrained, or save it again"


def entry(record: Mapping[str, Any]) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    return {"quant_method": METHOD, **{name: record[name] for name in _ENTRIES}}


def register_when_imported() -> None:
    """Registers the quantizer as soon as transformers' quantizers are imported, or now."""
    when_imported(_QUANTIZERS, _register)


@functools.cache
def reading_quantizer() -> Any:
    """The base of quantizers that read a model for inference."""
    from transformers.quantizers.base import HfQuantizer

    class ReadingQuantizer(HfQuantizer):
        def is_serializable(self) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return False

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            return model  # which transformers 4 wants from everybody

    return ReadingQuantizer


def _register() -> None:
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return

    class ForwardpassConfig(QuantizationConfigMixin):
        def __init__(self, **entries: Any) -> None:
            self.quant_method: Any = METHOD  # no QuantizationMethod, but what is registered
            self.entries = {name: value for name, value in entries.items() if name != "quant_method"}

        @classmethod
        def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
            return (cls(**config_dict), kwargs) if return_unused_kwargs else cls(**config_dict)

        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": METHOD, **self.entries}

    class ForwardpassQuantizer(reading_quantizer()):  # type: ignore[misc]
        """Reads a folder of ours (pre_quantized), or swaps a model of floats: its layers while it is loaded, or all of it then."""

        loading: WhileLoading | None = None
        dtype: Any = None  #: that floats are loaded in

        def validate_environment(self, *args: Any, **kwargs: Any) -> None:
            """Asked before anything is loaded."""
            if self.pre_quantized and not hasattr(HfQuantizer, "update_attn_implementation"):
                raise ValueError("this version of transformers has no place for the names of a swapped model's files: "
                                 "load it with fp.load_pretrained")  # fmt: skip
            if not self.pre_quantized:
                if not isinstance(self.quantization_config, Config):
                    raise ValueError('quantization_config of a model of floats is an fp.Config, e.g. fp.Config("int8")')
                if importlib.util.find_spec("transformers.core_model_loading") is None:
                    raise ValueError("quantization_config=fp.Config(…) needs transformers 5: load the model without it, and call "
                                     "fp.swap(model, config)")  # fmt: skip
                check_config(self.quantization_config)

        def update_attn_implementation(self, config: Any) -> Any:
            if not self.pre_quantized:
                return config
            self.record = checked({**self.quantization_config.entries, "model": _NO_MODEL}, "config.json")
            # A copy, as somebody may hold the config and go on with it where the load fails.
            self.config, self.config_class = copy.copy(config), type(config)
            self.config.transformers_weights, *others = weights_of(self.record)
            # transformers asks the config's class for more files than one. The copy is of another one until they are found.
            if others:
                extra = (*getattr(type(config), "extra_files", ()), *others)
                self.config.__class__ = type(type(config).__name__, (type(config),), {"extra_files": extra})
            return self.config

        def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
            """transformers has found the files by now."""
            self.dtype = dtype
            if self.pre_quantized:
                self.config.__class__ = self.config_class
            return dtype

        def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
            return self.loading is not None and self.loading.takes(param_name)

        def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
            return 1 if self.param_needs_quantization(model, param_name) else param.element_size()

        def get_quantize_ops(self) -> Any:
            return put_operation()(self.loading)

        def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
            if self.pre_quantized:
                self.filled = _Filled(model, self.record, _shapes(checkpoint_files or (), self.record))
            else:
                check_files(checkpoint_files or ())
                self.loading = while_loading(model, self.quantization_config, self.dtype)

        def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
            self.remove_quantization_config(model)
            if "disk" in getattr(model, "hf_device_map", {}).values():
                raise ValueError("this device_map leaves weights on a disk, and swapped layers hold theirs: load the model where "
                                 "it fits, by another device_map or max_memory")  # fmt: skip
            if self.pre_quantized:
                self.filled.finish()
            else:
                check_loaded(model)
                swap_loaded(model, self.quantization_config)
                if self.loading is not None:
                    self.loading.check_taken()
            return model

    auto.register_quantization_config(METHOD)(ForwardpassConfig)
    auto.register_quantizer(METHOD)(ForwardpassQuantizer)


def _shapes(paths: Iterable[str], record: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors, by their names, in the files that transformers found. FileNotFoundError or ValueError where these
    are not the files of the record.
    """
    files = [*map(pathlib.Path, paths)]
    if missing := sorted({*weights_of(record)} - {path.name for path in files}):
        raise FileNotFoundError(f"there is no {missing[0]} in the folder, or this version of transformers reads models of one "
                                f"file: {_FIX}")  # fmt: skip
    with TensorFiles(files, _FIX) as tensors:
        return tensors.shapes()


class _Filled:
    """A model with empty layers, while transformers reads their values."""

    def __init__(self, model: Any, record: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.model = model
        record, shapes = _below(model, record, shapes)
        now = names_now(record)
        shapes = {now(name): shape for name, shape in shapes.items()}
        self.record = record
        projections = Projections(model, on_meta=True)
        projections.put()
        leaves, layers = empty_layers(model, record, shapes, lambda t: torch.device("meta"), self._fail)
        self.changes = decide_changes(model, leaves, record, self._fail)
        self.in_floats = convolutions_in_floats(model, record, self._fail)
        projections.narrow(leaf.module for leaf in (*leaves, *self.changes.attention.swapped))
        for module in projections.places():  # else transformers initialises in_proj_weight, which is not there
            vars(module)["_is_hf_initialized"] = True
        self.layers = {leaf.fqn: (leaf, layers[id(leaf.module)]) for leaf in leaves}
        for leaf, layer in self.layers.values():
            vars(layer)["anchor"] = layer._parameters.pop("anchor")  # which no file has
            leaf.parent._modules[leaf.name] = _Earlier(layer) if record["schema"] == EARLIER else layer
        for name in shapes:
            fqn, _, tensor = name.rpartition(".")
            if fqn in self.layers and tensor not in self.layers[fqn][1].state_dict():
                raise self._fail(f"{name[:80]!r} has no place in the layer that is recorded")
        # Our files have buffers that are no part of a state dict (rotary frequencies): transformers computes them, and would say
        # that it did not expect them.
        self.expected = model._keys_to_ignore_on_load_unexpected
        computed = {name for name, _ in model.named_buffers()} - model.state_dict().keys()
        patterns = {rf"(^|\.){re.escape(name)}$" for name in computed & shapes.keys()}
        model._keys_to_ignore_on_load_unexpected = {*(self.expected or ()), *patterns}

    def _fail(self, text: str) -> ValueError:
        return ValueError(f"config.json does not fit this {type(self.model).__name__}: {text}; {_FIX}")

    def finish(self) -> None:
        self.model._keys_to_ignore_on_load_unexpected = self.expected
        for fqn, (leaf, layer) in self.layers.items():
            if isinstance(there := leaf.parent._modules[leaf.name], _Earlier):
                there.fill(layer)
                leaf.parent._modules[leaf.name] = layer
            for name, t in layer.named_buffers():
                if not is_loaded(t):
                    raise self._fail(f"{fqn}.{name} is missing from the file")
            layer._parameters["anchor"] = vars(layer).pop("anchor")
            layer._apply(lambda t: t)  # rows of 16 bytes
            layer.settle()
        anchors = {id(layer.anchor) for _, layer in self.layers.values()}
        if is_as_saved(self.model):
            for name, t in self.model.named_parameters():
                if not is_loaded(t) and id(t) not in anchors:
                    raise self._fail(f"{name} is missing from the file")
        if eight_bits := [name for name, p in self.model.named_parameters() if p.itemsize == 1]:
            raise self._fail(f"{eight_bits[0]} has 8 bits in the file, and no layer of it is recorded")
        take_over({fqn: layer for fqn, (_, layer) in self.layers.items()})
        layers, self.layers = self.layers, {}
        joined, changes = as_recorded(self.model, layers, self.changes, self.record, self._fail, self.in_floats)
        layers.clear()
        in_place = [x for part in joined.build() for x in part if not _is_there(self.model, x.fqn, x.replacement)]
        put_in_place(self.model, in_place)
        changes.put(self.model)
        joined.put()
        put_encoders(self.model, self.record["encoders"])
        put_decoders(self.model, self.record["decoders"])
        methods.put(self.model)


class _Earlier(nn.Module):
    """In the place of an empty layer, the tensors that an earlier version wrote of it, by their names then."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._buffers = {"weight" if name == "qweight" else name: t for name, t in layer._buffers.items()}

    def fill(self, layer: nn.Module) -> None:
        layer._buffers.update({"qweight" if name == "weight" else name: t for name, t in self._buffers.items()})


def _is_there(model: nn.Module, fqn: str, module: nn.Module) -> bool:
    return isinstance(module, QuantizedModule) and model.get_submodule(fqn) is module


def _below(
    model: Any, record: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Mapping[str, Any], Mapping[str, tuple[int, ...]]]:
    """A record and shapes of a model with a head, as the model below it has them."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names = [layer["fqn"] for layer in record["layers"]]
    if prefix == "." or hasattr(model, prefix[:-1]) or not any(name.startswith(prefix) for name in names):
        return record, shapes
    layers = [
        {**layer, "fqn": layer["fqn"].removeprefix(prefix)}
        for layer in record["layers"]
        if layer["fqn"].startswith(prefix)
    ]
    in_8_bits = [
        {**x, "fqn": x["fqn"].removeprefix(prefix)} for x in record["attention_8bit"] if x["fqn"].startswith(prefix)
    ]
    rewritings = record["rewritten"]
    if rewritings is not None:
        rewritings = [name.removeprefix(prefix) for name in rewritings if name.startswith(prefix)]
    shapes = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    others = {
        entry: [name.removeprefix(prefix) for name in record[entry] if name.startswith(prefix)]
        for entry in ("attention", "folded", "encoders", "decoders")
    }
    of_model = {
        "layers": layers,
        "attention_8bit": in_8_bits,
        "rewritten": rewritings,
        **others,
    }
    return {**record, **of_model}, shapes
