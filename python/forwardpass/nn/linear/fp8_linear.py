"""Fp8Linear: a drop-in for nn.Linear with e4m3 weights and e4m3 activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...dispatch import gpu_capability
from ...ops.common.activations import is_gated
from ...ops.common.quantized_rows import E4M3
from ...ops.common.rotation import fitting
from ...ops.fp8_gemm import FP8_GEMM, FP8_GEMM_QUANTIZE
from ...ops.fp8_gemm.reference import BLOCK, columns_scale, rows_scale
from ...ops.fp8_linear import OPERATION
from ...ops.fp8_linear.reference import quantized_input
from ...ops.quantize import OPERATION as QUANTIZE
from .quantized_inputs import Quantized, rows
from .quantized_linear import (
    QuantizedLinear,
    as_dtype,
    as_multiplied,
    linear_weight,
    quantize_weight,
    scales_shape,
)

SCALES = ("tensor", "row", "block")


def _fitting(columns: int, rotate: int | None, scales: str) -> int | None:
    """Columns that are rotated together share a scale."""
    return fitting(columns, rotate if rotate is None or scales != "block" else min(rotate, BLOCK))


class Fp8Linear(QuantizedLinear):
    """`y = x W^T + b` with W and x in float8_e4m3fn, x quantised on the way in.

    Weights have one scale each ("tensor"), one an output channel ("row"), or one for 128 x 128 of them ("block"). Activations
    are quantised as they come (dynamic), per token or, with "block", per 128 channels of a token; or by one scale for all
    (static). With `channel_scale` x is multiplied by it first and the weight has been divided by it (SmoothQuant, arXiv
    2211.10438). Needs a GPU from sm_89 on (L40S, RTX 40, H100); a CPU runs the reference, for trials of its accuracy.

    Made by `from_torch`; the constructor makes an empty layer of the same form, for `load_state_dict`.

    Args:
        in_features, out_features, bias: as in nn.Linear.
        dtype: of the bias; outputs have the dtype of the input.
        activation: "relu", "gelu", "gelu_tanh" or "silu", applied to y in the layer's epilogue; None: none, as in nn.Linear.
        scales: "tensor", "row" or "block"; static: not with "block"; channel_scale: see above.
        rotate: the most columns that are rotated together, 64, 128 or 256 (`fp.ops.quantize`): the largest of these up to it that
            divides in_features, with "block" of 64 and 128; None: not rotated. The attribute says which.

    Shapes: input [..., in_features], output [..., out_features]. Buffers: qweight e4m3 [N, K], weight_scale fp32 [1], [N] or
    [ceil(N / 128), ceil(K / 128)] (of gate and up as one layer [2, ceil(N / 256), ceil(K / 128)]), bias [N] or None,
    channel_scale fp32 [K] or None, input_scale fp32 [1] (static) or None.

    Inference only: raises under grad when the input requires it.

    Raises:
        ValueError: there is no such activation, or no such scales, or static comes with "block". Calls raise what
            `fp.ops.fp8_linear` raises.

    Example:
        >>> linear, x = torch.nn.Linear(256, 512), torch.randn(4, 256)
        >>> layer = fp.nn.Fp8Linear.from_torch(linear, scales="block")
        >>> layer(x).shape, layer.weight_scale.shape
        (torch.Size([4, 512]), torch.Size([4, 2]))
    """

    operation: ClassVar[str] = "fp8_linear"
    weight_dtype: ClassVar[torch.dtype] = E4M3

    channel_scale: Tensor | None
    input_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: torch.dtype | str = torch.float32,
        scales: str = "row",
        static: bool = False,
        channel_scale: bool = False,
        rotate: int | None = None,
        activation: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if scales not in SCALES:
            raise ValueError(f"Fp8Linear: scales must be one of {', '.join(SCALES)}, not {scales!r}")
        if static and scales == "block":
            raise ValueError('Fp8Linear: static activations go with scales "tensor" or "row", not with "block"')
        super().__init__(in_features, out_features, bias, as_dtype(dtype), device, scales=scales, activation=activation)
        self.scales, self.rotate = scales, _fitting(in_features, rotate, scales)
        if scales == "block" and is_gated(activation):  # of the gate matrix, and of the up matrix
            shape = 2, *scales_shape(out_features // 2, in_features, scales)
            self.weight_scale = torch.empty(shape, dtype=torch.float32, device=device)
        self._optional("channel_scale", channel_scale, in_features)
        self._optional("input_scale", static, 1)

    @classmethod
    def from_torch(
        cls,
        module: nn.Module,
        *,
        scales: str = "row",
        channel_scale: Tensor | None = None,
        input_scale: Tensor | None = None,
        rotate: int | None = None,
        activation: str | None = None,
    ) -> Fp8Linear:
        """The e4m3 form of an nn.Linear or a transformers Conv1D, on its device; its weight is read and not changed.

        Args:
            scales: of the weight, "tensor", "row" or "block".
            channel_scale: fp32 [K], what x is multiplied by; the weight is divided by it here.
            input_scale: fp32 [1] for static activations, of the scaled and rotated x: its largest magnitude over 448.
            rotate: as the constructor's; the weight is rotated here, in fp32.
            activation: what the layer applies to its output, see above.

        Raises:
            TypeError: channel_scale or input_scale is no tensor.
            ValueError: the module or an argument does not fit, and how.
        """
        cls._refuse(module)
        weight, bias = linear_weight(module), module.bias
        n, k = weight.shape
        cls._check_sizes(channel_scale=(channel_scale, k), input_scale=(input_scale, 1))
        assert bias is None or isinstance(bias, Tensor)
        layer = cls(k, n, bias is not None, dtype=weight.dtype, scales=scales, static=input_scale is not None,
                    channel_scale=channel_scale is not None, rotate=rotate, activation=activation, device="meta")  # fmt: skip
        quantized = quantize_weight(as_multiplied(weight, channel_scale, layer.rotate), E4M3, scales)
        layer.filled(*quantized, bias, channel_scale=channel_scale, input_scale=input_scale)
        return layer.train(module.training)

    def product(self, x: Tensor | Quantized, residual: Tensor | None = None, ada_gate: Tensor | None = None) -> Tensor:
        b = self._buffers
        if isinstance(x, Quantized):
            return FP8_GEMM(
                x.values, b["qweight"], x.scale, b["weight_scale"], b["bias"], self.activation, x.dtype, None,
                *(() if residual is None else (residual, ada_gate)),
            )  # fmt: skip
        return OPERATION(
            rows(x),
            b["qweight"],
            b["weight_scale"],
            b["bias"],
            self.activation,
            x.dtype,
            b["input_scale"],
            b["channel_scale"],
            *(() if self.rotate is None and residual is None else (residual, self.rotate, ada_gate)),
        )

    def row_quantization(self) -> tuple[torch.dtype, bool, Tensor | None, int | None] | None:
        if self.input_scale is not None or self.scales == "block":
            return None
        return E4M3, True, self.channel_scale, self.rotate

    def quantizes_for(self, then: QuantizedLinear, device: torch.device) -> bool:
        """Static ones; and those of groups of 128, which a tile of sm_90a's products has whole: others write fp32 first. Scales of
        whole rows no tile has."""
        if not isinstance(then, Fp8Linear) or then.rotate is not None:
            return False
        if then.scales != "block":
            return then.input_scale is not None
        return then.channel_scale is None and gpu_capability(device)[0] == 9

    def quantized_product(self, x: Tensor | Quantized, then: QuantizedLinear) -> Quantized:
        b = self._buffers
        options = b["weight_scale"], b["input_scale"], b["channel_scale"]
        if isinstance(x, Quantized):
            a, a_scale = x.values, x.scale
        else:
            a, a_scale = quantized_input(rows(x), *options, QUANTIZE, self.rotate)  # type: ignore[arg-type]
        product = a, b["qweight"], a_scale, b["weight_scale"], b["bias"], self.activation
        static = then._buffers["input_scale"]
        if static is None:
            q, scale = FP8_GEMM_QUANTIZE(*product, BLOCK)
            return Quantized(q, scale, x.dtype)
        return Quantized(FP8_GEMM(*product, E4M3, then.divisor()), static, x.dtype)

    def _quantized(self, x: Tensor | Quantized) -> Tensor:
        if isinstance(x, Quantized):
            a, a_scale = x.values, x.scale
        else:
            a, a_scale = quantized_input(x, self.weight_scale, self.input_scale, self.channel_scale, rotate=self.rotate)
        return a.double() * rows_scale(a, a_scale, self.scales == "block")

    @staticmethod
    def dequantized(buffers: Mapping[str, Tensor]) -> Tensor:
        q = buffers["qweight"]
        return q.double() * columns_scale(q, buffers["weight_scale"])

    def config(self) -> dict[str, Any]:
        return super().config() | {
            "scales": self.scales,
            "static": self.input_scale is not None,
            "channel_scale": self.channel_scale is not None,
        }

    def extra_repr(self) -> str:
        how = f"{'dynamic' if self.input_scale is None else 'static'}{', smoothed' if self.channel_scale is not None else ''}"
        return f"{super().extra_repr()}, scales={self.scales}, activations=float8_e4m3fn {how}"
