"""What the formats share: a layer's tensors by their names and shapes, and ways to make layers of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.files.tensor_files import TensorFiles
from ..dispatch import gpu_takes, operations
from ..nn import Fp8Linear, Int8Linear, QuantizedLinear, W8A16Linear
from ..nn.linear.quantized_linear import scales_shape
from ..ops.fp8_gemm import BLOCK


class Refused(ValueError):
    """What a layer holds, and that forwardpass has nothing for it."""


@dataclass(frozen=True)
class Header:
    """A tensor that is not read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype


#: As safetensors call them.
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


def header_of(files: TensorFiles, name: str, fix: str) -> Header:
    """That of a tensor. ValueError where there is no such dtype in torch."""
    shape, dtype = files.header(name)
    if dtype not in _DTYPES:
        raise ValueError(f"{name[:60]!r} is {dtype}, which torch has not: {fix}")
    return Header(shape, _DTYPES[dtype])


@dataclass(frozen=True)
class EightBits:
    """A Linear's weight as it is stored, and how its inputs are quantised."""

    weight: Tensor  #: int8 or e4m3 [N, K]
    scale: Tensor  #: float32, of as many elements as its kind has
    kind: str  #: "tensor" or "row", "group": 128 columns of a row, "block": 128 x 128
    inputs: bool = (
        True  #: whether they have 8 bits: each row as it comes, or in groups of 128 beside blocks, or by input_scale
    )
    symmetric: bool = True
    input_scale: Tensor | None = None  #: float32 [1]
    input_zero_point: Tensor | None = None  #: int32 [1]
    channel_scale: Tensor | None = None  #: float32 [K]
    rotate: int | None = None  #: columns that were rotated together

    @property
    def multiplies_as_8_bits(self) -> bool:
        """Whether the device has a product of 8-bit inputs and this weight; inputs stay as they are else."""
        if self.weight.dtype == torch.int8 or not self.inputs:
            return self.inputs
        device = self.weight.device
        return self.kind != "group" and gpu_takes(device) and not operations["fp8_linear"].too_old(device)

    def check_size(self, name: str, n: int, k: int) -> None:
        """Refused where it is no weight of that size; name: what it is called."""
        if self.weight.shape != (n, k):
            raise Refused(f"{name} is {list(self.weight.shape)} in the file, and [{n}, {k}] in the model")

    def scale_of(self, kind: str) -> Tensor:
        """The same scales as another kind has them, which has as many or more."""
        n, k = self.weight.shape
        scale = self.scale.reshape(-1) if self.kind in ("tensor", "row") else self.scale
        if self.kind == "block" and kind == "group":
            scale = scale.reshape(scales_shape(n, k, "block")).repeat_interleave(BLOCK, 0)[:n]
        elif self.kind == "tensor":
            scale = scale.expand(n) if kind == "row" else scale
        return scale.reshape(scales_shape(n, k, kind)).contiguous()

    def layer(self, bias: Tensor | None, activation: str | None, dtype: torch.dtype = torch.float32) -> QuantizedLinear:
        """The layer that computes with it; dtype: of the floats that it stands for."""
        n, k = self.weight.shape
        options: dict[str, Any] = {"activation": activation, "dtype": dtype, "device": "meta"}
        static = self.input_scale is not None
        if not self.multiplies_as_8_bits:
            if self.rotate is not None:
                raise Refused(f"its inputs are rotated, and stay floats on {self.weight.device.type}: kernels rotate inputs that "
                              "they quantise")  # fmt: skip
            kind = "group" if self.kind in ("block", "group") else "row"
            weights = W8A16Linear(k, n, bias is not None, weight_dtype=self.weight.dtype, scales=kind, **options)
            return weights.filled(self.weight, self.scale_of(kind), bias)
        if self.weight.dtype == torch.int8:
            smoothed = self.channel_scale is not None
            int8 = Int8Linear(
                k, n, bias is not None, symmetric=self.symmetric, static=static, channel_scale=smoothed,
                rotate=self.rotate, **options,
            )  # fmt: skip
            return int8.filled(self.weight, self.scale_of("row"), bias, input_scale=self.input_scale,
                               input_zero_point=self.input_zero_point, channel_scale=self.channel_scale)  # fmt: skip
        smoothed = self.channel_scale is not None
        fp8 = Fp8Linear(
            k,
            n,
            bias is not None,
            scales=self.kind,
            static=static,
            channel_scale=smoothed,
            rotate=self.rotate,
            **options,
        )
        if fp8.rotate != self.rotate:
            raise Refused(f"its inputs are rotated {self.rotate} at a time, of which {fp8.rotate} share a scale")
        return fp8.filled(
            self.weight, self.scale_of(self.kind), bias, input_scale=self.input_scale, channel_scale=self.channel_scale
        )


#: The tensors of a layer, by their names behind the layer's -> what is stored in them. Raises Refused.
Read = Callable[[Mapping[str, Tensor]], EightBits]


@dataclass(frozen=True)
class Recipe:
    """How one layer is read: of which tensors, by their names behind the layer's."""

    names: frozenset[str]
    read: Read

    def layer(self, tensors: Mapping[str, Tensor], activation: str | None) -> QuantizedLinear:
        """activation: the one that the layer computes besides."""
        return self.read(tensors).layer(tensors.get("bias"), activation)


#: (its tensors in the file, by their names behind the layer's; `quantization_config`; its name in the file) -> the recipe, or None
#: for a layer that holds floats. Raises Refused.
Format = Callable[[Mapping[str, Header], Mapping[str, Any], str], Recipe | None]


def recipe(
    tensors: Mapping[str, Header],
    read: Read,
    required: tuple[str, ...],
    optional: tuple[str, ...] = (),
) -> Recipe:
    """The recipe for a layer of these names; Refused where one is missing, or another is there that nothing is known of."""
    if missing := [name for name in required if name not in tensors]:
        raise Refused(f"its {missing[0]} is missing")
    if unknown := sorted(tensors.keys() - {*required, *optional, "bias"}):
        raise Refused(f"it has a tensor {unknown[0][:60]!r}, of which nothing is known")
    return Recipe(frozenset(tensors), read)


def _there(tensors: Mapping[str, Header], name: str) -> Header:
    if name not in tensors:
        raise Refused(f"its {name} is missing")
    return tensors[name]


def check_shape(tensors: Mapping[str, Header], name: str, *shapes: tuple[int, ...]) -> None:
    """Refused where there is no such tensor, or it has none of these shapes."""
    if (shape := _there(tensors, name).shape) not in shapes:
        raise Refused(f"its {name} is {list(shape)}, and should be {' or '.join(str(list(s)) for s in shapes)}")


def check_dtype(tensors: Mapping[str, Header], name: str, *dtypes: torch.dtype) -> None:
    if (dtype := _there(tensors, name).dtype) not in dtypes:
        raise Refused(f"its {name} is {dtype}, and should be {' or '.join(map(str, dtypes))}")


def as_scale(name: str, values: Tensor) -> Tensor:
    """float32, positive and finite."""
    if not values.is_floating_point():
        raise Refused(f"its {name} is {values.dtype}, and scales are floats")
    scale = values.detach().float()
    if not (scale.isfinite().all() and (scale > 0).all()):
        raise Refused(f"its {name} holds values that are no scales (0, negative, NaN or infinity)")
    return scale


def check_int8_scales(kind: str) -> None:
    """Refused where 8-bit inputs are multiplied by an int8 weight of such scales."""
    if kind not in ("tensor", "row"):
        raise Refused(f"its int8 weights have scales by {kind}, and its inputs 8 bits")


def scales_kind(n: int, k: int, tensors: Mapping[str, Header], name: str) -> str:
    """The kind of scales, in the words of `scales_shape`, that a tensor has for a weight [N, K]."""
    shape = _there(tensors, name).shape
    if shape in ((), (1,), (1, 1)):
        return "tensor"
    if shape in ((n,), (n, 1), (1, n)):
        return "row"
    for kind in ("block", "group"):
        if shape == scales_shape(n, k, kind):
            return kind
    raise Refused(f"its {name} is {list(shape)}: of a weight of {n} x {k} there are kernels for one scale, one a row, one for "
                  f"{BLOCK} columns of a row, and one for {BLOCK} x {BLOCK} weights")  # fmt: skip
