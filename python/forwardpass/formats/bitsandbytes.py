"""LLM.int8 of bitsandbytes: int8 weights, `q * SCB / 127` of each row.

bitsandbytes keeps the columns of an input that hold values beyond `llm_int8_threshold` apart, in 16 bits. Here every row is
quantised whole: a layer with such columns loses accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .recipe import EightBits, Header, Recipe, Refused, as_scale, check_shape, recipe


def layer_recipe(tensors: Mapping[str, Header], config: Mapping[str, Any], name: str) -> Recipe | None:
    if "weight" not in tensors or tensors["weight"].dtype != torch.int8:
        return None
    if "SCB" not in tensors:
        raise Refused("its SCB is missing")
    check_shape(tensors, "SCB", (tensors["weight"].shape[0],))

    def read(t: Mapping[str, Tensor]) -> EightBits:
        if "weight_format" in t and int(t["weight_format"]) != 0:
            raise Refused(f"its weight_format is {int(t['weight_format'])}, and 0, rows, can be read")
        return EightBits(t["weight"], as_scale("SCB", t["SCB"]) / 127, "row")

    return recipe(tensors, read, ("weight", "SCB"), ("weight_format",))
