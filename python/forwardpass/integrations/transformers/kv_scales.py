"""The scales of keys and values in 8 bits, on their way from a cache through a model's code to attention.

That code hands on two tensors and knows of no scales, so they are an attribute of each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: What the caches of a decoder can become, and in what their elements are stored; None: the model's dtype.
KV_CACHES = {"auto": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
_ATTRIBUTE = "forwardpass_kv_scale"


def attach(x: Tensor, scale: Tensor) -> None:
    """x: [B, Hk, S, D], scale: float32 [B, S, Hk], as operations take it."""
    carrier: Any = x
    setattr(carrier, _ATTRIBUTE, scale)


def scale_of(x: Tensor) -> Tensor | None:
    scale: Tensor | None = getattr(x, _ATTRIBUTE, None)
    return scale


def widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In a dtype that all code takes."""
    scale = scale_of(x)
    return x if scale is None else (x.float() * scale.transpose(1, 2).unsqueeze(-1)).to(dtype)
