"""Which classes are convolutions and nothing else, and how they pad."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..ops.int8_gemm import MAX_K_ZERO_POINT
from .linear.quantized_linear import forward_is_elsewhere, qualified

Pair = tuple[int, int]
Size = int | list[int] | tuple[int, int]  #: of height and width


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


def _own_padding(module: Any) -> Pair | None:
    """That of an nn.Conv2d. torch pads with "same" one more behind than before where a kernel is even."""
    if module.padding == "valid":
        return 0, 0
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size)]
        return None if any(n % 2 for n in total) else (total[0] // 2, total[1] // 2)
    return pair("padding", module.padding, 0)


def _same_padding(module: Any) -> Pair | None:
    """That of classes that pad as TensorFlow does, by the size of the input where they stride."""
    total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size)]
    return None if any(n % 2 for n in total) or tuple(module.stride) != (1, 1) else (total[0] // 2, total[1] // 2)


def _static_padding(module: Any) -> Pair | None:
    """That of classes that call a member `static_padding` first: with one size of input they pad as TensorFlow does."""
    pads, (height, width) = module.static_padding, pair("padding", module.padding, 0)
    if qualified(type(pads)) in _PAD_NOTHING:
        return height, width
    if type(pads) is not nn.ZeroPad2d:
        return None
    left, right, top, bottom = pads.padding
    return (height + top, width + left) if (left, top) == (right, bottom) else None


_PAD_NOTHING = (
    "torch.nn.modules.linear.Identity", "efficientnet_lite_pytorch.utils.Identity", "efficientnet_pytorch.utils.Identity",
)  # fmt: skip
#: By what a class pads, those of which it was read that they compute a convolution and nothing else.
_CONVOLUTIONS: Mapping[str, Callable[[Any], Pair | None]] = {
    "torch.nn.modules.conv.Conv2d": _own_padding,
    "timm.layers.conv2d_same.Conv2dSame": _same_padding,
    "efficientnet_lite_pytorch.utils.Conv2dStaticSamePadding": _static_padding,
    "efficientnet_pytorch.utils.Conv2dStaticSamePadding": _static_padding,
}


def is_convolution(module: nn.Module) -> bool:
    """Whether it computes a convolution and nothing else but to pad with what `padding_of` has."""
    return qualified(type(module)) in _CONVOLUTIONS and not forward_is_elsewhere(type(module))


def padding_of(module: nn.Module) -> Pair | None:
    """Zeros on either side of an input's height and width; None where they are not as many on both."""
    return _CONVOLUTIONS[qualified(type(module))](module)
