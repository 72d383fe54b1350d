"""accelerate's offloading of buffers (`offload_buffers=True`), where the integers of a swapped model are.

accelerate looks a module's tensors up in the model's `state_dict`. That of a gated MLP has gate and up as the layers that they
were, and no tensor of the product that they are. accelerate's hook on that product keeps these itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from ..common.imports import when_imported
from ..nn import QuantizedLinear
from ..ops.common.activations import is_gated
from . import patches


def register_when_imported() -> None:
    """As soon as accelerate is imported, or now."""
    when_imported("accelerate.hooks", _register)


def _register() -> None:
    from accelerate.hooks import AlignDevicesHook

    patches.put(AlignDevicesHook, "init_hook", _keeping)


def _keeping(init_hook: Callable[[Any, nn.Module], nn.Module]) -> Callable[[Any, nn.Module], nn.Module]:
    @functools.wraps(init_hook)
    def keep_and_init(self: Any, module: nn.Module) -> nn.Module:
        if (
            self.offload
            and self.offload_buffers
            and isinstance(module, QuantizedLinear)
            and is_gated(module.activation)
        ):
            self.weights_map = None  # accelerate then makes one of the module's own tensors
        return init_hook(self, module)

    return keep_and_init
