"""How batches go into a model and what comes out: the conventions of everything that takes `batches`.

A mapping is `model(**batch)`, a tuple or list `model(*batch)`, a tensor `model(batch)`; anything else needs
`forward(model, batch)`, which is used for all where it is given. The output that is compared is `output(result)`, by
default the logits, else the last_hidden_state, else the first floating tensor. Padding is left out where the batch
has an attention_mask.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module, Any], Any]
Output = Callable[[Any], Tensor]


def check_several(argument: str, batches: Iterable[Any]) -> None:
    """TypeError where `batches` is one batch, whose rows or names would be taken for batches, or is no iterable."""
    if isinstance(batches, Mapping | Tensor | str | bytes) or not isinstance(batches, Iterable):
        raise TypeError(f"{argument} is an iterable of batches, not a {type(batches).__name__}: pass [batch] for one")


def several(argument: str, batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, one after the other.

    Raises:
        TypeError: as `check_several`.
        ValueError: at the end, where there was none.
    """
    check_several(argument, batches)

    def each() -> Iterator[Any]:
        none = True
        for batch in batches:
            none = False
            yield batch
        if none:
            raise ValueError(
                f"{argument} holds no batch: pass a non-empty iterable (a generator that was read before is empty)"
            )

    return each()


def first_of(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """(the first batch, all of them, which are read once); None of an empty iterable."""
    remaining = iter(batches)
    first = [*itertools.islice(remaining, 1)]
    return (first[0] if first else None), itertools.chain(first, remaining)


def run(model: nn.Module, batch: Any, forward: Forward | None = None) -> Any:
    """What the model returns for one batch."""
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    if isinstance(batch, Tensor):
        return model(batch)
    raise TypeError(
        f"a batch is a mapping, a tuple, a list or a tensor, not {type(batch).__name__}: pass forward=fn(model, batch)"
    )


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within the block every module is in eval mode; each one's flag is put back."""
    flags = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inference mode, eval mode, and no compiled code, which would not see hooks; every module's flag is put back."""
    with eval_mode(model), torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        yield


def device_of(model: nn.Module) -> torch.device:
    """Where a model, or a part of it, takes its batches: the device of its first parameter or buffer, the CPU where it has none."""
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def main_output(result: Any) -> Tensor:
    """The tensor that stands for a model's result."""
    for name in ("logits", "last_hidden_state"):
        value = result.get(name) if isinstance(result, Mapping) else getattr(result, name, None)
        if isinstance(value, Tensor):
            return value
    for value in tensors(result):
        if value.is_floating_point():
            return value
    raise TypeError(
        f"the model's result, a {type(result).__name__}, holds no floating tensor to compare: pass output=fn(result)"
    )


def tensors(tree: Any) -> Iterator[Tensor]:
    """Every tensor of a batch or result: of mappings the values, of sequences the members."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping | Sequence) and not isinstance(tree, str | bytes):
        for value in tree.values() if isinstance(tree, Mapping) else tree:
            yield from tensors(value)


def map_tensors(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same tree with `change(tensor)` for each tensor. A mapping that is no dataclass becomes a dict."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        values = {name: map_tensors(value, change) for name, value in tree.items()}
        return type(tree)(**values) if dataclasses.is_dataclass(tree) else values  # transformers' ModelOutput is both
    if isinstance(tree, tuple | list):
        members = [map_tensors(member, change) for member in tree]
        return type(tree)(*members) if hasattr(tree, "_fields") else type(tree)(members)
    return tree


class Fingerprint:
    """A fingerprint of batches from any iterable: `reading` passes them on, `value` is then the same for the same names, shapes,
    dtypes and bytes in the same order, on any device. None where a batch holds what has no bytes of its own.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._complete = True

    @property
    def value(self) -> str | None:
        return f"sha256:{self._hash.hexdigest()}" if self._complete else None

    def add(self, values: Iterable[Any]) -> Fingerprint:
        for _ in self.reading(values):
            pass
        return self

    def reading(self, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            self._add(batch)
            yield batch

    def _add(self, value: Any) -> None:
        if isinstance(value, Tensor):
            t = value.detach().cpu().contiguous()
            self._hash.update(f"{t.dtype}{list(t.shape)}".encode())
            self._hash.update((ctypes.c_char * t.nbytes).from_address(t.data_ptr()) if t.numel() else b"")
        elif isinstance(value, Mapping):
            self._add([x for item in value.items() for x in item])
        elif isinstance(value, list | tuple):
            self._hash.update(f"[{len(value)}".encode())
            for x in value:
                self._add(x)
        elif value is None or isinstance(value, str | int | float | bytes):
            self._hash.update(repr(value).encode() + b";")
        else:
            self._complete = False


def padding_mask(batch: Any, lead: Sequence[int], fqn: str = "") -> Tensor | None:
    """Which of the tokens of a tensor [*lead, n] are real: bool [*lead]; None where the batch does not say.

    It says so by an attention_mask [B, S], for lead [B, S, ...] or flattened [B * S]; of torch's encoder by its
    src_key_padding_mask of bool, True at padding. Inside a decoder that stands beside an encoder (`fqn`), and for its output
    (no `fqn`), the decoder_attention_mask counts.
    """
    if not isinstance(batch, Mapping):
        return None
    decoder = any(name in batch for name in ("decoder_input_ids", "decoder_inputs_embeds")) and (
        not fqn or "decoder" in fqn.split(".")
    )
    mask = batch.get("decoder_attention_mask" if decoder else "attention_mask")
    if mask is None and "tgt" not in batch:
        padding = batch.get("src_key_padding_mask")
        mask = ~padding if isinstance(padding, Tensor) and padding.dtype == torch.bool else None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    if tuple(lead) == (mask.numel(),):
        return mask.bool().flatten()
    if tuple(lead[:2]) != tuple(mask.shape):
        return None
    return mask.bool().reshape(*mask.shape, *(1,) * (len(lead) - 2)).expand(lead)
