"""W8A16Linear: a drop-in for nn.Linear with 8-bit weights and activations as they are."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...ops.common.quantized_rows import E4M3
from ...ops.w8a16_gemm import OPERATION
from .quantized_inputs import rows
from .quantized_linear import QuantizedLinear, as_dtype, linear_weight, quantize_weight

SCALES = ("row", "group")


class W8A16Linear(QuantizedLinear):
    """`y = x W^T + b` with W in int8 or e4m3, upconverted as it is read; x keeps its dtype.

    Half (against 16 bits) or a quarter (against 32) of the weight bytes, and their error alone. Made by `from_torch`; the
    constructor makes an empty layer of the same form, for `load_state_dict`. Inference only: raises under grad when the input
    requires it.

    Args:
        in_features, out_features, bias: as in nn.Linear.
        dtype: of the bias; outputs have the dtype of the input.
        weight_dtype: torch.int8 or torch.float8_e4m3fn.
        activation: "relu", "gelu", "gelu_tanh" or "silu", applied to y in the layer's epilogue; None: none, as in nn.Linear.
        scales: "row", one an output channel, or "group", one for 128 columns of it.

    Shapes: input [..., in_features], output [..., out_features]. Buffers: qweight [N, K], weight_scale fp32 [N] or
    [N, ceil(K / 128)], bias [N] or None.

    Raises:
        ValueError: there is no such activation, weight dtype or scales. Calls raise what `fp.ops.w8a16_gemm` raises.

    Example:
        >>> linear, x = torch.nn.Linear(256, 512), torch.randn(4, 256)
        >>> layer = fp.nn.W8A16Linear.from_torch(linear, scales="group")
        >>> layer(x).shape, layer.qweight.dtype, layer.weight_scale.shape
        (torch.Size([4, 512]), torch.int8, torch.Size([512, 2]))
    """

    operation: ClassVar[str] = "w8a16_gemm"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: torch.dtype | str = torch.float32,
        weight_dtype: torch.dtype | str = torch.int8,
        scales: str = "row",
        activation: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        weight_dtype = as_dtype(weight_dtype)
        if weight_dtype not in (torch.int8, E4M3):
            raise ValueError(f"W8A16Linear: weight_dtype must be int8 or float8_e4m3fn, not {weight_dtype}")
        if scales not in SCALES:
            raise ValueError(f"W8A16Linear: scales must be one of {', '.join(SCALES)}, not {scales!r}")
        super().__init__(in_features, out_features, bias, as_dtype(dtype), device, weight_dtype, scales, activation)
        self.scales = scales

    @classmethod
    def from_torch(
        cls,
        module: nn.Module,
        *,
        weight_dtype: torch.dtype | str = torch.int8,
        scales: str = "row",
        activation: str | None = None,
    ) -> W8A16Linear:
        """The 8-bit form of an nn.Linear or a transformers Conv1D, on its device; its weight is read and not changed.

        Raises:
            ValueError: the module does not fit, and how.
        """
        cls._refuse(module)
        weight, bias = linear_weight(module), module.bias
        assert bias is None or isinstance(bias, Tensor)
        n, k = weight.shape
        layer = cls(k, n, bias is not None, dtype=weight.dtype, weight_dtype=weight_dtype, scales=scales,
                    activation=activation, device="meta")  # fmt: skip
        return layer.filled(*quantize_weight(weight, layer.qweight.dtype, scales), bias).train(module.training)

    def product(  # type: ignore[override]
        self, x: Tensor, residual: Tensor | None = None, ada_gate: Tensor | None = None
    ) -> Tensor:
        b = self._buffers
        added = () if residual is None else (residual, ada_gate)
        return OPERATION(rows(x), b["qweight"], b["weight_scale"], b["bias"], self.activation, *added)

    def config(self) -> dict[str, Any]:
        return super().config() | {
            "weight_dtype": str(self.qweight.dtype).removeprefix("torch."),
            "scales": self.scales,
        }

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight={str(self.qweight.dtype).removeprefix('torch.')}, scales={self.scales}"
