"""A swapped model on disk: files of safetensors, and `forwardpass.json`, which names them and says all that is no tensor.

The original weights are neither stored nor needed: a model is built without values (Hugging Face's on the meta device),
its quantised layers are made empty from their stored configuration, and every tensor is read into its place.
Nothing in a checkpoint is executed: no pickle, no remote code, no kernel of a hub, no path from a file.
"""

from __future__ import annotations

import functools
import os
import pathlib
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..common.files import read_json, write_json
from ..common.modules import plain_module
from ..integrations import sentence_transformers as sentences
from ..integrations.kv_scales import KV_CACHES
from ..nn import Experts, QuantizedLinear, QuantizedModule
from ..nn.experts import experts_sizes
from ..version import __version__
from . import auto_model, card, keras_layers, methods, model_config, originals
from .attention import AttentionDecision, AttentionSwap, decide_attention, implementation_before
from .folder import (
    RECORD,
    WEIGHTS,
    check_folder,
    local_folder,
    put_weights,
    remove_other_weights,
    saving,
)
from .kv_cache import CacheDecision, CacheSwap, decide_kv_cache, kv_cache_of
from .plan import UNPAD
from .precision import modules
from .projections import Projections
from .rules import Context
from .siblings import JoinedSwap
from .stored import checkpoint as stored_checkpoint
from .stored import comfyui
from .tensor_files import TensorFiles, safetensors_module, shard_bytes, split
from .unpadding import UnpaddingDecision, UnpaddingSwap, decide_unpadding, unpads
from .walker import Leaf, experts_leaves, linear_like

SCHEMA = "forwardpass.checkpoint/3"
#: Its files have integers under the name `weight`.
EARLIER = "forwardpass.checkpoint/2"
_FIX = "save it again with fp.save_pretrained(model, folder)"
_RECORD = {
    "schema": str,
    "forwardpass": str,
    "model": dict,
    "weights": str | list,  # of several files, their names
    "layers": list,
    "attention": list,
    "unpad": str | None,
    "kv_cache": str | None,
    "aliases": dict,
    "around": dict | None,
}
_MODEL = {"class": str, "attention": str | None, "config": dict | None, "generation_config": dict | None}
_LAYER = {"fqn": str, "module": str, "precision": str | None, "version": int | None, "config": dict}


Fail = Callable[[str], ValueError]
Changes = tuple[AttentionDecision, UnpaddingDecision, CacheDecision]


@dataclass(frozen=True)
class Slot:
    """Where a parameter or buffer is held."""

    module: nn.Module
    name: str
    tensor: Tensor

    @property
    def is_parameter(self) -> bool:
        return self.name in self.module._parameters

    @property
    def holder(self) -> dict[str, Any]:
        return self.module._parameters if self.is_parameter else self.module._buffers


def _slots(model: nn.Module, instead: Mapping[int, nn.Module], prefix: str = "") -> Iterator[tuple[str, Slot]]:
    """Every parameter and buffer under every name; buffers that state_dict leaves out (rotary frequencies) too, as a
    model built without values cannot compute them. `instead`: modules that stand for others, by id.
    """
    module = instead.get(id(model), model)
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is not None and tensor is not getattr(module, "anchor", None):
                yield prefix + name, Slot(module, name, tensor)
    for name, child in module._modules.items():
        if child is not None:
            yield from _slots(child, instead, f"{prefix}{name}.")


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    model_card: bool = True,
) -> None:
    """Writes a swapped model to `folder` (made where it is missing); `load_pretrained` reads it without the originals.

    Tied tensors are stored once. Over an older checkpoint it is one step: whenever it is interrupted, the old one or the new one
    is there, whole. `load_pretrained` reads forwardpass.json and the weights that it names; a Hugging Face model's config.json
    and generation_config.json are written beside them for other programs (a tokenizer saved there finds its class), which find
    no weights of theirs. Of a `SentenceTransformer` or a `CrossEncoder` its modules, prompts and other settings are stored, and its
    tokenizer, so that `load_pretrained` gives the same again.

    Args:
        folder: new, empty, or one that holds a checkpoint of forwardpass, which is replaced. While one process saves there,
            another one is refused.
        overwrite: True: any other folder too. Its config.json and generation_config.json are replaced, its other files stay. The
            folder that the model was loaded from (config._name_or_path) is refused all the same.
        max_shard_size: bytes, or a text such as "5GB", of a file of weights, of which there are several where that is not enough; a
            larger tensor has a file of its own.
        model_card: write README.md too, a model card with what the report of the swap says. One that is there, and was not written
            so, stays as it is.

    Raises:
        ValueError: max_shard_size is no size; the model is not swapped, or holds what safetensors cannot, or is of
            sentence-transformers and has other modules than Transformer, Pooling, Normalize and Dense; the folder is not to be
            written to. ImportError: safetensors is missing.

    Example:
        >>> report = fp.swap(model, precision="int8")
        >>> fp.save_pretrained(model, "checkpoint")
    """
    model = plain_module("save_pretrained", model)
    around = sentences.describe(model)
    processor = None if around is None else functools.partial(sentences.save_processor, model)
    write(model, around, folder, overwrite, max_shard_size, model_card, processor)


def write(
    model: nn.Module,
    around: dict[str, Any] | None,
    folder: str | os.PathLike[str],
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    model_card: bool = True,
    processor: Callable[[pathlib.Path], object] | None = None,
) -> None:
    """`save_pretrained` of a model that is, or for its names stands for, what `around` describes; `processor` writes its tokenizer
    into the folder."""
    layers, separate = originals.separate_layers(model)
    if not layers:
        raise ValueError("save_pretrained stores swapped models, and this one holds no quantised layer: call fp.swap "
                         "first, or use the model's own save method")  # fmt: skip
    if keras_layers.roots(model):
        raise ValueError(
            "save_pretrained stores no layers of keras: its own model.save(…) stores the float model, to be swapped anew"
        )
    sources = model_config.sources(model)
    check_folder(folder, sources, overwrite)  # before tensors are gathered
    shard_bytes(max_shard_size)
    safetensors_module()
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    stored: dict[Any, str] = {}
    storages: set[int] = set()
    for fqn, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(f"{fqn} ({type(module).__name__}) has extra state that is no tensor, which safetensors "
                             f"cannot hold: save that model with its own method")  # fmt: skip
    for name, slot in _slots(model, separate):
        t = slot.tensor.detach()
        if type(t) is not Tensor or t.is_meta:
            raise ValueError(f"{name} is {'on the meta device' if t.is_meta else f'a {type(t).__name__}'}, and only "
                             f"plain tensors with values can be saved: load or gather it first")  # fmt: skip
        key = (t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype)
        if t.numel() and key in stored:
            aliases[name] = stored[key]
            continue
        stored[key] = name
        alone = t.untyped_storage().nbytes() == t.nbytes and t.untyped_storage()._cdata not in storages
        storages.add(t.untyped_storage()._cdata)
        tensors[name] = t.cpu().contiguous() if alone else t.cpu().clone(memory_format=torch.contiguous_format)

    transformer = model if around is None else sentences.transformer_of(model)
    config, generation = model_config.configs(transformer)
    if around is not None and config is None:
        raise ValueError(f"what this {around['class']} is around is a {type(transformer).__name__}, which is no class of "
                         "transformers: save that model with its own method")  # fmt: skip
    record_but_weights = {
        "schema": SCHEMA,
        "forwardpass": __version__,
        "model": {"class": type(transformer).__name__, "attention": implementation_before(transformer),
                  "config": config, "generation_config": generation},
        "layers": [
            {"fqn": fqn, "module": type(m).__name__, "precision": vars(m).get("precision"),
             "version": vars(m).get("precision_version"), "config": m.config()}
            for fqn, m in layers.items()
        ],
        "attention": originals.swapped_attention(model),
        "unpad": unpads(model),
        "kv_cache": kv_cache_of(model),
        "aliases": aliases,
        "around": around,
    }  # fmt: skip
    with saving(folder, sources, overwrite) as folder:
        record = {**record_but_weights, "weights": _put_shards(folder, tensors, max_shard_size)}
        write_json(folder / RECORD, record)
        if config is not None:  # which transformers reads where forwardpass is imported: see auto_model.py
            config = config | {"quantization_config": auto_model.entry(record)}
        for name, content in ((model_config.CONFIG, config), (model_config.GENERATION, generation)):
            if content is not None:
                write_json(folder / name, content)
        if model_card:
            stored_bytes = sum(t.nbytes for t in tensors.values())
            card.write(folder, _card(model, layers, transformer if config is not None else None, around, stored_bytes))
        remove_other_weights(folder, weights_of(record))
        if processor is not None:
            processor(folder)


def _put_shards(folder: pathlib.Path, tensors: dict[str, Tensor], max_shard_size: int | str) -> str | list[str]:
    """The name of the file of weights, or of the files."""
    save_file = functools.partial(safetensors_module().torch.save_file, metadata={"format": "pt"})
    names = [put_weights(folder, functools.partial(save_file, shard)) for shard in split(tensors, max_shard_size)]
    return names[0] if len(names) == 1 else names


def _card(
    model: nn.Module,
    layers: Mapping[str, QuantizedModule],
    transformer: nn.Module | None,
    around: dict[str, Any] | None,
    stored_bytes: int,
) -> str:
    if around is not None:
        library = "sentence-transformers"
        loading = f"A {around['class']}. In this folder, or with its id on the hub in place of the dot:"
        code = 'import forwardpass as fp\nmodel = fp.load_pretrained(".")'
    elif transformer is not None:
        library, name = "transformers", type(transformer).__name__
        loading = "In this folder, or with its id on the hub in place of the dot:"
        code = f'import forwardpass\nfrom transformers import {name}\nmodel = {name}.from_pretrained(".")'
    else:
        library = None
        loading = f"In this folder, where `build()` gives a {type(model).__name__} of floats, which may be on the meta device:"
        code = 'import forwardpass as fp\nmodel = fp.load_pretrained(".", model=build())'
    return card.compose(model, layers, stored_bytes, loading, code, library=library)


def load_pretrained(
    folder: str | os.PathLike[str], model: nn.Module | None = None, *, device: str | torch.device = "cpu"
) -> nn.Module:
    """Reads a model that `save_pretrained` wrote; its outputs are those of the model that was saved, bit for bit.

    Or one that another library stored in 8 bits in transformers' form: compressed-tensors, DeepSeek's and Qwen's fp8, modelopt,
    bitsandbytes, GPTQ in 8 bits, fbgemm. Each layer takes over the bytes that are there, and the scales of inputs. Where the device
    multiplies no fp8, such weights are read as they are, and inputs stay in 16 bits or more. Or a file of ComfyUI, int8 or e4m3,
    into a model whose tensors have the file's names.

    Args:
        folder: what was given to save_pretrained, a folder of such a checkpoint, or the id of either on the hub, whose JSON and
            safetensors files are downloaded; or the path of a file of ComfyUI, which takes a model.
        model: a model of the same structure, not swapped, to be filled in place; it may be on the meta device. Its
            parameters are replaced, not written to. None: Hugging Face's class is built from its stored config, in eval mode, and
            around it the SentenceTransformer or CrossEncoder that was saved.
            Attention that may have to be downloaded (flash_attention_2) is then left to the class's default, with a warning.
        device: where tensors go that have no place yet: those of a model on meta, or of one built here.

    Returns:
        the model. It has no originals: `fp.restore` says so.

    Raises:
        FileNotFoundError, ValueError: the folder is no checkpoint, is damaged, or is for another model; a given model
            is then as it was. ImportError: safetensors, transformers or sentence-transformers is missing.

    Example:
        >>> model = fp.load_pretrained("checkpoint", model=build_model())
    """
    return _load(folder, model, device, sentences.build)


def load_transformer(folder: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> nn.Module:
    """The model of transformers of a checkpoint, without what sentence-transformers has around it, for which that package is not
    needed.
    """
    model = _load(folder, None, device, lambda around, transformer, _: sentences.bare(around, transformer))
    is_wrapped = (pathlib.Path(folder) / RECORD).is_file() and description(folder)
    return sentences.transformer_of(model) if is_wrapped else model


def description(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What sentence-transformers has around the model of a checkpoint of forwardpass, if anything."""
    around: dict[str, Any] | None = _read_record(pathlib.Path(folder))["around"]
    return around


def _load(
    folder: str | os.PathLike[str],
    model: nn.Module | None,
    device: str | torch.device,
    build: Callable[[dict[str, Any], nn.Module, str], nn.Module],
) -> nn.Module:
    """`load_pretrained`; build(around, transformer, folder) gives the model to be filled where there is something around it."""
    if torch.device(device).type == "meta":
        raise ValueError(f"{folder} is read onto a device that holds values, and meta holds none: pass another device=")
    folder = local_folder(folder)
    if folder.is_file():
        return _load_file(folder, model, torch.device(device))
    if not (folder / RECORD).exists() and (other := stored_checkpoint.find(folder)):
        if model is not None:
            raise ValueError(f"{folder} is no checkpoint of forwardpass, and is loaded without model=")
        return stored_checkpoint.load(other, torch.device(device))
    record = _read_record(folder)
    with TensorFiles([folder / name for name in weights_of(record)], _FIX) as files:
        in_file = {renamed(record, name): name for name in files.shapes()}
        shapes = {name: files.header(stored)[0] for name, stored in in_file.items()}
        if model is None:
            model = _build(folder, record["model"], len(shapes))
            if record["around"] is not None:
                model = build(record["around"], model, str(folder))
        else:
            model = _to_be_filled(model)
        _fill(model, record, shapes, lambda name: files.read(in_file[name]), torch.device(device), str(folder))
    return model


def renamed(record: Mapping[str, Any], name: str) -> str:
    """The name that a tensor of a record's files has now."""
    fqn, _, tensor = name.rpartition(".")
    is_earlier = record["schema"] == EARLIER and tensor == "weight"
    return f"{fqn}.qweight" if is_earlier and any(layer["fqn"] == fqn for layer in record["layers"]) else name


def _load_file(path: pathlib.Path, model: nn.Module | None, device: torch.device) -> nn.Module:
    """`load_pretrained` of a file of ComfyUI."""
    if model is None:
        raise ValueError(f"{path} is a file of weights, which does not say what its model is: pass the model as model=")
    model = _to_be_filled(model)
    with TensorFiles([path], "check the path") as files:
        record, shapes, read = comfyui.contents(path, model, files)
        _fill(model, record, shapes, read, device, str(path))
    return model


def _to_be_filled(model: nn.Module) -> nn.Module:
    model = plain_module("load_pretrained", model)
    if originals.quantised_layers(model) or originals.swapped_attention(model):
        raise ValueError(
            "load_pretrained fills a model that is not swapped: call fp.restore(model) first, or build it anew"
        )
    return model


def _fill(
    model: nn.Module,
    record: dict[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    device: torch.device,
    source: str,
) -> None:
    """Checks everything, reads everything, and only then changes the model."""

    def fail(text: str) -> ValueError:
        return ValueError(
            f"{source} does not fit this {type(model).__name__}: {text}; load it into the model it was saved from"
        )

    def place(tensor: Tensor) -> torch.device:
        return device if tensor.is_meta else tensor.device

    with Projections(model, on_meta=True) as projections:
        _fill_layers(model, record, shapes, read, place, projections, fail)
        projections.stays = True


def _fill_layers(
    model: nn.Module,
    record: dict[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    place: Callable[[Tensor], torch.device],
    projections: Projections,
    fail: Fail,
) -> None:
    layers, replacements = empty_layers(model, record, shapes, place, fail)
    changes = decide_changes(model, layers, record, fail)
    projections.narrow(leaf.module for leaf in (*layers, *changes[0].swapped))
    slots = dict(_slots(model, replacements))
    aliases = record["aliases"]
    if unknown := [name for name in (*aliases, *aliases.values()) if name not in slots]:
        raise fail(f"it has no tensor {unknown[0][:80]!r}")
    names_in_model = {aliases.get(name, name) for name in slots}
    missing, extra = sorted(names_in_model - shapes.keys()), sorted(shapes.keys() - names_in_model)
    for names, problem in ((missing, "is missing from the file"), (extra, "has no place in the model")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise fail(f"{names[0][:80]!r}{more} {problem}")
    for name, slot in slots.items():
        if (shape := shapes[aliases.get(name, name)]) != tuple(slot.tensor.shape):
            raise fail(f"{name} has the shape {shape} in the file and {tuple(slot.tensor.shape)} in the model")
    for fqn, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise fail(f"{fqn}.{name} is a plain attribute on the meta device, which no checkpoint fills")

    values: dict[tuple[str, bool], Tensor] = {}  # what is tied is one object
    assignments: list[tuple[dict[str, Any], str, Tensor]] = []
    for name, slot in slots.items():
        is_quantized, key = isinstance(slot.module, QuantizedModule), (aliases.get(name, name), slot.is_parameter)
        if is_quantized or key not in values:
            value, expected = read(key[0]), slot.tensor.dtype
            if value.dtype != expected and (
                is_quantized or not (value.is_floating_point() and expected.is_floating_point)
            ):
                raise fail(f"{name} is {value.dtype} in the file, not {expected}")
            if is_quantized:  # into the padded rows that are there
                slot.tensor.copy_(value)
                continue
            value = value.to(place(slot.tensor), copy=True)  # the file may be mapped into memory, and may change later
            values[key] = nn.Parameter(value, slot.tensor.requires_grad) if slot.is_parameter else value
        assignments.append((slot.holder, slot.name, values[key]))
    joined = JoinedSwap({leaf.fqn: (leaf, replacements.pop(id(leaf.module))) for leaf in layers})
    slots.clear()  # which hold the layers too
    in_place = [x for part in joined.build() for x in part]
    originals.put_in_place(model, in_place)
    for holder, name, value in assignments:
        holder[name] = value
    put_changes(model, changes)
    joined.put()
    methods.put(model)


def empty_layers(
    model: nn.Module,
    record: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    place: Callable[[Tensor], torch.device],
    fail: Fail,
) -> tuple[list[Leaf], dict[int, QuantizedModule]]:
    """(the layers that a record names, quantised layers without values by the ids of those)."""
    leaves = {leaf.fqn: leaf for leaf in (*linear_like(model), *experts_leaves(model))}
    replacements: dict[int, QuantizedModule] = {}
    says_dtypes = record.get("schema") == SCHEMA or record.get("model", {}).get("config") is not None
    for layer in record["layers"]:
        leaf = leaves.get(layer["fqn"])
        if leaf is None:
            raise fail(f"it has no Linear layer or experts {layer['fqn'][:80]!r}")
        size, recorded, name = _sizes(leaf, layer["config"])
        in_file = shapes.get(f"{leaf.fqn}.{name}", size)
        if not size == recorded == in_file:  # before memory of that size is asked for
            raise fail(f"{leaf.fqn} is {size}, recorded as {recorded}, and {leaf.fqn}.{name} in the file is {in_file}")
        if (layer["module"] == Experts.__name__) != leaf.is_experts:
            raise fail(f"{leaf.fqn} is recorded as {layer['module']}, and is a {type(leaf.module).__name__}")
        new = _empty_layer(layer, place(leaf.weight), fail).train(leaf.module.training)
        if new.activation not in (None, leaf.formula):
            raise fail(f"{leaf.fqn} computes {new.activation}, and {leaf.formula or 'no such activation'} is behind it")
        if isinstance(new, Experts):
            new.adopt(leaf.module)
        elif isinstance(new, QuantizedLinear):
            new.stand_for(leaf.module, dtype_too=not says_dtypes)
        replacements[id(leaf.module)] = new
    return [leaves[layer["fqn"]] for layer in record["layers"]], replacements


def decide_changes(model: nn.Module, layers: list[Leaf], record: Mapping[str, Any], fail: Fail) -> Changes:
    """What a record says of attention, padding and caches."""
    try:
        context = Context(model)
        attention = decide_attention(context, True, record["attention"])
        unpadding = decide_unpadding(context, layers, attention, True, record["unpad"])
        return attention, unpadding, decide_kv_cache(model, attention, record["kv_cache"])
    except ValueError as e:
        raise fail(str(e)) from None


def put_changes(model: nn.Module, changes: Changes) -> None:
    """Attention, unpadding and caches, after layers."""
    attention, unpadding, caches = changes
    AttentionSwap(model, attention, unpadding.named).put()
    UnpaddingSwap(unpadding).put()
    CacheSwap(caches).put()


def _sizes(leaf: Leaf, config: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[Any, ...], str]:
    """(its weight's shape, the same by what is recorded of it, that weight's name)."""
    if not leaf.is_experts:
        return (leaf.out_features, leaf.in_features), (config.get("out_features"), config.get("in_features")), "qweight"
    experts, intermediate, hidden = experts_sizes(leaf.module)
    names = ("num_experts", "hidden_features", "intermediate_features")
    return (experts, hidden, intermediate), tuple(config.get(name) for name in names), "down_weight"


def _build(folder: pathlib.Path, model: Mapping[str, Any], tensors: int) -> nn.Module:
    if model["config"] is None:
        raise ValueError(f"{folder} holds a {model['class'][:60]}, which is no class of transformers: build "
                         f"it and pass it as model=, it may be on the meta device")  # fmt: skip
    return model_config.build(
        model["class"], model["attention"], model["config"], model["generation_config"], tensors, str(folder)
    )


def _empty_layer(layer: Mapping[str, Any], device: torch.device, fail: Callable[[str], ValueError]) -> QuantizedModule:
    """The quantised layer, without values."""
    module, config = modules()[layer["module"]], layer["config"]
    kinds = typing.get_type_hints(module.__init__)
    try:
        if wrong := [name for name, x in config.items() if name in kinds and not _is(x, kinds[name])]:
            raise TypeError(f"{wrong[0]}={repr(config[wrong[0]])[:40]} is not of its type")
        new = module(**config, device=device)
    except (TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise fail(f"the configuration of {layer['fqn']} is not one of {layer['module']} ({e})") from None
    if layer["precision"] is not None:
        vars(new).update(precision=layer["precision"], precision_version=layer["version"])
    return new


def _read_record(folder: pathlib.Path) -> dict[str, Any]:
    """forwardpass.json, every entry of the type that `save_pretrained` writes."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}: give load_pretrained a folder that fp.save_pretrained wrote"
        )
    return checked(read_json(folder / RECORD, "checkpoint of forwardpass", _FIX), folder / RECORD)


def checked(content: Mapping[str, Any], path: str | pathlib.Path) -> dict[str, Any]:
    """A record with every entry of the type that `save_pretrained` writes. Raises ValueError, which names its place."""
    record = {"unpad": None, "kv_cache": None, "around": None, **content}  # older ones do not say
    if record.get("schema") not in (SCHEMA, EARLIER):
        raise ValueError(
            f"{path} has the schema {str(record.get('schema'))[:60]!r}, and this version reads {SCHEMA!r}: {_FIX}"
        )

    def require(holds: bool, problem: str) -> None:
        if not holds:
            raise ValueError(f"{path} is damaged ({problem}): {_FIX}")

    require(_has(record, _RECORD) and _has(record["model"], _MODEL), "its entries are not those of a checkpoint")
    weights = weights_of(record)
    require(
        all(isinstance(name, str) and WEIGHTS.fullmatch(name) for name in weights)
        and len({*weights}) == len(weights) > 0,
        "the name of its weights",
    )
    require(record["unpad"] in (None, *UNPAD), "what it says of padding")
    require(record["kv_cache"] in (None, *KV_CACHES), "what it says of caches")
    if record["around"] is not None:
        try:
            sentences.check(record["around"])
        except (ValueError, TypeError, AttributeError) as e:
            require(False, str(e))
    names = (*record["aliases"].values(), *record["attention"])
    require(all(isinstance(name, str) for name in names), "an alias or attention is no name")
    fqns = set()
    for i, layer in enumerate(record["layers"]):
        require(isinstance(layer, dict) and _has(layer, _LAYER), f"layer {i}")
        require(layer["module"] in modules(), f"layer {i} is of an unknown module")
        require(layer["fqn"] not in fqns, f"layer {i} is there twice")
        fqns.add(layer["fqn"])
    return record if record["schema"] == SCHEMA else _as_now(record)


def _as_now(record: dict[str, Any]) -> dict[str, Any]:
    """An earlier record, which does not say of layers without a bias what dtype they stand for."""
    of_model = record["model"]["config"] or {}
    dtype = of_model.get("dtype") or of_model.get("torch_dtype")
    for layer in record["layers"]:
        if dtype is not None and layer["config"].get("bias") is False:
            layer["config"]["dtype"] = dtype
    aliases = {renamed(record, name): renamed(record, stored) for name, stored in record["aliases"].items()}
    return {**record, "aliases": aliases}


def weights_of(record: Mapping[str, Any]) -> list[str]:
    """The names of a record's files of weights."""
    weights = record["weights"]
    return weights if isinstance(weights, list) else [weights]


def _is(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is of a type, or of one of a union: exactly, as True is no size."""
    return type(value) in (typing.get_args(kind) or (kind,))


def _has(entries: Mapping[str, Any], kinds: Mapping[str, Any]) -> bool:
    return set(entries) == set(kinds) and all(_is(entries[name], kind) for name, kind in kinds.items())
