"""What stands behind a convolution that computes the norm and the activation that stood there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..common.models.modules import are_watched_by_others
from .float_conv2d import FoldsNorm
from .guard import InEpilogue


class InConvolution(InEpilogue):
    """In the place of an activation that a convolution computes behind the norm that it has folded, if any: it leaves out both, or
    this one."""

    _apart = False
    passed: tuple[str, ...] = ()  #: members between the two that are nn.Identity, of what holds them

    @property
    def is_apart(self) -> bool:
        normed = self._of[1].normed
        return self._apart or (normed is not None and normed[0] is not self and normed[0].is_apart)  # type: ignore[union-attr, index]

    @is_apart.setter
    def is_apart(self, value: bool) -> None:
        self._apart = value

    def is_between(self, modules: Mapping[str, nn.Module | None]) -> bool:
        return super().is_between(modules) or any(type(modules.get(name)) is not nn.Identity for name in self.passed)


class FoldedNorm(InConvolution):
    """In the place of a BatchNorm2d whose scale and shift the convolution before it computes in its epilogue.

    It has the very parameters and statistics of the norm, by the same names. Where something has come between the two since, or
    the norm is in training mode, the convolution leaves it out and this one applies it.
    """

    _version = 2  #: of a BatchNorm's state dict

    def _attach(self, layer: nn.Module) -> None:
        norm = self._of[0]
        state = vars(self)
        state.update(
            (key, value) for key, value in vars(norm).items() if key not in state
        )  # what others may ask it for
        #: the same dicts: what is put into one, by a cast or a checkpoint, is in both
        state.update(
            _parameters=norm._parameters,
            _buffers=norm._buffers,
            _non_persistent_buffers_set=norm._non_persistent_buffers_set,
        )
        assert isinstance(layer, FoldsNorm)
        layer.normed = (self,)

    @property
    def is_apart(self) -> bool:
        return self._apart or self.training

    @is_apart.setter
    def is_apart(self, value: bool) -> None:
        self._apart = value

    def is_between(self, modules: Mapping[str, nn.Module | None]) -> bool:
        return modules.get(self._names[0]) is not self._of[1] or super().is_between(modules)

    def train(self, mode: bool = True) -> FoldedNorm:
        self._of[0].train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FoldedNorm:
        super()._apply(fn, recurse)
        self._layer.unfold()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self._of[0]._load_from_state_dict(*args)
        self._layer.unfold()

    @property
    def _layer(self) -> FoldsNorm:
        layer = self._of[1]
        assert isinstance(layer, FoldsNorm)
        return layer


class SharedActivation(nn.Identity):
    """In the place of an activation that stands behind several convolutions, and behind what else: what a convolution has applied
    it to passes, by the very tensor, and all else is activated.

    Of those for which twice is once (ReLU, ReLU6), so that where a tensor is not known again, in another thread or compiled code,
    the result is the same.
    """

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.training = activation.training
        self._of = (activation,)  # in a tuple, which holds no children
        self._activated: Tensor | None = None

    def give(self, y: Tensor) -> None:
        """A tensor that it was applied to."""
        if not torch.compiler.is_compiling():
            self._activated = y

    def forward(self, input: Any) -> Any:
        if not torch.compiler.is_compiling():
            y, self._activated = self._activated, None
            if y is not None and y is input:
                return input
        return self._of[0](input)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_activated": None}

    def extra_repr(self) -> str:
        return f"{type(self._of[0]).__name__}, by layers before it"


class InShared(InConvolution):
    """Beside a `SharedActivation`, of one of the convolutions: it is in no place of the model."""

    shared: tuple[SharedActivation]

    def is_between(self, modules: Mapping[str, nn.Module | None]) -> bool:
        instead = self.shared[0]
        if modules.get(self._names[1]) is not instead:
            return True
        return super().is_between({**modules, self._names[1]: self}) or are_watched_by_others(instead)

    def give(self, y: Tensor) -> None:
        self.shared[0].give(y)
