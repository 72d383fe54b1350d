"""`AutoModel.from_pretrained` on a folder of `save_pretrained`, once forwardpass is imported: a quantizer of transformers.

config.json has the record of forwardpass.json as its `quantization_config`. Without forwardpass transformers finds no file of
weights in such a folder, and says so. With it the quantizer names the file, puts empty layers into the model, which transformers
fills, and then does what else the record says.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..common.imports import when_imported
from ..nn import QuantizedLinear, QuantizedModule

METHOD = "forwardpass"
_QUANTIZERS = "transformers.quantizers.auto"
_ENTRIES = ("schema", "forwardpass", "weights", "layers", "attention", "unpad", "kv_cache", "aliases")
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

    return ReadingQuantizer


def _register() -> None:
    from transformers.quantizers import auto
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
        def update_attn_implementation(self, config: Any) -> Any:
            from .checkpoint import checked

            self.record = checked({**self.quantization_config.entries, "model": _NO_MODEL}, "config.json")
            config.transformers_weights = self.record["weights"]
            return config

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            self.filled = _Filled(model, self.record)

        def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
            self.remove_quantization_config(model)
            self.filled.finish()
            return model

    auto.register_quantization_config(METHOD)(ForwardpassConfig)
    auto.register_quantizer(METHOD)(ForwardpassQuantizer)


class _Filled:
    """A model with empty layers, while transformers reads their values."""

    def __init__(self, model: Any, record: Mapping[str, Any]) -> None:
        from .checkpoint import decide_changes, empty_layers

        self.model = model
        record = _below(model, record)
        leaves, layers = empty_layers(model, record, {}, lambda t: torch.device("meta"), self._fail)
        self.changes = decide_changes(model, leaves, record, self._fail)
        self.layers = {leaf.fqn: (leaf, layers[id(leaf.module)]) for leaf in leaves}
        for leaf, layer in self.layers.values():
            leaf.parent._modules[leaf.name] = layer

    def _fail(self, text: str) -> ValueError:
        return ValueError(f"config.json does not fit this {type(self.model).__name__}: {text}; {_FIX}")

    def finish(self) -> None:
        from . import originals, saving
        from .checkpoint import put_changes
        from .siblings import JoinedSwap

        for fqn, (_, layer) in self.layers.items():
            for name, t in layer.named_buffers():
                if not getattr(t, "_is_hf_initialized", False):
                    raise self._fail(f"{fqn}.{name} is missing from the file")
            layer._apply(lambda t: t)  # rows of 16 bytes
            if isinstance(layer, QuantizedLinear):
                layer.settle()
        if eight_bits := [name for name, p in self.model.named_parameters() if p.itemsize == 1]:
            raise self._fail(f"{eight_bits[0]} has 8 bits in the file, and no layer of it is recorded")
        layers, self.layers = self.layers, {}
        joined = JoinedSwap(layers)
        in_place = [x for part in joined.build() for x in part if not _is_there(self.model, x.fqn, x.replacement)]
        originals.put_in_place(self.model, in_place)
        put_changes(self.model, self.changes)
        joined.put()
        saving.refuse(self.model)


def _is_there(model: nn.Module, fqn: str, module: nn.Module) -> bool:
    return isinstance(module, QuantizedModule) and model.get_submodule(fqn) is module


def _below(model: Any, record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A record of a model with a head, as the model below it has it."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names = [layer["fqn"] for layer in record["layers"]]
    if prefix == "." or hasattr(model, prefix[:-1]) or not any(name.startswith(prefix) for name in names):
        return record
    layers = [
        {**layer, "fqn": layer["fqn"].removeprefix(prefix)}
        for layer in record["layers"]
        if layer["fqn"].startswith(prefix)
    ]
    attention = [name.removeprefix(prefix) for name in record["attention"] if name.startswith(prefix)]
    return {**record, "layers": layers, "attention": attention}
