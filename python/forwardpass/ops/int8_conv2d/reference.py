"""int8_conv2d in plain torch: the specification. Sums of int8 products are exact in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.epilogue import apply_epilogue


def int8_conv2d(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    residual: Tensor | None = None,
    residual_first: bool = False,
    packed: Tensor | None = None,
) -> Tensor:
    acc = F.conv2d(x.double(), weight.double(), None, list(stride), list(padding), list(dilation), groups).permute(
        0, 2, 3, 1
    )
    of_pixels = x_scale if x_scale.numel() == 1 else x_scale.reshape(-1, 1, 1).expand(acc.shape[:-1])
    added = None if residual is None else residual.permute(0, 2, 3, 1)
    acc = acc.clone(
        memory_format=torch.contiguous_format
    )  # of one pixel its strides may be any, and contiguous() keeps them
    out = apply_epilogue(acc, of_pixels, weight_scale, bias, activation, out_dtype, out_scale, residual=added,
                         residual_first=residual_first)  # fmt: skip
    return out.permute(0, 3, 1, 2)
