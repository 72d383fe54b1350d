"""Which attention of transformers reads a cache of ours, by its code.

What the cache returns has to be the keys and values that go to attention. In 8 bits nothing may be computed with them on the way,
because their scales would be lost.
"""

from __future__ import annotations

import ast
import functools
from typing import Any

import torch
from torch import nn

from ..class_source import named, owner_of_forward, tree_of_module


def why_not_read(attention: nn.Module, dtype: torch.dtype | None) -> str | None:
    """Why the code of an attention module cannot read a cache of ours with elements of this dtype (None: the model's), else None.

    transformers' DeepSeek keeps latents in its cache, of another width than each other, and computes keys and values from them. A
    few others compute with what the cache returns (JetMoe repeats it), which 8 bits do not allow.
    """
    cls: Any = type(attention)  # mypy takes type[nn.Module] for unhashable
    holds_others, computes = _reading(cls)
    if holds_others:
        return "it keeps something else than keys and values in its cache"
    if computes and dtype is not None:
        return "its code computes with what its cache returns"
    return None


@functools.lru_cache(maxsize=1024)
def _reading(cls: Any) -> tuple[bool, bool]:
    """(whether what a cache returns is neither the keys nor the values of attention, whether code comes between the two)"""
    owner = owner_of_forward(cls)
    forward = named(named(tree_of_module(owner), owner.__name__), "forward")
    if forward is None:
        return False, False
    nodes = [*ast.walk(forward)]
    updates = [x for x in nodes if isinstance(x, ast.Assign) and _updates_cache(x.value)]
    cached = {name for x in updates for name in _targets(x)}
    calls = [x for x in nodes if isinstance(x, ast.Call) and _is_attention(x)]
    keys_and_values = {ast.unparse(x) for call in calls for x in call.args[2:4]}
    if not updates or not calls:
        return False, bool(updates)
    between = range(max(x.lineno for x in updates) + 1, min(x.lineno for x in calls))
    computes = [
        x
        for x in nodes
        if isinstance(x, ast.Assign) and x.lineno in between and cached & {*_targets(x)} and not _reads_layer(x.value)
    ]
    return cached.isdisjoint(keys_and_values), cached != keys_and_values or bool(computes)


def _updates_cache(x: ast.expr) -> bool:
    """Whether it is cache.update(key, value, layer, ...), or an element of what that returns."""
    call = x.value if isinstance(x, ast.Subscript) else x
    return isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "update" and len(call.args) >= 3


def _is_attention(call: ast.Call) -> bool:
    """Whether it is attention(self, query, key, value, ...), as the AttentionInterface has it."""
    return len(call.args) >= 4 and ast.unparse(call.args[0]) == "self"


def _reads_layer(x: ast.expr) -> bool:
    """Whether it is cache.layers[i].keys or .values, which carry their scales."""
    return all(getattr(y, "attr", "") in ("keys", "values") for y in (x.elts if isinstance(x, ast.Tuple) else (x,)))


def _targets(x: ast.Assign) -> list[str]:
    targets = [y for target in x.targets for y in (target.elts if isinstance(target, ast.Tuple) else (target,))]
    return [ast.unparse(y) for y in targets]
