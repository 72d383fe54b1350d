"""encoder_layer: the layers of a transformer's encoder in one call, on a CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...dispatch import Operation
from ..common.activations import GATED, PLAIN, check_activation, is_gated
from ..common.quantized_rows import FLOATS, check_float_rows, check_vector
from ..int8_gemm import check_int8_weight, check_packed
from . import reference
from .reference import LAYER, LINEAR, LINEARS, NO_WINDOW, is_fused


class Int8Weight(NamedTuple):
    """A linear layer whose input is quantised row by row.

    weight: int8 [N, K]; scale: float32 [N]; bias: float32, float16 or bfloat16 [N]; sum: int32 [N], weight.sum(1,
    dtype=torch.int32): the input has zero points; None: it has none; channel_scale: float32 [K], multiplies the input first;
    packed: `pack_int8_weight(weight)`.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None = None
    sum: Tensor | None = None
    channel_scale: Tensor | None = None
    packed: Tensor | None = None


_NO_WEIGHT = (None,) * LINEAR


class EncoderWeights(NamedTuple):
    """One layer: q, k, v and out [H, H]; up [I, H], gated [2 I, H] by `interleave_gate_up`; down [H, I]; weight and bias of both
    norms, float32 or x's dtype [H], or None. q, k and v with the same `channel_scale`, or with none, share one quantisation of
    their input. Where k and v are None, q is [3 H, H], their rows one after another; in all layers of a call, or in none."""

    q: Int8Weight
    k: Int8Weight | None
    v: Int8Weight | None
    out: Int8Weight
    up: Int8Weight
    down: Int8Weight
    norm1: tuple[Tensor | None, Tensor | None]
    norm2: tuple[Tensor | None, Tensor | None]


def flat(layers: Sequence[EncoderWeights]) -> list[Tensor | None]:
    """In the order of the schema. TypeError where they are none."""
    if not isinstance(layers, (list, tuple)) or not all(isinstance(layer, EncoderWeights) for layer in layers):
        raise TypeError("encoder_layer: layers must be a list of EncoderWeights, one a layer")
    return [t for layer in layers for part in layer for t in (_NO_WEIGHT if part is None else part)]


def encoder_layer(
    x: Tensor,
    cu_seqlens: Tensor,
    layers: Sequence[EncoderWeights],
    *,
    heads: int,
    eps: float = 1e-12,
    activation: str | None = "gelu",
    pre_norm: bool = False,
    scale: float | None = None,
    attention_dtype: torch.dtype | None = None,
    key_lens: Tensor | None = None,
    score_bias: Tensor | None = None,
    rotary: Sequence[tuple[Tensor, Tensor]] | None = None,
    windows: Sequence[int | None] | None = None,
    first_norm: bool = True,
) -> Tensor:
    """The layers of an encoder, one after another, on packed sequences::

        post-norm   y = norm1(x + out(attention(qkv(x))))    x = norm2(y + down(activation(up(y))))
        pre-norm    y = x + out(attention(qkv(norm1(x))))    x = y + down(activation(up(norm2(y))))

    Each product is `int8_linear`, dynamic per row. Values between the steps are float32. They are rounded to attention_dtype in q,
    k, v and what attention returns, and to x's dtype between layers: layers in one call give the bits of as many calls.

    Args:
        x: float32, float16 or bfloat16 [T, H], last stride 1, any row stride: the rows of all sequences, without padding.
        cu_seqlens: int32 [B + 1]: the b-th sequence is from cu_seqlens[b] to cu_seqlens[b + 1]. They rise from 0 to T.
        layers: one `EncoderWeights` or more, the first layer first.
        heads: divides H.
        eps: of both norms, which are layer norms.
        activation: of the MLP: None, relu, gelu, gelu_tanh, silu, relu6, hard_swish, silu_mul, gelu_mul, gelu_tanh_mul.
        pre_norm: see above. What follows the last layer (a final norm) is the caller's.
        scale: of the scores; None: 1 / sqrt(H / heads).
        attention_dtype: float32, float16 or bfloat16; None: x's dtype. With AVX512_BF16 attention in bfloat16 takes half the time.
        key_lens: int32 [B]: rows of sequence b attend to its first key_lens[b] rows alone, as in a batch with padding on the right;
            none: to zeros. None: to all.
        score_bias: float32 [heads, S, S] or [1, heads, S, S], last stride 1: score_bias[h, i, j] is added to the score of row i and
            key j of each sequence, in all layers, after scale, such as MPNet's relative positions. Shorter sequences take its first
            rows and columns. -inf: the key is not attended to. None: nothing is added.
        rotary: (cos, sin) of each layer, float32 or x's dtype [T, R], R even and at most H / heads, last stride 1: in each head the
            first R columns of q and k are rotated by those of their row, x[c] cos[c] + (c < R / 2 ? -x[c + R / 2] : x[c - R / 2])
            sin[c], as `append_kv` has it. q and k are rounded to attention_dtype before and after. None: nothing is rotated.
        windows: of each layer: row i of a sequence attends to its rows from i - window to i + window alone, of its key_lens; to
            none: to zeros. None, of a layer or of all: no window.
        first_norm: False: the first layer has no norm1, as in ModernBERT, which norms its embeddings; with pre_norm alone.

    Returns:
        [T, H] of x's dtype, contiguous. A row of a sequence that is not known by cu_seqlens is NaN, and so are those of a sequence
        with key_lens beyond it, or longer than score_bias. A NaN or an infinity stays in its sequence. In one
        layer it stays in the rows that see it, if heads have 16, 32, …, 128 columns. Bits do not depend on the number of threads.

    Raises:
        TypeError: an argument is of another type or dtype than above.
        ValueError: a shape, layout, device, value or combination of arguments is not one of those above.
        Unsupported: a backend asked for by name cannot run these arguments.
        RuntimeError: an input requires grad, in grad mode: operations have no backward.

    Example:
        >>> def weight(n, k):
        ...     q, scale, _ = fp.ops.quantize(torch.randn(n, k), torch.int8)
        ...     return fp.ops.Int8Weight(q, scale, torch.randn(n))
        >>> norm = torch.ones(64), torch.zeros(64)
        >>> attention = [weight(64, 64) for _ in range(4)]
        >>> layer = fp.ops.EncoderWeights(*attention, weight(256, 64), weight(64, 256), norm, norm)
        >>> lengths = torch.tensor([0, 5, 8], dtype=torch.int32)
        >>> fp.ops.encoder_layer(torch.randn(8, 64), lengths, [layer], heads=4).shape
        torch.Size([8, 64])
    """
    dtype = getattr(x, "dtype", None) if attention_dtype is None else attention_dtype
    cos, sin = _split(rotary)
    ints = [] if windows is None else [NO_WINDOW if window is None else window for window in windows]
    return OPERATION(x, cu_seqlens, flat(layers), heads, eps, activation, pre_norm, scale, dtype, key_lens, score_bias, cos, sin,
                     ints, first_norm)  # fmt: skip


def _split(rotary: Sequence[tuple[Tensor, Tensor]] | None) -> tuple[list[Tensor], list[Tensor]]:
    if rotary is None:
        return [], []
    if not isinstance(rotary, (list, tuple)) or any(not isinstance(x, (list, tuple)) or len(x) != 2 for x in rotary):
        raise TypeError("encoder_layer: rotary must be a list of (cos, sin), one a layer")
    return [cos for cos, _ in rotary], [sin for _, sin in rotary]


def check_linear(op: str, weights: Sequence[Tensor | None], name: str, rows: int | None, inputs: Tensor) -> int:
    """Its rows. inputs: empty, with as many columns as its input."""
    weight, scale, bias, total, channel_scale, packed = weights
    if not isinstance(weight, Tensor) or not isinstance(scale, Tensor):
        raise TypeError(f"{op}: {name} must be an Int8Weight with weight and scale, and has not both")
    check_int8_weight(op, f"{name}.weight", weight, "its input", inputs, total is not None)
    n = weight.shape[0]
    if rows is not None and n != rows:
        raise ValueError(
            f"{op}: {name}.weight must be [{rows}, {inputs.shape[-1]}], and has shape {tuple(weight.shape)}"
        )
    check_vector(op, f"{name}.scale", scale, n, torch.float32, inputs)
    check_vector(op, f"{name}.bias", bias, n, FLOATS, inputs)
    check_vector(op, f"{name}.sum", total, n, torch.int32, inputs)
    check_vector(op, f"{name}.channel_scale", channel_scale, inputs.shape[-1], torch.float32, inputs)
    check_packed(op, packed, inputs)
    return n


def _check_layer(weights: Sequence[Tensor | None], activation: str | None, x: Tensor) -> None:
    op, h = "encoder_layer", x.shape[1]
    q, k, v, out, up, down = (weights[i * LINEAR : (i + 1) * LINEAR] for i in range(LINEARS))
    inputs = x.new_empty(0, h)
    fused = is_fused(weights)
    for name, linear in (("q", q), ("k", k), ("v", v), ("out", out)):
        if not fused or linear not in (k, v):
            check_linear(op, linear, name, 3 * h if fused and linear is q else h, inputs)
    n = check_linear(op, up, "up", None, inputs)
    if is_gated(activation) and n % 16:
        raise ValueError(f"{op}: the rows of up must be a multiple of 16 with {activation}, 8 of gate beside 8 of up, and are {n}: "
                         "pad them with zeros")  # fmt: skip
    check_linear(op, down, "down", h, x.new_empty(0, n // 2 if is_gated(activation) else n))
    names = ("norm1's weight", "norm1's bias", "norm2's weight", "norm2's bias")
    for name, vector in zip(names, weights[LINEARS * LINEAR :]):
        check_vector(op, name, vector, h, (x.dtype, torch.float32), x)


def _check_sequences(x: Tensor, cu_seqlens: Tensor, key_lens: Tensor | None) -> None:
    op = "encoder_layer"
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{op}: cu_seqlens must be a tensor of torch.int32, not {type(cu_seqlens).__name__}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"{op}: cu_seqlens must be [B + 1], and has shape {tuple(cu_seqlens.shape)}")
    check_vector(op, "cu_seqlens", cu_seqlens, cu_seqlens.numel(), torch.int32, x)
    check_vector(op, "key_lens", key_lens, cu_seqlens.numel() - 1, torch.int32, x)


def _check_score_bias(bias: Tensor | None, heads: int, x: Tensor) -> None:
    op = "encoder_layer"
    if bias is None:
        return
    if not isinstance(bias, Tensor) or bias.dtype != torch.float32:
        dtype = getattr(bias, "dtype", type(bias).__name__)
        raise TypeError(f"{op}: score_bias must be a tensor of torch.float32, not {dtype}")
    shape = tuple(bias.shape)
    if len(shape) not in (3, 4) or shape[-3] != heads or shape[-2] != shape[-1] or (len(shape) == 4 and shape[0] != 1):
        raise ValueError(
            f"{op}: score_bias must be [{heads}, S, S] or [1, {heads}, S, S], one for all sequences, and has shape {shape}"
        )
    if shape[-1] > 1 and bias.stride(-1) != 1:
        raise ValueError(
            f"{op}: the last dimension of score_bias must have stride 1, not {bias.stride(-1)}: make it contiguous"
        )
    if bias.device != x.device:
        raise ValueError(f"{op}: score_bias is on {bias.device} and x on {x.device}: move one of them")


def _check_rotary(cos: list[Tensor], sin: list[Tensor], layers: int, heads: int, x: Tensor) -> None:
    op = "encoder_layer"
    if len(cos) != len(sin) or len(cos) not in (0, layers):
        raise ValueError(f"{op}: rotary must have (cos, sin) of each of {layers} layers, and has {len(cos)}")
    for t in (*cos, *sin):
        if not isinstance(t, Tensor) or t.dtype not in (torch.float32, x.dtype) or t.dtype != cos[0].dtype:
            dtype = getattr(t, "dtype", type(t).__name__)
            raise TypeError(f"{op}: cos and sin must be tensors of float32 or all of x's dtype, not {dtype}")
        columns = t.shape[-1] if t.dim() == 2 else 0
        if t.shape != (len(x), cos[0].shape[-1]) or columns < 2 or columns % 2 or columns > x.shape[1] // heads:
            raise ValueError(
                f"{op}: cos and sin must be [{len(x)}, R], R even, the same in all layers and at most {x.shape[1] // heads}, the "
                f"columns of a head, and have shape {tuple(t.shape)}"
            )
        if t.stride(1) != 1:
            raise ValueError(f"{op}: the last dimension of cos and sin must have stride 1: make them contiguous")
        if t.device != x.device:
            raise ValueError(f"{op}: cos or sin is on {t.device} and x on {x.device}: move one of them")


def _check_windows(windows: list[int], layers: int) -> None:
    op = "encoder_layer"
    if any(isinstance(w, bool) or not isinstance(w, int) for w in windows):
        raise TypeError(f"{op}: windows must be integers or None, one a layer, not {windows}")
    if len(windows) not in (0, layers) or any(w < NO_WINDOW for w in windows):
        raise ValueError(f"{op}: windows must be one of each of {layers} layers, at least 0 or None, and are {windows}")


def _check(
    x: Tensor,
    cu_seqlens: Tensor,
    weights: list[Tensor | None],
    heads: int,
    eps: float,
    activation: str | None,
    pre_norm: bool,
    scale: float | None,
    attention_dtype: torch.dtype,
    key_lens: Tensor | None,
    score_bias: Tensor | None = None,
    cos: Sequence[Tensor] = (),
    sin: Sequence[Tensor] = (),
    windows: Sequence[int] = (),
    first_norm: bool = True,
) -> None:
    op = "encoder_layer"
    check_float_rows(op, "x", x)
    if x.dim() != 2:
        raise ValueError(
            f"{op}: x must be [T, H], all sequences one after another, and has shape {tuple(x.shape)}: flatten it"
        )
    if type(heads) is not int or heads < 1 or x.shape[1] % heads:
        raise ValueError(f"{op}: heads must be a positive divisor of the {x.shape[1]} columns of x, not {heads!r}")
    for name, v in (("eps", eps), ("scale", scale)):
        if v is not None and (isinstance(v, bool) or not isinstance(v, (int, float))):
            raise TypeError(f"{op}: {name} must be a number, not {type(v).__name__}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"{op}: eps must be finite and at least 0, not {eps}")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"{op}: scale must be finite and positive, not {scale}")
    check_activation(op, activation, (None, *PLAIN, *GATED))
    if not isinstance(pre_norm, bool):
        raise TypeError(f"{op}: pre_norm must be True or False, not {pre_norm!r}")
    if attention_dtype not in FLOATS:
        raise TypeError(f"{op}: attention_dtype must be float32, float16 or bfloat16, not {attention_dtype}")
    _check_sequences(x, cu_seqlens, key_lens)
    _check_score_bias(score_bias, heads, x)
    if not isinstance(weights, list) or not weights or len(weights) % LAYER:
        raise ValueError(f"{op}: layers must be one EncoderWeights or more")
    layers = [weights[i : i + LAYER] for i in range(0, len(weights), LAYER)]
    if len({is_fused(layer) for layer in layers}) > 1:
        raise ValueError(f"{op}: q, k and v must be one weight in all layers, or in none")
    for layer in layers:
        _check_layer(layer, activation, x)
    _check_rotary([*cos], [*sin], len(layers), heads, x)
    _check_windows([*windows], len(layers))
    if not isinstance(first_norm, bool):
        raise TypeError(f"{op}: first_norm must be True or False, not {first_norm!r}")
    if not (first_norm or pre_norm):
        raise ValueError(f"{op}: first_norm=False is for pre_norm=True, where norm1 comes first")


def _fake(x: Tensor, *options: object) -> Tensor:
    return x.new_empty(x.shape)


OPERATION = Operation(encoder_layer, _check, reference.encoder_layer, _fake, backends=("cpu",))
