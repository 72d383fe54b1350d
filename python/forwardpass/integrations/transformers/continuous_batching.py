"""transformers' continuous batching runs implementations that it takes for flash attention by their names, and reads and appends to
its pages in place, its "decode fast path", for flash-attention 2 and 3 alone. Ours takes packed sequences and pages as well, on any
device, so both checks let ours through.

A batch with a prompt has no table of pages: transformers writes its keys by the places of tokens, and gathers all keys of each
sequence. On a GPU ours reads them in their pages, where one sequence has several tokens and all others one. That is what the
scheduler makes of a prompt that comes in chunks: a chunk fills what the steps of other sequences leave of a batch.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from ...dispatch import gpu_takes
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
        patches.put(modules[2].PagedAttentionCache, "update", functools.partial(_without_gathering, names))
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


#: The option that `_without_gathering` adds to a call of attention: each sequence's pages, int32 [B, n], -1 where it has none.
PROMPT_PAGES = "prompt_pages"
#: Where a cache keeps the last such table: the layers of a batch share it.
_TABLE = "_forwardpass_prompt_pages"


def _without_gathering(names: Collection[str], before: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(before)
    def update(self: Any, key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]) -> Any:
        allocator = self.layer_to_allocator[layer_idx]
        places = kwargs["read_index"]
        if not (
            kwargs.get("block_table") is None
            and kwargs.get("is_causal") is True
            and allocator.supports_block_table
            and self.config._attn_implementation in names
            and places[allocator.index].numel()
            and gpu_takes(key_states.device)
            and _is_one_among_steps(key_states.shape[2], kwargs)
        ):
            return before(self, key_states, value_states, layer_idx, kwargs)
        read = places[allocator.index]
        kwargs["read_index"] = [x[:0] for x in places]  # nothing to gather: it writes, and gives what it was given
        written = before(self, key_states, value_states, layer_idx, kwargs)
        kwargs["read_index"] = places
        kwargs["k_cache"], kwargs["v_cache"] = allocator.get_cache_for_block_table(layer_idx)
        kwargs[PROMPT_PAGES] = _pages(self, read, kwargs, kwargs["k_cache"].shape[1])
        return written

    return update


def _is_one_among_steps(tokens: int, kwargs: dict[str, Any]) -> bool:
    """Whether one sequence has `max_length_q` tokens, and each other one has one: known without a look at the device. In a batch
    that is padded to a size, max_length_q is that size."""
    others: int = kwargs["cu_seq_lens_q"].numel() - 2
    return tokens == others + int(kwargs["max_length_q"])


def _pages(cache: Any, read_index: Tensor, kwargs: dict[str, Any], page: int) -> Tensor:
    """The pages of this layer's sequences, as `attention_decode` takes them."""
    last = vars(cache).get(_TABLE)
    if last is not None and last[0] is read_index and last[1] == read_index._version:
        table: Tensor = last[2]
        return table
    ends = kwargs["cu_seq_lens_k"]  # of this layer, by now
    first = torch.arange(0, int(kwargs["max_length_k"]), page, device=read_index.device)  # keys of pages
    places = (ends[:-1, None] + first).clamp(max=read_index.numel() - 1)
    table = torch.where(first < ends.diff()[:, None], read_index[places] // page, -1).int()
    setattr(cache, _TABLE, (read_index, read_index._version, table))
    return table


def in_their_pages(
    q: Tensor,
    ends_q: Tensor,
    most_rows: int,
    seq_lens: Tensor,
    pages: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Attention of a batch of steps with one sequence of several tokens, in two calls, without a look at the device.

    Args:
        q: [T, H, D]; ends_q: [B + 1]; most_rows: of the longest sequence; seq_lens: [B]; pages: [B, n].
        attend: (q [B, rows, H, D], seq_lens, pages) to [B, rows, H, D].

    Returns:
        [T, H, D].
    """
    ends, sequences = ends_q.long(), ends_q.numel() - 1
    longest = ends.diff().argmax(0, keepdim=True)
    end = ends[longest + 1]
    # Its last row is the last one. In a batch that is padded to a size it may have fewer rows: the first ones then are others',
    # and nobody reads what becomes of them.
    rows = torch.arange(most_rows, device=q.device) + end - most_rows
    out = attend(q[rows.clamp(min=0)].unsqueeze(0), seq_lens[longest], pages[longest]).squeeze(0)
    of_tokens = torch.arange(len(q), device=q.device) - end + most_rows
    out = out[of_tokens.clamp(0, most_rows - 1)]
    if sequences > 1:
        others = torch.arange(sequences - 1, device=q.device)
        others += others >= longest
        steps = ends[others]
        out[steps] = attend(q[steps].unsqueeze(1), seq_lens[others], pages[others]).squeeze(1)
    return out
