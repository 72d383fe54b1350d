"""A swapped model in a format of others: compressed-tensors, which vLLM and transformers run."""

from __future__ import annotations

import copy
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..common.files import beside, write_json
from ..common.modules import head_of, plain_module
from ..dispatch import Unsupported
from ..nn import Bf16Linear, Fp8Linear, GatedMLP, Int8Linear, QuantizedModule, W8A16Linear
from ..ops.common.quantized_rows import E4M3
from ..ops.fp8_gemm import BLOCK
from . import card, model_config, originals
from .folder import check_folder
from .tensor_files import safetensors_module, shard_bytes, split

FORMATS = ("compressed-tensors",)


def export_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    format: str = "compressed-tensors",
    *,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes a swapped model of transformers in a format that other programs run, with the values that its layers have.

    compressed-tensors: a group of config_groups for each kind of layer; int8 and e4m3 weights by row, tensor or block, inputs by
    token or static, weights alone packed. Layers of bf16 and those that were not swapped are stored as floats. The model's classes
    in transformers, and vLLM, read the folder; `load_pretrained` too. Its tokenizer is not in it. README.md is a model card with
    what the report of the swap says; one that is there, and was not written so, stays as it is.

    Args:
        folder: new or empty; overwrite: another, too, where files of these names are replaced.
        max_shard_size: bytes, or "5GB", of a file.

    Raises:
        ValueError: there is no such format, the model is not swapped or no class of transformers, or the folder is refused.
        Unsupported: the format cannot hold a layer, and why, before anything is written: smoothed inputs of calibrated layers,
            but of a gated MLP's last one, which the one before takes; experts.

    Example:
        >>> report = fp.swap(model, precision="int8")
        >>> fp.export_pretrained(model, "exported")
    """
    if format not in FORMATS:
        raise ValueError(f"export_pretrained writes {', '.join(FORMATS)}, not {format!r}")
    model = plain_module("export_pretrained", model)
    config, generation = model_config.configs(model)
    if config is None:
        raise ValueError(f"export_pretrained writes models of transformers, and {type(model).__name__} is none: use "
                         "fp.save_pretrained")  # fmt: skip
    layers, _ = originals.separate_layers(model)
    if not layers:
        raise ValueError(
            "export_pretrained stores swapped models, and this one holds no quantised layer: call fp.swap first"
        )
    layers = _folded(model, layers)
    schemes = {fqn: _scheme(fqn, layer) for fqn, layer in layers.items() if not isinstance(layer, Bf16Linear)}
    folder = check_folder(folder, model_config.sources(model), overwrite)
    shard_bytes(max_shard_size)
    tensors = dict(_tensors(model, layers))
    names = _as_on_the_hub(model, tensors)
    tensors = {names[name]: t for name, t in tensors.items()}
    layer_names = {name.rpartition(".")[0]: in_file.rpartition(".")[0] for name, in_file in names.items()}
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(tensors, folder, max_shard_size)
    config["quantization_config"] = _quantization_config(model, schemes, layer_names)
    if _is_untied(model, layers):
        config["tie_word_embeddings"] = False
    if generation is not None:
        write_json(folder / model_config.GENERATION, generation)
    write_json(folder / model_config.CONFIG, config)
    card.write(folder, _card(model, layers, sum(t.nbytes for t in tensors.values())))


def _card(model: nn.Module, layers: Mapping[str, QuantizedModule], stored_bytes: int) -> str:
    loading = ("Stored as compressed-tensors has it, which vLLM reads, and transformers where compressed-tensors is installed. By "
               "forwardpass, in this folder, or with its id on the hub in place of the dot:")  # fmt: skip
    code = 'import forwardpass as fp\nmodel = fp.load_pretrained(".")'
    tags = ("compressed-tensors",)
    return card.compose(model, layers, stored_bytes, loading, code, library="transformers", tags=tags)


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

    if getattr(layer, "channel_scale", None) is not None:
        raise Unsupported(f"{fqn} multiplies its input by a scale for each channel (it is calibrated), for which "
                          "compressed-tensors has no place: swap without calibrate=", {})  # fmt: skip
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
        is_e4m3 = layer.weight.dtype == E4M3
        grouped = {"strategy": "group", "group_size": BLOCK} if layer.scales == "group" else {"strategy": "channel"}
        if is_e4m3 and layer.scales == "group":
            raise Unsupported(
                f"{fqn} has e4m3 weights in groups of {BLOCK}, for which compressed-tensors has no format", {}
            )
        weights = args("float" if is_e4m3 else "int", **grouped)
        return {
            "format": "naive-quantized" if is_e4m3 else "pack-quantized",
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


def _quantization_config(
    model: nn.Module, schemes: Mapping[str, dict[str, Any]], names_in_file: Mapping[str, str]
) -> dict[str, Any]:
    groups: list[tuple[dict[str, Any], list[str]]] = []
    for fqn, scheme in schemes.items():
        same = next((names for other, names in groups if other == scheme), None)
        if same is None:
            groups.append((scheme, [names_in_file[fqn]]))
        else:
            same.append(names_in_file[fqn])
    formats = {scheme["format"] for scheme, _ in groups}
    linears = (n for n, m in model.named_modules() if isinstance(m, nn.Linear | Bf16Linear))
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {
            f"group_{i}": {"targets": ["Linear"] if len(groups) == 1 else names, **scheme}
            for i, (scheme, names) in enumerate(groups)
        },
        "ignore": [names_in_file.get(name, name) for name in linears if name not in schemes],
        "kv_cache_scheme": None,
    }


def _tensors(model: nn.Module, layers: Mapping[str, QuantizedModule]) -> Iterator[tuple[str, Tensor]]:
    """Everything that a file has, by name; what is tied once."""
    for fqn, layer in layers.items():
        yield from ((f"{fqn}.{name}", t) for name, t in _layer_tensors(layer))
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


def _layer_tensors(layer: QuantizedModule) -> Iterator[tuple[str, Tensor]]:
    """A layer's, by the format's names."""
    b = layer._buffers
    weight, scale = b["weight"], b.get("weight_scale")
    assert weight is not None
    if isinstance(layer, W8A16Linear) and weight.dtype == torch.int8:
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


def _write_weights(tensors: dict[str, Tensor], folder: pathlib.Path, max_shard_size: int | str) -> None:
    safetensors = safetensors_module()
    shards = split(tensors, max_shard_size)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for file, shard in zip(names, shards):
        part = {name: t.cpu().clone(memory_format=torch.contiguous_format) for name, t in shard.items()}
        with beside(folder / file) as partial:
            safetensors.torch.save_file(part, partial, metadata={"format": "pt"})
            partial.replace(folder / file)
    index = folder / "model.safetensors.index.json"
    for old in folder.glob("model*.safetensors"):
        if old.name not in names:
            old.unlink()
    if len(shards) > 1:
        total = sum(t.nbytes for t in tensors.values())
        weight_map = {name: file for file, shard in zip(names, shards) for name in shard}
        write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
    else:
        index.unlink(missing_ok=True)
