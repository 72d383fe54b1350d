"""The layers of a text encoder as one operation on a CPU, `fp.ops.encoder_layer`.

A model calls its layers one after another, and each calls some ten modules. Here the first layer of a stack computes all of them in
one call, hands a tensor of NaN to the next one, which hands it on, and the last layer gives the result. So the model's own loop
runs, and code that reads what is between the layers gets NaN: such a model does not pass the proof (`swap.verdicts`), in which the
same is done in floats.

The layers stay what they are, with their modules, names and weights. A call goes to these, layer by layer, where something could
tell the difference: a hook, another forward, module or weight, hidden states or attention weights that are asked for, autograd,
autocast, training, torch.compile, a cache, a mask that is no padding on the right.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...common.environment import has_bfloat16_products
from ...dispatch import asked_for_by_name, interpreter
from ...dispatch.calls import take
from ...nn import Int8Linear
from ...nn.guard import Beginning, code_guard
from ...ops.common.activations import PLAIN
from ...ops.common.quantized_rows import FLOATS
from ...ops.encoder_layer import OPERATION, EncoderWeights, Int8Weight, flat
from . import attention, rotary, unpadding

#: The attribute of a tensor of NaN between layers that has what the last layer gives, or is to know.
RESULT = "_forwardpass_encoded"


_END = object()
#: The ids of stacks whose holders' forward runs, and has not called the first layer yet: of each thread, as threads share a stack.
_begun: ContextVar[frozenset[int]] = ContextVar("forwardpass_encoders", default=frozenset())


@dataclass(frozen=True)
class Form:
    """What the parts of a post-norm layer are called. `attention` has attention_head_size, and scaling unless it divides scores by
    the root of that size."""

    attention: str
    qkv: tuple[str, str, str]
    out: str
    norm1: str
    up: str
    activation: str
    down: str
    norm2: str
    score_bias: str | None = None  #: the layer's argument that is added to all scores
    in_tuple: bool = False  #: whether the layer returns its hidden states in a tuple

    @property
    def linears(self) -> tuple[str, ...]:
        return (*self.qkv, self.out, self.up, self.down)


#: BERT and its like (RoBERTa, XLM-R, ELECTRA, CamemBERT, …), DistilBERT, MPNet.
FORMS = (
    Form("attention.self", ("attention.self.query", "attention.self.key", "attention.self.value"), "attention.output.dense",
         "attention.output.LayerNorm", "intermediate.dense", "intermediate.intermediate_act_fn", "output.dense",
         "output.LayerNorm"),
    Form("attention", ("attention.q_lin", "attention.k_lin", "attention.v_lin"), "attention.out_lin", "sa_layer_norm",
         "ffn.lin1", "ffn.activation", "ffn.lin2", "output_layer_norm"),
    Form("attention.attn", ("attention.attn.q", "attention.attn.k", "attention.attn.v"), "attention.attn.o",
         "attention.LayerNorm", "intermediate.dense", "intermediate.intermediate_act_fn", "output.dense", "output.LayerNorm",
         score_bias="position_bias", in_tuple=True),
)  # fmt: skip


def form_of(layer: nn.Module) -> Form | None:
    """None where its parts are others."""
    names = dict(layer.named_modules())
    for form in FORMS:
        norms = [names.get(name) for name in (form.norm1, form.norm2)]
        if (
            all(name in names for name in (form.attention, form.activation, *form.linears))
            and all(type(n) is nn.LayerNorm and n.weight is not None and len(n.normalized_shape) == 1 for n in norms)
            and norms[0].eps == norms[1].eps  # type: ignore[union-attr]
            and isinstance(getattr(names[form.attention], "attention_head_size", None), int)
            and getattr(layer, "add_cross_attention", False) is False
        ):
            return form
    return None


class Stack(Beginning):
    """Layers of one form, and what computes them: in 8 bits by the layers' own weights, or in floats for a proof."""

    def __init__(
        self,
        holder: nn.Module,
        layers: Sequence[nn.Module],
        form: Form,
        activation: str | None = None,
        in_floats: bool = False,
    ) -> None:
        """holder: the module whose forward calls the layers; activation: that of the MLP's module, for a first layer that does not
        compute it."""
        self.holder, self.layers, self.form = holder, tuple(layers), form
        self.activation, self.in_floats = activation, in_floats
        self.calls = 0
        self._name = type(self.part(self.layers[0], form.attention)).__name__
        self._in_bfloat16 = has_bfloat16_products()  # attention of floats
        classes = {type(m): None for layer in layers for m in layer.modules() if not _is_ours(type(m))}
        self._guards = tuple(code_guard(cls) for cls in classes)
        self._forget()

    def _forget(self) -> None:
        self._code = tuple(function for g in self._guards for function in g.functions)
        self._calls = tuple(call for g in self._guards for call in g.calls)
        self._weights: list[Tensor | None] | None = None
        self._watched: tuple[dict[str, Any], ...] = ()  # of modules, parameters and buffers
        self._values: tuple[Any, ...] = ()  # theirs, in order
        self._modules: tuple[nn.Module, ...] = ()
        self._attributes: tuple[dict[str, Any], ...] = ()
        self._norms: tuple[nn.Parameter, ...] = ()
        self._hooks = -1
        self._config: Any = None
        self._implementation: str | None = None

    def in_8_bits(self) -> Stack:
        """The same stack, computed by the layers' own weights, once its form is proven in floats."""
        return type(self)(self.holder, self.layers, self.form, self.activation)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has modules and weights of its own, which its first call finds."""
        return {
            name: vars(self)[name]
            for name in ("layers", "form", "in_floats", "activation", "_name", "_in_bfloat16", "_guards")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, calls=0)
        self._forget()

    def put(self) -> None:
        for i, layer in enumerate(self.layers):
            vars(layer)["forward"] = self.forward_of(i)
        self._handles = self.watch(self.holder)

    def forward_of(self, index: int) -> Forward:
        return Forward(self, index)

    def begin(self, holder: nn.Module, *call: Any) -> None:
        """Nothing where the holder is asked for hidden states: MPNet's collects them in its own loop, past `attention.collects`."""
        if torch.compiler.is_compiling():
            return
        args, kwargs = call
        arguments = {**dict(zip(unpadding.parameters(type(holder).forward), args)), **kwargs}
        if not arguments.get("output_hidden_states") and self._are_in(holder):
            _begun.set(_begun.get() | {id(self)})

    def end(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            _begun.set(_begun.get() - {id(self)})

    def _are_in(self, holder: nn.Module) -> bool:
        """Whether the holder still has a list of just these layers, none of them compiled: nothing but NaN comes from a first layer
        where no last one follows."""
        lists = (tuple(m._modules.values()) for m in holder._modules.values() if isinstance(m, nn.ModuleList))
        return self.layers in lists and all(layer._compiled_call_impl is None for layer in self.layers)

    def has_begun(self) -> bool:
        """Whether a call of the first layer is its holder's. No other call of it is then."""
        begun = id(self) in _begun.get()
        self.end()
        return begun

    def undo(self) -> None:
        for layer in self.layers:
            if stack_of(layer) is not None:
                del vars(layer)["forward"]
        for handle in self._handles:
            handle.remove()
        self._forget()

    def is_ready(self) -> bool:
        """Whether the modules that are there now can be one operation."""
        return self._find()

    def result_of_begun(self, hidden: Tensor, mask: Any, options: dict[str, Any]) -> Tensor | None:
        """`result` in the holder's forward; a first layer that is called alone computes itself."""
        return self.result(hidden, mask, options) if self.has_begun() else None

    def part(self, layer: nn.Module, name: str) -> Any:
        return layer.get_submodule(name)

    def result(self, hidden: Tensor, mask: Any, options: dict[str, Any]) -> Tensor | None:
        """What all layers give; None where they are to be called one by one."""
        bias = options.pop(self.form.score_bias, None) if self.form.score_bias else None
        if not self._takes(hidden, options):
            return None
        lengths = lengths_of(hidden, mask)
        if lengths is None or not self._is_as_built(hidden) or not self._takes_bias(bias, hidden):
            return None
        self.calls += 1
        operands = hidden.flatten(0, 1), *lengths, None if bias is None else bias[0]
        y = self._floats(*operands) if self.in_floats else self._int8(*operands)
        for _ in self.layers:
            take(self._name)
        return y.view(hidden.shape)

    def _takes(self, hidden: Tensor, options: dict[str, Any]) -> bool:
        if type(hidden) is not Tensor or hidden.dim() != 3 or hidden.device.type != "cpu" or hidden.dtype not in FLOATS:
            return False
        if torch.is_grad_enabled() and hidden.requires_grad:
            return False
        if torch.is_autocast_enabled("cpu") or self.layers[0].training:
            return False
        # A backend that is asked for is for the layers' own operations.
        if not self.in_floats and (interpreter() is not None or asked_for_by_name()):
            return False
        if attention.collects() or torch.jit.is_tracing():
            return False
        return all(x is None or x is False for x in options.values())

    def _takes_bias(self, bias: Any, hidden: Tensor) -> bool:
        """Whether it is one for all sequences, whose rows are at the positions that it has."""
        if bias is None:
            return True
        rows = unpadding.current()
        batch, length = hidden.shape[:2]
        if rows is not None and rows.are(hidden):
            if rows.has_holes:
                return False
            batch, length = rows.shape
        heads = hidden.shape[2] // self.part(self.layers[0], self.form.attention).attention_head_size
        return (
            type(bias) is Tensor
            and bias.dtype in (torch.float32, hidden.dtype)
            and bias.shape[1:] == (heads, length, length)
            and bias.shape[0] in (1, batch)
            and bias.stride(-1) == 1
            and not (torch.is_grad_enabled() and bias.requires_grad)
            and torch.equal(bias[1:], bias[:-1])
        )

    def _is_as_built(self, hidden: Tensor) -> bool:
        """Whether modules, weights and code are those that were found, nothing new is around them, and norms have a dtype that
        goes with these hidden states."""
        # 378 of MiniLM take 48 us out of cold caches (EPYC 9005), one by one and by name 80.
        if not all(map(operator.is_, _values(self._watched), self._values)):
            self._forget()
        if not self._modules and not self._find():
            return False
        for attributes in self._attributes:
            if "forward" in attributes:
                return False
        for cls, name, function, code in self._code:
            if getattr(cls, name, None) is not function or function.__code__ is not code:
                return False
        for cls, call in self._calls:
            if cls.__call__ is not call:
                return False
        dtypes, has_grad = (torch.float32, hidden.dtype), torch.is_grad_enabled()
        for p in self._norms:
            if p.dtype not in dtypes or (has_grad and p.requires_grad):
                return False
        if getattr(self._config, "_attn_implementation", None) != self._implementation:
            return False
        if self._hooks != RemovableHandle.next_id:  # somebody has put one somewhere
            if any(map(_is_watched, (*self.layers, *self._modules))):
                return False
            self._hooks = RemovableHandle.next_id
        return True

    def _find(self) -> bool:
        """Modules and weights as they are now."""
        modules = tuple(m for layer in self.layers for m in layer.modules() if m is not layer)
        holders = {id(m): m for m in (*self.layers, *modules)}.values()
        watched = [m._modules for m in holders]
        if not self.in_floats:
            weights = [self._weights_of(layer) for layer in self.layers]
            if any(w is None for w in weights) or len({self._constants(layer) for layer in self.layers}) > 1:
                return False
            self._weights = self._flat([w for w in weights if w is not None])
            watched += self._tensors()
        self._watched, self._values = tuple(watched), tuple(_values(watched))
        self._norms = tuple(x for x in self._values if isinstance(x, nn.Parameter))
        self._modules, self._attributes = modules, tuple(map(vars, modules))
        # MPNet's attention has none: it computes in its own code.
        self._config = getattr(self.part(self.layers[0], self.form.attention), "config", None)
        self._implementation = getattr(self._config, "_attn_implementation", None)
        return True

    def _flat(self, weights: Sequence[Any]) -> list[Tensor | None]:
        return flat(weights)

    def _constants(self, layer: nn.Module) -> tuple[Any, ...]:
        """What is one for all layers of a call."""
        of_attention, norm = self.part(layer, self.form.attention), self.part(layer, self.form.norm1)
        return of_attention.attention_head_size, _scale(of_attention), norm.eps, self._activation(layer)

    def _activation(self, layer: nn.Module) -> str | None:
        up: str | None = self.part(layer, self.form.up).activation
        return up or self.activation

    def _tensors(self) -> Iterator[dict[str, Any]]:
        """What holds those of all layers that the operation computes."""
        f = self.form
        for layer in self.layers:
            yield from (self.part(layer, name)._buffers for name in f.linears)
            yield from (self.part(layer, name)._parameters for name in (f.norm1, f.norm2))

    def _weights_of(self, layer: nn.Module) -> Any:
        f = self.form
        qkv = [self.part(layer, name) for name in f.qkv]
        others = [self.part(layer, name) for name in (f.out, f.up, f.down)]
        if not all(map(is_plain, (*qkv, *others))):
            return None
        norms = [self.part(layer, name) for name in (f.norm1, f.norm2)]
        if any(m.activation for m in (*qkv, others[0], others[2])) or self._activation(layer) not in PLAIN:
            return None
        pairs = [(n.weight, n.bias) for n in norms]
        q, k, v, out, up, down = map(int8_weight, (*qkv, *others))
        return EncoderWeights(q, k, v, out, up, down, *pairs)

    def _int8(self, x: Tensor, cu_seqlens: Tensor, key_lens: Tensor | None, bias: Tensor | None) -> Tensor:
        head_size, scale, eps, activation = self._constants(self.layers[0])
        dtype = torch.bfloat16 if x.dtype == torch.float32 and self._in_bfloat16 else x.dtype
        heads, bias = x.shape[1] // head_size, None if bias is None else bias.float()
        return OPERATION(
            x, cu_seqlens, self._weights, heads, eps, activation, False, scale, dtype, key_lens, bias, [], [], [], True
        )

    def _floats(self, x: Tensor, cu_seqlens: Tensor, key_lens: Tensor | None, bias: Tensor | None) -> Tensor:
        """The formula, by the layers' own modules."""
        f, spans = self.form, [*itertools.pairwise(cu_seqlens.tolist())]
        keys = [b - a for a, b in spans] if key_lens is None else key_lens.tolist()
        for layer in self.layers:
            part = {name: self.part(layer, name) for name in (*f.linears, f.norm1, f.norm2, f.activation, f.attention)}
            size, scale = part[f.attention].attention_head_size, _scale(part[f.attention])
            q, k, v = (part[name](x).unflatten(1, (-1, size)).transpose(0, 1) for name in f.qkv)
            sequences = [
                F.scaled_dot_product_attention(
                    q[:, a:b],
                    k[:, a : a + n],
                    v[:, a : a + n],
                    None if bias is None else bias[:, : b - a, :n],
                    scale=scale,
                )
                for (a, b), n in zip(spans, keys)
            ]
            attended = torch.cat(sequences, 1)
            y = part[f.norm1](x + part[f.out](attended.transpose(0, 1).reshape(x.shape)))
            x = part[f.norm2](y + part[f.down](part[f.activation](part[f.up](y))))
        return x


class Forward:
    """In the place of a layer's forward."""

    def __init__(self, stack: Stack, index: int) -> None:
        self.stack, self.index = stack, index

    def __call__(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        stack, layer = self.stack, self.stack.layers[self.index]
        if not torch.compiler.is_compiling():
            is_last = self.index + 1 == len(stack.layers)
            if self.index == 0:
                result = stack.result_of_begun(hidden_states, attention_mask, _options(type(layer), args, kwargs))
                nan = None if result is None else between(result, result)
            else:
                result, nan = getattr(hidden_states, RESULT, None), hidden_states
            if result is not None:
                y = result if is_last else nan
                return (y,) if stack.form.in_tuple else y
        return type(layer).forward(layer, hidden_states, attention_mask, *args, **kwargs)


def stack_of(layer: nn.Module) -> Stack | None:
    """The stack whose operation computes this layer."""
    forward = vars(layer).get("forward")
    return forward.stack if isinstance(forward, Forward) else None


def between(like: Tensor, result: Any) -> Tensor:
    """What all layers but the last one give, with what that one is to know."""
    nan = torch.full((1, 1, 1), torch.nan, dtype=like.dtype).expand(like.shape)
    setattr(nan, RESULT, result)
    return nan


def _values(holders: Iterable[dict[str, Any]]) -> Iterator[Any]:
    """And an end, as two sequences are compared that may differ in length."""
    return itertools.chain(itertools.chain.from_iterable(map(dict.values, holders)), (_END,))


def _options(cls: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """By name, all arguments of a layer of this class but hidden states and mask."""
    names = unpadding.parameters(cls.forward)[2:]
    return {**dict(zip(itertools.chain(names, map(str, itertools.count())), args)), **kwargs}


def _scale(attention: Any) -> float:
    return float(attention.scaling) if hasattr(attention, "scaling") else 1 / math.sqrt(attention.attention_head_size)


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]


#: Hooks that do nothing that the one operation does not: they bring rows without padding, leave a rotation to a cache, or say that
#: layers are called.
_HOOKS = {
    unpadding.gather,
    unpadding.gather_positions,
    unpadding.scatter,
    unpadding.pad,
    unpadding.unpad,
    rotary.mark,
}


def _is_watched(m: nn.Module) -> bool:
    """Whether a hook is on it besides those that a swap and transformers put there, which act where hidden states are asked for."""
    tables = m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks
    return not all(_is_silent(hook) for table in tables for hook in table.values())


def _is_silent(hook: Any) -> bool:
    if getattr(hook, "__module__", None) == "transformers.utils.output_capturing":
        return True
    return hook in _HOOKS or (_is_ours(type(getattr(hook, "__self__", None))) and hook.__name__ in ("begin", "end"))


def is_plain(m: nn.Module) -> bool:
    """Whether it quantises its input row by row, and does nothing else that the operation has not."""
    return type(m) is Int8Linear and m.input_scale is None and m.rotate is None and m.sharding is None


def int8_weight(m: Int8Linear) -> Int8Weight:
    return Int8Weight(m.qweight, m.weight_scale, m.bias, m.weight_sum, m.channel_scale, m.packed())


def lengths_of(hidden: Tensor, mask: Any, window: int | None = None) -> tuple[Tensor, Tensor | None] | None:
    """(cu_seqlens, key_lens) of a call; None where its mask is another than padding on the right and a window.

    window: how far a row sees to both sides; None: to all keys.
    """
    rows = unpadding.current()
    if rows is not None and rows.are(hidden):
        return None if window is not None and rows.has_holes else (rows.cu_seqlens, None)
    batch, length = hidden.shape[:2]
    cu_seqlens = torch.arange(0, batch * length + 1, length, dtype=torch.int32)
    if mask is None:  # a window is in the mask
        return (cu_seqlens, None) if window is None or length <= window + 1 else None
    if type(mask) is not Tensor or mask.shape != (batch, 1, length, length):
        return None
    if mask.dtype in FLOATS:  # which is added to scores
        attends = mask == 0
        if not (attends | (mask <= torch.finfo(mask.dtype).min)).all():
            return None
        mask = attends
    if mask.dtype != torch.bool:
        return None
    row = mask[:, 0, 0] if window is None else mask.any(2).squeeze(1)
    if mask.stride(2) and not torch.equal(mask, _expected(row, window).expand_as(mask)):
        return None
    key_lens = row.sum(1, dtype=torch.int32)
    if not torch.equal(row, torch.arange(length, dtype=torch.int32) < key_lens[:, None]) or not row[:, 0].all():
        return None
    return cu_seqlens, key_lens


def _expected(row: Tensor, window: int | None) -> Tensor:
    """The mask of sequences whose keys count where row, bool [B, S], is True."""
    if window is None:
        return row[:, None, None]
    return row[:, None, None] & band(row.shape[1], row.shape[1], window)


def band(rows: int, keys: int, window: int) -> Tensor:
    """bool [rows, keys]: the keys within the window of each row."""
    return (torch.arange(rows)[:, None] - torch.arange(keys)).abs() <= window
