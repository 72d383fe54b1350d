"""Bf16Linear: a drop-in for nn.Linear that multiplies in bfloat16, in models that are not of 16 bits themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...dispatch import Reason
from ...ops import dequant_activation
from ...ops.common.quantized_rows import FLOATS
from .quantized_linear import QuantizedLinear, as_dtype, linear_weight


class Bf16Linear(QuantizedLinear):
    """`y = x W^T + b` with W and x rounded to bfloat16, sums in fp32 and b as it is; y has the dtype of x.

    The product is torch's own: tensor cores on a GPU, oneDNN's on a CPU, twice fp32's speed and more where the CPU multiplies
    bfloat16 (AVX-512 BF16, AMX). Bias and activation are `dequant_activation`'s. Half of the weight bytes of fp32, and about
    3e-3 of relative error on normal data: three roundings, of x, of W and of the product, 1.7e-3 each.

    Made by `from_torch`; the constructor makes an empty layer of the same form, for `load_state_dict`. Inference only: raises
    under grad when the input requires it.

    Args:
        in_features, out_features, bias: as in nn.Linear.
        dtype: of the bias; outputs have the dtype of the input.
        activation: "relu", "gelu", "gelu_tanh" or "silu", applied to y in fp32; None: none, as in nn.Linear.

    Shapes: input [..., in_features], output [..., out_features]. Buffers: qweight bfloat16 [N, K], bias [N] or None.

    Raises:
        ValueError: there is no such activation.
        TypeError: of a call: the input is not float32, float16 or bfloat16.

    Example:
        >>> linear, x = torch.nn.Linear(256, 512), torch.randn(4, 256)
        >>> layer = fp.nn.Bf16Linear.from_torch(linear)
        >>> layer(x).dtype, layer.qweight.dtype
        (torch.float32, torch.bfloat16)
    """

    weight_dtype: ClassVar[torch.dtype] = torch.bfloat16
    operation: ClassVar[str | None] = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: torch.dtype | str = torch.float32,
        activation: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, as_dtype(dtype), device, scales=None, activation=activation)

    @classmethod
    def why_not(cls, module: nn.Module) -> Reason | None:
        if reason := super().why_not(module):
            return reason
        if (dtype := linear_weight(module).dtype) != torch.float32:
            return Reason("dtype", f"its weight has 16 bits already ({dtype})", "leave it, or use int8, fp8 or w8a16")
        return None

    @classmethod
    def from_torch(cls, module: nn.Module, *, activation: str | None = None) -> Bf16Linear:
        """The bfloat16 form of an nn.Linear or a transformers Conv1D in float32, on its device; its weight is not changed.

        Raises:
            ValueError: the module does not fit, and how.
        """
        cls._refuse(module)
        weight, bias = linear_weight(module), module.bias
        assert bias is None or isinstance(bias, Tensor)
        layer = cls(
            weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype, activation=activation, device="meta"
        )
        layer.qweight = weight.to(torch.bfloat16, memory_format=torch.contiguous_format)
        if bias is not None:
            layer.bias = bias.detach().clone()
        layer.settle()
        return layer.train(module.training)

    takes_residual: ClassVar[bool] = False

    def product(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if x.dtype not in FLOATS:  # the product would round it, and say nothing
            raise TypeError(f"Bf16Linear: x must be float32, float16 or bfloat16, not {x.dtype}: convert it with "
                            ".to(torch.float32)")  # fmt: skip
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("Bf16Linear has no backward, and its input requires grad: call it under "
                               "torch.inference_mode(), or detach its input")  # fmt: skip
        y = F.linear(x.to(torch.bfloat16), self.qweight)
        if self.bias is None and self.activation is None:
            return y.to(x.dtype)
        # The bias is not in the product, which would round it: an error that is the same in every row. One operation that takes
        # some rows at a time through the three steps, as int8_linear does on a CPU, was no faster: oneDNN packs the weight in
        # each of its calls.
        return dequant_activation(y, None, None, bias=self.bias, activation=self.activation, out_dtype=x.dtype)

    def _quantized(self, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16).double()

    @staticmethod
    def dequantized(buffers: Mapping[str, Tensor]) -> Tensor:
        return buffers["qweight"].double()
