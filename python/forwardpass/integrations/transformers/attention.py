"""Attention of transformers' models: what their AttentionInterface calls, and what makes the masks that it is given.

A model's config names its implementation, so one name holds for all modules of a config; `Place` says which of them are
swapped, and goes with the module into copies and pickles. transformers is imported here alone, on first use.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import itertools
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ...common.syntax import source_of_class
from ...dispatch import Reason, asked_for_by_name
from ...dispatch.calls import decline, take
from ...nn.eight_bits import EightBits, attend
from ...ops.append_kv import OPERATION as APPEND_KV
from ...ops.append_kv import PLAIN
from ...ops.attention import ATTENTION
from ...ops.attention_decode import OPERATION as ATTENTION_DECODE
from .. import heads_first
from . import continuous_batching, key_ranges, kv_scales, unpadding

#: What the config of swapped attention names, and the words that follow it. transformers builds, copies and saves models by such
#: a config, as by any other registered name. No word is "flash": transformers loads flash-attention for a name with that word.
NAME = "forwardpass"
#: The window comes to attention as a number: every module of the config passes sliding_window=. Else masks hold it.
WINDOWED = "_windowed"
#: Continuous batching may run it.
PACKED = "_packed"
#: The config named sdpa before, which runs for modules that are not swapped, such as those of a model built from the config.
#: Without the word that is eager attention, which every model has.
SDPA = "_sdpa"
NAMES = frozenset(NAME + "".join(words) for words in itertools.product(("", WINDOWED), ("", PACKED), ("", SDPA)))
#: The attribute of an attention module that holds its Place.
PLACE = "forwardpass_attention"
#: What models hand on that says nothing about attention, or what the mask says too.
_SILENT = frozenset(
    ("position_ids", "cache_position", "use_cache", "return_dict", "output_hidden_states", "output_router_logits",
     "num_items_in_batch", "deterministic", "logits_to_keep")
)  # fmt: skip
_DISPATCH = re.compile(r"get_interface\(\s*self\.config\._attn_implementation,\s*(\w+)")
#: Code that does something else for an implementation that it knows by name. Eager's is none of our masks.
_ASKS_FOR_A_NAME = re.compile(r"""_attn_implementation\s*(?:==\s*["'](?!eager)|!=|(?:not\s+)?in\b|\])""")

_masks: ModuleType
_sdpa_mask: Callable[..., Tensor | None]
_bidirectional: Callable[..., Any]
_interface: Any
_collector: Any
_CAPTURING = "transformers.utils.output_capturing"


@dataclass(frozen=True)
class Place:
    """An attention module in its model: whether it is swapped, what its config called its implementation before, and what of it is
    computed in 8 bits."""

    fused: bool
    before: str
    eager: Callable[..., Any] | None
    bits: EightBits | None = None

    def __reduce__(self) -> Any:
        return _place, (self.fused, self.before, self.eager, self.bits)


def _place(fused: bool, before: str, eager: Callable[..., Any] | None, bits: EightBits | None = None) -> Place:
    """A copy, perhaps in a process that has not swapped yet, where transformers does not know the names."""
    register()
    return Place(fused, before, eager, bits)


@functools.cache
def register() -> Reason | None:
    """Makes the names known to transformers, with their masks: without these no padding would reach attention."""
    global _masks, _sdpa_mask, _bidirectional, _interface, _collector
    version = getattr(sys.modules.get("transformers"), "__version__", "")
    fix = "install transformers 5.24 or later"
    if importlib.util.find_spec("transformers") is None:
        return Reason("transformers", "transformers is not installed", fix)
    try:
        masks = importlib.import_module("transformers.masking_utils")
        functions = importlib.import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
        _masks, _sdpa_mask, _bidirectional = masks, masks.sdpa_mask, masks.bidirectional_mask_function
        _collector = importlib.import_module(_CAPTURING)._active_collector
        interface = type(functions)
        parameters = inspect.signature(_sdpa_mask).parameters
        mask_interface = masks.AttentionMaskInterface
        outputs = dataclasses.fields(importlib.import_module("transformers.modeling_outputs").CausalLMOutputWithPast)
    except (ImportError, AttributeError) as e:
        return Reason("transformers", f"transformers {version} has no interface for attention and its masks ({e})", fix)
    if not {"q_length", "q_offset", "local_size", "allow_is_causal_skip"} <= set(parameters):
        return Reason("transformers", f"transformers {version} makes masks another way than is known here", fix)
    if "cache" not in {x.name for x in outputs}:  # up to 5.23; with 5.20 continuous batching gave other tokens
        text = f"models of transformers {version} take their cache by another name than `cache`, which is known here"
        return Reason("transformers", text, fix)
    _interface = functions
    for name in NAMES:
        interface.register(name, _attention)
        mask_interface.register(name, _windowed_mask if WINDOWED in name else _mask)
    continuous_batching.admit({name for name in NAMES if PACKED in name})
    return None


def class_of(module: nn.Module) -> Any:
    """The class, as Any: mypy takes type[nn.Module] for unhashable."""
    return type(module)


@functools.lru_cache(maxsize=1024)
def source_of(cls: Any) -> str:
    """The source of a class; empty where there is none at hand."""
    try:
        return source_of_class(cls)
    except (OSError, TypeError):
        return ""


@functools.lru_cache(maxsize=1024)
def _dispatch(cls: Any) -> tuple[type, str] | None:
    """The class that calls the AttentionInterface for modules of this one, and the name of its eager function."""
    for c in cls.__mro__:
        if c.__module__.startswith("torch."):
            break
        if match := _DISPATCH.search(source_of(c)):
            return c, match[1]
    return None


def dispatches(module: nn.Module) -> bool:
    """Whether attention of this module goes through the AttentionInterface."""
    return _dispatch(class_of(module)) is not None and hasattr(getattr(module, "config", None), "_attn_implementation")


def eager_function(module: nn.Module) -> Callable[..., Any] | None:
    """What the module runs where its config says eager."""
    dispatch = _dispatch(class_of(module))
    return vars(sys.modules[dispatch[0].__module__]).get(dispatch[1]) if dispatch else None


def passes_window(module: nn.Module) -> bool:
    dispatch = _dispatch(class_of(module))
    return dispatch is not None and "sliding_window=" in source_of(dispatch[0])


def name_of(attention: Iterable[nn.Module], holders: Iterable[nn.Module], before: str) -> str:
    """What the config of these attention modules names; holders: all modules that hold the config, before: what it names now.

    Continuous batching, generate_batch(), treats us as flash attention. So it may run decoders whose code does nothing else for
    flash attention.
    """
    attention = tuple(attention)
    windows = all(passes_window(m) for m in attention)
    decodes = all(getattr(m, "is_causal", False) for m in attention)
    asks = any(_ASKS_FOR_FLASH in source_of_module(type(m).__module__) for m in holders)
    # transformers takes chunks for something that no flash attention does, where keys are more than one has
    chunks = any(getattr(getattr(m, "config", None), "attention_chunk_size", None) for m in attention)
    return name_in_place_of(
        before, (WINDOWED if windows else "") + (PACKED if decodes and not asks and not chunks else "")
    )


def name_in_place_of(before: str, words: str = "") -> str:
    """The name of us for a config that names `before`; `replaced_by` is the way back."""
    return NAME + words + (SDPA if replaced_by(before) == "sdpa" else "")


def replaced_by(name: str) -> str:
    """What a config named before that names us, or eager where that was neither sdpa nor eager; another name is its own."""
    if name not in NAMES:
        return name
    return "sdpa" if name.endswith(SDPA) else "eager"


_ASKS_FOR_FLASH = "is_flash_attention_requested"


@functools.lru_cache(maxsize=256)
def source_of_module(python_module: str) -> str:
    try:
        return inspect.getsource(sys.modules[python_module])
    except (OSError, TypeError, KeyError):
        return ""


@functools.lru_cache(maxsize=256)
def asks_for_a_name(python_module: str) -> str | None:
    """The line of a model's code that wants a name it knows, or None."""
    source = source_of_module(python_module)
    match = _ASKS_FOR_A_NAME.search(source)
    if match is None:
        return None
    return source[source.rfind("\n", 0, match.start()) + 1 : source.find("\n", match.start())].strip()


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    *,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """As for sdpa: bool, True where a key is allowed; None where nothing is masked but by causality. Of a step of decoding the
    range of keys, where that says the same."""
    if not use_vmap:
        window = key_ranges.reach(_masks, mask_function)
        step = key_ranges.of_step(batch_size, q_length, kv_length, q_offset, kv_offset, window, attention_mask, device)
        if step is not None:
            return step
    rest = {"attention_mask": attention_mask, "use_vmap": use_vmap, "device": device, **kwargs}
    if mask_function is not None:
        rest["mask_function"] = mask_function
    if mask_function is _bidirectional:  # the same row for all: it is not written out
        row = _sdpa_mask(batch_size, 1, kv_length, q_offset, kv_offset, **rest)
        return None if row is None else row.expand(-1, -1, q_length, -1)
    return _sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, **rest)


def _windowed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    *,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """As `_mask`, and None too where nothing is masked but by causality and a window, which attention gets as a number."""
    start = isinstance(q_offset, int) and q_offset == 0 and kv_offset == 0 and q_length == kv_length
    if start and allow_is_causal_skip and local_size == getattr(config, "sliding_window", None):
        local_size = None  # without it only padding makes a mask necessary, and that mask has the window again
    return _mask(batch_size, q_length, kv_length, q_offset, kv_offset, local_size=local_size,
                 allow_is_causal_skip=allow_is_causal_skip, config=config, **kwargs)  # fmt: skip


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """query [B, H, Sq, D], key [B, Hk, Sk, D], value [B, Hk, Sk, Dv] to [B, Sq, H, Dv] and no weights, or where the call collects
    weights those of eager attention, [B, H, Sq, Sk].

    attention_mask: as `_mask` makes it. is_causal is top-left, as sdpa has it, and without effect beside a mask. Of a cache that is
    yet empty keys beyond the rows are not seen. Of an encoder that runs without padding S are the tokens of all sequences, B is 1,
    and the mask that of the padded batch. Packed sequences come with cu_seq_lens_q.
    """
    options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, "sliding_window": sliding_window,
               "softcap": softcap, "s_aux": s_aux, "position_bias": position_bias, **kwargs}  # fmt: skip
    if attention_mask is None and kwargs.get("cu_seq_lens_q") is not None:
        return _packed(module, (query, key, value), options)
    rows = unpadding.current()
    if rows is not None and rows.are(query.transpose(1, 2)):
        return _varlen(rows, module, (query, key, value), attention_mask, options)
    place = vars(module).get(PLACE)
    tensors = query, key, value, attention_mask, position_bias, s_aux
    reason = _why_not(module, tensors, dropout, scaling, kwargs)
    call = type(module).__name__
    softcap, sinks = softcap or 0.0, s_aux if s_aux is None or s_aux.dtype == query.dtype else s_aux.float()
    is_range = attention_mask is not None and key_ranges.is_range(attention_mask)
    if reason is None and position_bias is None and (is_range or attention_mask is None):
        step = heads_first.decode_arguments(query, key, value, attention_mask, scaling, softcap, sinks)
        if step is not None:
            take(call)
            return ATTENTION_DECODE(*step), None
    key, value = (kv_scales.widened(x, query.dtype) for x in (key, value))
    mask = attention_mask
    if mask is not None:
        # of a cache that was empty a mask has all its places, and attention what was put there
        mask = key_ranges.as_mask(mask, query.shape[2], key.shape[2]) if is_range else mask[..., : key.shape[2]]
    causal = mask is None and query.shape[2] > 1 and bool(_is_causal(module, is_causal))
    config: Any = module.config
    by_number = causal and sliding_window and WINDOWED in config._attn_implementation
    left = sliding_window - 1 if by_number and sliding_window else None
    if reason is not None:
        decline(call, reason)
        options = {name: x for name, x in options.items() if x is not None or name == "scaling"}
        return _as_before(module, place, query, key, value, mask, causal, left, options)
    if position_bias is not None:
        if mask is None:
            mask = position_bias
        else:
            mask = position_bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else position_bias + mask
    arguments = heads_first.arguments(query, key, value, mask, causal, scaling, left=left, softcap=softcap, sinks=sinks)
    return attend(module, arguments, place and place.bits, call), None


#: What `_packed` takes of the options of `_attention`: those of flash-attention, as transformers' continuous batching passes them,
#: and what that passes besides.
_PACKED = ("dropout", "scaling", "is_causal", "sliding_window", "softcap", "s_aux", "cu_seq_lens_q", "cu_seq_lens_k",
           "max_length_q", "max_length_k", "block_table", "k_cache", "v_cache", "cache", "read_index", "write_index",
           "logits_indices", "logits_processor_args", continuous_batching.PROMPT_PAGES)  # fmt: skip


def _packed(module: nn.Module, qkv: tuple[Tensor, Tensor, Tensor], options: dict[str, Any]) -> tuple[Tensor, Any]:
    """Attention of sequences in a row: q [1, H, T, D], k and v [1, Hk, T', D], T' with what the cache holds
    of each. With a block_table they are one token each, which is appended to its sequence's pages here, as flash-attention's
    flash_attn_with_kvcache does it.

    Raises:
        RuntimeError: the call is none that fused attention takes; what is packed has no other way to run.
    """
    others = {name: x for name, x in options.items() if name not in _PACKED}
    reason = _why_not(module, qkv, options["dropout"], options["scaling"], others)
    if reason is not None:
        raise RuntimeError(f"{type(module).__name__} was given packed sequences, and {reason}")
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in qkv)  # [T, H, D]
    ends_q, ends_k = options["cu_seq_lens_q"], options["cu_seq_lens_k"]
    window, softcap, scale = options["sliding_window"], options["softcap"] or 0.0, options["scaling"]
    sinks = None if options["s_aux"] is None else options["s_aux"].float()
    left = None if window is None else window - 1
    table = options.get("block_table")
    if table is not None:
        take(type(module).__name__)
        k_cache, v_cache = options["k_cache"], options["v_cache"]
        seq_lens = ends_k.diff()[: len(q)].int()
        APPEND_KV(k.unsqueeze(1), v.unsqueeze(1), k_cache, v_cache, seq_lens, table, None, None, *PLAIN)
        step = q.unsqueeze(1), k_cache, v_cache, seq_lens, table, None, None, scale, left, None, softcap, sinks, False
        return ATTENTION_DECODE(*step, None, None).transpose(0, 1), None
    pages = options.get(continuous_batching.PROMPT_PAGES)
    if pages is not None:
        take(type(module).__name__)
        k_cache, v_cache = options["k_cache"], options["v_cache"]

        def decode(rows: Tensor, seq_lens: Tensor, table: Tensor) -> Tensor:
            plain = None, None, scale, left, None, softcap, sinks, False, None, None
            return ATTENTION_DECODE(rows, k_cache, v_cache, seq_lens, table, *plain)

        lengths = ends_k.diff().int()
        most_rows = int(options["max_length_q"])
        return continuous_batching.in_their_pages(q, ends_q, most_rows, lengths, pages, decode).unsqueeze(0), None
    causal = bool(_is_causal(module, options["is_causal"]))
    right = left if not causal else None
    call = q, k, v, scale, causal, left, right, softcap, None, None, sinks, ends_q.int(), ends_k.int(), False
    return attend(module, call, vars(module)[PLACE].bits, type(module).__name__).unsqueeze(0), None


#: What `_varlen` takes of the options of `_attention`.
_VARLEN = ("dropout", "scaling", "is_causal", "sliding_window")


def _varlen(
    rows: unpadding.Rows,
    module: nn.Module,
    qkv: tuple[Tensor, Tensor, Tensor],
    padding: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Any]:
    """Attention of q, k and v [1, H, T, D], each sequence by itself, whether the module is swapped or not; padded where no kernel
    takes that.

    On a CPU without AVX-512 that is torch's kernel on each sequence: all-MiniLM-L6-v2 in int8 on 32 texts, half of it padding,
    takes 470 ms, 598 with q, k and v padded, and 902 all padded (CPU time of one core of an AMD EPYC held to AVX2).

    padding: the mask, which says nothing but where `rows` are and, of modules with a sliding_window, how far they see.
    """
    window = options["sliding_window"]
    left = right = None if window is None else window - 1  # to both sides, and not itself
    others = {name: x for name, x in options.items() if name not in _VARLEN}
    reason = _why_not_call(module, qkv, options["dropout"], options["scaling"], others)
    place = vars(module).get(PLACE)
    if reason is None and asked_for_by_name() and not (place and place.fused):
        reason = Reason(
            "not_swapped", "a backend asked for by name is for what is swapped", "see the report of fp.swap"
        )
    if reason is None and window is not None and rows.has_holes:
        reason = Reason("holes", "padding between tokens counts in a window", "pad at the end")
    if reason is None:
        q, k, v, scale, *_ = heads_first.arguments(*qkv, None, False, options["scaling"])
        q, k, v = (x.squeeze(0) for x in (q, k, v))
        cu_seqlens = rows.cu_seqlens.to(q.device)
        call = q, k, v, scale, False, left, right, 0.0, None, None, None, cu_seqlens, cu_seqlens, False
        reason = heads_first.why_no_kernel(ATTENTION, call)
    if reason is None:
        return attend(module, call, place and place.bits, type(module).__name__).unsqueeze(0), None
    q, k, v = (rows.scatter(x.transpose(1, 2)).transpose(1, 2) for x in qkv)
    return rows.gather(_attention(module, q, k, v, padding, **options)[0]), None


def _is_causal(module: nn.Module, argument: bool | None) -> Any:
    return getattr(module, "is_causal", True) if argument is None else argument


def _why_not(
    module: nn.Module, tensors: tuple[Tensor | None, ...], dropout: float, scaling: Any, others: dict[str, Any]
) -> Reason | None:
    place = vars(module).get(PLACE)
    if place is None:
        return Reason("shared_config", "this model is not swapped, and its config is that of one that is",
                      "swap it too, built from copy.deepcopy(config)")  # fmt: skip
    if not place.fused:
        return Reason("not_swapped", "the swap left this module as it was", "see the report of fp.swap")
    return _why_not_call(module, tensors, dropout, scaling, others)


def _why_not_call(
    module: nn.Module, tensors: tuple[Tensor | None, ...], dropout: float, scaling: Any, others: dict[str, Any]
) -> Reason | None:
    if reason := heads_first.why_training(tensors, dropout):
        return reason
    if others.get("output_attentions") or _collects_weights(module):
        return Reason("attention_weights", "fused attention has no weights to return, and the call collects them",
                      "call the model without output_attentions")  # fmt: skip
    if scaling is not None and (isinstance(scaling, Tensor) or not scaling > 0):
        return Reason("scaling", "scaling is no positive number", "see the model's code")
    for name, x in others.items():
        if name not in _SILENT and x is not None and x is not False:
            return Reason("argument", f"{name}= is nothing that fused attention takes", "call the model without it")
    return None


def _collects_weights(module: nn.Module) -> bool:
    """Whether the call that this thread is in takes attention weights from what modules return, by hooks of transformers."""
    if torch.compiler.is_compiling() and not _collector.compiling:
        # A part of a model is compiled, and torch does not trace a context variable: the hooks are there once a call has asked.
        return any(getattr(hook, "__module__", "") == _CAPTURING for hook in module._forward_hooks.values())
    collected = _collector.get()
    return collected is not None and any(name.endswith("attentions") for name in collected)


def collects() -> bool:
    """Whether the call that this thread is in collects anything that modules return, by hooks of transformers."""
    return bool(_collector.get())


def _as_before(
    module: nn.Module,
    place: Place | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    left: int | None,
    options: dict[str, Any],
) -> tuple[Tensor, Any]:
    """What the model ran before it was swapped, on the mask that it would have had; eager attention where weights are collected,
    as sdpa returns none."""
    if causal and key.shape[2] > query.shape[2]:
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        if "position_bias" in options:
            options["position_bias"] = options["position_bias"][..., : query.shape[2]]
    if left is not None:
        mask = _causal(query, key, left)
    config: Any = module.config
    before = replaced_by(config._attn_implementation) if place is None else place.before
    eager = eager_function(module) if place is None else place.eager
    collects = options.get("output_attentions") or _collects_weights(module)
    if before == "sdpa" and not (collects and eager):
        return _interface["sdpa"](module, query, key, value, mask, **options)
    if eager is None:
        raise RuntimeError(
            f"{type(module).__name__} has no eager attention to go back to: call fp.restore(model) first"
        )
    if mask is None and causal:
        mask = _causal(query, key, None)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    return eager(module, query, key, value, mask, **options)


def _causal(query: Tensor, key: Tensor, left: int | None) -> Tensor:
    """[1, 1, Sq, Sk], True where a key is allowed."""
    distance = torch.arange(key.shape[2], device=key.device) - torch.arange(
        query.shape[2], device=key.device
    ).unsqueeze(1)
    allowed = distance <= 0
    return (allowed if left is None else allowed & (distance >= -left)).unsqueeze(0).unsqueeze(0)
