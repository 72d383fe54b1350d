"""transformers' continuous batching runs implementations that it takes for flash attention by their names, and reads and appends to
its pages in place, its "decode fast path", for flash-attention 2 and 3 alone. Ours takes packed sequences and pages as well, on any
device, so both checks let ours through.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Collection
from typing import Any

from .. import patches

_PACKAGE = "transformers.generation.continuous_batching"


def admit(names: Collection[str]) -> None:
    """These implementations, as flash attention; in pages where all kinds of attention in a model keep keys and values there.

    A transformers that checks another way refuses them, or gathers the keys of each step first, as it does for every name that it
    does not know.
    """
    try:
        modules = [
            importlib.import_module(f"{_PACKAGE}.{name}") for name in ("continuous_api", "initialization", "cache")
        ]
        for module in modules:
            patches.put(module, "is_flash_attention_requested", functools.partial(_as_flash, names))
        patches.put(modules[1], "ensure_decode_fast_path_is_available", functools.partial(_in_pages, modules[1], names))
    except (ImportError, AttributeError, KeyError):
        return


def _as_flash(names: Collection[str], is_flash: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(is_flash)
    def check(config: Any = None, requested_attention_implementation: str | None = None, version: Any = None) -> bool:
        name = requested_attention_implementation if config is None else config._attn_implementation
        if name in names:
            return version is None  # it is no version of flash-attention
        return bool(is_flash(config, requested_attention_implementation, version))

    return check


def _in_pages(module: Any, names: Collection[str], before: Callable[..., None]) -> Callable[..., None]:
    allocators, kinds_of = module.ATTN_TYPE_TO_ALLOCATOR, module.group_layers_by_attn_type

    @functools.wraps(before)
    def check(config: Any, cb_config: Any, user_requested: bool) -> None:
        in_pages = all(allocators[kind].supports_block_table for kind in kinds_of(config))
        if not (in_pages and config._attn_implementation in names):
            before(config, cb_config, user_requested)

    return check
