"""A swapped model in a format of others: compressed-tensors, which vLLM and transformers run, and ComfyUI's files."""

from __future__ import annotations

import copy
import os
import pathlib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..common.files.json_files import flush, json_text, room_beside
from ..common.files.tensor_files import safetensors_module, shard_bytes, split
from ..common.models.modules import head_of, plain_module
from ..dispatch import Unsupported
from ..formats import Refused, comfyui, compressed_tensors
from ..integrations.transformers import model_config
from ..nn import (
    Bf16Linear,
    Fp8Linear,
    GatedMLP,
    Int8Linear,
    MultiheadAttention,
    QuantizedLinear,
    QuantizedModule,
    W8A16Linear,
)
from ..ops.common.quantized_rows import E4M3
from ..ops.fp8_gemm import BLOCK
from ..swap import originals
from . import card, readback, smoothing
from .folder import RECORD, check_folder, remove_other_weights, saving

FORMATS = ("compressed-tensors", "comfyui")
PACKED = "pack-quantized"
INDEX = "model.safetensors.index.json"
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def export_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    format: str = "compressed-tensors",
    *,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes a swapped model in a format that other programs run, with the values that its layers have.

    compressed-tensors, for models of transformers: a group of config_groups for each kind of layer; int8 and e4m3 weights by row,
    tensor or block, inputs by token or static, weights alone packed. Layers of bf16 and those that were not swapped are stored as
    floats. Rotated inputs are a transform_config, which transformers 5.24 passes over: a warning says so. The model's classes in
    transformers, and vLLM, read the folder; `load_pretrained` too. Its tokenizer is not in it. README.md is a model card with what
    the report of the swap says; one that is there, and was not written so, stays as it is.

    comfyui, for models of any class: one file of the model's own names, int8 weights by row, rotated ones (`convrot`) of 64 and 256
    columns, and e4m3 weights with one scale. ComfyUI quantises inputs of int8 layers symmetrically, and those of e4m3 layers where
    the layer has a static scale.

    Args:
        folder: of comfyui the file, `….safetensors`; else new or empty; overwrite: another, too, where files of these names are
            replaced, and a checkpoint of forwardpass. Killed at any time, it leaves the old export or the new one whole, or a
            folder without config.json. Another process that saves there meanwhile is refused.
        max_shard_size: bytes, or "5GB", of a file.

    Raises:
        ValueError: there is no such format, the model is not swapped or no class of transformers, or the folder is refused.
        Unsupported: before anything is written, the layer and the reason: the format has no form for it (experts, e4m3 in
            groups); it is no nn.Linear in transformers (Conv1D); the scales of a calibrated layer have no place in the norm or
            the layer before it; the class that transformers builds has other tensors than this model.

    Example:
        >>> report = fp.swap(model, precision="int8")
        >>> fp.export_pretrained(model, "exported")
    """
    if format not in FORMATS:
        raise ValueError(f"export_pretrained writes {', '.join(FORMATS)}, not {format!r}")
    model = plain_module("export_pretrained", model)
    config, generation = model_config.configs(model)
    if config is None and format == "compressed-tensors":
        raise ValueError(f"export_pretrained writes models of transformers, and {type(model).__name__} is none: use "
                         "fp.save_pretrained")  # fmt: skip
    layers, _ = originals.separate_layers(model)
    if not layers:
        raise ValueError(
            "export_pretrained stores swapped models, and this one holds no quantised layer: call fp.swap first"
        )
    _refuse_projections(model, layers)
    if format == "comfyui":
        return _put_file(pathlib.Path(folder), model, layers, overwrite)
    assert config is not None
    layers, norms = smoothing.fold(model, _folded(model, layers))
    if _is_untied(model, layers):
        config["tie_word_embeddings"] = False
    schemes = {fqn: _scheme(fqn, layer) for fqn, layer in layers.items() if not isinstance(layer, Bf16Linear)}
    built = readback.as_built(model, config, len(model.state_dict()))
    _check_layers(built, schemes)
    sources = model_config.sources(model)
    check_folder(folder, sources, overwrite, replaces=False)  # before tensors are gathered
    shard_bytes(max_shard_size)
    tensors = {**dict(_tensors(model, layers, schemes)), **norms}
    names = _as_on_the_hub(model, tensors)
    layer_names = {name.rpartition(".")[0]: in_file.rpartition(".")[0] for name, in_file in names.items()}
    rotated = {fqn: layer for fqn, layer in layers.items() if isinstance(layer, QuantizedLinear) and layer.rotate}
    transforms, matrices = compressed_tensors.transforms_of(rotated, lambda fqns: _both_names(fqns, layer_names))
    names |= {name: _in_file(name, layer_names) for name in matrices}
    tensors = {names[name]: t for name, t in {**tensors, **matrices}.items()}
    config["quantization_config"] = _quantization_config(built, schemes, layer_names)
    if transforms:
        config["quantization_config"]["transform_config"] = transforms
    try:
        compressed_tensors.read_config(config["quantization_config"])
    except Refused as e:
        raise Unsupported(f"this swap has no form that others read: {e}; use fp.save_pretrained", {}) from None
    readback.check(built, config, tensors, schemes)
    with saving(folder, sources, overwrite, replaces=False) as folder:
        _put(folder, tensors, max_shard_size, config, generation)
        if rotated:
            warnings.warn(f"export_pretrained: the inputs of {len(rotated)} layers are rotated (transform_config): a reader that "
                          "does not know it, as transformers 5.24, gives wrong results", stacklevel=2)  # fmt: skip
        card.write(folder, _card(model, layers, sum(t.nbytes for t in tensors.values())))


def _put_file(path: pathlib.Path, model: nn.Module, layers: Mapping[str, QuantizedModule], overwrite: bool) -> None:
    """ComfyUI's: written beside the old one, then renamed."""
    if path.suffix != ".safetensors" or path.is_dir():
        raise ValueError(f"a file of ComfyUI ends in .safetensors, unlike {path}")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} is there: give another name, or pass overwrite=True")
    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    for fqn, layer in layers.items():
        try:
            of_layer, about = comfyui.stored_layer(layer)
        except Refused as e:
            raise Unsupported(f"{fqn}: {e}", {}) from None
        tensors |= {f"{fqn}.{name}": t for name, t in of_layer.items()}
        if about is not None:
            described[fqn] = about
    tensors |= {n: t for n, t in _tensors(model, {}, {}) if n not in tensors}
    whole = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    with room_beside(path) as room:
        safetensors_module().torch.save_file(whole, room / path.name, metadata=comfyui.header(described))
        flush(room / path.name)
        os.replace(room / path.name, path)


def _check_layers(built: nn.Module, schemes: Mapping[str, dict[str, Any]]) -> None:
    """Unsupported where a layer is no Linear in transformers; changes the format of packed ones that it does not read so."""
    for fqn in schemes:
        readback.check_layer(fqn, built)
    packed = [fqn for fqn, scheme in schemes.items() if scheme["format"] == PACKED]
    if packed and not readback.takes_packed(built, packed):
        for fqn in packed:
            schemes[fqn]["format"] = "int-quantized"


def _card(model: nn.Module, layers: Mapping[str, QuantizedModule], stored_bytes: int) -> str:
    loading = ("Stored as compressed-tensors has it, which vLLM reads, and transformers where compressed-tensors is installed. By "
               "forwardpass, in this folder, or with its id on the hub in place of the dot:")  # fmt: skip
    code = 'import forwardpass as fp\nmodel = fp.load_pretrained(".")'
    tags = ("compressed-tensors",)
    return card.compose(model, layers, stored_bytes, loading, code, library="transformers", tags=tags)


def _refuse_projections(model: nn.Module, layers: Iterable[str]) -> None:
    """Unsupported where others would look for in_proj_weight, and for an out_proj that is a float's."""
    for fqn in layers:
        parent = fqn.rpartition(".")[0]
        if isinstance(model.get_submodule(parent), MultiheadAttention):
            raise Unsupported(f"{fqn} is a projection of an nn.MultiheadAttention, which others hold in in_proj_weight and read "
                              f"as floats: swap with exclude={parent!r}, or use fp.save_pretrained", {})  # fmt: skip


def _folded(model: nn.Module, layers: Mapping[str, QuantizedModule]) -> dict[str, QuantizedModule]:
    """The layers, without the smoothing of a gated MLP's last one: it multiplies what the up projection gives, whose scales of rows
    and bias take it. That of layers behind a norm stays: each has its own, and the norm is one."""
    folded = dict(layers)
    for fqn, module in model.named_modules():
        if not isinstance(module, GatedMLP) or len(module.members) != 3:
            continue
        names = [f"{fqn}.{name}" if fqn else name for name in module.members]
        up, down = (copy.copy(folded[name]) for name in names[1:])
        up._buffers, down._buffers = dict(up._buffers), dict(down._buffers)
        smoothing, scale, bias = (
            down._buffers.get("channel_scale"),
            up._buffers.get("weight_scale"),
            up._buffers["bias"],
        )
        if smoothing is None or scale is None or scale.shape[:1] != smoothing.shape:
            continue  # a scale for a tensor or for blocks has no room for it
        up._buffers["weight_scale"] = (scale.t() * smoothing).t().contiguous()
        if bias is not None:
            up._buffers["bias"] = (bias * smoothing).to(bias.dtype)
        down._buffers["channel_scale"] = None
        folded |= {names[1]: up, names[2]: down}
    return folded


def _scheme(fqn: str, layer: QuantizedModule) -> dict[str, Any]:
    """What config_groups say of such layers."""

    def args(kind: str, strategy: str, dynamic: bool = False, symmetric: bool = True, **others: Any) -> dict[str, Any]:
        return {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": symmetric, "dynamic": dynamic, **others}

    def inputs(kind: str, static: bool, symmetric: bool = True) -> dict[str, Any]:
        return args(kind, "tensor" if static else "token", not static, symmetric)

    if isinstance(layer, Int8Linear):
        of_inputs = inputs("int", layer.input_scale is not None, layer.symmetric)
        return {"format": "int-quantized", "weights": args("int", "channel"), "input_activations": of_inputs}
    if isinstance(layer, Fp8Linear):
        if layer.scales == "block":
            weights = args("float", "block", block_structure=[BLOCK, BLOCK])
            of_inputs = args("float", "group", True, group_size=BLOCK)
        else:
            weights = args("float", "channel" if layer.scales == "row" else "tensor")
            of_inputs = inputs("float", layer.input_scale is not None)
        return {"format": "float-quantized", "weights": weights, "input_activations": of_inputs}
    if isinstance(layer, W8A16Linear):
        is_e4m3 = layer.qweight.dtype == E4M3
        grouped = {"strategy": "group", "group_size": BLOCK} if layer.scales == "group" else {"strategy": "channel"}
        if is_e4m3 and layer.scales == "group":
            raise Unsupported(
                f"{fqn} has e4m3 weights in groups of {BLOCK}, for which compressed-tensors has no format", {}
            )
        weights = args("float" if is_e4m3 else "int", **grouped)
        return {
            "format": "naive-quantized" if is_e4m3 else PACKED,
            "weights": weights,
            "input_activations": None,
        }
    raise Unsupported(
        f"{fqn} is a {type(layer).__name__}, for which compressed-tensors has no form here: exclude it", {}
    )


def _as_on_the_hub(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The names that tensors have in files on the hub, which other programs read, by the model's.

    What a class of transformers has in stacks, and files one by one, stays in stacks: its reader of compressed-tensors takes
    experts of floats in no other way (5.24).
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightRenaming, apply_renamings
    except ImportError:  # before transformers 5 models have those names
        return {name: name for name in names}
    transforms: Any = getattr(model, "_weight_conversions", None)
    if transforms is None:  # not read from a file, whose prefix would be known
        transforms = get_model_conversion_mapping(model, add_legacy=False)  # type: ignore[arg-type]
        transforms = [t for t in transforms if not isinstance(t, PrefixChange)]
    renamings: Any = [t.reverse_transform() for t in reversed(transforms) if isinstance(t, WeightRenaming)]
    return {name: apply_renamings(name, renamings) for name in names}


def _both_names(fqns: Iterable[str], names_in_file: Mapping[str, str]) -> list[str]:
    """Layers go by both of their names: transformers compares those of its modules, and vLLM those in the file."""
    return [*dict.fromkeys(name for fqn in fqns for name in (names_in_file.get(fqn, fqn), fqn))]


def _in_file(name: str, names_in_file: Mapping[str, str]) -> str:
    """The name of a transform's matrix, beside its layer's there."""
    fqn, part, tensor = name.rsplit(".", 2)
    return f"{names_in_file[fqn]}.{part}.{tensor}"


def _quantization_config(
    built: nn.Module, schemes: Mapping[str, dict[str, Any]], names_in_file: Mapping[str, str]
) -> dict[str, Any]:
    """built: the model as readers build it."""

    def both(fqns: Iterable[str]) -> list[str]:
        return _both_names(fqns, names_in_file)

    groups: list[tuple[dict[str, Any], list[str]]] = []
    for fqn, scheme in schemes.items():
        same = next((names for other, names in groups if other == scheme), None)
        if same is None:
            groups.append((scheme, [fqn]))
        else:
            same.append(fqn)
    formats = {scheme["format"] for scheme, _ in groups}
    linears = (n for n, m in built.named_modules() if isinstance(m, nn.Linear))
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {
            f"group_{i}": {"targets": ["Linear"] if len(groups) == 1 else both(names), **scheme}
            for i, (scheme, names) in enumerate(groups)
        },
        "ignore": both(name for name in linears if name not in schemes),
        "kv_cache_scheme": None,
    }


def _tensors(
    model: nn.Module, layers: Mapping[str, QuantizedModule], schemes: Mapping[str, dict[str, Any]]
) -> Iterator[tuple[str, Tensor]]:
    """Everything that a file has, by name; what is tied once."""
    for fqn, layer in layers.items():
        packs = schemes.get(fqn, {}).get("format") == PACKED
        yield from ((f"{fqn}.{name}", t) for name, t in _layer_tensors(layer, packs))
    stored: set[Any] = set()
    for fqn, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            continue
        for name, t in (*module._parameters.items(), *module._buffers.items()):
            if t is None or name in module._non_persistent_buffers_set:
                continue
            key = t.untyped_storage()._cdata, t.storage_offset(), t.shape
            if t.numel() == 0 or key not in stored:
                stored.add(key)
                yield (f"{fqn}.{name}" if fqn else name), t.detach()


def _layer_tensors(layer: QuantizedModule, packs: bool) -> Iterator[tuple[str, Tensor]]:
    """A layer's, by the format's names; packs: int8 in int32s."""
    b = layer._buffers
    weight, scale = b["qweight"], b.get("weight_scale")
    assert weight is not None
    if packs:
        n, k = weight.shape
        padded = nn.functional.pad(weight.to(torch.int16) + 128, (0, -k % 4), value=128).to(torch.uint8)
        yield "weight_packed", padded.contiguous().view(torch.int32)
        yield "weight_shape", torch.tensor([n, k])
    else:
        yield "weight", weight
    if scale is not None:
        by_row = scale.dim() == 1 and scale.numel() == weight.shape[0] and getattr(layer, "scales", "row") == "row"
        yield "weight_scale", scale[:, None] if by_row else scale
    for name, dtype in (("input_scale", torch.float32), ("input_zero_point", torch.int8)):
        if (t := b.get(name)) is not None:
            yield name, t.to(dtype)
    if (bias := b.get("bias")) is not None:
        yield "bias", bias


def _is_untied(model: nn.Module, layers: Mapping[str, QuantizedModule]) -> bool:
    """Whether the head has a copy of its own where the config ties it to the embedding."""
    head = head_of(model)
    return head is not None and any(layer is head for layer in layers.values())


def _put(
    folder: pathlib.Path,
    tensors: dict[str, Tensor],
    max_shard_size: int | str,
    config: dict[str, Any],
    generation: dict[str, Any] | None,
) -> None:
    """Everything is written beside what is there, then renamed in one go. config.json goes first and comes last: a folder in which
    a process was killed meanwhile has the old export, the new one, or no config.json, and is then read by nobody."""
    safetensors = safetensors_module()
    shards = split(tensors, max_shard_size)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    index: dict[str, Any] | None = None
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards) for name in shard}
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    with room_beside(folder / "model.safetensors") as room:
        written = {name: room / name for name in names}
        for partial, shard in zip(written.values(), shards):
            part = {name: t.cpu().clone(memory_format=torch.contiguous_format) for name, t in shard.items()}
            safetensors.torch.save_file(part, partial, metadata={"format": "pt"})
        contents = {INDEX: index, model_config.GENERATION: generation, model_config.CONFIG: config}
        for name, content in contents.items():
            if content is not None:
                written[name] = room / name
                written[name].write_text(json_text(content), encoding="utf-8")
        for partial in written.values():
            flush(partial)
        for name in (model_config.CONFIG, RECORD):
            (folder / name).unlink(missing_ok=True)
        for old in folder.iterdir():
            if _WEIGHTS.fullmatch(old.name) or old.name == INDEX:
                old.unlink()
        for name, partial in written.items():
            partial.replace(folder / name)
    remove_other_weights(folder, ())
