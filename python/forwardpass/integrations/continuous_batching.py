"""transformers' continuous batching reads and appends to its pages in place, its "decode fast path", only for implementations that
it knows by name. Ours takes pages as well, on any device, so its check lets ours through.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Collection
from typing import Any


def open_pages(names: Collection[str]) -> None:
    """For these implementations, where all kinds of attention in a model keep their keys and values in pages.

    A transformers that checks another way gathers the keys of each step first, as it does for every name that it does not know.
    """
    try:
        module = importlib.import_module("transformers.generation.continuous_batching.initialization")
        before, allocators = module.ensure_decode_fast_path_is_available, module.ATTN_TYPE_TO_ALLOCATOR
        kinds_of = module.group_layers_by_attn_type
    except (ImportError, AttributeError):
        return

    @functools.wraps(before)
    def check(config: Any, cb_config: Any, user_requested: bool) -> None:
        in_pages = all(allocators[kind].supports_block_table for kind in kinds_of(config))
        if not (in_pages and config._attn_implementation in names):
            before(config, cb_config, user_requested)

    module.ensure_decode_fast_path_is_available = check  # type: ignore[attr-defined]
