"""decoder_layer: the layers of a transformer's decoder in one call, on a CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...dispatch import Operation
from ..common.activations import GATED, PLAIN, check_activation, is_gated
from ..common.cache_layout import check_apart, check_cache, check_rotary, rotary_pair
from ..common.quantized_rows import FLOATS, check_float_rows, check_vector
from ..encoder_layer import Int8Weight, check_linear
from ..w8a16_gemm import check_weight_only
from . import reference
from .reference import LAYER, LINEAR, LINEARS


class W8a16Weight(NamedTuple):
    """A linear layer whose input stays as it is, as in `w8a16_gemm`.

    weight: int8 or float8_e4m3fn [N, K]; scale: float32 [N], or [N, ceil(K / 128)] for blocks of 128 columns; bias: float32,
    float16 or bfloat16 [N].
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None = None


class DecoderWeights(NamedTuple):
    """One layer of H columns, with H' columns of all query heads and Hk' of all key heads: qkv [H' + 2 Hk', H], the rows of q, k
    and v one after another; out [H, H']; up [I, H], gated [2 I, H] by `interleave_gate_up`; down [H, I]; the weights of both norms,
    float32 or x's dtype [H]. All of a call are `Int8Weight`s, or all are `W8a16Weight`s."""

    qkv: Int8Weight | W8a16Weight
    out: Int8Weight | W8a16Weight
    up: Int8Weight | W8a16Weight
    down: Int8Weight | W8a16Weight
    norm1: Tensor
    norm2: Tensor


def flat(layers: Sequence[DecoderWeights]) -> list[Tensor | None]:
    """In the order of the schema. TypeError where they are none."""
    if not isinstance(layers, (list, tuple)) or not all(isinstance(layer, DecoderWeights) for layer in layers):
        raise TypeError("decoder_layer: layers must be a list of DecoderWeights, one a layer")
    if len({type(part) for layer in layers for part in layer[:LINEARS]}) > 1:
        raise TypeError("decoder_layer: the linear layers of a call must all be Int8Weight, or all W8a16Weight")
    return [t for layer in layers for part in layer for t in _tensors(part)]


def is_weight_only(layers: Sequence[DecoderWeights]) -> bool:
    return bool(layers) and isinstance(layers[0].qkv, W8a16Weight)


def _tensors(part: Int8Weight | W8a16Weight | Tensor) -> Sequence[Tensor | None]:
    if isinstance(part, W8a16Weight):
        return (*part, *(None,) * (LINEAR - len(part)))
    return part if isinstance(part, Int8Weight) else (part,)


def decoder_layer(
    x: Tensor,
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    seq_lens: Tensor,
    layers: Sequence[DecoderWeights],
    *,
    heads: int,
    rotary: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
    activation: str | None = "silu_mul",
    scale: float | None = None,
    leftpad: Tensor | None = None,
) -> Tensor:
    """The layers of a decoder, one after another, on new tokens of sequences with a cache, as `generate` has them::

        q, k, v = qkv(norm1(x)); q and k are rotated; k and v go to the layer's cache
        y = x + out(attention(q, cache))
        x = y + down(activation(up(norm2(y))))

    Norms are RMS norms. Each product is `int8_linear`, dynamic per row, or with `W8a16Weight`s `w8a16_gemm` of float32 values. Keys
    go to the cache as `append_kv` writes them. Attention reads it as `attention_decode` does, for any number of tokens. Values
    between the steps are float32. They are rounded to x's dtype in q, k, v and what attention returns, and between layers: layers
    in one call give the bits of as many calls. Many rows of a bfloat16 x are rounded before each product with a `W8a16Weight` too,
    where a CPU multiplies bfloat16 in pairs.

    Args:
        x: float32, float16 or bfloat16 [B, S, H], last stride 1: S new tokens of each sequence.
        k_caches: one for each layer, [B, L, Hk, D] of x's dtype, last stride 1, others free but not 0; written in place.
        v_caches: the same of the values.
        seq_lens: int32 [B], the new tokens included; from 0 to L.
        layers: one `DecoderWeights` for each cache, the first layer first.
        heads: of q, a multiple of Hk.
        rotary: (cos, sin), [B, S, R] or [1, S, R], float32 or x's dtype, as in `append_kv`; None: nothing is rotated.
        eps: of both norms.
        activation: of the MLP: None, relu, gelu, gelu_tanh, silu, relu6, hard_swish, silu_mul, gelu_mul, gelu_tanh_mul.
        scale: of the scores; None: 1 / sqrt(D).
        leftpad: int32 [B]: a sequence's first keys that count for nothing, as those of padding on the left; None: none.

    Returns:
        [B, S, H] of x's dtype, contiguous. Rows of a sequence with a length beyond 0 to L, or a leftpad below 0, are NaN. Nothing
        is written for a length out of range. Bits do not depend on the number of threads. On a CPU a NaN or an infinity in a row of
        x reaches that row and those that see its key, and no others.

    Raises:
        TypeError: an argument is of another type or dtype than above.
        ValueError: a shape, layout, device, value or combination of arguments is not one of those above.
        Unsupported: a backend asked for by name cannot run these arguments.
        RuntimeError: an input requires grad, in grad mode: operations have no backward.

    Example:
        >>> def weight(n, k):
        ...     q, scale, _ = fp.ops.quantize(torch.randn(n, k), torch.int8)
        ...     return fp.ops.Int8Weight(q, scale)
        >>> norm = torch.ones(64)
        >>> layer = fp.ops.DecoderWeights(weight(96, 64), weight(64, 64), weight(512, 64), weight(64, 256), norm, norm)
        >>> k_cache, v_cache = torch.zeros(2, 1, 32, 1, 16)
        >>> seq_lens = torch.tensor([8], dtype=torch.int32)
        >>> fp.ops.decoder_layer(torch.randn(1, 8, 64), [k_cache], [v_cache], seq_lens, [layer], heads=4).shape
        torch.Size([1, 8, 64])
    """
    cos, sin = rotary_pair("decoder_layer", rotary)
    for name, caches in (("k_caches", k_caches), ("v_caches", v_caches)):
        if not isinstance(caches, (list, tuple)):
            raise TypeError(
                f"decoder_layer: {name} must be a list of tensors, one a layer, not {type(caches).__name__}"
            )
    return OPERATION(
        x, [*k_caches], [*v_caches], seq_lens, flat(layers), heads, cos, sin, eps, activation, scale, leftpad,
        is_weight_only(layers),
    )  # fmt: skip


def _check_layer(
    weights: Sequence[Tensor | None], activation: str | None, x: Tensor, q: int, kv: int, weight_only: bool
) -> None:
    op, h = "decoder_layer", x.shape[2]
    qkv, out, up, down = (weights[i * LINEAR : (i + 1) * LINEAR] for i in range(LINEARS))
    inputs = x.new_empty(0, h)
    check = _check_weight_only if weight_only else check_linear
    check(op, qkv, "qkv", q + 2 * kv, inputs)
    check(op, out, "out", h, x.new_empty(0, q))
    n = check(op, up, "up", None, inputs)
    if is_gated(activation) and n % 16:
        raise ValueError(f"{op}: the rows of up must be a multiple of 16 with {activation}, 8 of gate beside 8 of up, and are {n}: "
                         "pad them with zeros")  # fmt: skip
    check(op, down, "down", h, x.new_empty(0, n // 2 if is_gated(activation) else n))
    for name, v in zip(("norm1", "norm2"), weights[LINEARS * LINEAR :]):
        if v is None:
            raise TypeError(f"{op}: {name} must be a tensor of torch.float32 or x's dtype, and is None")
        check_vector(op, name, v, h, (x.dtype, torch.float32), x)


def _check_weight_only(op: str, weights: Sequence[Tensor | None], name: str, rows: int | None, inputs: Tensor) -> int:
    """As `check_linear`."""
    weight, scale, bias, *others = weights
    if any(t is not None for t in others):
        raise TypeError(f"{op}: {name} has a weight, a scale and a bias where its input stays as it is, and no others")
    n = check_weight_only(op, f"{name}.", weight, scale, inputs)
    if rows is not None and n != rows:
        raise ValueError(f"{op}: {name}.weight must be [{rows}, {inputs.shape[-1]}], and has {n} rows")
    if isinstance(scale, Tensor) and scale.dim() != 2:
        check_vector(op, f"{name}.scale", scale, n, torch.float32, inputs)
    check_vector(op, f"{name}.bias", bias, n, FLOATS, inputs)
    return n


def _check_caches(x: Tensor, k_caches: list[Tensor], v_caches: list[Tensor], seq_lens: Tensor) -> tuple[int, int]:
    """Heads and columns of the caches."""
    op = "decoder_layer"
    if not k_caches or len(k_caches) != len(v_caches):
        raise ValueError(
            f"{op}: each layer has a k_cache and a v_cache, and there are {len(k_caches)} and {len(v_caches)}"
        )
    for k, v in zip(k_caches, v_caches):
        for name, cache in (("k_cache", k), ("v_cache", v)):
            if not isinstance(cache, Tensor) or cache.dtype != x.dtype:
                raise TypeError(f"{op}: a {name} must be a tensor of x's dtype, {x.dtype}")
            if cache.dim() != 4 or cache.shape[2:] != k_caches[0].shape[2:] or 0 in cache.shape[2:]:
                raise ValueError(
                    f"{op}: a {name} must be [B, L, Hk, D], Hk and D those of the first, and has shape {tuple(cache.shape)}"
                )
        like = x.new_empty(1).expand(*x.shape[:2], *k.shape[2:])
        check_cache(op, "x", like, k, v, seq_lens, None, None, None, k.shape[3])
        for name, cache in (("k_cache", k), ("v_cache", v)):
            if any(n > 1 and stride == 0 for n, stride in zip(cache.shape, cache.stride())):
                raise ValueError(f"{op}: a {name} is expanded and cannot be written: pass .contiguous()")
        check_apart(op, "cache", k, v)
    return int(k_caches[0].shape[2]), int(k_caches[0].shape[3])


def _check_numbers(eps: float, scale: float | None) -> None:
    op = "decoder_layer"
    for name, v in (("eps", eps), ("scale", scale)):
        if v is not None and (isinstance(v, bool) or not isinstance(v, (int, float))):
            raise TypeError(f"{op}: {name} must be a number, not {type(v).__name__}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"{op}: eps must be finite and at least 0, not {eps}")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"{op}: scale must be finite and positive, not {scale}")


def _check(
    x: Tensor,
    k_caches: list[Tensor],
    v_caches: list[Tensor],
    seq_lens: Tensor,
    weights: list[Tensor | None],
    heads: int,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    activation: str | None,
    scale: float | None,
    leftpad: Tensor | None,
    weight_only: bool = False,
) -> None:
    op = "decoder_layer"
    check_float_rows(op, "x", x)
    if x.dim() != 3 or x.dtype not in FLOATS:
        raise ValueError(f"{op}: x must be [B, S, H], and has shape {tuple(x.shape)}")
    kv_heads, columns = _check_caches(x, k_caches, v_caches, seq_lens)
    if type(heads) is not int or heads < 1 or heads % kv_heads:
        raise ValueError(
            f"{op}: heads must be a positive multiple of the {kv_heads} heads of the caches, not {heads!r}"
        )
    check_rotary(op, "x", x, columns, cos, sin)
    _check_numbers(eps, scale)
    check_activation(op, activation, (None, *PLAIN, *GATED))
    check_vector(op, "leftpad", leftpad, x.shape[0], torch.int32, x)
    if len(weights) != LAYER * len(k_caches):
        raise ValueError(
            f"{op}: layers must be one DecoderWeights for each cache: {len(k_caches)}, not {len(weights) // LAYER}"
        )
    for i in range(0, len(weights), LAYER):
        _check_layer(weights[i : i + LAYER], activation, x, heads * columns, kv_heads * columns, weight_only)


def _fake(x: Tensor, *options: object) -> Tensor:
    return x.new_empty(x.shape)


OPERATION = Operation(
    decoder_layer, _check, reference.decoder_layer, _fake, backends=("cpu",), writes=("k_caches", "v_caches")
)
