"""ComfyUI's 8-bit files: one file of safetensors of a diffusion model, read into a model of the same names that is given, and
written.

Which layers are quantised, and how, is in the file's header (`_quantization_metadata`) or beside each layer (`comfy_quant`, the
bytes of a JSON object): `float8_e4m3fn`, whose inputs are quantised where there is an `input_scale`, and `int8_tensorwise`, whose
inputs are quantised row by row. e4m3 weights of which neither says anything are as they come, or times an older file's
`scale_weight`. The inputs of int8 weights that were rotated (`convrot`) are rotated too, 64 or 256 columns at a time.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..common.files.tensor_files import TensorFiles
from ..nn import Bf16Linear, Fp8Linear, Int8Linear, QuantizedLinear, QuantizedModule
from ..ops.common.quantized_rows import E4M3
from ..proofs.walker import linear_like
from .recipe import EightBits, Header, Recipe, Refused, as_scale, check_shape, header_of, recipe, scales_kind

_FIX = "read it with ComfyUI"
_METADATA = "_quantization_metadata"
#: What ComfyUI has before the names of a diffusion model, in files of more than that.
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_FORMATS = {"float8_e4m3fn": E4M3, "int8_tensorwise": torch.int8}
_MOST = 4096  #: bytes of a layer's JSON

#: (the record of a checkpoint that has these layers, the shapes of its tensors, what reads one by its name)
Contents = tuple[dict[str, Any], dict[str, tuple[int, ...]], Callable[[str], Tensor]]


def contents(path: pathlib.Path, model: nn.Module, files: TensorFiles) -> Contents:
    """What the file has for this model, as a checkpoint of forwardpass has it. ValueError, in a sentence."""
    in_file = [*files.shapes()]
    prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in in_file)), "")
    names = {name.removeprefix(prefix): name for name in in_file}
    headers = {name: header_of(files, full, _FIX) for name, full in names.items()}
    described = {name.removeprefix(prefix): x for name, x in _described(files.metadata().get(_METADATA), path).items()}
    layers: dict[str, QuantizedLinear] = {}
    used: set[str] = set()
    for leaf in linear_like(model):
        full_names = {name.removeprefix(f"{leaf.fqn}."): name for name in headers if name.startswith(f"{leaf.fqn}.")}
        tensors = {name: headers[full] for name, full in full_names.items()}
        try:
            about = described.get(leaf.fqn)
            if "comfy_quant" in tensors:
                if math.prod(tensors["comfy_quant"].shape) > _MOST:
                    raise Refused(f"its comfy_quant has {math.prod(tensors['comfy_quant'].shape)} bytes")
                about = _object(bytes(files.read(names[full_names["comfy_quant"]]).flatten().tolist()))
            if (how := layer_recipe(tensors, about)) is None:
                continue
            read = {name: files.read(names[full]) for name, full in full_names.items()}
            stored = how.read(read)
            stored.check_size("its weight", leaf.out_features, leaf.in_features)
            layers[leaf.fqn] = stored.layer(read.get("bias"), leaf.formula)
        except Refused as e:
            raise ValueError(f"{leaf.fqn}: {e}; {_FIX}") from None
        used.update(full_names.values())
    floats = {name: header.shape for name, header in headers.items() if name not in used}
    buffers = {f"{fqn}.{n}": t for fqn, layer in layers.items() for n, t in layer._buffers.items() if t is not None}
    entries = [
        {"fqn": fqn, "module": type(m).__name__, "precision": "stored", "version": 1, "config": m.config()}
        for fqn, m in layers.items()
    ]
    nothing: dict[str, Any] = {"attention": [], "attention_8bit": [], "unpad": None, "kv_cache": None, "aliases": {}}
    record = {"layers": entries, **nothing}
    shapes = {**floats, **{name: tuple(t.shape) for name, t in buffers.items()}}
    return record, shapes, lambda name: buffers.pop(name) if name in buffers else files.read(names[name])


def layer_recipe(tensors: Mapping[str, Header], about: Any) -> Recipe | None:
    """about: what the file says of the layer; None where it says nothing."""
    if "weight" not in tensors:
        return None
    dtype = tensors["weight"].dtype
    if about is None:
        if dtype == torch.int8:
            raise Refused("the file does not say what its int8 weight is")
        if dtype != E4M3:
            return None
        about = {"format": "float8_e4m3fn"}
    if not isinstance(about, Mapping) or about.get("format") not in _FORMATS:
        form = about.get("format") if isinstance(about, Mapping) else about
        raise Refused(f"it is of the format {str(form)[:40]!r}, and {' and '.join(_FORMATS)} can be read")
    if dtype != _FORMATS[about["format"]]:
        raise Refused(f"its weight is {dtype}, and of the format {about['format']}")
    n, k = tensors["weight"].shape
    rotate = _rotation(about, dtype, k)
    scale, static = (next((x for x in names if x in tensors), None) for names in _SCALES)
    kind = "tensor" if scale is None else scales_kind(n, k, tensors, scale)
    if dtype == torch.int8 and (scale is None or kind not in ("tensor", "row")):
        raise Refused("its int8 weight has no scale" if scale is None else f"its int8 weight has scales by {kind}")
    if static is not None:
        check_shape(tensors, static, (), (1,))

    def read(t: Mapping[str, Tensor]) -> EightBits:
        scales = torch.ones(1, device=t["weight"].device) if scale is None else as_scale(scale, t[scale])
        of_inputs = None if static is None else as_scale(static, t[static]).reshape(1)
        return EightBits(
            t["weight"],
            scales,
            kind,
            inputs=dtype == torch.int8 or static is not None,
            input_scale=of_inputs,
            rotate=rotate,
        )

    return recipe(tensors, read, ("weight",), ("comfy_quant", *(x for names in _SCALES for x in names)))


def _rotation(about: Mapping[str, Any], dtype: torch.dtype, k: int) -> int | None:
    """Columns that were rotated together; what says nothing of them has 256."""
    if not about.get("convrot"):
        return None
    size = about.get("convrot_groupsize", 256)
    if dtype != torch.int8 or size not in _ROTATED:
        raise Refused(f"its weight is {dtype} and was rotated in groups of {size!r} (convrot): int8 ones of "
                      f"{' and '.join(map(str, _ROTATED))} can be read")  # fmt: skip
    if k % size:
        raise Refused(f"its weight was rotated in groups of {size} (convrot), of which its {k} inputs are no multiple")
    return int(size)


#: columns that a regular Hadamard matrix for which there are kernels has
_ROTATED = (64, 256)

#: Of the weight, and of inputs; the second are an older form's.
_SCALES = (("weight_scale", "scale_weight"), ("input_scale", "scale_input"))


def stored_layer(layer: QuantizedModule) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """A layer's tensors by their names behind its own, and what the file says of it. Raises Refused, in part of a sentence."""
    b = layer._buffers
    tensors = {name: t for name, t in (("weight", b.get("qweight")), ("bias", b.get("bias"))) if t is not None}
    if isinstance(layer, Bf16Linear):
        return tensors, None
    if not isinstance(layer, Int8Linear | Fp8Linear):
        raise Refused(f"a {type(layer).__name__} has no form there")
    if layer.channel_scale is not None:
        raise Refused("its inputs are smoothed (calibrate=), which ComfyUI does not do")
    scale = layer.weight_scale
    if isinstance(layer, Int8Linear):
        if layer.input_scale is not None:
            raise Refused("its inputs have one scale, and ComfyUI quantises those of int8 row by row")
        if layer.rotate not in (None, *_ROTATED):
            sizes = " and ".join(map(str, _ROTATED))
            raise Refused(f"its weight was rotated in groups of {layer.rotate}, and ComfyUI has {sizes}: swap with a precision of "
                          "rotate=64")  # fmt: skip
        rotated = {} if layer.rotate is None else {"convrot": True, "convrot_groupsize": layer.rotate}
        return {**tensors, "weight_scale": scale[:, None]}, {"format": "int8_tensorwise", **rotated, "per_row": True}
    if layer.scales != "tensor" or layer.rotate is not None:
        raise Refused(f"its e4m3 weight has scales by {layer.scales}{', and was rotated' if layer.rotate else ''}, and ComfyUI has "
                      "one a tensor")  # fmt: skip
    static = {} if layer.input_scale is None else {"input_scale": layer.input_scale.reshape(())}
    return {**tensors, "weight_scale": scale.reshape(()), **static}, {"format": "float8_e4m3fn"}


def header(described: Mapping[str, Any]) -> dict[str, str]:
    """The file's metadata, of what it says of layers by their names."""
    return {_METADATA: json.dumps({"format_version": "1.0", "layers": dict(described)})}


def _described(text: str | None, path: pathlib.Path) -> Mapping[str, Any]:
    """What the header says of layers, by their names in the file."""
    if text is None:
        return {}
    try:
        layers = _object(text)["layers"]
        if isinstance(layers, dict):
            return layers
    except (Refused, KeyError):
        pass
    raise ValueError(f"{path} has a {_METADATA} that names no layers: {_FIX}")


def _object(text: str | bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise Refused("what the file says of it is no JSON object")
    return value
