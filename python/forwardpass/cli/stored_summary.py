"""What a command says of a model that another library stored in 8 bits, in the words of a swap's report (extra `cli`)."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..common.models.modules import tensor_bytes
from ..nn.linear.quantized_linear import is_linear
from ..swap import originals
from ..swap.precision import STORED


def as_reported(model: nn.Module, before: nn.Module) -> dict[str, Any]:
    """Entries of a report's JSON, for a model whose bytes were taken over; before: what transformers has of the same folder."""
    layers, _ = originals.separate_layers(model)
    stays = [name for name, m in model.named_modules() if is_linear(m)]
    reason = {"code": "floats", "text": "the file holds no 8 bits of it", "fix": ""}
    sizes = [tensor_bytes(m.modules()) for m in (before, model)]
    return {
        "swapped": [
            {"fqn": name, "precision": STORED.name, "version": STORED.version, "module": type(layer).__name__}
            for name, layer in layers.items()
        ],
        "attention": [{"fqn": name} for name in originals.swapped_attention(model)],
        "unpadding": {"encoders": [], "reason": None},
        "skipped": [{"fqn": name, **reason} for name in stays],
        "other_layers": [],
        "kv_cache": None,
        "warnings": [],
        "weight_bytes": {
            "before": sizes[0],
            "after": sizes[1],
            "originals": 0,
            "originals_device": None,
            "peak": sizes[1],
        },
    }
