"""What rows of a decode step see of a cache as two numbers a sequence, in place of transformers' mask over all keys.

A range is int32 [1, 1, 2, B]: the first key that counts, behind padding and what a window leaves out, and the end, the rows'
own keys included; row i of S sees keys below end - S + 1 + i. It has four dimensions as models hand on masks of four as they
are. Of a static cache both are computed on the device, so that what is compiled or captured goes on with other lengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

#: Tokens of a step that attend by a range. More, as a prompt in chunks has, come with a mask: fp.ops.attention_decode gives them to
#: the kernel for few rows where there is a first key.
MOST_ROWS = 8


def reach(masks: ModuleType, mask_function: Callable[..., Any] | None) -> float | None:
    """How many keys up to itself a row sees by a mask function of transformers.masking_utils: inf where it is plain causality,
    None where it says anything else.
    """
    causal = masks.causal_mask_function
    if mask_function is None or mask_function is causal:
        return math.inf
    if torch.compiler.is_compiling():
        return None  # functions that are made within a graph cannot be looked into
    sliding, overlay = masks.sliding_window_causal_mask_function(1), masks.sliding_window_overlay(1)
    if getattr(mask_function, "__code__", None) is not sliding.__code__:
        return None
    (functions,) = _captured(mask_function)
    if len(functions) != 2 or functions[1] is not causal or functions[0].__code__ is not overlay.__code__:
        return None
    (window,) = _captured(functions[0])
    return float(window)


def _captured(function: Any) -> list[Any]:
    return [cell.cell_contents for cell in function.__closure__]


def of_step(
    batch: int,
    rows: int,
    keys: int,
    before: int | Tensor,
    offset: int,
    window: float | None,
    padding: Tensor | None,
    device: torch.device | str,
) -> Tensor | None:
    """The range of a step of `rows` after `before` tokens, or None where a range does not say what its mask would.

    Args:
        keys, offset: how many keys attention will get, and the place of the first of them.
        before: a number, or where the cache is static a tensor on the device.
        window: as `reach` gives it.
        padding: bool [B, tokens], False at padding; tokens behind its end are padding too. It is looked at: a GPU is waited for, as
            transformers does too.
    """
    started = isinstance(before, Tensor) or before > 0
    if window is None or not started or rows > MOST_ROWS or (rows > 1 and window < keys):
        return None
    end = before + rows - offset
    bounds = torch.zeros((1, 1, 2, batch), dtype=torch.int32, device=device)
    first, ends = bounds[0, 0]
    ends += end
    if padding is not None:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or (padding[:, 1:] < padding[:, :-1]).any():
            return None  # padding behind tokens is no matter of a first key
        if padding.shape[1] < before + rows:
            return None  # keys behind its end are masked, as `prepare_padding_mask` of transformers has it
        first += (padding.shape[1] - padding.sum(1) - offset).clamp(min=0)
    if window != math.inf and (isinstance(end, Tensor) or end > window):
        torch.maximum(first, ends - int(window), out=first)
    return bounds


def is_range(mask: Tensor) -> bool:
    return mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[:3] == (1, 1, 2)


def as_mask(bounds: Tensor, rows: int, keys: int) -> Tensor:
    """Bool [B, 1, rows, keys], True where a key is allowed."""
    first, end = bounds[0, 0, :, :, None, None, None]
    key = torch.arange(keys, device=bounds.device)
    place = end - rows + torch.arange(rows, device=bounds.device)[:, None]
    return (key >= first) & (key <= place)
