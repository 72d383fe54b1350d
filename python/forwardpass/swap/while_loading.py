"""Layers that are quantised while a model of floats is read: each as soon as its last tensor is there. So one layer at a time is in
memory as floats.

Until the model as a whole is swapped such a layer stays in its place, with its biases and a weight of made-up values in a few
kilobytes. That of a module of experts is in the memory of one expert, for all modules of that shape. Whatever looks at the model
meanwhile finds the modules, shapes, dtypes and devices that it knows. It can run the model, too, as the proofs of rewritings do:
they are about code, not about values.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from ..common.models.modules import tensor_bytes
from ..proofs.inputs import made_up_weight
from ..proofs.walker import Leaf, experts_leaves, linear_leaves
from .config import Config
from .decision import precision_of
from .precision import EARLY, Early
from .rules import Context, why_skip
from .swapping import quantised


class WhileLoading:
    """A model without values, into which parameters are put as they are read.

    Args:
        model: on the meta device.
        config: what is then swapped, without calibration, and without originals.
        dtype: that parameters are read in. Layers of another one are not taken.
        tied: names of parameters that others share: those are not taken, as others need them as they are.
    """

    def __init__(self, model: nn.Module, config: Config, dtype: torch.dtype, tied: set[str]) -> None:
        plan = config.stored_plan
        self._planned = None if plan is None else plan.precisions()
        self._context = Context(model, config.included, config.excluded, config.presets)
        self._context.memory.clear()  # that of tensors that make way
        self._leaves: dict[str, Leaf] = {}  #: by the names of parameters
        self._awaited: dict[int, set[str]] = {}  #: names of the parameters that a module waits for
        self._early: dict[str, Early] = {}
        self._one_expert: dict[tuple[Any, ...], Tensor] = {}  #: made-up weights by shape, dtype and device
        for leaf in (*linear_leaves(model), *experts_leaves(model)):  # the swap of the model reads its code
            names = {f"{leaf.fqn}.{name}": p for name, p in leaf.module._parameters.items() if p is not None}
            if tied.isdisjoint(names) and all(p.dtype == dtype and _is_plain(p) for p in names.values()):
                self._leaves |= dict.fromkeys(names, leaf)
                self._awaited[id(leaf.module)] = {*names}

    def takes(self, name: str) -> bool:
        """Whether `put` takes the parameter of that name."""
        leaf = self._leaves.get(name)
        return leaf is not None and _is_plain(leaf.module._parameters[name.rpartition(".")[2]])

    def refuse(self, name: str) -> None:
        """Takes no parameter any more of the layer that has this one: it is loaded as if nobody quantised it."""
        for other in self._awaited.pop(id(self._leaves[name].module)):
            self._leaves.pop(other)

    def check_taken(self) -> None:
        """RuntimeError where the swap of the model found a layer no more, whose floats are gone."""
        if lost := [fqn for fqn, early in self._early.items() if early.module is not None]:
            raise RuntimeError(f"{lost[0]} was quantised while the model was loaded, and is not where it was: load the model "
                               "without quantization_config=, and call fp.swap")  # fmt: skip

    @torch.no_grad()
    def put(self, name: str, value: nn.Parameter) -> None:
        """A parameter with its value, in its place. The last one of a layer: quantises it."""
        leaf = self._leaves[name]
        leaf.module._parameters[name.rpartition(".")[2]] = value
        awaited = self._awaited[id(leaf.module)]
        awaited.discard(name)
        if not awaited:
            with contextlib.suppress(
                Exception
            ):  # the swap of the model does it again, and raises it: transformers would hide it
                self._quantise(leaf)

    def _quantise(self, leaf: Leaf) -> None:
        """Where the swap of the model will take it: what it then reports of other layers, it finds out itself."""
        precision = precision_of(leaf, self._context.presets, self._planned, calibrated=False)
        if precision is None or why_skip(leaf, self._context, precision.precision, defaults=self._planned is None):
            return
        new, size = quantised(leaf, precision.precision, {}), tensor_bytes([leaf.module])
        floats = {p.untyped_storage()._cdata for p in leaf.module._parameters.values() if p is not None}
        for name, t in new.named_buffers():
            if t.untyped_storage()._cdata in floats:  # of a file that is mapped, which would stay
                new.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = t.clone()
        for name, p in [*leaf.module._parameters.items()]:
            if p is not None:
                leaf.module._parameters[name] = self._in_place_of(p)
        vars(leaf.module)[EARLY] = early = Early(precision, new, size)
        self._early[leaf.fqn] = early

    def _in_place_of(self, p: nn.Parameter) -> nn.Parameter:
        """A parameter of the same shape, dtype, device and attributes, without the memory."""
        new = nn.Parameter(p.detach().clone() if p.dim() < 2 else self._made_up(p), p.requires_grad)
        vars(new).update(vars(p))
        return new

    def _made_up(self, p: Tensor) -> Tensor:
        """Random values as large as those of a layer that was just initialised, others for each layer: a proof would not see else
        that two of them are exchanged. Rows of experts are apart, as the products of torch and transformers want it, and alike in
        all experts.
        """
        *experts, n, k = p.shape
        seed = len(self._early)
        if not experts:
            return made_up_weight(n, k, p.dtype, p.device, seed)
        key = n, k, p.dtype, p.device
        if key not in self._one_expert:
            generator = torch.Generator().manual_seed(seed)
            matrix = torch.empty(n, k, dtype=p.dtype).normal_(std=k**-0.5, generator=generator)
            self._one_expert[key] = matrix.to(p.device)
        return self._one_expert[key].expand(p.shape)


def _is_plain(p: Tensor | None) -> bool:
    """Whether it is a whole tensor, and no part of one that is divided between processes."""
    return type(p) is nn.Parameter and type(p.data) is Tensor
