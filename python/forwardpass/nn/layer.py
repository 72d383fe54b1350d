"""What the quantised linear layers share: the weight they come from, buffers that keep their layout and their fp32 scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..backend import Reason
from ..ops import quantize
from ..quantized_rows import FLOATS, empty_q, pad_rows


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D: a Linear with its weight transposed (GPT-2). Does not import transformers."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def linear_weight(module: nn.Module) -> Tensor:
    """The weight [N, K] of an nn.Linear or a Conv1D, detached."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().t() if is_conv1d(module) else weight.detach()


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] to int8 -127..127 and its fp32 scales [N], nearest rounding, one scale an output channel."""
    q, scale, _ = quantize(weight.float().contiguous(), torch.int8)
    return q, scale


class QuantizedLinear(nn.Module):
    """Base of the layers that hold an 8-bit weight in plain buffers: weight int8 [N, K], weight_scale fp32 [N], bias [N] or None.

    Rows of `weight` are padded to 16 bytes in memory, for the kernels; `state_dict` has the plain shape. Scales stay fp32 and
    integers stay integers when the model is cast: `half()` and `to(torch.bfloat16)` change the bias alone.
    """

    keep_float32: ClassVar[tuple[str, ...]] = ("weight_scale",)
    #: the operation that its forward calls
    operation: ClassVar[str]
    #: the deepest K that the layer's kernels take
    max_in_features: ClassVar[int | None] = None

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device: torch.device | str | None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        empty = torch.empty(0, device=device)
        self.register_buffer("weight", empty_q(empty, (out_features, in_features), torch.int8))
        self.register_buffer("weight_scale", torch.empty(out_features, dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def why_not(cls, module: nn.Module) -> Reason | None:
        """None where `from_torch` takes this module, else the reason."""
        if type(module) is not nn.Linear and not is_conv1d(module):
            return Reason(
                "subclass",
                f"it is a {type(module).__name__}, not an nn.Linear",
                "swap it by hand if its forward is Linear's",
            )
        weight = linear_weight(module)
        if weight.is_meta:
            return Reason("meta", "its weight is on the meta device", "load the weights first")
        if weight.dtype not in FLOATS:
            return Reason("dtype", f"its weight is {weight.dtype}", "use float32, float16 or bfloat16")
        n, k = weight.shape
        if n == 0 or k == 0:
            return Reason("empty", f"its weight is {n} x {k}", "nothing is to be gained")
        if cls.max_in_features and k > cls.max_in_features:
            return Reason(
                "too_deep", f"K = {k} could overflow int32 accumulators, the limit is {cls.max_in_features}", "leave it"
            )
        return None

    @classmethod
    def _refuse(cls, module: nn.Module) -> None:
        if reason := cls.why_not(module):
            raise ValueError(f"{cls.__name__}.from_torch: {reason}")

    def _fill(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """Takes over an int8 weight [N, K], its scales [N] and a copy of the bias."""
        self.weight = weight if weight.stride(0) % 16 == 0 else pad_rows(weight)
        self.weight_scale = scale
        if bias is not None:
            self.bias = bias.detach().clone()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        before = {name: getattr(self, name) for name in self.keep_float32}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new is not None and new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        if self.weight.stride(0) % 16:  # .to() makes it contiguous
            self.weight = pad_rows(self.weight)
        return self

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON takes them: `cls(**config)` is this layer without its values."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "dtype": str(self.bias.dtype if self.bias is not None else torch.float32).removeprefix("torch."),
        }

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """torch.float16 from "float16": what `config` writes."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype must be a torch dtype or its name, not {dtype!r}")
    return found


def rows(x: Tensor) -> Tensor:
    """x, or a contiguous copy where the ops would refuse its layout: nn.Linear takes any."""
    if x.is_contiguous() or x.dim() == 0:
        return x
    strides = [x.stride(d) for d in range(x.dim()) if x.shape[d] != 1]
    sizes = [n for n in x.shape if n != 1]
    if x.shape[-1] != 1 and strides[-1:] != [1]:
        return x.contiguous()
    lead = range(len(sizes) - (2 if x.shape[-1] != 1 else 1))
    return x if all(strides[d] == strides[d + 1] * sizes[d + 1] for d in lead) else x.contiguous()
