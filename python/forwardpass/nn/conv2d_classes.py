"""Which classes are convolutions and nothing else, and how they pad."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.int8_gemm import MAX_K_ZERO_POINT
from .linear.quantized_linear import forward_is_elsewhere, qualified

Pair = tuple[int, int]
Size = int | list[int] | tuple[int, int]  #: of height and width
Sides = tuple[int, int, int, int]  #: left, right, top, bottom


def pair(name: str, x: Any, least: int) -> Pair:
    """(of height, of width)."""
    both = (x, x) if type(x) is int else x
    if not isinstance(both, tuple | list) or len(both) != 2 or any(type(n) is not int or n < least for n in both):
        raise ValueError(f"Int8Conv2d: {name} must be an integer from {least} on, or two of them, not {x!r}")
    return both[0], both[1]


def is_pointwise(module: nn.Module) -> bool:
    """Whether a convolution is the product of a Linear for each pixel."""
    m: Any = module
    forms = tuple(m.kernel_size), padding_of(m), m.groups
    return forms == ((1, 1), (0, 0), 1) and m.in_channels <= MAX_K_ZERO_POINT


def _own_padding(module: Any, height: int, width: int) -> Sides:
    """That of an nn.Conv2d. torch pads with "same" one more behind than before where a kernel is even."""
    if module.padding == "valid":
        return 0, 0, 0, 0
    if module.padding == "same":
        down, across = (d * (k - 1) for d, k in zip(module.dilation, module.kernel_size))
        return _halves(down, across)
    down, across = pair("padding", module.padding, 0)
    return across, across, down, down


def _same_padding(module: Any, height: int, width: int) -> Sides:
    """That of classes that pad as TensorFlow does, by the size of the input where they stride."""
    m = module
    down, across = (
        max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
        for size, k, s, d in zip((height, width), m.kernel_size, m.stride, m.dilation)
    )
    return _halves(down, across)


def _halves(down: int, across: int) -> Sides:
    """The smaller half before."""
    return across // 2, across - across // 2, down // 2, down - down // 2


def _static_padding(module: Any, height: int, width: int) -> Sides | None:
    """That of classes that call a member `static_padding` first: with one size of input they pad as TensorFlow does. None: it is
    no padding with zeros."""
    pads, (down, across) = module.static_padding, pair("padding", module.padding, 0)
    if qualified(type(pads)) in _PAD_NOTHING:
        return across, across, down, down
    if type(pads) is not nn.ZeroPad2d:
        return None
    left, right, top, bottom = pads.padding
    return across + left, across + right, down + top, down + bottom


_PAD_NOTHING = (
    "torch.nn.modules.linear.Identity", "efficientnet_lite_pytorch.utils.Identity", "efficientnet_pytorch.utils.Identity",
)  # fmt: skip
#: By what a class pads an input of a height and a width, those of which it was read that they compute a convolution and nothing
#: else.
_CONVOLUTIONS: Mapping[str, Callable[[Any, int, int], Sides | None]] = {
    "torch.nn.modules.conv.Conv2d": _own_padding,
    "timm.layers.conv2d_same.Conv2dSame": _same_padding,
    "efficientnet_lite_pytorch.utils.Conv2dStaticSamePadding": _static_padding,
    "efficientnet_pytorch.utils.Conv2dStaticSamePadding": _static_padding,
}
#: Those whose padding is another for inputs of other sizes, where they stride.
_BY_SIZE = ("timm.layers.conv2d_same.Conv2dSame",)


def is_convolution(module: nn.Module) -> bool:
    """Whether it computes a convolution and nothing else but to pad with what `padding_of` has."""
    return qualified(type(module)) in _CONVOLUTIONS and not forward_is_elsewhere(type(module))


def padding_of(module: nn.Module) -> Pair | None:
    """Zeros on either side of an input's height and width; None where they are not as many on both."""
    kind, m = qualified(type(module)), module
    if kind in _BY_SIZE and tuple(m.stride) != (1, 1):  # type: ignore[arg-type]
        return None
    sides = _CONVOLUTIONS[kind](m, 1, 1)
    return None if sides is None else _even(sides)


def _even(sides: Sides) -> Pair | None:
    left, right, top, bottom = sides
    return (top, left) if (left, top) == (right, bottom) else None


def is_zero_padded(module: nn.Module) -> bool:
    """Whether it is a convolution of an input that `padded` gives."""
    if not is_convolution(module) or module.padding_mode != "zeros":
        return False
    return _CONVOLUTIONS[qualified(type(module))](module, 1, 1) is not None


def padded(kind: str, module: nn.Module, x: Tensor) -> tuple[Tensor, Pair]:
    """(x [..., H, W] with its zeros, where they are not as many on both sides; those that are still to be added on either side of
    height and width), as a convolution of this class pads. module: one of that class, or with its attributes."""
    sides = _CONVOLUTIONS[kind](module, x.shape[-2], x.shape[-1])
    assert sides is not None
    even = _even(sides)
    return (x, even) if even is not None else (F.pad(x, sides), (0, 0))
