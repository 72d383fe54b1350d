"""The layers of a decoder as one operation on a CPU, `fp.ops.decoder_layer`.

As `encoder_stack` has it for encoders: the model's own loop runs, the first layer computes all of them, and a tensor of NaN goes
through the others. Keys and values go to the cache that the model was given, if its layers are `cache.GrowingLayer`s, as a swap
with kv_cache="auto" makes them, or are empty yet.

A layer is known by its code: its forward, that of its attention and that of its norms are, statement by statement, those of
transformers' Llama. What the loop around the layers does with them is proven by a run (`swap.attention.decoder_layers`).
"""

from __future__ import annotations

import ast
import functools
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....dispatch.calls import take
from ....nn import GatedMLP, QuantizingNorm, W8A16Linear
from ....nn.mlp import TwoProducts
from ....ops.decoder_layer import OPERATION, DecoderWeights, Int8Weight, W8a16Weight, flat, is_weight_only
from ...class_source import body_of, is_as_written, named, owner_of_forward, tree_of_module
from .. import key_ranges, rotary
from ..encoder_stack import Stack, int8_weight, is_plain
from ..norm_formulas import NormFormula, norm_formula


@dataclass(frozen=True)
class Form:
    """What the parts of a layer are called. `attention` has head_dim and scaling."""

    attention: str = "self_attn"
    qkv: tuple[str, str, str] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out: str = "self_attn.o_proj"
    mlp: str = "mlp"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    activation: str = "mlp.act_fn"
    norm1: str = "input_layernorm"
    norm2: str = "post_attention_layernorm"
    in_tuple: bool = False  #: whether the layer returns its hidden states in a tuple

    @property
    def linears(self) -> tuple[str, ...]:
        return (*self.qkv, self.out, self.gate, self.up, self.down)


FORM = Form()
_RMS = NormFormula("rms", "variance_epsilon")


def form_of(layer: nn.Module) -> Form | None:
    """None where it is none of Llama's kind."""
    modules = dict(layer.named_modules())
    if any(name not in modules for name in (FORM.attention, FORM.activation, FORM.norm1, FORM.norm2, *FORM.linears)):
        return None
    attention, mlp, *norms = (written(modules[name]) for name in (FORM.attention, FORM.mlp, FORM.norm1, FORM.norm2))
    windows = (getattr(x, "sliding_window", None) for x in (attention, getattr(attention, "config", None)))
    if not (
        all(map(_is_llamas, (layer, attention, mlp), ("DecoderLayer", "Attention", "MLP")))
        and all(norm_formula(n) == _RMS for n in norms)
        and norms[0].variance_epsilon == norms[1].variance_epsilon
        and isinstance(getattr(attention, "head_dim", None), int)
        and all(window is None for window in windows)
    ):
        return None
    return FORM


def written(module: nn.Module) -> Any:
    """The module itself, or the one that a module of ours stands for in a model that is in 8 bits already."""
    return module.written if isinstance(module, TwoProducts | QuantizingNorm) else module


def _is_llamas(module: nn.Module | None, suffix: str) -> bool:
    """Whether its forward is, statement by statement, that of Llama's class with this end of its name."""
    cls: Any = type(module)  # mypy takes type[nn.Module] for unhashable
    owner = owner_of_forward(cls)
    return _code(owner) == _code_of_llama(suffix) != "" and is_as_written(owner, "forward")


@functools.lru_cache(maxsize=8)
def _code_of_llama(suffix: str) -> str:
    llama = importlib.import_module("transformers.models.llama.modeling_llama")
    return _code(getattr(llama, f"Llama{suffix}", None))


@functools.lru_cache(maxsize=1024)
def _code(owner: Any) -> str:
    forward = named(named(tree_of_module(owner), owner.__name__), "forward")
    return "" if forward is None else body_of(_WithoutWindow().visit(forward))


class _WithoutWindow(ast.NodeTransformer):
    """Without sliding_window= in calls, which is None in layers that are taken."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        keywords = [x for x in node.keywords if x.arg != "sliding_window"]
        return ast.copy_location(ast.Call(node.func, node.args, keywords), node)


class DecoderStack(Stack):
    """Layers of one form, and what computes them: in 8 bits by the layers' own weights, or in floats for a proof."""

    form: Form  # type: ignore[assignment]

    def result(self, hidden: Tensor, mask: Any, options: dict[str, Any]) -> Tensor | None:
        """What all layers give; None where they are to be called one by one."""
        cache, rotary = options.pop("cache", None), options.pop("position_embeddings", None)
        options = {name: x for name, x in options.items() if name not in ("use_cache", "position_ids")}
        if not self._takes(hidden, options) or not isinstance(rotary, tuple):
            return None
        before = _before(cache, len(self.layers), self.in_floats)
        if before is None or (padding := _leftpad(hidden, mask, before)) is None or not self._is_as_built(hidden):
            return None
        self.calls += 1
        y = (
            self._in_floats(hidden, mask, cache, rotary)
            if self.in_floats
            else self._in_8_bits(hidden, padding[0], cache, before, rotary)
        )
        for _ in self.layers:
            take(self._name)
        return y

    def _is_as_built(self, hidden: Tensor) -> bool:
        """The rotation is a function of a Python module, which no class has."""
        attention = self.part(self.layers[0], self.form.attention)
        return rotary.replaced(attention) is None and super()._is_as_built(hidden)

    def _constants(self, layer: nn.Module) -> tuple[Any, ...]:
        of_attention, norm = self.part(layer, self.form.attention), self.part(layer, self.form.norm1)
        mlp = self.part(layer, self.form.mlp)
        activation = mlp.layers[0].activation if isinstance(mlp, TwoProducts) else None
        kind = type(self.part(layer, self.form.out))
        return of_attention.head_dim, float(of_attention.scaling), norm.variance_epsilon, activation, kind

    def _tensors(self) -> Iterator[dict[str, Any]]:
        """But those of q, k and v, which their product looks after."""
        f = self.form
        for layer in self.layers:
            yield from (linear._buffers for linear in (self.part(layer, f.out), *self.part(layer, f.mlp).layers))
            yield from (self.part(layer, name)._parameters for name in (f.norm1, f.norm2))

    def _weights_of(self, layer: nn.Module) -> Any:
        f = self.form
        qkv, out, mlp = [self.part(layer, name) for name in f.qkv], self.part(layer, f.out), self.part(layer, f.mlp)
        if type(mlp) is not GatedMLP or not _are_of_one_kind(*qkv, out, *mlp.layers):
            return None
        if mlp._between or mlp._behind or any(m.activation for m in (*qkv, out, mlp.layers[1])):
            return None
        joined = qkv[0].joined
        if joined is None or joined.members != tuple(qkv) or not joined.is_whole(anew=True):
            return None
        norms = (self.part(layer, name).weight for name in (f.norm1, f.norm2))
        weights = [_weight(m) for m in (joined.layer, out, *mlp.layers)]
        return DecoderWeights(*weights, *norms)  # type: ignore[arg-type]

    def _flat(self, weights: Sequence[Any]) -> list[Tensor | None]:
        self._weight_only = is_weight_only(weights)
        return flat(weights)

    def _in_8_bits(
        self, hidden: Tensor, leftpad: Tensor | None, cache: Any, before: int, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        head_dim, scale, eps, activation, _ = self._constants(self.layers[0])
        batch, tokens = hidden.shape[:2]
        out, k_proj = self.part(self.layers[0], self.form.out), self.part(self.layers[0], self.form.qkv[1])
        like = hidden.new_empty(1).expand(batch, k_proj.out_features // head_dim, tokens, head_dim)
        k_caches, v_caches = zip(*(layer.extend(like) for layer in cache.layers[: len(self.layers)]))
        seq_lens = torch.full((batch,), before + tokens, dtype=torch.int32)
        y: Tensor = OPERATION(
            hidden, [*k_caches], [*v_caches], seq_lens, self._weights, out.in_features // head_dim, *rotary, eps, activation,
            scale, leftpad, self._weight_only,
        )  # fmt: skip
        return y

    def _in_floats(self, x: Tensor, mask: Tensor | None, cache: Any, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """The formula, by the layers' own modules."""
        f, shape = self.form, x.shape[:2]
        cos, sin = (t.unsqueeze(1) for t in rotary)
        for i, layer in enumerate(self.layers):
            part = {name: self.part(layer, name) for name in (*f.linears, f.norm1, f.norm2, f.activation, f.attention)}
            of_attention, normed = part[f.attention], part[f.norm1](x)
            q, k, v = (part[name](normed).view(*shape, -1, of_attention.head_dim).transpose(1, 2) for name in f.qkv)
            q, k = (t * cos + torch.cat((-t.chunk(2, -1)[1], t.chunk(2, -1)[0]), -1) * sin for t in (q, k))
            k, v = cache.update(k, v, i)
            if mask is not None and key_ranges.is_range(mask):
                mask = key_ranges.as_mask(mask, shape[1], k.shape[2])
            causal = mask is None and shape[1] > 1
            attended = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=causal, scale=float(of_attention.scaling), enable_gqa=True
            )
            y = x + part[f.out](attended.transpose(1, 2).reshape(*shape, -1))
            normed = part[f.norm2](y)
            x = y + part[f.down](part[f.activation](part[f.gate](normed)) * part[f.up](normed))
        return x


def _are_of_one_kind(*linears: nn.Module) -> bool:
    """Whether the operation has their products: in int8 of inputs that are quantised row by row, or of weights in 8 bits alone."""
    return all(map(is_plain, linears)) or all(type(m) is W8A16Linear and m.sharding is None for m in linears)


def _weight(m: Any) -> Int8Weight | W8a16Weight:
    return W8a16Weight(m.qweight, m.weight_scale, m.bias) if type(m) is W8A16Linear else int8_weight(m)


def _before(cache: Any, count: int, in_floats: bool) -> int | None:
    """How many tokens a cache has of each of the first `count` layers; None where the operation cannot write into it."""
    if cache is None:
        return None
    if in_floats:
        return int(cache.get_seq_length())
    from ..cache import GrowingLayer, adapt  # imports transformers

    layers: Any = getattr(cache, "layers", ())
    if len(layers) < count:
        return None
    if type(layers[0]) is not GrowingLayer and layers[0].get_seq_length() == 0:
        adapt(cache, None)
    length = layers[0].get_seq_length()
    for layer in layers[:count]:
        if (
            type(layer) is not GrowingLayer
            or layer.dtype is not None
            or layer.is_sliding
            or layer.get_seq_length() != length
        ):
            return None
    return int(length)


def _leftpad(hidden: Tensor, mask: Any, before: int) -> tuple[Tensor | None, ...] | None:
    """The padding on the left of each sequence, (None,) where there is none; None where a mask says something else."""
    batch, tokens = hidden.shape[:2]
    if mask is None:
        return (None,) if tokens == 1 or before == 0 else None
    if type(mask) is not Tensor or mask.dim() != 4:
        return None
    if key_ranges.is_range(mask):
        return (mask[0, 0, 0],)
    keys = before + tokens
    if mask.dtype != torch.bool or mask.shape[1:] != (1, tokens, keys) or mask.shape[0] not in (1, batch):
        return None
    padding = keys - mask[:, 0, -1].sum(1)
    key, place = torch.arange(keys), torch.arange(before, keys)[:, None]
    first = padding[:, None, None]
    expected = (key >= first) & (key <= place)
    if not torch.equal(mask[:, 0] & (place >= first), expected):
        return None
    return (padding.int().expand(batch).contiguous(),)
