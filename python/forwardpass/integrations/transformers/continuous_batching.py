"""transformers' continuous batching runs implementations that it takes for flash attention by their names, and reads and appends to
its pages in place, its "decode fast path", for flash-attention 2 and 3 alone. Ours takes packed sequences and pages as well, on any
device, so both checks let ours through.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Collection
from typing import Any

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
            _admit_as_flash(module, names)
        _open_pages(modules[1], names)
    except (ImportError, AttributeError):
        return


def _admit_as_flash(module: Any, names: Collection[str]) -> None:
    is_flash = module.is_flash_attention_requested

    @functools.wraps(is_flash)
    def check(config: Any = None, requested_attention_implementation: str | None = None, version: Any = None) -> bool:
        name = requested_attention_implementation if config is None else config._attn_implementation
        if name in names:
            return version is None  # it is no version of flash-attention
        return bool(is_flash(config, requested_attention_implementation, version))

    module.is_flash_attention_requested = check


def _open_pages(module: Any, names: Collection[str]) -> None:
    before, allocators = module.ensure_decode_fast_path_is_available, module.ATTN_TYPE_TO_ALLOCATOR
    kinds_of = module.group_layers_by_attn_type

    @functools.wraps(before)
    def check(config: Any, cb_config: Any, user_requested: bool) -> None:
        in_pages = all(allocators[kind].supports_block_table for kind in kinds_of(config))
        if not (in_pages and config._attn_implementation in names):
            before(config, cb_config, user_requested)

    module.ensure_decode_fast_path_is_available = check
