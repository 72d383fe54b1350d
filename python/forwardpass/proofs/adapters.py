"""Layers below adapters (peft): a module that holds a layer as `base_layer`, calls it, and adds what it computes itself.

Such a layer can be swapped where all that its adapter does with it is to call it. That is read from the code of the adapter's
class: some read the weight in their forward (DoRA, BOFT, LoHa), and what adds to the weight, merging, is refused after a swap.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from functools import lru_cache
from types import FunctionType
from typing import Any

from torch import nn

from ..common.models.modules import forward_replaced, has_hooks
from ..integrations.peft import BASE
from ..nn import QuantizedModule
from .code import definition, hands_over, is_attribute_of, self_of

#: Methods of an adapter, and of what holds all of a model's, that write into the weights below.
MERGING = ("merge", "unmerge")
MERGING_ALL = ("merge_adapter", "unmerge_adapter", "merge_and_unload")
#: The one that makes another adapter beside those that are there.
ADDING = "update_layer"
#: Ways to the layer below that say nothing of what is done with it.
_GIVES_BASE = ("get_base_layer", "get_base_weight", "set_base_weight", "super")
#: First values of an adapter that are not computed from the weight below.
_INITIAL = (True, False, "gaussian")


def is_quantized_below(adapter: nn.Module) -> bool:
    """Whether the layer below an adapter, and below others within it, is a swapped one."""
    base = adapter._modules.get(BASE)
    return base is not None and (isinstance(base, QuantizedModule) or is_quantized_below(base))


def reads_base(adapter: nn.Module) -> bool:
    """Whether an adapter's forward may do something else with the layer below than to call it."""
    if has_hooks(adapter) or forward_replaced(adapter) or not _only_calls(type(adapter), True):  # type: ignore[arg-type]
        return True
    values = (y for x in vars(adapter).values() if isinstance(x, dict) for y in x.values())
    helpers = {
        type(x) for x in values if not isinstance(x, nn.Module) and hasattr(type(x), "forward")
    }  # peft's LoraVariant
    return not all(_only_calls(cls, False) for cls in helpers)  # type: ignore[arg-type]  # classes have a hash


@lru_cache(maxsize=256)
def _only_calls(cls: type, must: bool) -> bool:
    """Whether forward, and the methods that it calls of its own object, do nothing with `base_layer` but to call it; must: whether
    they have to."""
    todo, visited, calls = ["forward"], {*MERGING}, 0
    while todo:
        name = todo.pop()
        if name in visited:
            continue
        visited.add(name)
        member = inspect.getattr_static(cls, name, None)
        function = inspect.unwrap(getattr(member, "fget", getattr(member, "__func__", member)) or cls)
        if not isinstance(function, FunctionType):
            continue  # an attribute of objects, or no method of this class
        method = definition(function.__code__)
        if method is None:
            return False
        self_name = self_of(method)
        calls_made = [x for x in ast.walk(method) if isinstance(x, ast.Call)]
        called = {id(x.func) for x in calls_made}
        to_helpers = (x.args for x in calls_made if isinstance(x.func, ast.Attribute) and x.func.attr == "forward")
        if hands_over(method, {id(argument) for arguments in to_helpers for argument in arguments}):
            return False
        for x in ast.walk(method):
            word = x.attr if isinstance(x, ast.Attribute) else x.id if isinstance(x, ast.Name) else None
            if word in _GIVES_BASE or (isinstance(x, ast.Constant) and x.value == BASE):
                return False
            if word == BASE:
                if id(x) not in called:
                    return False
                calls += 1
            elif is_attribute_of(x, self_name):
                todo.append(str(word))
    return calls > 0 or not must


def is_plain(config: Any) -> bool:
    """Whether a LoRA of this config is made without the weight below, and runs without it."""
    variants = (f.name for f in dataclasses.fields(config) if f.metadata.get("is_lora_variant"))
    return getattr(config, "init_lora_weights", None) in _INITIAL and not any(
        getattr(config, name, None) for name in ("use_dora", *variants)
    )
