"""compressed-tensors (llm-compressor, vLLM): int8 and e4m3 weights, by groups of layers that config.json describes.

`config_groups` has for each group its targets (names, names of classes, "re:" patterns of names), how weights are quantised, and
how inputs are; `ignore` has the targets that no group is for. A weight is `q * weight_scale`; scales have the model's dtype.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops.common.quantized_rows import E4M3
from .recipe import (
    EightBits,
    Header,
    Recipe,
    Refused,
    as_scale,
    check_dtype,
    check_int8_scales,
    check_shape,
    recipe,
    scales_kind,
)

_PACKED = 4  #: of 8 bits in an int32, the first in the lowest byte, each with 128 added


def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`quantization_config` as compressed-tensors reads it, where that is installed: a group that is named after one of its presets
    gets what the preset says. As it is elsewhere. Raises Refused, in part of a sentence, where the library refuses it."""
    if importlib.util.find_spec("compressed_tensors") is None:
        return dict(config)
    from compressed_tensors.quantization import QuantizationConfig

    try:
        read = QuantizationConfig.model_validate(copy.deepcopy(dict(config)))
        groups = {name: group.model_dump() for name, group in read.config_groups.items()}
    except Exception as e:  # pydantic's, and kinds of its own
        why = " ".join(str(e).split())[:200]
        raise Refused(f"compressed-tensors does not read its quantization_config ({type(e).__name__}: {why})") from None
    return {**config, "config_groups": groups}


def layer_recipe(tensors: Mapping[str, Header], config: Mapping[str, Any], name: str) -> Recipe | None:
    if _has_content(config.get("transform_config")):
        raise Refused("transform_config rotates weights, and its inputs would have to be rotated too")
    plain = "weight" in tensors and tensors["weight"].dtype not in (torch.int8, E4M3)
    if "weight_packed" not in tensors and (plain or "weight" not in tensors):
        return None
    group = _group(config, name)
    weights, inputs = group.get("weights"), group.get("input_activations")
    if group.get("output_activations") is not None:
        raise Refused("output_activations quantises its outputs too, and layers here give 16 bits or more")
    if not isinstance(weights, Mapping):
        raise Refused("its group says nothing of weights")
    if weights.get("num_bits") != 8:
        raise Refused(f"it has {weights.get('num_bits')} bits, and there are kernels for 8")
    if not weights.get("symmetric", True) or "weight_zero_point" in tensors:
        raise Refused("its weights have zero points, and there are kernels for symmetric ones")
    if "weight_packed" in tensors:
        return _packed(tensors, inputs)
    if tensors["weight"].dtype == torch.int8:
        return _int8(tensors, inputs)
    return _e4m3(tensors, inputs)


def _has_content(transforms: Any) -> bool:
    """Whether a transform_config has any: the library writes empty ones."""
    return bool(transforms.get("config_groups", transforms) if isinstance(transforms, Mapping) else transforms)


def _group(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        if isinstance(group, Mapping) and any(_matches(target, name) for target in group.get("targets") or ()):
            return group
    raise Refused("no group of config_groups is for it")


def _matches(target: Any, name: str) -> bool:
    if not isinstance(target, str):
        return False
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target in (name, "Linear")


def _static(tensors: Mapping[str, Header], inputs: Any) -> bool:
    """Whether there is one scale for all inputs; they are quantised row by row else."""
    if inputs.get("num_bits") != 8:
        raise Refused(f"its inputs have {inputs.get('num_bits')} bits, and there are kernels for 8 and 16")
    if inputs.get("dynamic"):
        return False
    if inputs.get("strategy") != "tensor":
        raise Refused(f"its inputs have static scales by {inputs.get('strategy')}, and there are kernels for one scale")
    check_shape(tensors, "input_scale", (), (1,))
    return True


def _int8(tensors: Mapping[str, Header], inputs: Any) -> Recipe:
    n, k = tensors["weight"].shape
    kind = scales_kind(n, k, tensors, "weight_scale")
    if inputs is None:
        return _weights_alone(tensors, kind)
    check_int8_scales(kind)
    names = ["weight", "weight_scale"]
    symmetric = bool(inputs.get("symmetric", True))
    if static := _static(tensors, inputs):
        names += ["input_scale"] + ([] if symmetric else ["input_zero_point"])

    def read(t: Mapping[str, Tensor]) -> EightBits:
        return EightBits(
            t["weight"], as_scale("weight_scale", t["weight_scale"]), kind, symmetric=symmetric,
            input_scale=as_scale("input_scale", t["input_scale"]).reshape(1) if static else None,
            input_zero_point=t["input_zero_point"].reshape(1).int() if static and not symmetric else None,
        )  # fmt: skip

    return recipe(tensors, read, tuple(names))


def _weights_alone(tensors: Mapping[str, Header], kind: str) -> Recipe:
    def read(t: Mapping[str, Tensor]) -> EightBits:
        return EightBits(t["weight"], as_scale("weight_scale", t["weight_scale"]), kind, inputs=False)

    return recipe(tensors, read, ("weight", "weight_scale"))


def _e4m3(tensors: Mapping[str, Header], inputs: Any) -> Recipe:
    n, k = tensors["weight"].shape
    kind = scales_kind(n, k, tensors, "weight_scale")
    if inputs is None:
        return _weights_alone(tensors, kind)
    static = _static(tensors, inputs)

    def read(t: Mapping[str, Tensor]) -> EightBits:
        of_inputs = as_scale("input_scale", t["input_scale"]).reshape(1) if static else None
        return EightBits(t["weight"], as_scale("weight_scale", t["weight_scale"]), kind, input_scale=of_inputs)

    return recipe(tensors, read, ("weight", "weight_scale", *(("input_scale",) if static else ())))


def _packed(tensors: Mapping[str, Header], inputs: Any) -> Recipe:
    """int8 in int32s: weights alone have 8 bits."""
    if inputs is not None:
        raise Refused("its weights are packed, and its inputs quantised")
    n, words = tensors["weight_packed"].shape
    check_dtype(tensors, "weight_packed", torch.int32)

    def read(t: Mapping[str, Tensor]) -> EightBits:
        rows, k = (int(x) for x in t["weight_shape"])
        if rows != n or -(-k // _PACKED) != words:
            raise Refused(f"its weight_shape is {[rows, k]}, and its weight_packed {[n, words]}")
        weight = (t["weight_packed"].contiguous().view(torch.uint8)[:, :k] ^ 0x80).view(torch.int8)
        kind = scales_kind(n, k, tensors, "weight_scale")
        return EightBits(weight, as_scale("weight_scale", t["weight_scale"]), kind, inputs=False)

    return recipe(tensors, read, ("weight_packed", "weight_scale", "weight_shape"))
