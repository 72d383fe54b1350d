"""W8A16Linear: a drop-in for nn.Linear with int8 weights and activations as they are."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..ops import w8a16_gemm
from .layer import QuantizedLinear, as_dtype, linear_weight, quantize_weight, rows


class W8A16Linear(QuantizedLinear):
    """`y = x W^T + b` with W in int8, one scale an output channel, widened as it is read; x keeps its dtype.

    Half (against 16 bits) or a quarter (against 32) of the weight bytes, and their error alone. Made by `from_torch`; the
    constructor makes an empty layer of the same form, for `load_state_dict`. Buffers: weight int8 [N, K], weight_scale fp32
    [N], bias [N] or None. Inference only: raises under grad when the input requires it.
    """

    operation: ClassVar[str] = "w8a16_gemm"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, as_dtype(dtype), device)

    @classmethod
    def from_torch(cls, module: nn.Module) -> W8A16Linear:
        """The 8-bit form of an nn.Linear or a transformers Conv1D, on its device; its weight is read and not changed.

        Raises:
            ValueError: the module does not fit, and how.
        """
        cls._refuse(module)
        weight, bias = linear_weight(module), module.bias
        assert bias is None or isinstance(bias, Tensor)
        layer = cls(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        layer._fill(*quantize_weight(weight), bias)
        return layer.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        return w8a16_gemm(rows(x), self.weight, self.weight_scale, bias=self.bias)
