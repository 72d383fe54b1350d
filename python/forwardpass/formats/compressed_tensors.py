"""compressed-tensors (llm-compressor, vLLM): int8 and e4m3 weights, by groups of layers that config.json describes.

`config_groups` has for each group its targets (names, names of classes, "re:" patterns of names), how weights are quantised, and
how inputs are; `ignore` has the targets that no group is for. A weight is `q * weight_scale`; scales have the model's dtype.

`transform_config` has schemes of matrices (QuIP, SpinQuant). Weights in the file are multiplied already (locations "weight_input"
and "weight_output"). Inputs of a layer are to be ("input"), by blocks of a Hadamard matrix, which the file has beside one of the
layers. That of queries and of keys ("q_attn", "k_cache") leaves their products what they are.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..nn import QuantizedLinear
from ..ops.common.quantized_rows import E4M3
from ..ops.common.rotation import SIZES, SignedRotation, hadamard, sylvester
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
    gets what the preset says. As it is elsewhere. Raises Refused, in part of a sentence, where the library refuses it, or a
    transform is none that is computed here."""
    check_transforms(config)
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
    """`config` has besides, as "matrices", those of its transforms by their names (see `is_matrix`)."""
    recipe_of_weight = _layer_recipe(tensors, config, name)
    transform = _input_transform(config, name)
    if transform is None:
        return recipe_of_weight
    if recipe_of_weight is None:
        raise Refused("its inputs are to be rotated (transform_config), and it holds floats")
    if "weight" not in tensors:
        raise Refused("its inputs are to be rotated, and stay floats")
    k = tensors["weight"].shape[1]
    rotation, read = _rotation(*transform, config, name, k), recipe_of_weight.read

    def rotated(t: Mapping[str, Tensor]) -> EightBits:
        stored = read(t)
        scale = rotation.channel_scale(k, stored.weight.device)
        if scale is not None and stored.input_zero_point is not None:
            raise Refused("its inputs have a zero point, and are to be rotated by a matrix of other signs than ours")
        weight = rotation.weight(stored.weight)
        return replace(stored, weight=weight, rotate=rotation.size, channel_scale=scale)

    return replace(recipe_of_weight, read=rotated)


def _layer_recipe(tensors: Mapping[str, Header], config: Mapping[str, Any], name: str) -> Recipe | None:
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


# ---- transform_config

#: layers' names as targets
Names = Callable[[Iterable[str]], list[str]]
#: scheme's name, scheme, and what it applies where
_Transform = tuple[str, Mapping[str, Any], Mapping[str, Any]]
_HADAMARD = ("hadamard", "random-hadamard")
#: In the file already; of a layer's inputs; without a trace in products of queries and keys, where both have the same.
_IN_FILE, _INPUT, _CANCEL = ("weight_input", "weight_output"), "input", ("q_attn", "k_cache")


def _transforms(config: Mapping[str, Any]) -> list[_Transform]:
    """Raises Refused where it is nothing that the library writes."""
    transforms = config.get("transform_config") or {}  # the library writes empty ones
    groups = transforms.get("config_groups") or {} if isinstance(transforms, Mapping) else None
    schemes: list[tuple[str, Any]] = [*groups.items()] if isinstance(groups, Mapping) else [(str(transforms), None)]
    transforms_found: list[_Transform] = []
    for name, scheme in schemes:
        apply = scheme.get("apply") if isinstance(scheme, Mapping) else None
        if not isinstance(apply, list) or not all(isinstance(x, Mapping) for x in apply):
            raise Refused(f"its transform_config has {str(name)[:40]!r}, which applies nothing that is known")
        transforms_found += [(name, scheme, x) for x in apply]
    return transforms_found


def check_transforms(config: Mapping[str, Any]) -> None:
    """Refused, in part of a sentence, where a transform is of more than weights and the inputs of layers."""
    for name, scheme, x in _transforms(config):
        where = x.get("location")
        if where in (*_IN_FILE, _INPUT):
            continue
        alike = [y.get("location") for _, other, y in _transforms(config) if other is scheme
                 and all(x.get(key) == y.get(key) for key in ("targets", "ignore"))
                 and bool(x.get("inverse")) == bool(y.get("inverse"))]  # fmt: skip
        if where not in _CANCEL or not {*_CANCEL} <= {*alike} or scheme.get("type") not in _HADAMARD:
            raise Refused(f"its transform_config rotates at {str(where)[:40]!r} ({name}), and there are kernels that rotate the "
                          "inputs of layers")  # fmt: skip


def is_matrix(config: Mapping[str, Any], tensor: str) -> bool:
    """Whether a tensor of the file is part of a transform, by its name: the matrix, or an order of its rows and columns."""
    holder, _, last = tensor.rpartition(".")
    part = holder.rpartition(".")[2]
    return last in ("weight", "perm") and any(part == f"{n}_{x.get('location')}" for n, _, x in _transforms(config))


def rotates_inputs(config: Mapping[str, Any], name: str) -> bool:
    """Whether a transform is of the inputs of the layer that has this name in the file. Raises Refused, as `layer_recipe` does."""
    return _input_transform(config, name) is not None


def _input_transform(config: Mapping[str, Any], name: str) -> _Transform | None:
    applied = [
        transform
        for transform in _transforms(config)
        if transform[2].get("location") == _INPUT
        and any(_matches(target, name) for target in _listed(transform[2].get("targets")))
        and not any(_matches(target, name) for target in _listed(transform[2].get("ignore")))
    ]
    if len(applied) > 1:
        raise Refused(f"its inputs are to be rotated twice ({applied[0][0]}, {applied[1][0]}), and kernels rotate once")
    return applied[0] if applied else None


def _listed(targets: Any) -> list[Any]:
    return targets if isinstance(targets, list) else [targets]


def _rotation(
    scheme_name: str, scheme: Mapping[str, Any], how: Mapping[str, Any], config: Mapping[str, Any], name: str, k: int
) -> SignedRotation:
    size = scheme.get("head_dim") or k
    if size not in SIZES or k % size:
        sizes = ", ".join(map(str, SIZES))
        raise Refused(f"its {k} inputs are to be rotated {size} at a time ({scheme_name}), and kernels rotate {sizes}")
    if scheme.get("type") not in _HADAMARD:
        raise Refused(f"its inputs are to be multiplied by a {str(scheme.get('type'))[:40]!r} matrix ({scheme_name}), and kernels "
                      "have Hadamard ones")  # fmt: skip
    matrix = _matrix(scheme_name, scheme, config, name, size)
    rotation = SignedRotation.of(matrix.T if how.get("inverse") else matrix)
    if rotation is None:
        raise Refused(f"its inputs are to be rotated by a matrix ({scheme_name}) that is not ours, whatever the signs of its rows "
                      "and the order and signs of its columns")  # fmt: skip
    return rotation


def _matrix(scheme_name: str, scheme: Mapping[str, Any], config: Mapping[str, Any], name: str, size: int) -> Tensor:
    """A layer's own, or the one of its size that layers of the scheme share, of which the file has one."""
    part, matrices = f"{scheme_name}_{_INPUT}", config.get("matrices", {})
    of_scheme = {n: t for n, t in matrices.items() if n.rpartition(".")[0].rpartition(".")[2] == part}
    if of_layer := {n: t for n, t in of_scheme.items() if n.startswith(f"{name}.{part}.")}:
        of_scheme = of_layer
    weights = [t for n, t in of_scheme.items() if n.endswith(".weight") and t.shape == (size, size)]
    orders = [t for n, t in of_scheme.items() if n.endswith(".perm") and t.shape == (size,)]
    if not weights and not orders and scheme.get("type") == "hadamard" and not scheme.get("randomize"):
        return sylvester(size)
    several = any(not torch.equal(t, alike[0]) for alike in (weights, orders) for t in alike)
    if several or not weights:
        raise Refused(f"the matrix of its inputs ({scheme_name}) is missing from the file, or is one of several")
    matrix = weights[0].double()
    if scheme.get("randomize") and not orders:
        raise Refused(f"the order of the matrix of its inputs ({scheme_name}) is missing from the file")
    return matrix[orders[0]][:, orders[0]] if orders else matrix


def transforms_of(layers: Mapping[str, QuantizedLinear], names: Names) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The transform_config of layers whose inputs are rotated, and its matrices by their names in the model: one of each size,
    beside the first of its layers. "random-hadamard" is the type whose matrix readers take from the file: ours is not Sylvester's.

    names: of the layers that a transform is for, as targets.
    """
    groups: dict[str, Any] = {}
    matrices: dict[str, Tensor] = {}
    for size in sorted({layer.rotate for layer in layers.values() if layer.rotate is not None}):
        fqns, scheme = [fqn for fqn, layer in layers.items() if layer.rotate == size], f"rotate_{size}"
        matrices[f"{fqns[0]}.{scheme}_{_INPUT}.weight"] = hadamard(size).sign().float()
        apply = [
            {"targets": names(fqns), "location": where, "inverse": inverse, "ignore": []}
            for where, inverse in ((_INPUT, False), (_IN_FILE[0], True))
        ]
        groups[scheme] = {"type": "random-hadamard", "apply": apply, "randomize": False, "requires_grad": False,
                          "head_dim": size, "precision": "torch.float32"}  # fmt: skip
    return {"config_groups": groups} if groups else {}, matrices


# ---- groups


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
