"""A swapped model from disk: everything is checked, everything is read, and only then is the model changed."""

from __future__ import annotations

import os
import pathlib
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common.files.forms import AtMost, misfit
from ..common.files.tensor_files import TensorFiles
from ..common.models.exchange import put_in_place
from ..common.models.modules import plain_module
from ..formats import comfyui
from ..integrations import sentence_transformers as sentences
from ..integrations.transformers import model_config
from ..nn import Experts, Int8Conv2d, QuantizedLinear, QuantizedModule
from ..nn.conv2d_classes import is_zero_padded
from ..nn.eight_bits import EightBits
from ..nn.mlp import quantised_layers
from ..nn.quantized_experts import experts_sizes
from ..proofs.siblings import JoinedSwap
from ..proofs.walker import ConvolutionLeaf, Leaf, all_leaves, convolutions
from ..swap import methods, originals
from ..swap.attention.attention_modules import decide_attention
from ..swap.attention.decoder_layers import put_decoders
from ..swap.attention.encoder_layers import put_encoders
from ..swap.attention.kv_cache import decide_kv_cache
from ..swap.attention.projections import Projections
from ..swap.attention.unpadded_encoders import decide_unpadding
from ..swap.plan import attention_8bit_of
from ..swap.precision import modules
from ..swap.rules import Context
from . import stored as stored_checkpoint
from .folder import (
    RECORD,
    local_folder,
)
from .record import FIX, SCHEMA, names_now, read_record, slots, weights_of
from .rewritten import Changes, Layers, proven

Fail = Callable[[str], ValueError]


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
    around: dict[str, Any] | None = read_record(pathlib.Path(folder))["around"]
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
    record = read_record(folder)
    with TensorFiles([folder / name for name in weights_of(record)], FIX) as files:
        now = names_now(record)
        in_file = {now(name): name for name in files.shapes()}
        shapes = {name: files.header(stored)[0] for name, stored in in_file.items()}
        if model is None:
            model = _build(folder, record["model"], len(shapes))
            if record["around"] is not None:
                model = build(record["around"], model, str(folder))
        else:
            model = _to_be_filled(model)
        _fill(model, record, shapes, lambda name: files.read(in_file[name]), torch.device(device), str(folder))
    return model


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
    if quantised_layers(model) or originals.swapped_attention(model):
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
    in_floats = convolutions_in_floats(model, record, fail)
    projections.narrow(leaf.module for leaf in (*layers, *changes.attention.swapped))
    named_slots = dict(slots(model, replacements))
    aliases = record["aliases"]
    if unknown := [name for name in (*aliases, *aliases.values()) if name not in named_slots]:
        raise fail(f"it has no tensor {unknown[0][:80]!r}")
    names_in_model = {aliases.get(name, name) for name in named_slots}
    missing, extra = sorted(names_in_model - shapes.keys()), sorted(shapes.keys() - names_in_model)
    for names, problem in ((missing, "is missing from the file"), (extra, "has no place in the model")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise fail(f"{names[0][:80]!r}{more} {problem}")
    for name, slot in named_slots.items():
        if (shape := shapes[aliases.get(name, name)]) != tuple(slot.tensor.shape):
            raise fail(f"{name} has the shape {shape} in the file and {tuple(slot.tensor.shape)} in the model")
    buffers = _same_as_buffers(model, fail)
    values: dict[tuple[str, bool], Tensor] = {}  # what is tied is one object
    assignments: list[tuple[dict[str, Any], str, Tensor]] = []
    for name, slot in named_slots.items():
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
    named = {leaf.fqn: (leaf, replacements.pop(id(leaf.module))) for leaf in layers}
    named_slots.clear()  # which hold the layers too
    before = [(holder, name, holder[name]) for holder, name, _ in assignments]
    before += [(vars(module), name, vars(module)[name]) for module, name, _ in buffers]
    try:
        for holder, name, value in assignments:
            holder[name] = value
        for module, name, buffer in buffers:
            vars(module)[name] = module._buffers[buffer]
        joined, changes = as_recorded(model, named, changes, record, fail, in_floats)
        named.clear()
        put_in_place(model, [x for part in joined.build() for x in part])
    except BaseException:
        for holder, name, value in before:
            holder[name] = value
        raise
    changes.put(model)
    joined.put()
    put_encoders(model, record.get("encoders", ()))
    put_decoders(model, record.get("decoders", ()))
    methods.put(model)


def as_recorded(
    model: nn.Module,
    layers: Layers,
    changes: Changes,
    record: Mapping[str, Any],
    fail: Fail,
    in_floats: Sequence[ConvolutionLeaf] = (),
) -> tuple[JoinedSwap, Changes]:
    """What the record says that the layers are together, where a run does not disprove it: its swap has proven it."""
    try:
        return proven(model, layers, changes, record.get("rewritten"), believed=True, in_floats=in_floats)
    except ValueError as e:
        raise fail(str(e)) from None


def convolutions_in_floats(model: nn.Module, record: Mapping[str, Any], fail: Fail) -> list[ConvolutionLeaf]:
    """The convolutions that compute what is behind them in floats."""
    names = record.get("folded", ())
    leaves = {x.fqn: x for x in convolutions(model)} if names else {}
    for fqn in names:
        leaf = leaves.get(fqn)
        if leaf is None or not (leaf.norm or leaf.activation) or not is_zero_padded(leaf.module):
            raise fail(
                f"it has no convolution {fqn[:80]!r} with a norm or an activation behind it that it could compute"
            )
    return [leaves[fqn] for fqn in names]


def _same_as_buffers(model: nn.Module, fail: Fail) -> list[tuple[nn.Module, str, str]]:
    """(module, attribute, buffer) of plain attributes on the meta device that are a buffer of their module by another name, as
    transformers 4's rotary embeddings have `original_inv_freq`. Others no checkpoint fills."""
    same = []
    for fqn, module in model.named_modules():
        for name, value in vars(module).items():
            if not (isinstance(value, Tensor) and value.is_meta):
                continue
            buffer = next((other for other, t in module._buffers.items() if t is value), None)
            if buffer is None:
                raise fail(f"{fqn}.{name} is a plain attribute on the meta device, which no checkpoint fills")
            same.append((module, name, buffer))
    return same


def empty_layers(
    model: nn.Module,
    record: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    place: Callable[[Tensor], torch.device],
    fail: Fail,
) -> tuple[list[Leaf], dict[int, QuantizedModule]]:
    """(the layers that a record names, quantised layers without values by the ids of those)."""
    leaves: dict[str, Leaf] = {x.fqn: x for x in all_leaves(model)}
    replacements: dict[int, QuantizedModule] = {}
    says_dtypes = record.get("schema") == SCHEMA or record.get("model", {}).get("config") is not None
    for layer in record["layers"]:
        leaf = leaves.get(layer["fqn"])
        if leaf is None:
            raise fail(f"it has no Linear layer, convolution or experts {layer['fqn'][:80]!r}")
        size, recorded, name = _sizes(leaf, layer["config"])
        in_file = shapes.get(f"{leaf.fqn}.{name}", size)
        if not size == recorded == in_file:  # before memory of that size is asked for
            raise fail(f"{leaf.fqn} is {size}, recorded as {recorded}, and {leaf.fqn}.{name} in the file is {in_file}")
        kinds = Experts.__name__, Int8Conv2d.__name__
        if tuple(layer["module"] == kind for kind in kinds) != (leaf.is_experts, leaf.is_convolution):
            raise fail(f"{leaf.fqn} is recorded as {layer['module']}, and is a {type(leaf.module).__name__}")
        new = _empty_layer(layer, place(leaf.weight), fail).train(leaf.module.training)
        if new.activation not in (None, leaf.formula):
            raise fail(f"{leaf.fqn} computes {new.activation}, and {leaf.formula or 'no such activation'} is behind it")
        if isinstance(leaf, ConvolutionLeaf) and isinstance(new, Int8Conv2d) and new.folds_norm:
            if leaf.norm is None:
                raise fail(f"{leaf.fqn} computes the norm behind it, and none is there")
            new.fold(leaf.norm.module)
        if isinstance(new, Experts):
            new.adopt(leaf.module)
        elif isinstance(new, QuantizedLinear | Int8Conv2d):
            new.stand_for(leaf.module, dtype_too=not says_dtypes)
        replacements[id(leaf.module)] = new
    return [leaves[layer["fqn"]] for layer in record["layers"]], replacements


def decide_changes(model: nn.Module, layers: list[Leaf], record: Mapping[str, Any], fail: Fail) -> Changes:
    """What a record says of attention, padding and caches."""
    try:
        context = Context(model)
        bits = {x.fqn: EightBits(x.dtype, x.crossover) for x in attention_8bit_of(record)}
        attention = decide_attention(context, True, record["attention"], bits=bits)
        unpadding = decide_unpadding(context, layers, attention, True, record["unpad"])
        return Changes(attention, unpadding, decide_kv_cache(model, attention, record["kv_cache"]))
    except ValueError as e:
        raise fail(str(e)) from None


def _sizes(leaf: Leaf, config: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[Any, ...], str]:
    """(its weight's shape, the same by what is recorded of it, that weight's name)."""
    if leaf.is_convolution:
        window = _window_of(*map(config.get, ("out_channels", "in_channels", "groups", "kernel_size")))
        return tuple(leaf.weight.shape), window, "qweight"
    if not leaf.is_experts:
        return (leaf.out_features, leaf.in_features), (config.get("out_features"), config.get("in_features")), "qweight"
    experts, intermediate, hidden = experts_sizes(leaf.module)
    names = ("num_experts", "hidden_features", "intermediate_features")
    return (experts, hidden, intermediate), tuple(config.get(name) for name in names), "down_weight"


def _window_of(out_channels: Any, in_channels: Any, groups: Any, kernel: Any) -> tuple[Any, ...]:
    """The weight's shape by what is recorded of a convolution; nothing that is one where that is none."""
    if (
        not all(type(x) is int for x in (out_channels, in_channels, groups))
        or not isinstance(kernel, list)
        or groups < 1
    ):
        return (out_channels, in_channels, groups, kernel)
    return (out_channels, in_channels // groups, *kernel)


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
        if problem := misfit({name: x for name, x in config.items() if name in kinds}, AtMost(kinds)):
            raise TypeError(problem)
        new = module(**config, device=device)
    except (TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise fail(f"the configuration of {layer['fqn']} is not one of {layer['module']} ({e})") from None
    if layer["precision"] is not None:
        vars(new).update(precision=layer["precision"], precision_version=layer["version"])
    return new
