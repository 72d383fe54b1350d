"""DeepSeek's and Qwen's fp8 (`quant_method: fp8`): e4m3 weights with a scale for each block of 128 x 128, or one.

`weight_scale_inv` multiplies, whatever its name says. `activation_scheme`: dynamic, inputs in groups of 128 of a row or by row; or
static, by one `activation_scale`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..ops.common.quantized_rows import E4M3
from .recipe import EightBits, Header, Recipe, as_scale, check_shape, recipe, scales_kind


def layer_recipe(tensors: Mapping[str, Header], config: Mapping[str, Any], name: str) -> Recipe | None:
    if "weight" not in tensors or tensors["weight"].dtype != E4M3:
        return None
    n, k = tensors["weight"].shape
    kind = scales_kind(n, k, tensors, "weight_scale_inv")
    static = config.get("activation_scheme", "dynamic") == "static"
    if static:
        check_shape(tensors, "activation_scale", (), (1,))

    def read(t: Mapping[str, Tensor]) -> EightBits:
        of_inputs = as_scale("activation_scale", t["activation_scale"]).reshape(1) if static else None
        scale = as_scale("weight_scale_inv", t["weight_scale_inv"])
        return EightBits(t["weight"], scale, kind, input_scale=of_inputs)

    names = ("weight", "weight_scale_inv", *(("activation_scale",) if static else ()))
    return recipe(tensors, read, names)
