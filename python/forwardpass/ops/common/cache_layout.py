"""What attention_decode and append_kv share: the layout of a cache of keys and values, its checks, and where a token's row is.

A cache is contiguous, [B, L, Hk, D], or consists of pages, [P, page, Hk, D], of which block_table names those of each sequence.
Its 8-bit elements have scales: one, one a head, or one for each token and head in the cache's shape without D.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import DEBUG, is_of_subclass
from .quantized_rows import E4M3, FLOATS
from .values import may_look

QUANTIZED = (torch.int8, E4M3)


def is_per_token(scale: Tensor | None) -> bool:
    """Whether each token and head has a scale of its own."""
    return scale is not None and scale.dim() == 3


def capacity(k_cache: Tensor, block_table: Tensor | None) -> int:
    """Keys that a sequence can have."""
    return k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])


def check_new_rows(op: str, names: str, *tensors: Tensor) -> None:
    """q, or k and v: [B, S, heads, D] of one float dtype, on one device."""
    for name, x in zip(names, tensors):
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, not {type(x).__name__}")
        if x.dtype not in FLOATS:
            raise TypeError(
                f"{op}: {name} must be float16, bfloat16 or float32, not {x.dtype}: convert it with .to(torch.float16)"
            )
        if x.dim() != 4 or x.shape[-1] == 0 or x.shape[-2] == 0:
            raise ValueError(f"{op}: {name} must be [B, S, heads, D], and has shape {tuple(x.shape)}")
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(
                f"{op}: the last dimension of {name} must have stride 1, not {x.stride(-1)}: pass {name}.contiguous()"
            )


def check_cache(
    op: str,
    name: str,
    x: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    value_dim: int | None,
) -> None:
    """x, called name, are new tokens of the cache's sequences, or queries of theirs. value_dim: columns of v_cache; None: any."""
    for cache_name, cache, columns in (("k_cache", k_cache, x.shape[3]), ("v_cache", v_cache, value_dim)):
        if not isinstance(cache, Tensor) or cache.dtype not in (x.dtype, *QUANTIZED):
            dtype = getattr(cache, "dtype", type(cache).__name__)
            raise TypeError(
                f"{op}: {cache_name} must be a tensor of {name}'s dtype, {x.dtype}, int8 or float8_e4m3fn, not {dtype}"
            )
        if cache.device != x.device:
            raise ValueError(f"{op}: {cache_name} is on {cache.device} and {name} on {x.device}: move one of them")
        if cache.dim() != 4 or 0 in cache.shape[1:] or columns not in (None, cache.shape[3]):
            layout = "[B, L, Hk" if block_table is None else "[P, page, Hk"
            raise ValueError(
                f"{op}: {cache_name} must be {layout}, {columns or 'Dv'}], and has shape {tuple(cache.shape)}"
            )
        if cache.shape[3] > 1 and cache.stride(3) != 1:
            raise ValueError(f"{op}: the last dimension of {cache_name} must have stride 1, not {cache.stride(3)}")
    if k_cache.shape[:3] != v_cache.shape[:3] or k_cache.dtype != v_cache.dtype:
        raise ValueError(f"{op}: k_cache and v_cache must have one shape without columns and one dtype, and are {k_cache.dtype} "
                         f"{tuple(k_cache.shape)} and {v_cache.dtype} {tuple(v_cache.shape)}")  # fmt: skip
    check_ints(op, "seq_lens", seq_lens, name, x)
    _check_table(op, name, x, k_cache, block_table)
    for scale_name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if k_cache.dtype not in QUANTIZED:
            if scale is not None:
                raise ValueError(f"{op}: {scale_name} goes with an int8 or float8_e4m3fn cache, not {k_cache.dtype}")
            continue
        if not isinstance(scale, Tensor) or scale.dtype != torch.float32:
            raise TypeError(f"{op}: {scale_name} must be a float32 tensor for a cache of {k_cache.dtype}, not "
                            f"{getattr(scale, 'dtype', type(scale).__name__)}")  # fmt: skip
        if scale.shape not in ((1,), k_cache.shape[2:3], k_cache.shape[:3]):
            raise ValueError(f"{op}: {scale_name} must be [1], [{k_cache.shape[2]}] or {list(k_cache.shape[:3])}, and has shape "
                             f"{tuple(scale.shape)}")  # fmt: skip
        if scale.device != x.device:
            raise ValueError(f"{op}: {scale_name} is on {scale.device} and {name} on {x.device}: move one of them")


def check_ints(op: str, name: str, ints: Tensor, x_name: str, x: Tensor) -> None:
    """One of each sequence of x."""
    if not isinstance(ints, Tensor) or ints.dtype != torch.int32:
        dtype = getattr(ints, "dtype", type(ints).__name__)
        raise TypeError(f"{op}: {name} must be an int32 tensor, not {dtype}: use .int()")
    if ints.shape != (x.shape[0],) or not ints.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous [{x.shape[0]}], and has shape {tuple(ints.shape)}")
    if ints.device != x.device:
        raise ValueError(f"{op}: {name} is on {ints.device} and {x_name} on {x.device}: move one of them")


def rotary_pair(op: str, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    """cos and sin of an argument that may be None."""
    if rotary is None:
        return None, None
    if not isinstance(rotary, tuple | list) or len(rotary) != 2:
        raise TypeError(f"{op}: rotary must be (cos, sin) or None, not {type(rotary).__name__}")
    return rotary[0], rotary[1]


def check_rotary(op: str, name: str, x: Tensor, columns: int, cos: Tensor | None, sin: Tensor | None) -> None:
    """cos and sin, both or neither, of new tokens x [B, S, …], called name, whose heads have so many columns."""
    if cos is None and sin is None:
        return
    for part, t in (("cos", cos), ("sin", sin)):
        if not isinstance(t, Tensor) or t.dtype not in (torch.float32, x.dtype):
            raise TypeError(f"{op}: {part} of rotary must be a tensor of float32 or {name}'s dtype, {x.dtype}, not "
                            f"{getattr(t, 'dtype', type(t).__name__)}")  # fmt: skip
        if t.dim() != 3 or t.shape[0] not in (1, x.shape[0]) or t.shape[1] != x.shape[1] or t.shape[2] % 2:
            raise ValueError(f"{op}: {part} of rotary must be [{x.shape[0]} or 1, {x.shape[1]}, an even number], and has shape "
                             f"{tuple(t.shape)}")  # fmt: skip
        if not 0 < t.shape[2] <= columns or t.stride(2) != 1:
            raise ValueError(f"{op}: {part} of rotary must have 2 to {columns} columns of stride 1, and has "
                             f"{t.shape[2]} of stride {t.stride(2)}")  # fmt: skip
        if t.device != x.device:
            raise ValueError(f"{op}: {part} of rotary is on {t.device} and {name} on {x.device}: move one of them")
    assert cos is not None and sin is not None
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ValueError(f"{op}: cos and sin of rotary must have one shape and dtype, and are {cos.dtype} {tuple(cos.shape)} "
                         f"and {sin.dtype} {tuple(sin.shape)}")  # fmt: skip


def _check_table(op: str, name: str, x: Tensor, k_cache: Tensor, block_table: Tensor | None) -> None:
    batch = x.shape[0]
    if block_table is None:
        if k_cache.shape[0] != batch:
            raise ValueError(f"{op}: without a block_table k_cache must be of {name}'s batch size, {batch}, and has shape "
                             f"{tuple(k_cache.shape)}")  # fmt: skip
        return
    if not isinstance(block_table, Tensor) or block_table.dtype != torch.int32:
        raise TypeError(f"{op}: block_table must be an int32 tensor, not "
                        f"{getattr(block_table, 'dtype', type(block_table).__name__)}: use .int()")  # fmt: skip
    if block_table.dim() != 2 or block_table.shape[0] != batch or block_table.shape[1] == 0:
        raise ValueError(f"{op}: block_table must be [{batch}, n], and has shape {tuple(block_table.shape)}")
    if block_table.shape[1] > 1 and block_table.stride(1) != 1:
        raise ValueError(f"{op}: the last dimension of block_table must have stride 1, not {block_table.stride(1)}")
    if block_table.device != x.device:
        raise ValueError(f"{op}: block_table is on {block_table.device} and {name} on {x.device}: move one of them")
    if k_cache.shape[0] == 0:
        raise ValueError(f"{op}: k_cache must have a page, and has shape {tuple(k_cache.shape)}")


def check_leftpad(op: str, leftpad: Tensor) -> None:
    """Under FORWARDPASS_DEBUG, whether all are at least 0."""
    if DEBUG and may_look(op, leftpad) and (leftpad < 0).any():
        b = int((leftpad < 0).nonzero()[0])
        raise ValueError(f"{op}: leftpad must be at least 0, and of sequence {b} is {int(leftpad[b])}")


def check_apart(op: str, name: str, k: Tensor | None, v: Tensor | None) -> None:
    """What is written for keys and for values: of the same memory the second would overwrite the first."""
    if k is None or v is None or torch.compiler.is_compiling() or is_of_subclass(k) or is_of_subclass(v):
        return
    if k.data_ptr() and k.data_ptr() == v.data_ptr() and k.stride() == v.stride():
        raise ValueError(
            f"{op}: k_{name} and v_{name} are the same memory, where v would overwrite k: pass two tensors"
        )


def check_lengths(
    op: str, k_cache: Tensor, seq_lens: Tensor, block_table: Tensor | None, first: Tensor | None = None
) -> None:
    """Under FORWARDPASS_DEBUG, whether lengths are within the cache and pages in use exist. Without it rows are NaN instead, on
    every backend: to look would be to wait for a GPU.

    first [B]: of each sequence the first key that is read or written; without it 0.
    """
    if not DEBUG or not may_look(op, seq_lens, block_table):
        return
    most = capacity(k_cache, block_table)
    wrong = (seq_lens < 0) | (seq_lens > most)
    if wrong.any():
        b = int(wrong.nonzero()[0])
        room = (
            "rows of the cache" if block_table is None else f"tokens of the {block_table.shape[1]} pages in block_table"
        )
        raise ValueError(
            f"{op}: seq_lens must be from 0 to {most}, the {room}, and of sequence {b} is {int(seq_lens[b])}"
        )
    if block_table is None:
        return
    begin = torch.arange(block_table.shape[1], device=block_table.device) * k_cache.shape[1]
    start = torch.zeros_like(seq_lens) if first is None else first.clamp(min=0)
    used = (begin < seq_lens[:, None]) & (begin + k_cache.shape[1] > start[:, None]) & (start < seq_lens)[:, None]
    wrong = used & ((block_table < 0) | (block_table >= k_cache.shape[0]))
    if wrong.any():
        b, n = wrong.nonzero()[0].tolist()
        raise ValueError(f"{op}: block_table must name pages below {k_cache.shape[0]} for what a sequence has, and entry {n} of "
                         f"sequence {b}, of {int(seq_lens[b])} tokens, is {int(block_table[b, n])}")  # fmt: skip


def has_room(seq_lens: Tensor, k_cache: Tensor, block_table: Tensor | None) -> Tensor:
    """Whether each sequence has a length, and the cache room for it: bool [B]."""
    return (seq_lens >= 0) & (seq_lens <= capacity(k_cache, block_table))


def locate(positions: Tensor, k_cache: Tensor, block_table: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The first two indices of the rows of positions [B, T] of sequences, and whether there is such a row."""
    page = k_cache.shape[1]
    live = (positions >= 0) & (positions < capacity(k_cache, block_table))
    positions = positions.clamp(0, capacity(k_cache, block_table) - 1)
    if block_table is None:
        return torch.arange(len(positions), device=positions.device)[:, None].expand_as(positions), positions, live
    pages = block_table.gather(1, positions // page).long()
    live = live & (pages >= 0) & (pages < k_cache.shape[0])
    return pages.clamp(0, k_cache.shape[0] - 1), positions % page, live
