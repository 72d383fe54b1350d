"""Int8Linear: a drop-in for nn.Linear with int8 weights and int8 activations (W8A8)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...dispatch import library
from ...ops.common.epilogue import per_row
from ...ops.common.rotation import fitting
from ...ops.int8_gemm import MAX_K_ZERO_POINT
from ...ops.int8_gemm import OPERATION as GEMM
from ...ops.int8_linear import OPERATION, pack_int8_weight
from ...ops.int8_linear.reference import quantized_input
from ...ops.quantize import OPERATION as QUANTIZE
from .quantized_inputs import Quantized, rows
from .quantized_linear import QuantizedLinear, as_dtype, as_multiplied, linear_weight, quantize_weight


def packed_weight(weight: Tensor) -> Tensor | None:
    """weight [N, K] as this CPU's kernel reads it; None where none reads another than weight."""
    on_cpu = type(weight) is Tensor and weight.device.type == "cpu" and library.load_error is None
    return pack_int8_weight(weight) if on_cpu else None


class Int8Linear(QuantizedLinear):
    """`y = x W^T + b` with W in int8, scaled per channel, and x quantised to int8 on the way in.

    Activations are quantised per token as they come (dynamic), or by one scale per tensor (static). They are asymmetric by default:
    that costs one multiplication per output, and one-sided activations (after GELU or ReLU) have about half of the error. It needs
    the row sums of the weight, which the layer keeps in `weight_sum`. `fp.ops.int8_linear` keeps nothing, and is symmetric by
    default. With `channel_scale` x is multiplied by it first, and the weight has been divided by it (SmoothQuant, arXiv
    2211.10438).

    Made by `from_torch`; the constructor makes an empty layer of the same form, for `load_state_dict`.

    Args:
        in_features, out_features, bias: as in nn.Linear.
        dtype: of the bias; outputs have the dtype of the input.
        activation: "relu", "gelu", "gelu_tanh" or "silu", applied to y in the layer's epilogue; None: none, as in nn.Linear.
        symmetric, static, channel_scale: which buffers there are, see above.
        rotate: the most columns that are rotated together, 64, 128 or 256 (`fp.ops.quantize`): the largest of these up to it that
            divides in_features, none where none does; None: not rotated. The attribute says which.

    Shapes: input [..., in_features], output [..., out_features]. Buffers: qweight int8 [N, K], weight_scale fp32 [N], bias [N] or
    None, weight_sum int32 [N] (asymmetric), channel_scale fp32 [K] or None, input_scale fp32 [1] and input_zero_point int32 [1]
    (static).

    On a CPU with AVX2 at most it also keeps its weight as the kernel reads it, in about as many bytes again, made from `qweight` on
    the first call after that was replaced. Where `qweight` is written into in place the results follow, but each call packs it
    anew: `layer.qweight = layer.qweight.clone()` ends that. It is no buffer, and not in the state_dict.

    Inference only: raises under grad when the input requires it.

    Raises:
        ValueError: there is no such activation. Calls raise what `fp.ops.int8_linear` raises.

    Example:
        >>> linear, x = torch.nn.Linear(256, 512), torch.randn(4, 256)
        >>> layer = fp.nn.Int8Linear.from_torch(linear)
        >>> y = layer(x)
        >>> y.shape, bool((y - linear(x)).norm() < 0.02 * y.norm())
        (torch.Size([4, 512]), True)
    """

    operation: ClassVar[str] = "int8_linear"
    output_buffers: ClassVar[tuple[str, ...]] = (*QuantizedLinear.output_buffers, "weight_sum")
    max_in_features: ClassVar[int | None] = MAX_K_ZERO_POINT

    weight_sum: Tensor | None
    channel_scale: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    _packed: tuple[Tensor | None, Tensor | None] = (None, None)  #: a weight, and that weight packed

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: torch.dtype | str = torch.float32,
        symmetric: bool = False,
        static: bool = False,
        channel_scale: bool = False,
        rotate: int | None = None,
        activation: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, as_dtype(dtype), device, activation=activation)
        self.symmetric, self.rotate = symmetric, fitting(in_features, rotate)
        self._optional("weight_sum", not symmetric, out_features, torch.int32)
        self._optional("channel_scale", channel_scale, in_features)
        self._optional("input_scale", static, 1)
        self._optional("input_zero_point", static and not symmetric, 1, torch.int32)

    @classmethod
    def from_torch(
        cls,
        module: nn.Module,
        *,
        symmetric: bool = False,
        channel_scale: Tensor | None = None,
        input_scale: Tensor | None = None,
        input_zero_point: Tensor | None = None,
        quantized: tuple[Tensor, Tensor] | None = None,
        bias: Tensor | None = None,
        rotate: int | None = None,
        activation: str | None = None,
    ) -> Int8Linear:
        """The int8 form of an nn.Linear or a transformers Conv1D, on its device.

        Args:
            module: its weight is read, not kept and not changed.
            symmetric: how activations are quantised.
            channel_scale: fp32 [K], what x is multiplied by; the weight is divided by it here.
            input_scale, input_zero_point: fp32 [1] and (asymmetric) int32 [1] for static activations, of the scaled and rotated x.
            quantized: (int8 [N, K], fp32 [N]) in place of nearest rounding, for a weight already divided by channel_scale, and
                rotated.
            bias: in place of the module's own, as a correction of the mean error leaves it.
            rotate: as the constructor's; the weight is rotated here, in fp32.
            activation: what the layer applies to its output, see above.

        Raises:
            TypeError: an argument is of another type or dtype than above.
            ValueError: the module or an argument does not fit, and how.
        """
        cls._refuse(module)
        weight = linear_weight(module)
        n, k = weight.shape
        own_bias = module.bias if bias is None else bias
        cls._check_sizes(channel_scale=(channel_scale, k), input_scale=(input_scale, 1), bias=(bias, n),
                         input_zero_point=(input_zero_point, 1))  # fmt: skip
        if not isinstance(symmetric, bool):
            raise TypeError(f"Int8Linear.from_torch: symmetric must be True or False, not {symmetric!r}")
        if input_zero_point is not None and input_zero_point.is_floating_point():
            raise TypeError(
                f"Int8Linear.from_torch: input_zero_point must be int32, not {input_zero_point.dtype}: round it"
            )
        if (input_zero_point is not None) != (input_scale is not None and not symmetric):
            raise ValueError(
                "Int8Linear.from_torch: input_zero_point goes with input_scale and symmetric=False, and only with them"
            )
        if quantized is None:
            quantized = quantize_weight(as_multiplied(weight, channel_scale, fitting(k, rotate)))
        elif [(t.dtype, tuple(t.shape)) for t in quantized] != [(torch.int8, (n, k)), (torch.float32, (n,))]:
            formats = " and ".join(f"{t.dtype} {list(t.shape)}" for t in quantized[:2])
            raise ValueError(
                f"Int8Linear.from_torch: quantized must be int8 [{n}, {k}] and float32 [{n}], not {formats}"
            )
        layer = cls(k, n, own_bias is not None, dtype=weight.dtype, symmetric=symmetric, static=input_scale is not None,
                    channel_scale=channel_scale is not None, rotate=rotate, activation=activation, device="meta")  # fmt: skip
        assert own_bias is None or isinstance(own_bias, Tensor)
        layer.filled(*quantized, own_bias, channel_scale=channel_scale, input_scale=input_scale,
                     input_zero_point=input_zero_point)  # fmt: skip
        return layer.train(module.training)

    def _fill(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super()._fill(weight, scale, bias)
        if not self.symmetric:
            self.weight_sum = self.qweight.sum(1, dtype=torch.int32)

    def product(self, x: Tensor | Quantized, residual: Tensor | None = None, ada_gate: Tensor | None = None) -> Tensor:
        b, packed = self._buffers, self._packed
        if isinstance(x, Quantized):
            return self._gemm(*self._operands(x), x.dtype, None, residual, ada_gate)
        if torch.compiler.is_compiling():
            if torch.compiler.is_exporting():  # for other machines
                packed = (None, None)
        elif packed[0] is not b["qweight"]:
            packed = self._pack()
        return OPERATION(
            x if x.is_contiguous() else rows(x), b["qweight"], b["weight_scale"], b["bias"], self.activation, x.dtype,
            b["input_scale"], b["input_zero_point"], self.symmetric, b["channel_scale"], b["weight_sum"], packed[1],
            *(() if self.rotate is None and residual is None else (residual, self.rotate, ada_gate)),
        )  # fmt: skip

    def row_quantization(self) -> tuple[torch.dtype, bool, Tensor | None, int | None] | None:
        if self.input_scale is not None:
            return None
        return torch.int8, self.symmetric, self.channel_scale, self.rotate

    def quantizes_for(self, then: QuantizedLinear, device: torch.device) -> bool:
        """Symmetric ones, not rotated: an epilogue adds no zero point, and rotates nothing."""
        return isinstance(then, Int8Linear) and then.symmetric and then.input_scale is not None and then.rotate is None

    def quantized_product(self, x: Tensor | Quantized, then: QuantizedLinear) -> Quantized:
        q = self._gemm(*self._operands(x), torch.int8, then.divisor())
        return Quantized(q, then._buffers["input_scale"], x.dtype)  # type: ignore[arg-type]

    def _operands(self, x: Tensor | Quantized) -> tuple[Tensor, Tensor, Tensor | None]:
        """Quantised input, its scale and zero point, in launches of their own if at all."""
        if isinstance(x, Quantized):
            return x.values, x.scale, x.zero_point
        b = self._buffers
        return quantized_input(
            rows(x), b["input_scale"], b["input_zero_point"], self.symmetric, b["channel_scale"], QUANTIZE, self.rotate
        )

    def _gemm(
        self,
        a: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        dtype: torch.dtype,
        out_scale: Tensor | None,
        residual: Tensor | None = None,
        ada_gate: Tensor | None = None,
    ) -> Tensor:
        b = self._buffers
        return GEMM(
            a, b["qweight"], scale, b["weight_scale"], b["bias"], self.activation, dtype, out_scale, zero_point,
            b["weight_sum"], *(() if residual is None else (residual, ada_gate)),
        )  # fmt: skip

    def settle(self, alone: bool = True) -> None:
        super().settle(alone)
        if alone:
            self._pack()
        else:
            self._packed = (None, None)

    def packed(self) -> Tensor | None:
        """qweight as this CPU's kernel reads it, if in another way than it is."""
        return (self._packed if self._packed[0] is self.qweight else self._pack())[1]

    def _pack(self) -> tuple[Tensor | None, Tensor | None]:
        weight = self.qweight
        self._packed = packed = (weight, packed_weight(weight))
        return packed

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._packed = (None, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_packed": (None, None)}  # another process may read it another way

    def _quantized(self, x: Tensor | Quantized) -> Tensor:
        if isinstance(x, Quantized):
            q, scale, zero_point = x.values, x.scale, x.zero_point
        else:
            q, scale, zero_point = quantized_input(
                x, self.input_scale, self.input_zero_point, self.symmetric, self.channel_scale, rotate=self.rotate
            )
        a = q.double() if zero_point is None else q.double() - zero_point.reshape(per_row(zero_point, q))
        return a * scale.reshape(per_row(scale, q)).double()

    def config(self) -> dict[str, Any]:
        return super().config() | {
            "symmetric": self.symmetric,
            "static": self.input_scale is not None,
            "channel_scale": self.channel_scale is not None,
        }

    def extra_repr(self) -> str:
        how = f"{'symmetric' if self.symmetric else 'asymmetric'} {'dynamic' if self.input_scale is None else 'static'}"
        return f"{super().extra_repr()}, activations=int8 {how}{', smoothed' if self.channel_scale is not None else ''}"
