"""The layers of ModernBERT as one operation on a CPU, `fp.ops.encoder_layer`.

They are pre-norm, rotate queries and keys, and have a gated MLP. Some attend within a window, and have a rotation of their own.

The first layer is given its own mask and cosines, and does not see those of layers of the other kind. So, other than in
`encoder_stack`, the last layer computes all of them. Each one before it notes what it was given, and hands on a tensor of NaN. The
last layer may find that the operation cannot compute them, for example because a mask is no padding on the right. Then it calls all
of them one by one, each with what it was given.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....dispatch.calls import take
from ....nn import GatedMLP
from ....ops.encoder_layer import OPERATION, EncoderWeights
from ....ops.encoder_layer.reference import NO_WINDOW, rotated
from .. import rotary, unpadding
from ..encoder_stack import RESULT, Forward, Stack, band, between, int8_weight, is_plain, lengths_of
from .decoder_stack import written


@dataclass(frozen=True)
class Form:
    """What the parts of a layer are called. `attention` has head_dim and sliding_window."""

    attention: str = "attn"
    qkv: str = "attn.Wqkv"
    out: str = "attn.Wo"
    norm1: str = "attn_norm"
    mlp: str = "mlp"
    up: str = "mlp.Wi"
    activation: str = "mlp.act"
    down: str = "mlp.Wo"
    norm2: str = "mlp_norm"

    @property
    def linears(self) -> tuple[str, ...]:
        return self.qkv, self.out, self.up, self.down


FORM = Form()
#: What layers are given besides hidden states.
_MASK, _ROTARY = "attention_mask", "position_embeddings"
_Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def form_of(layer: nn.Module) -> Form | None:
    """None where its parts are others. The first layer of a model has no norm1."""
    modules = dict(layer.named_modules())
    if any(
        name not in modules
        for name in (FORM.attention, FORM.mlp, FORM.activation, FORM.norm1, FORM.norm2, *FORM.linears)
    ):
        return None
    attention, norm1, norm2 = (written(modules[name]) for name in (FORM.attention, FORM.norm1, FORM.norm2))
    norms = [norm2] if type(norm1) is nn.Identity else [norm1, norm2]
    if not all(type(n) is nn.LayerNorm and n.weight is not None and len(n.normalized_shape) == 1 for n in norms):
        return None
    if len({n.eps for n in norms}) > 1 or not isinstance(getattr(attention, "head_dim", None), int):
        return None
    window = getattr(attention, "sliding_window", 0)
    return FORM if window is None or (isinstance(window, int) and window > 0) else None


@dataclass
class _Operands:
    """A call's rows, where sequences begin and how many of their rows count, and the cosines, sines and window of each layer."""

    x: Tensor
    cu_seqlens: Tensor
    key_lens: Tensor | None
    cos: list[Tensor]
    sin: list[Tensor]
    windows: list[int | None]


class RotaryEncoderStack(Stack):
    """Layers of one form, and what computes them: in 8 bits by the layers' own weights, or in floats for a proof."""

    form: Form  # type: ignore[assignment]

    def forward_of(self, index: int) -> Forward:
        return _Forward(self, index)

    def begins(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """In the first layer, whether the last one may compute all of them."""
        return (
            self.has_begun()
            and self._takes(hidden, _others(self.layers[0], args, kwargs))
            and self._is_as_built(hidden)
        )

    def result_of_calls(self, hidden: Tensor, calls: Sequence[_Call]) -> Tensor:
        """What the layers give that were called so, one after another, the first with these hidden states."""
        operands = self._operands(hidden, calls)
        if operands is None:
            for layer, args, kwargs in calls:
                hidden = type(layer).forward(layer, hidden, *args, **kwargs)
            return hidden
        self.calls += 1
        y = self._in_floats(operands) if self.in_floats else self._in_8_bits(operands)
        for _ in self.layers:
            take(self._name)
        return y.view(hidden.shape)

    def _operands(self, hidden: Tensor, calls: Sequence[_Call]) -> _Operands | None:
        """None where the layers are to be called one by one."""
        if len(calls) != len(self.layers) or any(call[0] is not layer for call, layer in zip(calls, self.layers)):
            return None
        seen_masks: dict[tuple[int, int | None], Any] = {}  # layers of a kind are given the same tensors
        seen_rotary: dict[int, Tensor | None] = {}
        cos, sin, windows = [], [], []
        for layer, args, kwargs in calls:
            arguments = _arguments(layer, args, kwargs)
            attention, mask, pair = self.part(layer, self.form.attention), arguments.get(_MASK), arguments.get(_ROTARY)
            if any(_others(layer, args, kwargs).values()) or not isinstance(pair, tuple) or len(pair) != 2:
                return None
            window = None if attention.sliding_window is None else attention.sliding_window - 1
            if (id(mask), window) not in seen_masks:
                seen_masks[id(mask), window] = lengths_of(hidden, mask, window)
            for x in pair:
                if id(x) not in seen_rotary:
                    seen_rotary[id(x)] = _of_rows(x, hidden, attention.head_dim)
            c, s = (seen_rotary[id(x)] for x in pair)
            if c is None or s is None or c.dtype != s.dtype:
                return None
            cos.append(c)
            sin.append(s)
            windows.append(window)
        cu_seqlens, key_lens = _common(list(seen_masks.values()), hidden.shape[1])
        if cu_seqlens is None or len({x.dtype for x in cos}) > 1:
            return None
        return _Operands(hidden.flatten(0, 1), cu_seqlens, key_lens, cos, sin, windows)

    def _is_as_built(self, hidden: Tensor) -> bool:
        """The rotation is a function of a Python module, which no class has."""
        attention = self.part(self.layers[0], self.form.attention)
        return rotary.replaced(attention) is None and super()._is_as_built(hidden)

    def _constants(self, layer: nn.Module) -> tuple[Any, ...]:
        mlp = self.part(layer, self.form.mlp)
        activation = mlp.layers[0].activation if isinstance(mlp, GatedMLP) else None
        return self.part(layer, self.form.attention).head_dim, self.part(layer, self.form.norm2).eps, activation

    def _tensors(self) -> Iterator[dict[str, Any]]:
        f = self.form
        for layer in self.layers:
            linears = self.part(layer, f.qkv), self.part(layer, f.out), *self.part(layer, f.mlp).layers
            yield from (linear._buffers for linear in linears)
            yield from (self.part(layer, name)._parameters for name in (f.norm1, f.norm2))

    def _weights_of(self, layer: nn.Module) -> EncoderWeights | None:
        f = self.form
        qkv, out, mlp, norm1, norm2 = (self.part(layer, name) for name in (f.qkv, f.out, f.mlp, f.norm1, f.norm2))
        if type(mlp) is not GatedMLP or not all(map(is_plain, (qkv, out, *mlp.layers))):
            return None
        if any(
            type(mlp.get_submodule(name)) not in (nn.Dropout, nn.Identity) for name in (*mlp._between, *mlp._behind)
        ):
            return None
        if any(m.activation for m in (qkv, out, mlp.layers[1])):
            return None
        if type(norm1) is nn.Identity and layer is not self.layers[0]:
            return None
        first = (None, None) if type(norm1) is nn.Identity else (norm1.weight, norm1.bias)
        up, down = (int8_weight(m) for m in mlp.layers)  # type: ignore[arg-type]  # plain
        second = norm2.weight, norm2.bias
        return EncoderWeights(int8_weight(qkv), None, None, int8_weight(out), up, down, first, second)

    def _in_8_bits(self, o: _Operands) -> Tensor:
        head_dim, eps, activation = self._constants(self.layers[0])
        x = o.x
        dtype = torch.bfloat16 if x.dtype == torch.float32 and self._in_bfloat16 else x.dtype
        windows = [NO_WINDOW if window is None else window for window in o.windows]
        first_norm = type(self.part(self.layers[0], self.form.norm1)) is not nn.Identity
        y: Tensor = OPERATION(
            x, o.cu_seqlens, self._weights, x.shape[1] // head_dim, eps, activation, True, head_dim**-0.5, dtype, o.key_lens, None,
            o.cos, o.sin, windows, first_norm,
        )  # fmt: skip
        return y

    def _in_floats(self, o: _Operands) -> Tensor:
        """The formula, by the layers' own modules."""
        f, x, spans = self.form, o.x, [*itertools.pairwise(o.cu_seqlens.tolist())]
        keys = [b - a for a, b in spans] if o.key_lens is None else o.key_lens.tolist()
        for layer, cos, sin, window in zip(self.layers, o.cos, o.sin, o.windows):
            head_dim = self.part(layer, f.attention).head_dim
            qkv = self.part(layer, f.qkv)(self.part(layer, f.norm1)(x)).unflatten(1, (3, -1, head_dim))
            q, k = rotated(qkv[:, :2], cos, sin).permute(1, 2, 0, 3)  # each [heads, T, D], as v
            v = qkv[:, 2].transpose(0, 1)
            sequences = [
                F.scaled_dot_product_attention(
                    q[:, a:b], k[:, a : a + n], v[:, a : a + n], None if window is None else band(b - a, n, window),
                    scale=head_dim**-0.5,
                )
                for (a, b), n in zip(spans, keys)
            ]  # fmt: skip
            attended = torch.cat(sequences, 1).transpose(0, 1).reshape(x.shape)
            x = x + self.part(layer, f.out)(attended)
            x = x + self.part(layer, f.mlp)(self.part(layer, f.norm2)(x))
        return x


class _Forward(Forward):
    """In the place of a layer's forward."""

    stack: RotaryEncoderStack

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        stack, layer = self.stack, self.stack.layers[self.index]
        noted: tuple[Tensor, tuple[_Call, ...]] | None = None
        if not torch.compiler.is_compiling():
            if self.index:
                noted = getattr(hidden_states, RESULT, None)
            elif stack.begins(hidden_states, args, kwargs):
                noted = hidden_states, ()
        if noted is None:
            return type(layer).forward(layer, hidden_states, *args, **kwargs)
        hidden, calls = noted[0], (*noted[1], (layer, args, kwargs))
        if self.index + 1 == len(stack.layers):
            return stack.result_of_calls(hidden, calls)
        return between(hidden, (hidden, calls))


def _arguments(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """By name, all that a layer is given but its hidden states."""
    names = unpadding.parameters(type(layer).forward)[1:]
    return {**dict(zip(itertools.chain(names, map(str, itertools.count())), args)), **kwargs}


def _others(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those that the operation has no place for."""
    arguments = _arguments(layer, args, kwargs)
    return {name: x is not None and x is not False for name, x in arguments.items() if name not in (_MASK, _ROTARY)}


def _of_rows(x: Any, hidden: Tensor, columns: int) -> Tensor | None:
    """Cosines or sines [1 or B, S, D] as [T, D]; None where the operation does not take them."""
    batch, length = hidden.shape[:2]
    if type(x) is not Tensor or x.dim() != 3 or x.shape[0] not in (1, batch) or x.shape[1:] != (length, columns):
        return None
    if x.dtype not in (torch.float32, hidden.dtype) or columns % 2 or (torch.is_grad_enabled() and x.requires_grad):
        return None
    return x.expand(batch, -1, -1).reshape(batch * length, columns).contiguous()


def _common(lengths: Sequence[Any], rows: int) -> tuple[Tensor | None, Tensor | None]:
    """(cu_seqlens, key_lens) where those of all kinds of layers are the same."""
    if any(x is None for x in lengths):
        return None, None
    cu_seqlens, first = lengths[0]
    all_rows = torch.full((len(cu_seqlens) - 1,), rows, dtype=torch.int32)
    for _, key_lens in lengths[1:]:
        if key_lens is not first and not torch.equal(*(all_rows if x is None else x for x in (key_lens, first))):
            return None, None
    return cu_seqlens, first
