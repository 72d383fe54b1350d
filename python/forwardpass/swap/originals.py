"""The modules that a swap replaced, and how they come back.

They stand in a table beside the models, so that parameters(), state_dict(), pickles and deepcopies of a swapped model
hold the replacements alone. The table holds models weakly: a model that is dropped takes its originals with it.
"""

from __future__ import annotations

import functools
import sys
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..common.batches import device_of
from ..common.models.exchange import Replaced, exchange, put_in_place
from ..common.models.modules import accelerate_hooks, plain_module
from ..integrations.tensor_parallel import refuse_divided
from ..integrations.transformers.attention import PLACE
from ..nn import MultiheadAttention, QuantizedModule
from ..nn.mlp import TwoProducts, quantised_layers
from ..ops.common.quantized_rows import FLOATS
from . import methods


class Change(Protocol):
    """What a swap changes besides modules."""

    def put(self) -> None: ...

    def undo(self) -> None: ...


@dataclass(eq=False)
class Originals:
    """What one swap replaced; `restorable` is False where the originals were freed (then `layers` is empty)."""

    layers: tuple[Replaced, ...]
    restorable: bool
    changes: tuple[Change, ...]
    #: activations that layers compute now, with nn.Identity in their places, and norms that quantise for an MLP
    around: tuple[Replaced, ...] = ()
    before: tuple[Change, ...] = ()  #: what has to be there for the layers to be found
    #: that of a swap before this one, which left alone what this one replaced
    earlier: Originals | None = None
    report: Any = None  #: the Report of the swap

    def all(self) -> Iterator[Originals]:
        """This swap and those before it, the newest first."""
        swapped: Originals | None = self
        while swapped is not None:
            yield swapped
            swapped = swapped.earlier

    @property
    def replaced(self) -> tuple[Replaced, ...]:
        return (*self.layers, *self.around)

    def put(self, model: nn.Module) -> None:
        """Replacements into the places of originals, all or none."""
        for change in self.before:
            change.put()
        put_in_place(model, self.replaced)
        for change in self.changes:
            change.put()
        methods.put(model)

    def undo(self, model: nn.Module) -> None:
        exchange(model, [(x.fqn, x.replacement, x.original) for x in self.replaced])
        for change in (*reversed(self.changes), *reversed(self.before)):
            change.undo()
        methods.take_away(model)
        methods.put(model)  # what an earlier swap replaced is still there


_swapped: dict[int, tuple[weakref.ref[nn.Module], Originals]] = {}


def remember(model: nn.Module, swapped: Originals) -> None:
    key = id(model)  # not a WeakKeyDictionary: a model may define __eq__ and then has no hash
    _swapped[key] = weakref.ref(model, functools.partial(_drop, _swapped, key)), swapped


def _drop(table: dict[int, tuple[weakref.ref[nn.Module], Originals]], key: int, _: object) -> None:
    """Needs no global, which at the end of a process are gone before models are."""
    table.pop(key, None)


def forget(model: nn.Module) -> None:
    _swapped.pop(id(model), None)


def find(model: nn.Module) -> Originals | None:
    """What was replaced in this model, by the newest of its swaps, or None: never swapped, restored, a copy, or loaded."""
    entry = _swapped.get(id(model))
    return entry[1] if entry else None


def living() -> Iterator[Originals]:
    """Every swap that is not undone, of every model that is still there."""
    for _, newest in [*_swapped.values()]:
        yield from newest.all()


class Moved:
    """Parameters and buffers of modules on another device, and floats in another dtype, `but` these: the same objects, their data
    moved. `undo` takes them back.
    """

    def __init__(self, modules: Iterable[nn.Module], device: torch.device, but: Iterable[Tensor] = ()):
        self._before: list[tuple[Tensor, Tensor]] = []
        self._but = {id(t) for t in but}
        try:
            for module in modules:
                self.add(module, device)
        except BaseException:  # out of memory, an interrupt
            self.undo()
            raise

    def add(self, module: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
        for tensor in (*module.parameters(), *module.buffers()):
            for t in (tensor, tensor.grad):
                if id(tensor) in self._but or t is None:
                    continue
                cast = t.dtype if dtype is None or t.dtype not in FLOATS else dtype
                if (t.device, t.dtype) != (device, cast):
                    self._before.append((t, t.data))
                    t.data = t.data.to(device, cast)

    def undo(self) -> None:
        for tensor, data in self._before:
            tensor.data = data
        self._before.clear()


def _references(tensors: Sequence[Tensor], i: int) -> int:
    return sys.getrefcount(tensors[i])


_module = nn.Linear(1, 1, device="meta")
#: Of a parameter to which its module alone refers.
_ALONE = _references([*_module.parameters()], 0)


def held_elsewhere(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Their parameters and buffers to which something else refers: another model that shares them, an optimizer. Where these went,
    it would have to go too."""
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return [tensors[i] for i in range(len(tensors)) if _references(tensors, i) > _ALONE]


def restore(model: nn.Module) -> None:
    """Puts the original modules back, of all swaps of this model: the same Module and Parameter objects, values bit for bit.

    They arrive on the device that the model is on now, with the training flags that it has now; requires_grad and gradients are as
    they were. Where the model has been cast since, they are cast as it was, which rounds them as it would have. Hooks and
    attributes that were set on the replacements go with them, and so do values that `load_state_dict` gave them since the swap,
    while layers that were not swapped keep theirs: a warning says so.

    Raises:
        RuntimeError: the model is not swapped, is a copy of a swapped one, or was swapped with keep=False; or a layer
            was replaced since. The model stays as it is.

    Example:
        >>> with torch.inference_mode():
        ...     before = model(x)
        ...     report = fp.swap(model, precision="int8")
        ...     fp.restore(model)
        ...     torch.equal(model(x), before)
        True
    """
    model = plain_module("restore", model)
    swapped = find(model)
    if swapped is None:
        raise RuntimeError(_why_nothing(model))
    undo_swaps(model, [*swapped.all()])


def undo_swaps(model: nn.Module, swaps: Sequence[Originals]) -> None:
    """Undoes these, the newest of a model, the newest first: all or none. Raises RuntimeError as `restore` does."""
    if not all(swapped.restorable for swapped in swaps):
        raise RuntimeError(
            "this model was swapped with keep=False, so its originals are gone: load the original model again"
        )
    moved, undone = Moved((), torch.device("cpu")), []
    try:
        for layer in (x for swapped in swaps for x in swapped.layers):
            device = device_of(layer.replacement)
            if device.type != "meta":  # there is nothing there to be restored to
                moved.add(layer.original, device, _cast_since(layer))
        for swapped in swaps:
            swapped.undo(model)
            undone.append(swapped)
    except BaseException:
        for swapped in reversed(undone):
            swapped.put(model)
        moved.undo()
        raise
    if (earlier := swaps[-1].earlier) is None:
        forget(model)
    else:
        remember(model, earlier)
    layers = [x for swapped in swaps for x in swapped.replaced]
    for layer in layers:
        flags = {m: m.training for m in layer.replacement.modules()}
        layer.original.train(layer.replacement.training)
        for module, flag in flags.items():  # a dropout is in both, with a flag of its own
            module.training = flag
    hooked = [
        x.fqn
        for x in layers
        if any(m._forward_hooks or m._forward_pre_hooks for m in x.replacement.modules())
        or accelerate_hooks(x.replacement) != accelerate_hooks(x.original)
    ]
    loaded = [x.fqn for x in layers if any(getattr(m, "is_loaded", False) for m in x.replacement.modules())]
    if loaded:
        warnings.warn(f"restore: load_state_dict gave other values to {len(loaded)} replaced layers ({loaded[0]}, …) since the "
                      "swap, which went with them: these have those of before, and layers that were not swapped the loaded ones; "
                      "load the float state dict of the model that you want", stacklevel=3)  # fmt: skip
    if hooked:
        warnings.warn(f"restore: hooks registered on {len(hooked)} replaced layers ({hooked[0]}, …) went with them: "
                      "register them again on the restored layers", stacklevel=3)  # fmt: skip


def _cast_since(layer: Replaced) -> torch.dtype | None:
    """The dtype that a replacement stands for now, if it is another one than at the swap; None of what another library had in 8
    bits."""
    modules = [m for m in layer.replacement.modules() if isinstance(m, QuantizedModule)]
    now = {m.anchor.dtype for m in modules if "anchor" in m._parameters}
    before = {p.dtype for p in layer.original.parameters()}
    return now.pop() if len(now) == len(before) == 1 and now != before and before <= {*FLOATS} else None


def separate_layers(model: nn.Module, on_meta: bool = False) -> tuple[dict[str, QuantizedModule], dict[int, nn.Module]]:
    """(the quantised layers as a checkpoint has them, those of an MLP one by one; what stands for an MLP then, by the MLP's id).
    on_meta: gate and up of an MLP, which are copies, without values. ValueError where they are parts."""
    refuse_divided("a checkpoint", model, "store the model before it is divided")
    layers: dict[str, QuantizedModule] = {}
    instead: dict[int, nn.Module] = {}
    for fqn, module in quantised_layers(model).items():
        if isinstance(module, TwoProducts):
            parts = module.separate(on_meta)
            instead[id(module)] = nn.ModuleDict(parts)
            layers |= {f"{fqn}.{name}": layer for name, layer in parts.items()}
        else:
            layers[fqn] = module
    return layers, instead


def swapped_attention(model: nn.Module) -> list[str]:
    """The names of the modules whose attention is swapped."""
    return [fqn for fqn, m in model.named_modules() if is_swapped_attention(m)]


def is_swapped_attention(module: nn.Module) -> bool:
    if isinstance(module, MultiheadAttention):
        return module.fused
    return getattr(vars(module).get(PLACE), "fused", False)


def _why_nothing(model: nn.Module) -> str:
    layers = [*quantised_layers(model), *swapped_attention(model)]
    if not layers:
        return "this model is not swapped: there is nothing to restore"
    for fqn, submodule in model.named_modules():
        if fqn and find(submodule) is not None:
            return f"only its submodule {fqn} was swapped: restore that one, fp.restore(model.get_submodule({fqn!r}))"
    return (f"this model holds {len(layers)} swapped layers and no originals, being a copy of a swapped model or "
            f"loaded from a file: restore the model that was swapped, or load the original model again")  # fmt: skip
