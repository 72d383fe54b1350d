"""NVIDIA's modelopt: e4m3 weights and inputs with a scale each; int8 weights by row, of inputs times `pre_quant_scale`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops.common.quantized_rows import E4M3
from .recipe import EightBits, Header, Recipe, Refused, as_scale, check_int8_scales, check_shape, recipe, scales_kind


def layer_recipe(tensors: Mapping[str, Header], config: Mapping[str, Any], name: str) -> Recipe | None:
    if "weight" not in tensors or tensors["weight"].dtype not in (torch.int8, torch.uint8, E4M3):
        return None
    if tensors["weight"].dtype == torch.uint8:
        raise Refused("it has 4 bits, and there are kernels for 8")
    n, k = tensors["weight"].shape
    kind = scales_kind(n, k, tensors, "weight_scale")
    is_int8 = tensors["weight"].dtype == torch.int8
    if is_int8:
        check_int8_scales(kind)
    static, smoothed = "input_scale" in tensors, "pre_quant_scale" in tensors
    if static:
        check_shape(tensors, "input_scale", (), (1,))
    if smoothed:
        check_shape(tensors, "pre_quant_scale", (k,))

    def read(t: Mapping[str, Tensor]) -> EightBits:
        scale = as_scale("weight_scale", t["weight_scale"])
        of_inputs = as_scale("input_scale", t["input_scale"]).reshape(1) if static else None
        channel = as_scale("pre_quant_scale", t["pre_quant_scale"]) if smoothed else None
        return EightBits(t["weight"], scale, kind, input_scale=of_inputs, channel_scale=channel)

    return recipe(
        tensors, read, ("weight", "weight_scale"), ("input_scale", *(("pre_quant_scale",) if is_int8 else ()))
    )
