"""FloatConv2d: a convolution in floats with the BatchNorm and the activation behind it; and what it shares with Int8Conv2d."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.common.activations import PLAIN, activate, check_activation
from .conv2d_classes import is_zero_padded, padded
from .guard import InEpilogue
from .linear.quantized_linear import qualified
from .unread_image import UnreadImage

#: What a layer is normalised by, once it is folded: a BatchNorm2d, or what has its tensors.
Norm = nn.Module
T = TypeVar("T")


class FoldsNorm:
    """What a convolution knows of the norm and the activation behind it, which it computes."""

    #: what stands in the place of the activation that it computes, and of the norm; in tuples, which hold no children
    applied: tuple[InEpilogue] | None = None
    normed: tuple[InEpilogue] | None = None
    norm: tuple[Norm] | None = None  #: what it computes behind the convolution, whose tensors stay where they are
    activation: str | None = None
    folds_norm: bool = False
    #: tensors, how often each had been written to, and what was made of them
    _folded: tuple[Sequence[Tensor | None], list[int], Any] | None = None

    def fold(self, norm: Norm | None) -> None:
        """Computes this norm too, by its statistics, from here on; None: no norm. Its tensors stay its own: this layer reads them,
        and where it is cast, loaded or written into the results follow."""
        self.folds_norm, self.norm, self._folded = norm is not None, None if norm is None else (norm,), None

    def unfold(self) -> None:
        """Forgets what was made of tensors: they may be others by the same name."""
        self._folded = None

    @property
    def computed(self) -> tuple[Norm | None, str | None]:
        """(the norm, the activation) that this call computes; another module computes those that are apart."""
        is_normed = self.norm is not None and (self.normed is None or not self.normed[0].is_apart)
        is_apart = (self.folds_norm and not is_normed) or (self.applied is not None and self.applied[0].is_apart)
        return self.norm[0] if is_normed else None, None if is_apart else self.activation  # type: ignore[index]

    def _made_of(self, tensors: Sequence[Tensor | None], make: Callable[..., T]) -> T:
        """make(*tensors), made anew where one of them is another or was written to."""
        if torch.compiler.is_compiling():
            return make(*tensors)
        versions = [0 if t is None or t.is_inference() else t._version for t in tensors]
        before = self._folded
        if (
            before is not None
            and before[1] == versions
            and all(a is t for a, t in zip(before[0], tensors, strict=True))
        ):
            return before[2]
        result = make(*tensors)
        self._folded = tensors, versions, result
        return result


@dataclass
class _Kernel:
    """A weight and a bias with the norm in them, and the weight as oneDNN reads it, once that is needed."""

    weight: Tensor
    bias: Tensor | None
    packed: Tensor | None = None


class FloatConv2d(FoldsNorm, nn.Module):
    """A convolution that stays in floats, with the BatchNorm and the activation behind it.

    Its parameters are the convolution's own, under the same names: casts, checkpoints and writes into them, or into the norm's,
    count. The weight with the norm in it is made of them when it is needed, and kept until one of them changes.

    On a CPU, in float32 and bfloat16, oneDNN computes the activation in its epilogue and reads a weight that is packed once. Then
    the output is in channels_last memory, and an input that is not is copied into it first, as `Int8Conv2d` has it. A depthwise
    3 x 3 of 32 channels at 112 x 112 takes .14 ms so; with ReLU6 in place behind it 1.2 ms, with its BatchNorm besides 2.0 ms (one
    core of an AMD EPYC, Zen 4): the time goes into passes over memory. Elsewhere torch's own convolution and activation run on the
    folded weight: on other devices, in float16, in compiled or traced code, under autocast, and where a gradient is asked for.

    Args:
        convolution: an nn.Conv2d that pads with zeros, or of a class that is known to compute one. It keeps its parameters, which
            are this module's too.
        activation: "relu", "gelu", "gelu_tanh", "silu", "relu6" or "hard_swish"; None: none.

    Raises:
        ValueError: it is no such convolution, or there is no such activation. Calls raise what torch's convolution raises.

    Example:
        >>> conv, norm = torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.BatchNorm2d(8).eval()
        >>> layer = fp.nn.FloatConv2d(conv, "relu6")
        >>> layer.fold(norm)
        >>> x = torch.randn(1, 8, 9, 9)
        >>> torch.allclose(layer(x), torch.nn.functional.relu6(norm(conv(x))), atol=1e-5)
        True
    """

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def __init__(self, convolution: nn.Module, activation: str | None = None) -> None:
        super().__init__()
        check_activation(type(self).__name__, activation, (None, *PLAIN))
        if not is_zero_padded(convolution):
            raise ValueError(f"{type(self).__name__} takes an nn.Conv2d that pads with zeros, not a {type(convolution).__name__} "
                             "that may compute something else: leave it")  # fmt: skip
        state, before = vars(self), vars(convolution)
        state.update((name, value) for name, value in before.items() if name not in state)  # what others may ask it for
        #: the same dicts: what a cast or a checkpoint puts into one is in both
        shared = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")
        state.update((name, before[name]) for name in shared)
        self.training = convolution.training
        self.activation, self.kind = activation, qualified(type(convolution))

    def forward(self, input: Tensor) -> Tensor:
        """input: by nn.Conv2d's name for it."""
        x = input.floats() if isinstance(input, UnreadImage) else input
        if x.dim() == 3:
            return self(x[None])[0]
        norm, activation = self.computed
        tensors = [self._parameters["weight"], self._parameters["bias"], *([] if norm is None else norm_tensors(norm))]
        make = partial(_kernel, norm)
        learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors))
        kernel = make(*tensors) if learns else self._made_of(tensors, make)
        x, padding = padded(self.kind, self, x)
        if learns or not _is_for_onednn(x, kernel.weight, self.groups):
            y = F.conv2d(x, kernel.weight, kernel.bias, self.stride, padding, self.dilation, self.groups)
            y = activate(activation, y) if learns or torch.compiler.is_compiling() else activated(activation, y)
        else:
            y = self._in_one(x, kernel, padding, activation)
        if activation is not None and self.applied is not None:
            self.applied[0].give(y)
        return y

    def _in_one(self, x: Tensor, kernel: _Kernel, padding: tuple[int, int], activation: str | None) -> Tensor:
        """Convolution and activation as one operation of oneDNN, which torch's compiler calls too."""
        x = x.contiguous(memory_format=torch.channels_last)
        form = list(padding), list(self.stride), list(self.dilation), self.groups
        if kernel.packed is None:
            pack: Callable[..., Tensor] = torch._C._nn.mkldnn_reorder_conv2d_weight
            kernel.packed = pack(kernel.weight.to_mkldnn(), *form, list(x.shape))
        return torch.ops.mkldnn._convolution_pointwise(x, kernel.packed, kernel.bias, *form, *_ONEDNN[activation])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FloatConv2d:
        self.unfold()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_folded": None}  # oneDNN's tensors are not copied and not pickled

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}", f"kernel_size={self.kernel_size}", f"stride={self.stride}"]
        parts += [f"groups={self.groups}"] if self.groups > 1 else []
        return ", ".join([*parts, *computes(self)])


def computes(layer: FoldsNorm) -> list[str]:
    """In words: what a convolution computes besides."""
    return ["batch norm"] * layer.folds_norm + ([layer.activation] if layer.activation else [])


#: By activation, what oneDNN calls it, its numbers, and which formula.
_ONEDNN: dict[str | None, tuple[str, list[float], str]] = {
    None: ("none", [], ""),
    "relu": ("relu", [], ""),
    "relu6": ("hardtanh", [0.0, 6.0], ""),
    "silu": ("swish", [], ""),
    "hard_swish": ("hardswish", [], ""),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
}
_IN_PLACE: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hard_swish": F.hardswish,
}


def activated(activation: str | None, y: Tensor) -> Tensor:
    """The activation of y, which nobody else has, in y's memory where torch can: a new tensor of a layer's output costs more than
    to compute it."""
    return _IN_PLACE[activation](y, inplace=True) if activation in _IN_PLACE else activate(activation, y)


def _is_for_onednn(x: Tensor, weight: Tensor, groups: int) -> bool:
    if x.dim() != 4 or x.shape[1] != weight.shape[1] * groups:  # torch's says what is wrong
        return False
    if x.device.type != "cpu" or type(x) is not Tensor or x.dtype != weight.dtype or not x.numel():
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _kernel(norm: Norm | None, weight: Any, bias: Tensor | None, *of_norm: Any) -> _Kernel:
    if norm is None:
        return _Kernel(weight, bias)
    folded, shift = folded_norm(norm, weight.float(), bias, *of_norm)
    return _Kernel(folded.to(weight.dtype), shift.to(weight.dtype))


def folded_norm(
    norm: Norm,
    scale: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    variance: Tensor,
) -> tuple[Tensor, Tensor]:
    """(scales of a weight, or the weight itself, [C_out, ...]; bias), both fp32, with which a convolution gives what the norm makes
    of its output."""
    factor = torch.rsqrt(variance.float() + norm.eps)  # type: ignore[operator]
    if gamma is not None:
        factor = factor * gamma.float()
    shift = -mean.float() if bias is None else bias.float() - mean.float()
    shift = shift * factor
    scale = scale * factor.reshape(-1, *[1] * (scale.dim() - 1))
    return scale, shift if beta is None else shift + beta.float()


def norm_tensors(norm: Norm) -> list[Tensor | None]:
    """Those of a BatchNorm, of which a frozen one has all as buffers: weight, bias, mean, variance."""
    p, s = norm._parameters, norm._buffers
    return [p.get(name, s.get(name)) for name in ("weight", "bias", "running_mean", "running_var")]
