"""What layers take: inputs that are quantised already, and floats in a layout that the operations read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Quantized(NamedTuple):
    """An input that a layer or a norm before has quantised, as this one would: `(values - zero_point) * scale`, and the dtype that
    it stands for."""

    values: Tensor
    scale: Tensor
    dtype: torch.dtype
    zero_point: Tensor | None = None


def rows(x: Tensor) -> Tensor:
    """x, or a contiguous copy where the ops would refuse its layout: nn.Linear takes any."""
    if x.is_contiguous() or x.dim() == 0:
        return x
    strides = [x.stride(d) for d in range(x.dim()) if x.shape[d] != 1]
    sizes = [n for n in x.shape if n != 1]
    if x.shape[-1] != 1 and strides[-1:] != [1]:
        return x.contiguous()
    lead = range(len(sizes) - (2 if x.shape[-1] != 1 else 1))
    return x if all(strides[d] == strides[d + 1] * sizes[d + 1] for d in lead) else x.contiguous()
