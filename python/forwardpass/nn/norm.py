"""QuantizingNorm: a norm that gives an MLP its rows in 8 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..common.models.modules import is_watched
from ..dispatch import gpu_takes
from ..ops.norm_quantize import NORM_QUANTIZE
from .guard import code_guard
from .linear.quantized_inputs import Quantized, rows
from .mlp import TwoProducts


class QuantizingNorm(nn.Module):
    """A norm whose output goes to an MLP and nowhere else. On a GPU the normalised rows are quantised in the same pass, as the
    MLP's first layer quantises its input, and never rounded to 16 bits: 3 bytes move for each value of 16 bits, where a norm
    and a quantisation of one pass each move 7.

    Elsewhere it is the norm that it was made from, and so it is where something may look at what it returns: hooks on it or on the
    MLP, autocast, another module in the MLP's place, other code in the class of the norm or of what calls it. On a CPU the first
    layer quantises rows while they are in cache.

    `fp.swap` makes it. It has the very parameters of the other norm, by the same names.

    Args:
        norm: the one that it stands for.
        holder, name: the module that calls it, and that one's name for the MLP.
        kind, eps, offset: what the norm computes, in the words of `norm_quantize`; offset: what is added to its weight.

    Shapes: input [..., K]; output [..., K], or a `Quantized` of that.

    Example:
        >>> block, norm = torch.nn.Module(), torch.nn.LayerNorm(64)
        >>> up = fp.nn.Int8Linear.from_torch(torch.nn.Linear(64, 256), activation="gelu")
        >>> block.mlp = fp.nn.MLP.from_layers(up, fp.nn.Int8Linear.from_torch(torch.nn.Linear(256, 64)))
        >>> block.norm = fp.nn.QuantizingNorm(norm, block, "mlp", "layer", norm.eps, 0.0)
        >>> with torch.inference_mode():
        ...     block.mlp(block.norm(torch.randn(4, 64))).shape
        torch.Size([4, 64])
    """

    def __init__(self, norm: nn.Module, holder: nn.Module, name: str, kind: str, eps: float, offset: float) -> None:
        super().__init__()
        state = vars(self)
        state.update(
            {key: value for key, value in vars(norm).items() if key not in state}
        )  # what others may ask it for
        #: the same dicts: what is put into one, by a cast or a checkpoint, is in both
        state.update(_parameters=norm._parameters, _buffers=norm._buffers, training=norm.training)
        self._norm = (norm,)  # in tuples, which hold no children
        self._reader = (holder, name)
        self._computes: tuple[str, float, float] = (kind, eps, offset)
        #: of the code whose formula this is, and of the code that hands what it gives to the MLP alone
        self._guards = code_guard(type(norm)), code_guard(type(holder))

    @property
    def written(self) -> nn.Module:
        """The norm that it stands for."""
        return self._norm[0]

    def _quantization(self, x: Tensor) -> tuple[torch.dtype, bool, Tensor | None, int | None] | None:
        """How the one layer that reads it quantises rows; None where the result is to be floats."""
        if torch.is_autocast_enabled(x.device.type):
            return None
        holder, name = self._reader
        mlp, weight = holder._modules.get(name), self._parameters.get("weight")
        if not isinstance(mlp, TwoProducts) or is_watched(mlp) or mlp.is_apart or is_watched(self):
            return None
        promotes = weight is not None and weight.dtype != x.dtype  # and the result has another dtype than x
        return None if promotes or not self._is_as_proven() else mlp.layers[0].row_quantization()

    def _is_as_proven(self) -> bool:
        """Whether both still run the code that was read. What is compiled is not asked: it is traced with the code of now."""
        if torch.compiler.is_compiling():
            return True
        modules = self._norm[0], self._reader[0]
        then = "it gives floats, and no rows in 8 bits,"
        return all(guard.is_as_proven(module, then) for guard, module in zip(self._guards, modules))

    def forward(self, x: Tensor) -> Any:
        how = self._quantization(x) if gpu_takes(x.device) else None
        if how is None:
            return self._norm[0](x)
        (dtype, symmetric, channel_scale, rotate), (kind, eps, offset) = how, self._computes
        weight, bias = (self._parameters.get(name) for name in ("weight", "bias"))
        if weight is not None and offset:
            weight = weight.float() + offset  # type: ignore[assignment]
        rotated = () if rotate is None else (rotate,)
        q, scale, zero_point = NORM_QUANTIZE(
            rows(x), weight, eps, dtype, kind, bias, symmetric, channel_scale, *rotated
        )
        return Quantized(q, scale, x.dtype, None if symmetric else zero_point)

    def extra_repr(self) -> str:
        return f"{type(self._norm[0]).__name__}, quantises for {self._reader[1]}"
