"""Layers of Keras 3 on torch that compute what an nn.Linear does: Dense, and EinsumDense of such equations.

Keras keeps its layers in lists and graphs of its own, not as modules of torch. So each such layer gets an nn.Linear that has its
weights' memory, stands in the keras model's modules under the layer's path, and computes for it: the layer's `call` goes there.
Whatever swaps an nn.Linear then swaps that one. The keras layer, its variables and what keras saves of it stay as they are.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor, nn

from ..common.models.patterns import Pattern
from ..dispatch import Reason
from .report import Skipped

_DENSE = "keras.src.layers.core.dense.Dense"
_EINSUM_DENSE = "keras.src.layers.core.einsum_dense.EinsumDense"
#: Methods that would change keras' variables, of which swapped layers would know nothing.
_REFUSED = ("fit", "train_on_batch", "load_weights", "set_weights", "load_own_variables", "enable_lora", "quantize")


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def roots(model: nn.Module) -> list[Any]:
    """The keras layers that a model is, or has among its modules, without those within them."""
    keras: Any = sys.modules.get("keras")
    if not hasattr(keras, "config") or keras.config.backend() != "torch":  # Keras 2 has none
        return []
    layers = [m for m in model.modules() if isinstance(m, keras.Layer)]
    within = {
        id(m)
        for layer in layers
        for m in [*layer._flatten_layers(include_self=False), *layer.modules()]
        if m is not layer
    }
    return [layer for layer in layers if id(layer) not in within]


@dataclass(frozen=True, eq=False)
class _Refusal:
    method: str
    before: Any  #: what the layer itself held under that name, if anything

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(f"{self.method} would change float weights of which swapped layers have a copy in another form: call "
                           "fp.restore(model) first, and swap again when it is done")  # fmt: skip


@dataclass(eq=False)
class _Call:
    """`call` of a keras layer whose product its linear computes."""

    layer: Any
    root: weakref.ref[nn.Module]  #: the table of what was replaced, which has this too, may not keep a model alive
    name: str  #: of the linear among the root's modules
    summed: int  #: axes of the input that are summed over
    sizes: tuple[int, ...]  #: of the output's last axes

    def __call__(self, inputs: Tensor, training: bool | None = None) -> Any:
        if inputs.device.type == "meta":  # keras asks for a shape
            return type(self.layer).call(self.layer, inputs, training=training)
        root = self.root()
        if root is None:  # the layer goes on without the model
            return type(self.layer).call(self.layer, inputs, training=training)
        linear = root._modules[self.name]
        assert linear is not None
        y = linear(inputs if self.summed == 1 else inputs.flatten(-self.summed))
        y = y if len(self.sizes) == 1 else y.unflatten(-1, self.sizes)
        return y if self.layer.activation is None else self.layer.activation(y)


class KerasLinears:
    """The linears of a model's keras layers: `put` into it, and taken out by `undo`, all of them. As a context they are in it, and
    stay there where `stays` was set."""

    def __init__(self, model: nn.Module) -> None:
        tops = roots(model)
        self._roots = [weakref.ref(root) for root in tops]
        #: whether the model itself is of keras, where torch's training flag says nothing
        self.is_all = tops == [model]
        self._calls: list[tuple[_Call, nn.Linear]] = []
        self._others: list[tuple[str, Reason]] = []
        self.stays = False
        self._is_put = False
        self._hidden: list[
            tuple[dict[str, Any], dict[str, Any]]
        ] = []  #: dicts that entries were taken from, as they were
        prefixes = {id(m): f"{fqn}." if fqn else "" for fqn, m in model.named_modules()}
        visited: set[int] = set()
        for root in tops:
            names = set(root._modules)
            for layer in root._flatten_layers(include_self=True):
                if id(layer) in visited:
                    continue
                visited.add(id(layer))
                if not any(_qualified(cls) in (_DENSE, _EINSUM_DENSE) for cls in type(layer).__mro__):
                    continue
                name = _free_name(_path(layer), names)
                names.add(name)
                form = _form(layer)
                if isinstance(form, Reason):
                    self._others.append((prefixes[id(root)] + name, form))
                else:
                    call = _Call(layer, weakref.ref(root), name, *form)
                    self._calls.append((call, _linear(call)))

    def __enter__(self) -> KerasLinears:
        self.put()
        return self

    def __exit__(self, *_: object) -> None:
        if not self.stays:
            self.undo()

    def where_kept(self, keep: str | bool) -> str | bool:
        """Where the originals stay, as `fp.swap` has it: with keras, which holds them, if there are any of its layers."""
        if self._calls and keep in ("cpu", False):
            raise ValueError(
                f'keep={keep!r} is not for layers of keras, which holds their weights itself: pass keep="device"'
            )
        return "device" if self._calls else keep

    def narrow(self, modules: Iterable[nn.Module]) -> None:
        """Leaves the layers whose linears are not among these to keras."""
        ids = {id(m) for m in modules}
        self.undo()
        self._calls = [x for x in self._calls if id(x[1]) in ids]
        self.put()

    def skipped(self, exclude: Iterable[Pattern]) -> list[Skipped]:
        """Dense layers that stay, by their paths, but for those that are excluded."""
        return [Skipped(fqn, why) for fqn, why in self._others if not any(p.matches(fqn) for p in exclude)]

    def put(self) -> None:
        tops = self._tops()
        if self._is_put or not self._calls or not tops:
            return
        self._is_put = True
        for call, linear in self._calls:
            call.root()._modules[call.name] = linear  # type: ignore[union-attr]
            vars(call.layer)["call"] = call
        for owner in self._owners():
            for name in _REFUSED:
                if hasattr(type(owner), name):
                    vars(owner)[name] = _Refusal(name, vars(owner).get(name))
        paths = {variable.path for call, _ in self._calls for variable in _variables(call.layer)}
        for pd in _shown(tops):  # torch finds these weights in the linears now
            self._hidden += [(values, dict(values)) for values in (pd._keys, pd._parameters)]
            for path in paths & pd._keys.keys():
                del pd[path]

    def undo(self) -> None:
        if not self._is_put:
            return
        self._is_put = False
        while self._hidden:
            values, before = self._hidden.pop()
            since = dict(values)
            values.clear()
            values.update({**before, **since})
        for owner in self._owners():
            for name in _REFUSED:
                if isinstance(refusal := vars(owner).get(name), _Refusal):
                    del vars(owner)[name]
                    if refusal.before is not None:
                        vars(owner)[name] = refusal.before
        for call, _ in self._calls:
            vars(call.layer).pop("call", None)
            if (root := call.root()) is not None:
                root._modules.pop(call.name, None)

    def _tops(self) -> list[Any]:
        return [root for ref in self._roots if (root := ref()) is not None]

    def _owners(self) -> list[Any]:
        """What has methods that would change the weights: the layers, and all that they are in."""
        ids = {id(call.layer) for call, _ in self._calls}
        around = (
            layer
            for root in self._tops()
            for layer in root._flatten_layers(include_self=True)
            if any(id(x) in ids for x in layer._flatten_layers(include_self=False))
        )
        return list(dict.fromkeys((*(call.layer for call, _ in self._calls), *around)))


def _shown(tops: Iterable[Any]) -> list[nn.ParameterDict]:
    """What torch sees of the variables of keras layers."""
    for root in tops:
        root.torch_params  # noqa: B018, which makes the root's where it is not there yet
    return [pd for root in tops for m in root.modules() if (pd := m._modules.get("_torch_params")) is not None]


def _path(layer: Any) -> str:
    """As keras names its variables, if it has any."""
    kernel = getattr(layer, "_kernel", None)
    return layer.name if kernel is None else kernel.path.rpartition("/")[0]


def _free_name(path: str, names: Collection[str]) -> str:
    return next(name for i in range(len(names) + 1) if (name := path if i == 0 else f"{path}#{i + 1}") not in names)


def _variables(layer: Any) -> list[Any]:
    return [layer._kernel] if layer.bias is None else [layer._kernel, layer.bias]


def _form(layer: Any) -> tuple[int, tuple[int, ...]] | Reason:
    """(axes of the input that are summed over, sizes of the output's last axes), or why it is no Linear."""
    cls = type(layer)
    if _qualified(cls) not in (_DENSE, _EINSUM_DENSE):
        return Reason(
            "subclass", f"{_qualified(cls)} derives from a layer of keras and may compute something else", "leave it"
        )
    if not layer.built:
        return Reason(
            "uninitialized",
            "it is not built, and has no weight before its first call",
            "run the model on a batch first",
        )
    if layer.quantization_mode is not None or layer.lora_enabled:
        what = "has a LoRA" if layer.lora_enabled else f"is quantised by keras ({layer.quantization_mode})"
        return Reason("keras", f"it {what}", "swap the layer as it was before")
    if layer._remat_mode is not None or "call" in vars(layer):
        return Reason(
            "hooks", "its call was replaced on the instance, or is run again for gradients", "remove that first"
        )
    if layer.compute_dtype != layer.variable_dtype:
        return Reason("dtype", f"it computes in {layer.compute_dtype}, with weights in {layer.variable_dtype}",
                      "build the model with one dtype (keras.config.set_dtype_policy)")  # fmt: skip
    kernel = layer._kernel.shape
    summed = 1 if _qualified(cls) == _DENSE else _summed_axes(layer.equation)
    if summed is None or (layer.bias is not None and layer.bias.shape != kernel[summed:]):
        return Reason(
            "equation", f"{layer.equation}, with a bias over {layer.bias_axes}, is no product with a matrix", "leave it"
        )
    return summed, tuple(kernel[summed:])


def _summed_axes(equation: str) -> int | None:
    """How many of the input's last axes, and of the kernel's first, are summed over, where that is all that an equation says:
    ab…K, KN -> ab…N."""
    operands, _, output = equation.replace(" ", "").partition("->")
    inputs, _, kernel = operands.partition(",")
    for k in range(1, len(kernel)):
        summed, outer, batch = kernel[:k], kernel[k:], inputs[:-k]
        if (
            inputs.endswith(summed)
            and output == batch + outer
            and not set(kernel) & set(batch)
            and len(set(kernel)) == len(kernel)
        ):
            return k
    return None


def _linear(call: _Call) -> nn.Linear:
    """On the memory of the layer's kernel and bias."""
    kernel, *bias = (v.value.detach() for v in _variables(call.layer))
    n = math.prod(call.sizes)
    linear = nn.Linear(kernel.numel() // n, n, bool(bias), device="meta")
    for name, t in zip(("weight", "bias"), (kernel.reshape(-1, n).t(), *(b.reshape(n) for b in bias))):
        linear._parameters[name] = nn.Parameter(t, requires_grad=False)
    return linear.eval()
