"""Checkpoints of other libraries in 8 bits: read by transformers, layer by layer taken over.

transformers finds the files, renames what a model's class has under other names today, and puts tensors where they belong. In place
of each Linear of which the file holds 8 bits stands a StoredLinear meanwhile, so no weight is ever widened. Nothing that a
checkpoint names is run: no pickle, no remote code, no kernel of a hub.
"""

from __future__ import annotations

import functools
import inspect
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..common.extras import pip_install
from ..common.files.json_files import read_json
from ..common.files.tensor_files import TensorFiles
from ..common.models.exchange import put_in_place
from ..common.printing.quiet import quiet_libraries
from ..formats import FORMATS, NOTES, Format, Header, Refused, compressed_tensors
from ..formats.expert_tensors import put_tensors, read_experts, stacked, stored_experts, with_scales
from ..formats.recipe import header_of
from ..formats.stored_linear import StoredLinear
from ..integrations.transformers import model_config
from ..nn import QuantizedModule
from ..nn.linear.quantized_linear import is_linear
from ..nn.quantized_experts import experts_sizes, is_experts
from ..ops.common.quantized_rows import FLOATS
from ..ops.common.rotation import SIZES
from ..proofs.walker import Leaf, linear_like
from ..swap import methods
from ..swap.attention.attention_modules import decide_attention
from ..swap.attention.kv_cache import CacheDecision
from ..swap.attention.projections import Projections
from ..swap.attention.unpadded_encoders import UnpaddingDecision
from ..swap.rules import Context
from .auto_model import reading_quantizer
from .rewritten import Changes, proven

_METHOD = "forwardpass-stored"
_FIX = "load it with transformers instead"
_INDEX = "model.safetensors.index.json"
_MODELOPT = "hf_quant_config.json"  #: modelopt's, where config.json says nothing
#: Scales of queries, keys and values, which belong to no layer.
_OF_CACHES = re.compile(r".*\.[qkv](_proj\.)?_?(scale|zero_point|output_scale)")


@dataclass(frozen=True)
class StoredCheckpoint:
    """A folder whose config.json says that its weights are quantised."""

    folder: pathlib.Path
    config: Mapping[str, Any]  #: what config.json says
    #: and as "header" what the files themselves say, as "matrices" those of transforms by the file's names
    quantization: Mapping[str, Any]
    headers: Mapping[str, Header]  #: of every other tensor, by the file's names

    def put_layers(self, model: Any) -> None:
        """StoredLinears into the places of the Linears of which the file holds 8 bits."""
        sources: dict[str, dict[str, list[str]]] = {}
        for name, new_name in self.renamed(model).items():
            module, _, tensor = new_name.rpartition(".")
            sources.setdefault(module, {}).setdefault(tensor, []).append(name)
        for fqn, module in [*model.named_modules()]:
            if (names := sources.get(fqn)) is None:
                continue
            try:
                if is_experts(module):
                    self._put_experts(module, names)
                elif isinstance(module, nn.Linear) and is_linear(module):
                    self._put_linear(model, fqn, module, names)
            except Refused as e:
                raise Refused(f"{fqn}: {e}; {_FIX}") from None

    def _put_linear(self, model: Any, fqn: str, module: nn.Linear, names: Mapping[str, list[str]]) -> None:
        tensors = {tensor: self.headers[of_tensor[0]] for tensor, of_tensor in names.items()}
        n, k = module.out_features, module.in_features
        in_parts = any(len(of_tensor) > 1 for of_tensor in names.values())
        if not in_parts and "weight" in tensors and tensors["weight"].shape != (n, k):
            raise Refused(f"its weight is {list(tensors['weight'].shape)} in the file, and [{n}, {k}] in the model")
        recipe = self._format(tensors, self.quantization, _layer_name(names))
        if recipe is None:
            return
        if in_parts:
            raise Refused("the file has it in parts, with scales of their own")
        model.set_submodule(fqn, StoredLinear(k, n, tensors, recipe))

    def _put_experts(self, module: nn.Module, names: Mapping[str, list[str]]) -> None:
        experts = experts_sizes(module)[0]
        tensors = {
            tensor: self.headers[of_tensor[0]]
            if len(of_tensor) == 1
            else stacked([self.headers[name] for name in of_tensor], experts)
            for tensor, of_tensor in names.items()
        }
        in_file = {n for of_tensor in names.values() for name in of_tensor for n in (name, name.rpartition(".")[0])}
        if any(compressed_tensors.rotates_inputs(self.quantization, name) for name in in_file):
            raise Refused("inputs of its experts are to be rotated (transform_config), for which there is no kernel")
        recipe = read_experts(module, tensors, self.quantization, _layer_name(names), self._format)
        if recipe is not None:
            put_tensors(module, tensors, recipe)

    @property
    def _format(self) -> Format:
        return FORMATS[self.quantization["quant_method"]]

    def renamed(self, model: Any) -> dict[str, str]:
        """The model's names of the file's tensors, by the file's."""
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
        except ImportError:  # before transformers 5 files have the model's names
            return {name: name for name in self.headers}
        transforms = with_scales(get_model_conversion_mapping(model), self.headers)
        renamings = [x for x in transforms if isinstance(x, WeightRenaming)]
        converters = [x for x in transforms if isinstance(x, WeightConverter)]
        state = model.state_dict()
        prefix = model.base_model_prefix
        return {name: rename_source_key(name, renamings, converters, prefix, state)[0] for name in self.headers}


def _layer_name(names: Mapping[str, list[str]]) -> str:
    """A layer's name in the file, by its tensors' there."""
    return next(iter(names.values()))[0].rpartition(".")[0]


def is_there(folder: pathlib.Path) -> bool:
    """Whether config.json, or modelopt's own, names a format that is read."""
    try:
        _, quantization = _configs(folder)
    except (ValueError, OSError):
        return False
    return isinstance(quantization, Mapping) and quantization.get("quant_method") in FORMATS


def _configs(folder: pathlib.Path) -> tuple[dict[str, Any], Any]:
    """What config.json says, and what it or modelopt's own says of quantisation; None where neither says anything."""
    config = read_json(folder / model_config.CONFIG, "config of a model", _FIX)
    quantization = config.get("quantization_config")
    if quantization is None and (folder / _MODELOPT).is_file():
        quantization = {"quant_method": "modelopt", **read_json(folder / _MODELOPT, "config of modelopt", _FIX)}
    return config, quantization


def find(folder: str | os.PathLike[str]) -> StoredCheckpoint | None:
    """The checkpoint in a folder, if there is one of another library's.

    Raises ValueError, in a sentence, where it is of a format that is not read, or is damaged.
    """
    folder = pathlib.Path(folder)
    if not (folder / model_config.CONFIG).is_file():
        return None
    config, quantization = _configs(folder)
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    if method not in FORMATS:
        raise ValueError(
            f"{folder} is quantised by {str(method)[:40]!r}, and these can be read: {', '.join(FORMATS)}; {_FIX}"
        )
    if method == "compressed-tensors":
        try:
            quantization = compressed_tensors.read_config(quantization)
        except Refused as e:
            raise ValueError(f"{folder}: {e}; {_FIX}") from None
    is_matrix = functools.partial(compressed_tensors.is_matrix, quantization if method == "compressed-tensors" else {})
    headers, metadata, matrices = _headers(folder, is_matrix)
    return StoredCheckpoint(folder, config, {**quantization, "header": metadata, "matrices": matrices}, headers)


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    names = read_json(folder / _INDEX, "index of weights", _FIX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(x, str) for x in names.values()):
        raise ValueError(f"{folder / _INDEX} has no weight_map of names: {_FIX}")
    files = sorted(set(names.values()))
    for name in files:
        if not name.endswith(".safetensors") or name != os.path.basename(name) or not (folder / name).is_file():
            raise ValueError(
                f"{folder / _INDEX} names {name[:60]!r}, which is no file of safetensors in that folder: {_FIX}"
            )
    return [folder / name for name in files]


def _headers(
    folder: pathlib.Path, is_matrix: Callable[[str], bool]
) -> tuple[dict[str, Header], dict[str, str], dict[str, Tensor]]:
    """Those of every tensor, what the files say besides, and matrices of transforms, as far as they are small."""
    with TensorFiles(_files(folder), _FIX) as files:
        headers = {name: header_of(files, name, _FIX) for name in files.shapes()}
        names = [name for name in headers if is_matrix(name)]
        small = [name for name in names if max(headers[name].shape, default=0) <= max(SIZES)]
        matrices = {name: files.read(name) for name in small}
        headers = {name: header for name, header in headers.items() if name not in names}
        return headers, files.metadata(), matrices


def load(stored: StoredCheckpoint, device: torch.device) -> nn.Module:
    """The model, in eval mode, its 8-bit layers those of forwardpass, and its attention as `fp.swap` has it by default.

    Raises:
        ValueError: a layer holds what there are no kernels for, or the folder does not fit its model. ImportError: transformers is
            missing.
    """
    try:
        import transformers
        import transformers.core_model_loading
        from transformers.quantizers.base import HfQuantizer

        known = "model" in inspect.signature(HfQuantizer.update_weight_conversions).parameters
    except (ImportError, AttributeError):
        known = False
    if not known:
        raise ImportError(f"this checkpoint needs transformers 5.24 or later: {pip_install('hf')}")

    folder = stored.folder
    content = {k: v for k, v in stored.config.items() if k not in ("quantization_config", "auto_map")}
    try:
        model_config.check(content, len(stored.headers))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"the config of {folder} is refused ({e}): {_FIX}") from None
    (name, *_) = content.get("architectures") or [None]
    cls: Any = model_config.model_class(name)
    if cls is None:
        raise ValueError(f"transformers {transformers.__version__} has no model class {str(name)[:60]!r}: {_FIX}")
    try:
        config = model_config.read(transformers.AutoConfig, model_config.CONFIG, content, trust_remote_code=False)
        config.quantization_config = _quantizer()(stored)
        with quiet_libraries():
            model, about = cls.from_pretrained(
                folder, config=config, dtype="auto", use_safetensors=True, trust_remote_code=False,
                local_files_only=True, output_loading_info=True,
            )  # fmt: skip
    except Refused as e:
        raise ValueError(str(e)) from None
    except Exception as e:  # transformers raises many kinds
        why = f"{type(e).__name__}: {e}".splitlines()[0][:160]
        raise ValueError(f"transformers cannot load {folder} ({why})") from None
    is_matrix = functools.partial(compressed_tensors.is_matrix, stored.quantization)
    unexpected = {name for name in about["unexpected_keys"] if not is_matrix(name)}
    _check_loaded(folder, {**about, "unexpected_keys": unexpected})
    if note := NOTES.get(stored.quantization["quant_method"]):
        warnings.warn(f"load_pretrained: {note}", stacklevel=4)
    return _finish(model.to(device).eval())


def _check_loaded(folder: pathlib.Path, about: Mapping[str, Any]) -> None:
    """ValueError where a tensor of the model or of the file is left over; a warning where scales of caches are."""
    extra = sorted(about["unexpected_keys"])
    caches = [name for name in extra if _OF_CACHES.fullmatch(name)]
    extra = [name for name in extra if name not in caches]
    for names, problem in (
        (sorted(about["missing_keys"]), "is missing from the file"),
        (extra, "has no place in the model"),
        (sorted(str(x) for x in about["mismatched_keys"]), "has another shape in the file"),
        (sorted(about["error_msgs"]), "is an error of transformers"),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ValueError(f"{folder} does not fit its model: {names[0][:120]!r}{more} {problem}; {_FIX}")
    if caches:
        warnings.warn(f"the calibrated scales of caches ({caches[0]}, …: {len(caches)}) are not used: kv_cache= of fp.swap has a "
                      "scale for each token and head, which is finer", stacklevel=4)  # fmt: skip


def _finish(model: nn.Module) -> nn.Module:
    """Layers of forwardpass in the places of the stored ones."""
    layers: dict[str, tuple[Leaf, QuantizedModule]] = {}
    dtype = next((p.dtype for p in model.parameters() if p.dtype in FLOATS), torch.float32)
    stored = [(leaf, None) for leaf in linear_like(model) if isinstance(leaf.module, StoredLinear)]
    for leaf, recipe in (*stored, *stored_experts(model)):
        module: Any = leaf.module
        try:
            new = module.made(leaf.formula, dtype) if recipe is None else recipe.module(module, in_place=True)
        except Refused as e:
            raise ValueError(f"{leaf.fqn}: {e}; {_FIX}") from None
        module._parameters = dict.fromkeys(module._parameters)
        layers[leaf.fqn] = leaf, new
    projections = Projections(model)
    projections.put()
    attention = decide_attention(Context(model), "auto")
    projections.narrow(leaf.module for leaf in attention.swapped)
    changes = Changes(attention, UnpaddingDecision((), None), CacheDecision(None))
    joined, changes = proven(model, layers, changes, None, believed=False)
    layers.clear()
    put_in_place(model, [x for part in joined.build() for x in part])
    changes.put(model)
    joined.put()
    methods.put(model)
    return model


@functools.cache
def _quantizer() -> Any:
    """The config of a quantizer of transformers that only puts StoredLinears into a model."""
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(_METHOD)
    class StoredConfig(QuantizationConfigMixin):
        def __init__(self, stored: StoredCheckpoint) -> None:
            self.quant_method: Any = _METHOD  # no QuantizationMethod, but what is registered
            self.stored = stored

        def get(self, key: str, default: Any = None) -> Any:
            return getattr(self, key, default)

    @register_quantizer(_METHOD)
    class StoredQuantizer(reading_quantizer()):  # type: ignore[misc]
        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            self.quantization_config.stored.put_layers(model)

        def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
            return with_scales(weight_conversions, self.quantization_config.stored.headers)

        def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
            self.remove_quantization_config(model)
            return model

    return StoredConfig
