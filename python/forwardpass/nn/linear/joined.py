"""Layers that are called with one input, one after another, as one product, as q, k and v of attention."""

from __future__ import annotations

import threading
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...common.models.modules import are_watched_by_others
from ..guard import Beginning, code_guard

if TYPE_CHECKING:
    from .quantized_linear import QuantizedLinear

_joining = threading.Lock()
#: More rows are not worth it there.
MOST_ROWS_ON_CPU = 32


class Joined(Beginning):
    """The layers of one input: their weights are rows of one, which the first of them multiplies for all.

    That reads the input, and quantises it, once; and where rows are few, a call's fixed time is much of it. The layers stay:
    their names, their hooks, and their buffers, which are views. The first computes, the others take their columns of the result
    if what they are called with is the same tensor, in the forward of the module that holds them, whose code was read (see
    `proofs.siblings`): between the first call and the last nothing writes to that tensor. Called in another way each layer
    computes alone. So it does where something has written to that tensor, which torch counts outside of inference mode, and where
    the views are no longer what it holds: moved, cast, copied, or of a scale written into. Those are joined again, where they still
    agree, by the next call that is not compiled.
    """

    def __init__(self, members: Sequence[QuantizedLinear], holder: type[nn.Module] | None = None) -> None:
        """holder: the class whose code calls them."""
        self.members = tuple(members)
        self._guard = None if holder is None else code_guard(holder)
        #: the input, how often it had been written to, and each layer's columns
        self._result: tuple[Tensor, int | None, Sequence[Tensor]] | None = None
        self._join()

    def _join(self) -> None:
        """Makes the weight of all, and the layers' buffers views of it, one at a time."""
        first, sizes = self.members[0], [m.out_features for m in self.members]
        config = first.config() | {"out_features": sum(sizes)}
        with torch.inference_mode(False), torch.no_grad():  # for a later load_state_dict, which writes in place
            layer = type(first)(**config, device=first.qweight.device).eval()
            for name, whole in layer._buffers.items():
                if whole is None:
                    continue
                if name not in first.output_buffers:
                    whole.copy_(first._buffers[name])  # type: ignore[arg-type]
                    for member in self.members:  # out of inference mode, whose tensors do not count what is written
                        member._buffers[name] = member._buffers[name].clone()  # type: ignore[union-attr]
                    continue
                for member, part in zip(self.members, whole.split(sizes)):
                    part.copy_(member._buffers[name])
                    member._buffers[name] = part
        layer.settle()
        for member in self.members:
            member.settle(alone=False)
            member.joined = self
        self._views = [(m._buffers, name, t) for m in self.members for name, t in m._buffers.items() if t is not None]
        self._scales = [(t, t._version) for _, name, t in self._views if name not in first.output_buffers]
        self._is_copy, self.layer, self._sizes = False, layer, sizes

    def _is_whole(self) -> bool:
        if self._is_copy:
            return False
        for buffers, name, view in self._views:
            if buffers[name] is not view:
                return False
        if self._scales and not torch.compiler.is_compiling():
            for scale, version in self._scales:  # of which the product has a copy
                if scale._version != version:
                    return False
        return True

    def is_whole(self, anew: bool = False) -> bool:
        """Whether the layers' buffers are views of the product's. anew: joins them again where they are not, and agree."""
        if self._is_whole():
            return True
        if not anew or why_apart(self.members):
            return False
        with _joining:
            if not self._is_whole():
                self._join()
        return True

    def begin(self, holder: nn.Module, *_: Any) -> None:
        """The next calls are those that were read, where the holder's code is what it was, and no hook on a layer may write into
        their input."""
        if torch.compiler.is_compiling():
            self._begun = True
            return
        if self._guard is None:  # of a copy
            self._guard = code_guard(type(holder))
        self._begun = self._guard.is_as_proven(holder) and not are_watched_by_others(*self.members)

    def end(self, *_: Any) -> None:
        self._begun, self._result = False, None

    def __call__(self, member: QuantizedLinear, x: Tensor) -> Tensor:
        if member is self.members[0]:
            begun, self._begun = self._begun, False
            if not begun or _has_too_many_rows(x) or torch.compiler.is_exporting():
                return member.product(x)  # what is exported asks for no number of rows
            if not self._is_whole():
                if torch.compiler.is_compiling():
                    return member.product(x)
                if not self.is_whole(anew=True):
                    return member.product(x)
            y = self.layer.product(x)
            columns = y.split(self._sizes, -1)
            self._result = x, writes(x), columns
            return columns[0]
        result = self._result
        if result is None or result[0] is not x or (result[1] is not None and result[1] != writes(x)):
            return member.product(x)
        if member is self.members[-1]:
            self._result = None
        return result[2][self.members.index(member)]

    def __getstate__(self) -> dict[str, Any]:
        """A copy has tensors of its own, which its next call joins."""
        return {**vars(self), "_begun": False, "_result": None, "_views": [], "_scales": [], "_is_copy": True}


def writes(x: Tensor) -> int | None:
    """How often something has written into a tensor or a view of it; None where torch does not count."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


def _has_too_many_rows(x: Tensor) -> bool:
    """On a CPU the product itself is then all of the time, and an output in one piece is new memory for each call, where those of
    the layers are used again: SmolLM2-135M in int8, 512 rows, two cores of Zen 4: 520 ms joined, 390 ms apart."""
    return x.is_cpu and x.numel() > MOST_ROWS_ON_CPU * x.shape[-1]


def why_apart(
    layers: Sequence[nn.Module], but_activation: bool = False, but_buffers: Container[str] = ()
) -> str | None:
    """Why these layers cannot be one product; None where they can. but_activation: whatever they apply to their outputs;
    but_buffers: these are not looked at."""
    from .quantized_linear import QuantizedLinear

    first = layers[0]
    for layer in layers:
        if not isinstance(layer, QuantizedLinear) or type(layer) is not type(first):
            return "they are of several kinds"
        if type(layer).forward is not QuantizedLinear.forward:
            return f"{type(layer).__name__} has a forward of its own"
        if _form(layer) != _form(first) or not (but_activation or layer.activation == first.activation):
            return "their activations, biases, scales or dtypes differ"
        if layer.sharding is not None and not layer.sharding.is_local:
            return "processes add or exchange what is theirs"
        if layer.out_features % 8:
            return "rows of 16 bytes would be divided"
        for name, t in layer._buffers.items():
            if t is None or name in but_buffers:
                continue
            if name in layer.output_buffers:
                if t.shape[0] != layer.out_features:
                    return f"{name} is not by output"
            elif t.is_meta or not torch.equal(t, first._buffers[name]):  # type: ignore[arg-type]
                return f"{name} differs"
    return None


def _form(layer: QuantizedLinear) -> Any:
    """What layers that are joined have in common."""
    return layer.config() | {"out_features": None, "activation": None}, {
        name: (t.dtype, t.device) for name, t in layer._buffers.items() if t is not None
    }
