"""fbgemm's fp8: e4m3 weights with a scale a row, inputs by row.

`input_scale_ub` bounds the magnitude that a row's scale is of; here no row is cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ops.common.quantized_rows import E4M3
from .recipe import EightBits, Header, Recipe, as_scale, check_shape, recipe


def layer_recipe(tensors: Mapping[str, Header], config: Mapping[str, Any], name: str) -> Recipe | None:
    if "weight" not in tensors or tensors["weight"].dtype != E4M3:
        return None
    result = recipe(
        tensors,
        lambda t: EightBits(t["weight"], as_scale("weight_scale", t["weight_scale"]), "row"),
        ("weight", "weight_scale"),
        ("input_scale_ub",),
    )
    n = tensors["weight"].shape[0]
    check_shape(tensors, "weight_scale", (n,), (n, 1))
    return result
