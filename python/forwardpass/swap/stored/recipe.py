"""What the formats share: a layer's tensors by their names and shapes, and ways to make layers of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...dispatch import gpu_takes, operations
from ...nn import Fp8Linear, Int8Linear, QuantizedLinear, W8A16Linear
from ...nn.layer import scales_shape
from ...ops.fp8_gemm import BLOCK


class Refused(ValueError):
    """What a layer holds, and that forwardpass has nothing for it."""


@dataclass(frozen=True)
class Header:
    """A tensor that is not read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Recipe:
    """How one layer is made: of which tensors, by their names behind the layer's."""

    names: frozenset[str]
    make: Make


#: (tensors by those names, the activation that the layer computes besides) -> the layer
Make = Callable[[Mapping[str, Tensor], str | None], QuantizedLinear]


#: (its tensors in the file, by their names behind the layer's; `quantization_config`; its name in the file) -> the recipe, or None
#: for a layer that holds floats. Raises Refused.
Format = Callable[[Mapping[str, Header], Mapping[str, Any], str], Recipe | None]


def recipe(
    tensors: Mapping[str, Header],
    make: Make,
    required: tuple[str, ...],
    optional: tuple[str, ...] = (),
) -> Recipe:
    """The recipe for a layer of these names; Refused where one is missing, or another is there that nothing is known of."""
    if missing := [name for name in required if name not in tensors]:
        raise Refused(f"its {missing[0]} is missing")
    if unknown := sorted(tensors.keys() - {*required, *optional, "bias"}):
        raise Refused(f"it has a tensor {unknown[0][:60]!r}, of which nothing is known")
    return Recipe(frozenset(tensors), make)


def check_shape(tensors: Mapping[str, Header], name: str, *shapes: tuple[int, ...]) -> None:
    """Refused where a tensor has none of these shapes."""
    if (shape := tensors[name].shape) not in shapes:
        raise Refused(f"its {name} is {list(shape)}, and should be {' or '.join(str(list(s)) for s in shapes)}")


def check_dtype(tensors: Mapping[str, Header], name: str, *dtypes: torch.dtype) -> None:
    if (dtype := tensors[name].dtype) not in dtypes:
        raise Refused(f"its {name} is {dtype}, and should be {' or '.join(map(str, dtypes))}")


def as_scale(name: str, values: Tensor) -> Tensor:
    """float32, positive and finite."""
    if not values.is_floating_point():
        raise Refused(f"its {name} is {values.dtype}, and scales are floats")
    scale = values.detach().float()
    if not (scale.isfinite().all() and (scale > 0).all()):
        raise Refused(f"its {name} holds values that are no scales (0, negative, NaN or infinity)")
    return scale


def scales_kind(n: int, k: int, tensors: Mapping[str, Header], name: str) -> str:
    """The kind of scales, in the words of `scales_shape`, that a tensor has for a weight [N, K]."""
    if name not in tensors:
        raise Refused(f"its {name} is missing")
    shape = tensors[name].shape
    if shape in ((), (1,), (1, 1)):
        return "tensor"
    if shape in ((n,), (n, 1), (1, n)):
        return "row"
    for kind in ("block", "group"):
        if shape == scales_shape(n, k, kind):
            return kind
    raise Refused(f"its {name} is {list(shape)}: of a weight of {n} x {k} there are kernels for one scale, one a row, one for "
                  f"{BLOCK} columns of a row, and one for {BLOCK} x {BLOCK} weights")  # fmt: skip


def int8_layer(
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    *,
    symmetric: bool = True,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    channel_scale: Tensor | None = None,
) -> Int8Linear:
    """The layer of a weight int8 [N, K] with one scale or one a row; input_scale: of static activations."""
    n, k = weight.shape
    layer = Int8Linear(k, n, bias is not None, symmetric=symmetric, static=input_scale is not None,
                       channel_scale=channel_scale is not None, activation=activation, device="meta")  # fmt: skip
    return layer.filled(weight, scale.reshape(-1).expand(n).contiguous(), bias, input_scale=input_scale,
                        input_zero_point=input_zero_point, channel_scale=channel_scale)  # fmt: skip


def w8a16_layer(weight: Tensor, scale: Tensor, kind: str, bias: Tensor | None, activation: str | None) -> W8A16Linear:
    """The layer of an 8-bit weight [N, K] with scales of a kind."""
    n, k = weight.shape
    scales = "group" if kind in ("block", "group") else "row"
    if kind == "block":
        scale = scale.reshape(scales_shape(n, k, kind)).repeat_interleave(BLOCK, 0)[:n]
    elif kind == "tensor":
        scale = scale.reshape(-1).expand(n)
    layer = W8A16Linear(
        k, n, bias is not None, weight_dtype=weight.dtype, scales=scales, activation=activation, device="meta"
    )
    return layer.filled(weight, scale.reshape(scales_shape(n, k, scales)).contiguous(), bias)


def e4m3_layer(
    weight: Tensor,
    scale: Tensor,
    kind: str,
    bias: Tensor | None,
    activation: str | None,
    input_scale: Tensor | None = None,
) -> Fp8Linear | W8A16Linear:
    """The layer of a weight e4m3 [N, K] with scales of a kind. Where the device multiplies no fp8, activations stay as they are."""
    if kind == "group" or not gpu_takes(weight.device) or operations["fp8_linear"].too_old(weight.device):
        return w8a16_layer(weight, scale, kind, bias, activation)
    n, k = weight.shape
    layer = Fp8Linear(
        k, n, bias is not None, scales=kind, static=input_scale is not None, activation=activation, device="meta"
    )
    return layer.filled(weight, scale.reshape(scales_shape(n, k, kind)), bias, input_scale=input_scale)
