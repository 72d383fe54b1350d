"""GPTQ in 8 bits: weights of K x N as integers of 32 bits, four of a column in each, with a scale for `group_size` of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops.fp8_gemm import BLOCK
from .recipe import EightBits, Header, Read, Recipe, Refused, as_scale, check_dtype, check_shape, recipe

_PACKED = 4
_ZERO = 128  #: what stands for 0; in files of the first version less one


def layer_recipe(tensors: Mapping[str, Header], config: Mapping[str, Any], name: str) -> Recipe | None:
    if "qweight" not in tensors:
        return None
    if config.get("bits") != 8:
        raise Refused(f"it has {config.get('bits')} bits, and there are kernels for 8")
    check_dtype(tensors, "qweight", torch.int32)
    words, n = tensors["qweight"].shape
    k, group = words * _PACKED, config.get("group_size")
    if group not in (BLOCK, -1, k):
        raise Refused(f"its group_size is {group}, and there are kernels for {BLOCK} and for whole rows")
    groups = -(-k // BLOCK) if group == BLOCK else 1
    required = ("qweight", "qzeros", "scales")
    result = recipe(tensors, _reader(k, n, groups), required, ("g_idx",))
    check_shape(tensors, "scales", (groups, n))
    check_shape(tensors, "qzeros", (groups, n // _PACKED))
    return result


def _reader(k: int, n: int, groups: int) -> Read:
    def read(t: Mapping[str, Tensor]) -> EightBits:
        order = t.get("g_idx")
        size = -(-k // groups)
        if order is not None and not torch.equal(
            order, torch.arange(k, device=order.device, dtype=order.dtype) // size
        ):
            raise Refused("its columns are in another order (desc_act), and groups are of columns in a row")
        zeros = t["qzeros"].contiguous().view(torch.uint8)
        if not ((zeros == _ZERO).all() or (zeros == _ZERO - 1).all()):
            raise Refused("its weights have zero points, and there are kernels for symmetric ones")
        weight = t["qweight"].contiguous().view(torch.uint8).view(-1, n, _PACKED).transpose(0, 1).reshape(n, k)
        scale = as_scale("scales", t["scales"]).t().contiguous()
        return EightBits((weight ^ 0x80).view(torch.int8), scale, "row" if groups == 1 else "group", inputs=False)

    return read
