"""Caches of keys and values for models of transformers: they grow in place, in the model's dtype or in 8 bits.

transformers' DynamicCache copies all that it holds for every token. Imported on first use, as transformers is.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import cache_utils

from ...common.models.decoding import CACHE_NAMES
from ...ops.append_kv import OPERATION as APPEND_KV
from ...ops.common.values import may_look
from . import kv_scales, rotary
from .attention import NAMES

#: What is allocated beyond what is there: tokens, and a part of it.
ROOM, GROWTH = 64, 4


class _Stored:
    """Keys and values [B, Hk, C, D], and where they are 8 bits the scale of each, float32 [B, Hk, C]."""

    def __init__(self, key: Tensor, value: Tensor, capacity: int, dtype: torch.dtype | None):
        batch, heads = key.shape[:2]

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros((batch, heads, capacity, *shape), dtype=dtype, device=key.device)

        self.keys = empty(key.shape[3], dtype=dtype or key.dtype)
        self.values = empty(value.shape[3], dtype=dtype or value.dtype)
        self.scales = None if dtype is None else (empty(dtype=torch.float32), empty(dtype=torch.float32))

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def map(self, change: Any) -> None:
        """change(tensor) in the place of each."""
        self.keys, self.values = change(self.keys), change(self.values)
        if self.scales is not None:
            self.scales = change(self.scales[0]), change(self.scales[1])

    def move(self, tokens: int) -> None:
        """All tokens to the front, by so many places, in place."""
        for x in (self.keys, self.values, *(self.scales or ())):
            raw = x.view(torch.int8) if x.dtype == torch.float8_e4m3fn else x  # which torch cannot roll
            raw.copy_(raw.roll(-tokens, 2))

    def append(self, key: Tensor, value: Tensor, seq_lens: Tensor) -> None:
        """Rotates the keys and their queries before, where that is pending."""
        k_scale, v_scale = (None, None) if self.scales is None else (x.transpose(1, 2) for x in self.scales)
        k_cache, v_cache = self.keys.transpose(1, 2), self.values.transpose(1, 2)
        APPEND_KV(
            key.transpose(1, 2), value.transpose(1, 2), k_cache, v_cache, seq_lens, None, k_scale, v_scale, *rotary.pending(key)
        )  # fmt: skip

    def between(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Views, with their scales."""
        keys, values = self.keys[:, :, begin:end], self.values[:, :, begin:end]
        if self.scales is not None:
            for x, scale in zip((keys, values), self.scales):
                kv_scales.attach(x, scale[:, :, begin:end].transpose(1, 2))
        return keys, values


class GrowingLayer(cache_utils.DynamicLayer):
    """The keys and values of one layer, of all tokens or the last `sliding_window`.

    dtype: torch.int8 or float8_e4m3fn, with a scale for each token and head; None: that of the keys. What a call adds to an
    empty cache is attended to as it was given; what later calls get of it has gone through the cache's dtype.
    """

    def __init__(self, dtype: torch.dtype | None, sliding_window: int | None = None):
        super().__init__()
        self.dtype = dtype
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self._stored: _Stored | None = None
        self._begin = self._end = 0  #: the tokens that are there, counted from the first that was ever appended

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = key_states.device
        self._stored = _Stored(key_states, value_states, self._capacity_for(key_states.shape[2]), self.dtype)
        self.is_initialized = True

    def appends_in_place(self) -> bool:
        """Whether all that attention gets of the next update comes from the cache."""
        return self._end > 0

    @staticmethod
    def _capacity_for(tokens: int) -> int:
        return tokens + tokens // GROWTH + ROOM

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rows, first = key_states.shape[2], self._end == 0
        stored = self._extend(key_states, value_states)
        tokens = self._end - self._begin
        lengths = torch.full((key_states.shape[0],), tokens, dtype=torch.int32, device=key_states.device)
        stored.append(key_states, value_states, lengths)
        if first:
            return key_states, value_states
        return stored.between(tokens - self._visible(rows), tokens)

    def extend(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Counts tokens that an operation is about to write, and gives it all room there is for keys and values, [B, C, Hk, D].

        like: what `update` would be given of either."""
        stored = self._extend(like, like)
        return stored.keys.transpose(1, 2), stored.values.transpose(1, 2)

    def _extend(self, key_states: Tensor, value_states: Tensor) -> _Stored:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows = key_states.shape[2]
        stored = self._reserve(rows)
        self._end += rows
        self._show()
        return stored

    def _visible(self, rows: int) -> int:
        tokens = self._end - self._begin
        return tokens if self.sliding_window is None else min(tokens, self.sliding_window - 1 + rows)

    def _reserve(self, rows: int) -> _Stored:
        """Room for as many tokens more."""
        stored = self._stored
        assert stored is not None
        if self._end - self._begin + rows <= stored.capacity:
            return stored
        if self.sliding_window is not None:
            self._forget(self._end - (self.sliding_window - 1))
        tokens = self._end - self._begin
        if self._capacity_for(tokens + rows) > stored.capacity:
            more = self._capacity_for(tokens + rows) - stored.capacity
            stored.map(lambda x: torch.cat([x, x.new_zeros((*x.shape[:2], more, *x.shape[3:]))], 2))
        return stored

    def _forget(self, place: int) -> None:
        """The tokens before this one."""
        leave = max(place - self._begin, 0)
        if leave and self._stored is not None:
            self._stored.map(lambda x: torch.cat([x[:, :, leave:], x[:, :, :leave]], 2))
            self._begin += leave

    def move(self, end: int) -> None:
        """Counts from another place: so many tokens were appended before, of which a window has left the first."""
        self._begin, self._end = end - (self._end - self._begin), end

    def _show(self) -> None:
        """What others read of a layer."""
        if self._stored is None:
            self.keys = self.values = None
        else:
            tokens = self._end - self._begin
            self.keys, self.values = self._stored.between(tokens - self._visible(0), tokens)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.sliding_window is None:
            return self._end + query_length, 0
        before = min(self._end, self.sliding_window - 1)
        return before + query_length, self._end - before

    def get_seq_length(self) -> int:
        return self._end

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number, of tokens to remove, not {tokens_to_remove}")
        end = max(self._end + tokens_to_remove, 0)
        if self.sliding_window is not None and self._begin > max(end - (self.sliding_window - 1), 0):
            raise RuntimeError(f"crop({tokens_to_remove}) goes back to tokens that the window of {self.sliding_window} has left, "
                               "which are gone: remove no more than the last call appended")  # fmt: skip
        self._end = end
        self._show()

    def reset(self) -> None:
        self._stored, self._begin, self._end = None, 0, 0
        self.is_initialized = False
        self._show()

    def _map(self, change: Any) -> None:
        if self._stored is not None:
            self._stored.map(change)
            self._show()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices])

    def offload(self) -> None:
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map(lambda x: x.to(self.device, non_blocking=True))


class StaticLayer(cache_utils.StaticLayer):
    """As transformers', with 8-bit elements and a scale for each token and head. Its length is on the device."""

    def __init__(self, dtype: torch.dtype, max_cache_len: int):
        super().__init__(max_cache_len)
        self.dtype = dtype
        self._fresh = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        stored = _Stored(key_states, value_states, self.max_cache_len, self.dtype)
        super().lazy_initialization(key_states[:0], value_states[:0])  # the rest of what it sets
        self.batch_size = key_states.shape[0]
        self._stored = stored
        self.keys, self.values = stored.between(0, self.max_cache_len)
        if not torch.compiler.is_compiling():
            assert stored.scales is not None
            for x in (stored.keys, stored.values, *stored.scales, self.keys, self.values):
                torch._dynamo.mark_static_address(x)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check_room(key_states.shape[2])
        first, self._fresh = self._fresh, False
        self.cumulative_length.add_(key_states.shape[2])
        lengths = self.cumulative_length.int().expand(key_states.shape[0]).contiguous()
        self._stored.append(key_states, value_states, lengths)
        return (key_states, value_states) if first else self._stored.between(0, self.max_cache_len)

    def _check_room(self, tokens: int) -> None:
        """As transformers' own layer, which raises on a CPU. On a GPU, which would have to be waited for, attention gives NaN."""
        if may_look("StaticCache", self.cumulative_length):
            there = int(self.cumulative_length)
            if there + tokens > self.max_cache_len:
                raise ValueError(f"the static cache has room for {self.max_cache_len} tokens, {there} are in it, and {tokens} more "
                                 "were given: make it with a larger max_cache_len")  # fmt: skip

    def appends_in_place(self) -> bool:
        """Whether all that attention gets of the next update comes from the cache."""
        return not self._fresh

    def fill(self, layer: Any, length: int) -> None:
        """With the first tokens of what another static layer holds."""
        self.lazy_initialization(layer.keys, layer.values)
        self.update(layer.keys[:, :, :length], layer.values[:, :, :length])

    def reset(self) -> None:
        self.cumulative_length.zero_()
        self._fresh = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._stored.map(lambda x: x.copy_(x.index_select(0, beam_idx.to(x.device))))


class StaticSlidingLayer(StaticLayer, cache_utils.StaticSlidingWindowLayer):
    """The same of a window's last tokens: with each token that is more, the others move by a place, as in transformers' own."""

    def __init__(self, dtype: torch.dtype, layer: Any):
        cache_utils.StaticSlidingWindowLayer.__init__(self, layer.max_cache_len, layer.max_cache_len)
        self._is_croppable = layer._is_croppable
        self.dtype = dtype
        self._fresh = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, before, window = key_states.shape[2], self.cumulative_length_int, self.max_cache_len
        if before + rows <= window:
            self.cumulative_length_int += rows
            return super().update(key_states, value_states)
        first, self._fresh = self._fresh, False
        self.cumulative_length_int += rows
        stored, seen = self._stored, None
        if first:
            seen = key_states, value_states
        elif rows > 1 or before < window:  # the first of them see tokens that leave
            old = stored.between(1, window) if before >= window else stored.between(0, before)
            wide = (kv_scales.widened(x, key_states.dtype) for x in old)
            seen = torch.cat((next(wide), key_states), 2), torch.cat((next(wide), value_states), 2)
        stored.move(min(before, window) + min(rows, window) - window)
        lengths = torch.full((key_states.shape[0],), window, dtype=torch.int32, device=key_states.device)
        stored.append(key_states, value_states, lengths)
        return stored.between(0, window) if seen is None else seen

    def appends_in_place(self) -> bool:
        return False  # not where tokens are several

    def fill(self, layer: Any, length: int) -> None:
        super().fill(layer, min(length, self.max_cache_len))
        self.cumulative_length_int = length

    def reset(self) -> None:
        super().reset()
        self.cumulative_length_int = 0


class KVCache(cache_utils.DynamicCache):
    """A cache to pass to `generate` or to a model's forward, whose attention is swapped (`fp.swap(model, attention=True)`).

    Keys and values are appended in place: DynamicCache copies all of them for each token. In 8 bits they take half of bfloat16's
    memory, 4 bytes for each token and head besides.

    Args:
        config: model.config.
        dtype: "int8", "fp8" (e4m3), or "auto": the model's.

    Raises:
        ValueError: there is no such dtype.
        RuntimeError: on first use, the config's attention is not swapped, so that nothing would read such a cache.

    Example:
        >>> cache = fp.KVCache(decoder.config, "int8")
        >>> tokens = decoder.generate(ids, past_key_values=cache, max_new_tokens=2)
    """

    def __init__(self, config: Any, dtype: str = "auto"):
        super().__init__(config=config)
        self._config = config.get_text_config(decoder=True)
        if dtype not in kv_scales.KV_CACHES:
            raise ValueError(f"KVCache: dtype is one of {', '.join(map(repr, kv_scales.KV_CACHES))}, not {dtype!r}")
        adapt(self, kv_scales.KV_CACHES[dtype])

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if self._config._attn_implementation not in NAMES:
            raise RuntimeError("the attention of the model that was given an fp.KVCache is not swapped, and no other reads it: "
                               "call fp.swap(model, attention=True) first")  # fmt: skip
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def adapt(cache: Any, dtype: torch.dtype | None) -> None:
    """Puts our layers into the place of transformers' own, with what those hold. Others, such as of linear attention, stay."""
    if isinstance(cache, cache_utils.EncoderDecoderCache):
        adapt(cache.self_attention_cache, dtype)
        adapt(cache.cross_attention_cache, dtype)
        return
    if not isinstance(cache, cache_utils.Cache):
        return
    if cache.layer_class_to_replicate is cache_utils.DynamicLayer:
        cache.layer_class_to_replicate = _Maker(dtype)  # type: ignore[assignment]
    for i, layer in enumerate(cache.layers):
        if type(layer) in _LAYERS:
            cache.layers[i] = _adapted(layer, dtype)


_LAYERS = (
    cache_utils.DynamicLayer,
    cache_utils.DynamicSlidingWindowLayer,
    cache_utils.StaticLayer,
    cache_utils.StaticSlidingWindowLayer,
)


class _Maker:
    """GrowingLayer of a dtype, as a class that can be pickled."""

    def __init__(self, dtype: torch.dtype | None):
        self.dtype = dtype

    def __call__(self) -> GrowingLayer:
        return GrowingLayer(self.dtype)


def _adapted(layer: Any, dtype: torch.dtype | None) -> Any:
    is_static = isinstance(layer, cache_utils.StaticLayer)
    if is_static and dtype is None:
        return layer  # before its length is read, a tensor: that would end a graph
    length = int(layer.get_seq_length()) if layer.is_initialized else 0
    if is_static:
        assert dtype is not None
        if isinstance(layer, cache_utils.StaticSlidingWindowLayer):
            static: StaticLayer = StaticSlidingLayer(dtype, layer)
        else:
            static = StaticLayer(dtype, layer.max_cache_len)
        if length:
            static.fill(layer, length)
        return static
    growing = GrowingLayer(dtype, getattr(layer, "sliding_window", None))
    if length:
        growing.update(layer.keys, layer.values)
        growing.move(length)
    return growing


class Adapter:
    """A hook before a model's forward: the cache that it is given becomes one of ours."""

    def __init__(self, dtype: torch.dtype | None):
        self.dtype = dtype

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for cache in _caches(model, args, kwargs):
            adapt(cache, self.dtype)


def _caches(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    for name in CACHE_NAMES:
        if kwargs.get(name) is not None:
            yield kwargs[name]
    for x in args:
        if isinstance(x, (cache_utils.Cache, cache_utils.EncoderDecoderCache)):
            yield x


def takes_cache(model: nn.Module) -> bool:
    return not set(CACHE_NAMES).isdisjoint(inspect.signature(type(model).forward).parameters)
