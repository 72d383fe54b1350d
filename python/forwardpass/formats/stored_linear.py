"""StoredLinear: what a file holds of a layer, in the layer's place until it is made into one of forwardpass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import QuantizedLinear
from .recipe import Header, Recipe


class StoredLinear(nn.Linear):
    """Parameters of the names, shapes and dtypes that the file has, on the meta device until they are loaded. Computes nothing."""

    def __init__(self, in_features: int, out_features: int, tensors: Mapping[str, Header], recipe: Recipe) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.recipe = in_features, out_features, recipe
        for name, header in {"bias": None, **tensors}.items():
            empty = None if header is None else torch.empty(header.shape, dtype=header.dtype, device="meta")
            self.register_parameter(name, None if empty is None else nn.Parameter(empty, requires_grad=False))
        if "weight" not in tensors:  # T5 and GPT-BigCode initialise their layers' by name
            vars(self)["weight"] = torch.empty(0)

    def made(self, activation: str | None, dtype: torch.dtype) -> QuantizedLinear:
        """The layer that takes its tensors over; dtype: of the model's floats."""
        tensors: dict[str, Tensor] = {name: p.detach() for name, p in self._parameters.items() if p is not None}
        stored = self.recipe.read(tensors)
        stored.check_size("its weight", self.out_features, self.in_features)
        return stored.layer(tensors.get("bias"), activation, dtype).train(self.training)

    def forward(self, x: Any) -> Any:
        raise NotImplementedError("this layer of a checkpoint is not made into one that computes")
