"""append_kv: new tokens' keys and values into the cache that attention_decode reads.

The contract; what it computes is in reference.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...dispatch import Operation
from ..common.cache_layout import check_cache, check_lengths, check_new_rows, check_rotary, rotary_pair
from ..common.quantized_rows import check_vector
from . import reference


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    *,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    q: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    interleaved: bool = False,
) -> Tensor | None:
    """Writes the last S tokens of each sequence into its cache, at positions seq_len - S to seq_len - 1, in place.

    It is the one operation that changes its arguments: the caches and, where each token has scales of its own, k_scale and v_scale.
    A position before the first is not written: of a sequence whose seq_len is less than S, the tokens at the front are padding.
    Nothing is written for a sequence whose length is out of range, nor for a token without a page. The row of q of such a token is
    NaN, and so is what fp.ops.attention_decode gives of it by the same seq_lens and block_table.
    What a model does to the rows of q and k before, a norm of each head and rotary embedding, can be done in the same launch.

    Args:
        k: float16, bfloat16 or float32 [B, S, Hk, D]; last stride 1, others free.
        v: [B, S, Hk, Dv] of k's dtype.
        k_cache: [B, L, Hk, D] or, with a block_table, pages [P, page, Hk, D] of any number of tokens; of k's dtype, int8 or
            float8_e4m3fn. Last stride 1, others free, but not 0.
        v_cache: as k_cache, of Dv columns; the two may be views of one tensor that overlap, but in no row that is written.
        seq_lens: int32 [B], the new tokens included; from 0 to the rows of the cache, or the tokens of the table's pages.
        block_table: int32 [B, n], as in fp.ops.attention_decode. No two sequences have new tokens in one page.
        k_scale: of an 8-bit cache, float32: [1] or [Hk], by which k is divided, or k_cache's shape without D, to which the scale of
            each token and head is written, its largest value divided by 127 or 448, as fp.ops.quantize does.
        v_scale: as k_scale, of v_cache.
        rotary: (cos, sin), [B, S, R] or [1, S, R], float32 or k's dtype: rotary embedding of the first R columns of k, R even, in
            halves, as rotate_half of transformers does: k * cos + rotate_half(k) * sin, in float32, before it is rounded.
        q: [B, S, H, D] of k's dtype, last stride 1: the queries of the new tokens, to which the same is done as to k.
        q_norm, k_norm: float32 or k's dtype [D], contiguous: the weight of an RMS norm (arXiv 1910.07467) of each head of q, and of
            k, before the rotation, as Qwen3 has it: x / sqrt(mean(x^2) + norm_eps) * weight, in float32. Gemma's is 1 + weight.
        norm_eps: is added to the mean square.
        interleaved: rotary rotates columns 0 and 1, 2 and 3, and so on, as GPT-J, Cohere and GLM have it: column 2i becomes
            k[2i] * cos[2i] - k[2i + 1] * sin[2i], column 2i + 1 k[2i + 1] * cos[2i + 1] + k[2i] * sin[2i + 1].

    Returns:
        q, normed and rotated, of its dtype, contiguous [B, S, H, D], padding too; NaN for tokens without a place. None without q.

    Raises:
        TypeError: an argument is of another type or dtype than above.
        ValueError: a shape, layout, device, value or combination of arguments is not one of those above. With FORWARDPASS_DEBUG=1
            in the environment also for lengths and pages that are out of range: the host looks, outside of graphs. Nothing is then
            written.
        Unsupported: a backend asked for by name cannot run these arguments.
        RuntimeError: an input requires grad, in grad mode: operations have no backward.

    Example:
        >>> k, v = torch.randn(2, 1, 4, 64), torch.randn(2, 1, 4, 64)  # a new token of each of 2 sequences
        >>> k_cache, v_cache = torch.zeros(2, 128, 4, 64), torch.zeros(2, 128, 4, 64)
        >>> seq_lens = torch.tensor([7, 3], dtype=torch.int32)  # the new tokens included
        >>> fp.ops.append_kv(k, v, k_cache, v_cache, seq_lens)
        >>> torch.equal(k_cache[0, 6], k[0, 0]), torch.equal(v_cache[1, 2], v[1, 0])
        (True, True)
    """
    (cos, sin), q_out = rotary_pair("append_kv", rotary), None
    if isinstance(q, Tensor):
        q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    OPERATION(
        k, v, k_cache, v_cache, seq_lens, block_table, k_scale, v_scale, cos, sin, q, q_out, q_norm, k_norm, norm_eps,
        interleaved,
    )  # fmt: skip
    return q_out


def _check(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    q: Tensor | None,
    q_out: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    norm_eps: float,
    interleaved: bool,
) -> None:
    op = "append_kv"
    check_new_rows(op, "kv", k, v)
    if k.shape[:3] != v.shape[:3] or k.dtype != v.dtype:
        raise ValueError(f"{op}: k and v must have one shape without columns and one dtype, and are {k.dtype} {tuple(k.shape)} "
                         f"and {v.dtype} {tuple(v.shape)}")  # fmt: skip
    if k.device != v.device:
        raise ValueError(f"{op}: v is on {v.device} and k on {k.device}: move one of them")
    check_cache(op, "k", k, k_cache, v_cache, seq_lens, block_table, k_scale, v_scale, v.shape[3])
    if k.shape[2] != k_cache.shape[2]:
        raise ValueError(f"{op}: k must have the heads of k_cache, {k_cache.shape[2]}, not {k.shape[2]}")
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache), ("k_scale", k_scale), ("v_scale", v_scale)):
        if x is not None and any(s == 0 and n > 1 for n, s in zip(x.shape, x.stride())):
            raise ValueError(
                f"{op}: {name} is expanded, so that its elements cannot be written: pass {name}.contiguous()"
            )
    reference.check_memory(k_cache, v_cache, k_scale, v_scale)
    check_rotary(op, "k", k, k.shape[3], cos, sin)
    if not isinstance(interleaved, bool):
        raise TypeError(f"{op}: interleaved must be True or False, not {interleaved!r}")
    if interleaved and cos is None:
        raise ValueError(f"{op}: interleaved says how rotary rotates: pass rotary, or leave interleaved out")
    _check_prepared(op, k, q, q_norm, k_norm, norm_eps)
    check_lengths(op, k_cache, seq_lens, block_table, seq_lens - k.shape[1])


def _check_prepared(
    op: str, k: Tensor, q: Tensor | None, q_norm: Tensor | None, k_norm: Tensor | None, norm_eps: float
) -> None:
    if q is not None:
        check_new_rows(op, "q", q)
        if q.dtype != k.dtype or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
            raise ValueError(f"{op}: q must be {k.dtype} [{k.shape[0]}, {k.shape[1]}, H, {k.shape[3]}], as k but for the heads, "
                             f"and is {q.dtype} {tuple(q.shape)}")  # fmt: skip
        if q.device != k.device:
            raise ValueError(f"{op}: q is on {q.device} and k on {k.device}: move one of them")
    elif q_norm is not None:
        raise ValueError(f"{op}: q_norm is the norm of q: pass q")
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            check_vector(op, name, weight, k.shape[3], (torch.float32, k.dtype), k)
    if isinstance(norm_eps, bool) or not isinstance(norm_eps, int | float) or not 0 <= norm_eps < math.inf:
        raise ValueError(f"{op}: norm_eps must be a number of at least 0, not {norm_eps!r}")


def _fake(*args: object) -> None:
    return None


#: Of the last arguments of OPERATION q_norm, k_norm and norm_eps, where there are no norms.
WITHOUT_NORMS = (None, None, 1e-6)
#: And those from cos on, where k is written as it is.
PLAIN = (None, None, None, None, *WITHOUT_NORMS, False)

OPERATION = Operation(
    append_kv, _check, reference.append_kv, _fake, writes=("k_cache", "v_cache", "k_scale", "v_scale", "q_out")
)
