"""Encoders of transformers on the rows of real tokens alone.

Of a batch of texts that differ in length, [B, S, H], the rows of padding go through every Linear layer, norm and activation, and
nobody reads what comes out. Within the stack of layers of a swapped encoder there are none:

- The model that takes the attention_mask (BertModel, ...) reads from it where the tokens stand, and keeps that, `Rows`, for the
  length of its call, in a context variable: threads and nested models each have their own.
- The first layer of the stack gathers them, [B, S, H] to [1, T, H], the last one puts them back, zeros between them. Embeddings
  before and heads behind see padded tensors, and so does the loop over the layers for what it computes itself from
  the embeddings (relative positions). Rotary embeddings, which layers are given, are gathered as well.
- Of what is in between attention alone looks at more than one row. It runs varlen, each sequence by itself, without a mask, a
  window as a number. Where no kernel takes a call, q, k and v are padded around it. Attention that does not come through
  transformers' interface to us (MPNet and DeBERTa compute it in their own code; or a user keeps it as it is) runs padded as a
  module, with its projections. That a sequence's bias is a corner of the batch's, bias[:, :, :n, :n] in MPNet, is not enough to
  run those two varlen: the operation takes no mask with cu_seqlens, and between projections and scores there is no place for a
  hook, so each module's forward would be written here a second time, DeBERTa's with its gathers by relative positions.

A row of int8 is quantised by itself, so a token's result is that of the padded model but for the order of sums.

A call stays padded, at the price of looking at the mask, where less than a sixteenth of its rows are padding; where a row begins
with padding, as heads read the first position (left padding, a row that is all padding); where there is no 2-D mask; where
hidden states or attention weights are asked for; and in training. So does whatever is compiled, exported, traced or captured into
a CUDA graph, as T differs from batch to batch. On a GPU a call waits for the mask, once.

All of it is hooks, functions of this module: they go with a model into copies and pickles.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...common.printing.quiet import warn_once
from ..class_source import class_is_as_written

#: The attribute of a model that runs a stack of its layers without padding: the implementation that its config has to name for
#: that, None where attention pads by itself.
PLACE = "forwardpass_unpadding"
#: And that of the classes of those layers and of their parts, whose code has to be transformers' own.
CLASSES = "forwardpass_unpadding_classes"


#: The least share of padding in a batch that pays. CPU time of all-MiniLM-L6-v2 in int8, padded and not (one core of an AMD EPYC,
#: the least of 40 calls): 31 tokens of 32 5.9 and 6.4 ms, 24 of 32 5.6 and 5.6, 960 of 1024 98.5 and 90.9.
WORTH = 1 / 16


class Rows:
    """Where the tokens of one padded batch stand."""

    def __init__(self, mask: Tensor, device: torch.device):
        """mask: bool [B, S] on the CPU, True for tokens; device: of the hidden states."""
        self.shape = mask.shape
        lengths = mask.sum(1)
        self.index = mask.flatten().nonzero().squeeze(1).to(device)  # int64 [T], of B * S
        self.cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int().to(device)
        # tokens before a row's first padding are all of them: positions then differ by as much as rows do
        self.has_holes = bool((mask.int().cumprod(1).sum(1) < lengths).any())
        self.are_out = False  #: whether the stack has been entered and not left
        self._position_embeddings: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # by id, which the tensor beside it keeps from reuse

    def gather(self, x: Tensor) -> Tensor:
        """[B, S, ...], or [1, S, ...] for all sequences, to [1, T, ...]."""
        index = self.index if x.shape[0] == self.shape[0] else self.index % self.shape[1]
        return x.flatten(0, 1).index_select(0, index.to(x.device)).unsqueeze(0)

    def scatter(self, x: Tensor) -> Tensor:
        """[1, T, ...] to [B, S, ...], zero where there is no token."""
        padded = x.new_zeros(self.shape.numel(), *x.shape[2:])
        return padded.index_copy_(0, self.index.to(x.device), x.squeeze(0)).unflatten(0, self.shape)

    def are(self, x: Tensor) -> bool:
        """Whether x is [1, T, ...] within the stack, and not a padded batch, whose rows are more."""
        return self.are_out and x.shape[0] == 1 and x.shape[1] == len(self.index)

    def position_embeddings(self, x: Tensor) -> Tensor:
        """Gathered once for all layers."""
        if id(x) not in self._position_embeddings:
            self._position_embeddings[id(x)] = x, self.gather(x)
        return self._position_embeddings[id(x)][1]


@dataclass(frozen=True)
class _Call:
    """A call of a model that unpads, within another's; rows: None where it stays padded."""

    model: nn.Module
    rows: Rows | None
    outer: _Call | None


_call: ContextVar[_Call | None] = ContextVar("forwardpass_unpadding", default=None)


def current() -> Rows | None:
    """The tokens of the call that this thread is in."""
    if torch.compiler.is_compiling():
        return None
    call = _call.get()
    return None if call is None else call.rows


@functools.lru_cache(maxsize=256)
def parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]  # without self


def _rows(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows | None:
    if model.training or torch.jit.is_tracing():
        return None
    arguments = {**dict(zip(parameters(type(model).forward), args)), **kwargs}
    mask, config = arguments.get("attention_mask"), model.config
    if type(mask) is not Tensor or mask.dim() != 2 or mask.is_meta:
        return None
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    if (replaced := why_replaced(vars(model).get(CLASSES, ()))) is not None:
        warn_once(f"the code of {replaced} is another than at the swap: batches keep their padding from here on")
        return None
    name = vars(model)[PLACE]
    if name is not None and config._attn_implementation != name:  # type: ignore[union-attr]  # set by hand since
        return None
    for output in ("output_hidden_states", "output_attentions"):
        x = arguments.get(output)
        if getattr(config, output, False) if x is None else x is not False:
            return None
    tokens = mask.cpu().bool()
    if tokens.sum() > (1 - WORTH) * tokens.numel() or not tokens[:, 0].all():
        return None
    return Rows(tokens, mask.device)


def why_replaced(classes: Iterable[Any]) -> str | None:
    """The first of these classes whose code is not what transformers has in its file; None where that is so of none."""
    return next((cls.__name__ for cls in classes if not class_is_as_written(cls)), None)


def enter(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a model's forward."""
    if torch.compiler.is_compiling():
        return
    outer = _call.get()
    if outer is not None and outer.model is model:  # an interrupt ended that call, past all hooks
        outer = outer.outer
    _call.set(_Call(model, _rows(model, args, kwargs), outer))


def enter_around(caller: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the forward of a module of sentence-transformers, which calls its model's forward past all hooks."""
    features = next(iter((*args, *kwargs.values())), None)
    if isinstance(features, Mapping) and "hidden_states" not in str(
        caller.modality_config
    ):  # which it asks the model for
        enter(caller.model, (), {**features, **kwargs})


def leave_around(caller: Any, args: tuple[Any, ...], output: Any) -> None:
    leave(caller.model, args, output)


def leave(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """After it, whatever it raised."""
    if torch.compiler.is_compiling():
        return
    call = _call.get()
    if call is None or call.model is not model:
        return
    _call.set(call.outer)
    if call.rows is not None and call.rows.are_out and output is not None:
        raise RuntimeError(f"a layer that closed the stack of this {type(model).__name__} was taken out after the swap, so its "
                           "rows are still without padding: call fp.restore(model), change it, and swap again")  # fmt: skip


def gather(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before the first layer of a stack."""
    rows = current()
    if rows is None or (hidden := _hidden(args, kwargs)).shape[:2] != rows.shape:
        return None
    rows.are_out = True
    return _with_hidden(rows.gather(hidden), args, kwargs)


def gather_positions(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before every layer that is given rotary embeddings."""
    rows = current()
    if rows is None or not rows.are_out:
        return None
    embeddings = tuple(rows.position_embeddings(x) for x in kwargs["position_embeddings"])
    return args, {**kwargs, "position_embeddings": embeddings}


def scatter(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """After the last layer of a stack."""
    rows = current()
    if rows is None or not rows.are_out:
        return None
    rows.are_out = False
    return _changed(rows.scatter, output)


def pad(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before attention that is computed in its module's own code."""
    rows = current()
    if rows is None or not rows.are_out:
        return None
    return _with_hidden(rows.scatter(_hidden(args, kwargs)), args, kwargs)


def unpad(attention: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """After it."""
    rows = current()
    return None if rows is None or not rows.are_out else _changed(rows.gather, output)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _with_hidden(
    hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def _changed(change: Callable[[Tensor], Tensor], output: Any) -> Any:
    """The output with its hidden states changed, which come first where it is a tuple."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


@dataclass(frozen=True)
class Stack:
    """Layers that run without padding."""

    fqn: str  #: of their list
    model: nn.Module  #: takes the attention_mask
    layers: tuple[nn.Module, ...]
    attention: tuple[nn.Module, ...]  #: of each layer
    caller: nn.Module | None  #: of sentence-transformers, which calls the model's forward by itself
    by_interface: bool  #: whether attention comes to `transformers.attention`

    @property
    def classes(self) -> tuple[Any, ...]:
        """Those of its layers and of all that is in them, once each."""
        return tuple(dict.fromkeys(type(m) for layer in self.layers for m in layer.modules()))

    def hooks(self) -> Iterator[Any]:
        """Registers them; their handles."""
        if self.caller is None:
            yield self.model.register_forward_pre_hook(enter, with_kwargs=True)
            yield self.model.register_forward_hook(leave, always_call=True)
        else:
            yield self.caller.register_forward_pre_hook(enter_around, with_kwargs=True)
            yield self.caller.register_forward_hook(leave_around, always_call=True)
        yield self.layers[0].register_forward_pre_hook(gather, with_kwargs=True)
        for layer in self.layers if self.by_interface else ():  # else attention gets padded rows, and all positions
            if "position_embeddings" in parameters(type(layer).forward):
                yield layer.register_forward_pre_hook(gather_positions, with_kwargs=True)
        # before hooks that were there: transformers' own record what layers return
        yield self.layers[-1].register_forward_hook(scatter, prepend=True)
        for module in () if self.by_interface else self.attention:
            yield module.register_forward_pre_hook(pad, with_kwargs=True)
            yield module.register_forward_hook(unpad, prepend=True)
