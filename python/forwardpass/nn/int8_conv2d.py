"""Int8Conv2d: a drop-in for nn.Conv2d with int8 weights and int8 activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.models.modules import is_watched
from ..dispatch import Reason, operations
from ..ops.common.activations import PLAIN, activate, check_activation
from ..ops.common.quantized_rows import FLOATS, LEAST_RANGE, pad_rows
from ..ops.int8_conv2d import OPERATION, output_size
from ..ops.int8_gemm import MAX_K, MAX_K_ZERO_POINT
from ..ops.int8_linear import OPERATION as LINEAR
from ..ops.int8_linear.reference import quantized_input
from ..ops.quantize import OPERATION as QUANTIZE
from ..ops.quantize.reference import quantize as quantize_reference
from .conv2d_classes import Size, is_convolution, padding_of, pair
from .float_conv2d import FoldsNorm, Norm, folded_norm, norm_tensors
from .linear.dequantized_weight import ReadableWeight
from .linear.int8_linear import packed_weight
from .linear.quantized_linear import QuantizedModule, as_autocast, as_dtype
from .unread_image import Compute, Steps, UnreadImage, check_steps, writable

#: Elements of an output from which on it waits for its reader: below, the object that waits takes longer (some 20 us) than what
#: it saves.
LEAST_UNREAD = 1 << 16


class Int8Conv2d(FoldsNorm, ReadableWeight, QuantizedModule):
    """`y = conv2d(x, W) + b` with W in int8, scaled per output channel, and x quantised to int8 on the way in.

    Activations are symmetric, and so zeros that pad an input are zeros. Each sample has a scale of its own as it comes (dynamic),
    as a window mixes pixels; or there is one for all, that calibration found (static). A convolution of 1 x 1 that pads nothing
    mixes none: it is the product of `Int8Linear`, with a scale and a zero point for each pixel, and what calibration finds for
    that: a smoothed input and compensated rounding.

    Inputs and outputs are as nn.Conv2d's. The output is in channels_last memory, whatever the input is in. An input that is not in
    channels_last is copied into it first: of layers in a row the first copies, and what the others get is theirs already. A model
    that is in channels_last as a whole copies nothing.

    Made by `from_torch`; the constructor makes an empty layer of the same form, for `load_state_dict`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in nn.Conv2d; padding is with zeros, as
            many on either side.
        dtype: of the bias, and of the weight that the layer stands for; outputs have the dtype of the input.
        static: whether there is one scale for all inputs.
        channel_scale: whether inputs are multiplied by a scale per channel first (`Int8Linear`); of those of 1 x 1.
        activation: "relu", "gelu", "gelu_tanh", "silu", "relu6" or "hard_swish", applied in the epilogue; None: none.
        folds_norm: whether a BatchNorm2d behind it is computed here too, once `fold` has said which.
        then: what is done with the output, and nothing else, in order: "add" another tensor, an activation by its name, and at the
            end "int8", where `Int8Conv2d`s of one static scale read it. The output is then an `UnreadImage`, and its epilogue
            computes these. `fp.swap` finds it.

    Shapes: input [N, C_in, H, W] or [C_in, H, W], output [N, C_out, H_out, W_out] or [C_out, H_out, W_out]. Buffers: qweight int8
    [C_out, C_in / groups, kh, kw], in channels_last memory; weight_scale fp32 [C_out]; bias [C_out] or None; input_scale fp32 [1]
    (static) or None; of 1 x 1 also weight_sum int32 [C_out], and channel_scale fp32 [C_in] or None.

    Depthwise convolutions and groups of few channels are computed too, and are not faster so: `fp.swap` leaves them in floats.
    Inference only: raises under grad when the input requires it.

    Raises:
        ValueError: there is no such activation. Calls raise what `fp.ops.int8_conv2d` raises.

    Example:
        >>> conv, x = torch.nn.Conv2d(32, 64, 3, padding=1), torch.randn(2, 32, 14, 14)
        >>> layer = fp.nn.Int8Conv2d.from_torch(conv)
        >>> y = layer(x)
        >>> y.shape, y.is_contiguous(memory_format=torch.channels_last), bool((y - conv(x)).norm() < 0.02 * y.norm())
        (torch.Size([2, 64, 14, 14]), True, True)
    """

    operation: ClassVar[str] = "int8_conv2d"

    qweight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor | None
    weight_sum: Tensor | None
    channel_scale: Tensor | None
    padding_mode: str = "zeros"
    transposed: bool = False
    steps: Steps | None = None  #: what comes behind it, or what notes that
    #: a weight, and that weight as a CPU reads it
    _packed: tuple[Tensor | None, Tensor | None] = (None, None)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        dtype: torch.dtype | str = torch.float32,
        static: bool = False,
        channel_scale: bool = False,
        activation: str | None = None,
        folds_norm: bool = False,
        then: list[str] | tuple[str, ...] = (),
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_activation(type(self).__name__, activation, (None, *PLAIN))
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"{type(self).__name__}: groups must divide {in_channels} and {out_channels} channels, and is {groups}"
            )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = pair("kernel_size", kernel_size, 1), pair("stride", stride, 1)
        self.padding, self.dilation = pair("padding", padding, 0), pair("dilation", dilation, 1)
        self.activation, self.folds_norm, self.then = activation, folds_norm, then
        shape, dtype = (out_channels, in_channels // groups, *self.kernel_size), as_dtype(dtype)
        qweight = torch.empty(shape, dtype=torch.int8, device=device, memory_format=torch.channels_last)
        self.register_buffer("qweight", qweight)
        self.register_buffer("weight_scale", torch.empty(out_channels, dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.empty(out_channels, dtype=dtype, device=device) if bias else None)
        form = self.kernel_size, self.padding, groups
        #: whether it is the product of a Linear
        self.is_pointwise = form == ((1, 1), (0, 0), 1) and in_channels <= MAX_K_ZERO_POINT and not static
        if channel_scale and not self.is_pointwise:
            raise ValueError(f"{type(self).__name__}: channel_scale goes with a kernel of 1 x 1, no padding, one group and "
                             "static=False, and only with them")  # fmt: skip
        optional = {
            "input_scale": (static, 1, torch.float32),
            "weight_sum": (self.is_pointwise, out_channels, torch.int32),
            "channel_scale": (channel_scale, in_channels, torch.float32),
        }
        for name, (present, size, kind) in optional.items():
            self.register_buffer(name, torch.empty(size, dtype=kind, device=device) if present else None)
        self._put_anchor(dtype, device)

    @classmethod
    def why_not(cls, module: nn.Module) -> Reason | None:
        """None where `from_torch` takes this module, else the reason."""
        if not is_convolution(module):
            text = f"it is a {type(module).__name__}, not an nn.Conv2d, and may compute something else"
            return Reason("subclass", text, "replace it by a plain nn.Conv2d if it does not")
        weight: Any = module.weight
        if module.padding_mode != "zeros":
            return Reason("padding_mode", f"it pads with {module.padding_mode}, and here zeros are outside", "leave it")
        if padding_of(module) is None:
            text = "it pads one side more than the other, or as its input's size asks for"
            return Reason("padding", text, "pad its input, and let it pad nothing")
        if weight.is_meta:
            return Reason("meta", "its weight is on the meta device", "load the weights first")
        if weight.dtype not in FLOATS:
            return Reason("dtype", f"its weight is {weight.dtype}", "use float32, float16 or bfloat16")
        if not weight.numel():
            return Reason("empty", f"its weight is {' x '.join(map(str, weight.shape))}", "nothing is to be gained")
        if (k := weight[0].numel()) > MAX_K:
            return Reason("too_deep", f"K = {k} could overflow int32 accumulators, the limit is {MAX_K}", "leave it")
        return operations[cls.operation].too_old(weight.device)

    @classmethod
    def from_torch(
        cls,
        module: nn.Module,
        *,
        input_scale: Tensor | None = None,
        channel_scale: Tensor | None = None,
        quantized: tuple[Tensor, Tensor] | None = None,
        activation: str | None = None,
    ) -> Int8Conv2d:
        """The int8 form of an nn.Conv2d, on its device.

        Args:
            module: its weight is read, not kept and not changed.
            input_scale: fp32 [1], positive, of static activations: an input beyond 127 of it saturates.
            channel_scale: fp32 [C_in], what x is multiplied by; the weight is divided by it here. Of 1 x 1.
            quantized: (int8 [C_out, C_in], fp32 [C_out]) in place of nearest rounding, for a weight already divided by
                channel_scale. Of 1 x 1.
            activation: what the layer applies to its output, see above.

        Raises:
            TypeError: a scale is no tensor of floats.
            ValueError: the module or an argument does not fit, and how. A BatchNorm is folded into a convolution by
                `torch.nn.utils.fuse_conv_bn_eval`, before.
        """
        if reason := cls.why_not(module):
            raise ValueError(f"{cls.__name__}.from_torch: {reason}")
        source: Any = module
        for name, scale, size in (
            ("input_scale", input_scale, 1),
            ("channel_scale", channel_scale, source.in_channels),
        ):
            _check_scale(cls.__name__, name, scale, size)
        weight = source.weight.detach()
        padding = padding_of(module)
        assert padding is not None
        layer = cls(
            source.in_channels, source.out_channels, source.kernel_size, source.stride, padding, source.dilation, source.groups,
            source.bias is not None, dtype=weight.dtype, static=input_scale is not None,
            channel_scale=channel_scale is not None, activation=activation, device="meta",
        )  # fmt: skip
        if channel_scale is not None:
            layer.channel_scale = channel_scale.detach().to(weight.device, torch.float32).reshape(-1).clone()
            weight = weight.float() / layer.channel_scale[:, None, None]
        layer.qweight, layer.weight_scale = quantize_convolution(weight) if quantized is None else quantized
        if quantized is not None and (not layer.is_pointwise or tuple(layer.qweight.shape) != tuple(weight.shape[:2])):
            raise ValueError(f"{cls.__name__}.from_torch: quantized goes with a kernel of 1 x 1, as int8 "
                             f"{list(weight.shape[:2])} and float32 [{len(weight)}]")  # fmt: skip
        layer.qweight = layer.qweight.reshape(weight.shape)
        if layer.is_pointwise:
            layer.weight_sum = layer.qweight.sum((1, 2, 3), dtype=torch.int32)
        if source.bias is not None:
            layer.bias = source.bias.detach().clone()
        if input_scale is not None:
            layer.input_scale = input_scale.detach().to(weight.device, torch.float32).reshape(1).clone()
        layer.settle()
        return layer.train(module.training)

    def forward(self, input: Tensor, residual: Tensor | None = None, residual_first: bool = False) -> Tensor:
        """input: by nn.Conv2d's name for it. residual: as the output, and added to it, with residual_first before the
        activation."""
        x, b, q = input, self._buffers, None
        device = b["qweight"].device.type  # type: ignore[union-attr]
        is_cast = device != "meta" and torch.is_autocast_enabled(device)
        if isinstance(x, UnreadImage):
            if not is_cast and (static := b["input_scale"]) is not None:
                q = x.in_int8(static)
            x = x.floats() if q is None else x
        if is_cast:
            x = as_autocast(x)  # type: ignore[assignment]
        images = x if q is None else q
        if images.dim() == 3:
            return self(x[None], None if residual is None else residual[None], residual_first)[0]
        if images.dim() != 4 or images.shape[1] != self.in_channels:
            raise ValueError(f"Int8Conv2d takes an input [N, {self.in_channels}, H, W], or without N, not {list(x.shape)}: "
                             "reshape it")  # fmt: skip
        compute, activation = self._computing(x, q)
        y = None if residual is not None or self.steps is None else self._waiting(compute, activation, x, images)
        if y is None:
            y = compute(activation, residual, residual_first, None)
        if activation is not None and self.applied is not None and residual is None:
            self.applied[0].give(y)
        return y

    @property
    def then(self) -> tuple[str, ...]:
        """What is done with the output, see above."""
        return () if self.steps is None else self.steps.expected or ()

    @then.setter
    def then(self, steps: Sequence[str]) -> None:
        check_steps(steps)
        self.steps = Steps(tuple(steps)) if steps else None

    def _waiting(self, compute: Compute, activation: str | None, x: Tensor, images: Tensor) -> Tensor | None:
        """The output, not yet computed; None where somebody may look at what it is."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_watched(self):
            return None
        if (self.applied is not None and self.applied[0].is_apart) or (
            self.normed is not None and self.normed[0].is_apart
        ):
            return None
        (n, _, *sides), kernel = images.shape, self.kernel_size
        height, width = map(output_size, sides, kernel, self.stride, self.padding, self.dilation)
        if min(n, height, width) < 1 or (torch.is_grad_enabled() and images.requires_grad):
            return None
        assert self.steps is not None
        if self.steps.expected is not None and n * self.out_channels * height * width < LEAST_UNREAD:
            return None
        shape, read_later = (n, self.out_channels, height, width), writable(images) if self.is_pointwise else ()
        dtype = x.float_dtype if isinstance(x, UnreadImage) else x.dtype
        return UnreadImage(
            shape, dtype, images.device, compute, self.steps, activation, read_later, not self.is_pointwise
        )

    def _computing(self, x: Tensor, q: Tensor | None) -> tuple[Compute, str | None]:
        """(what gives the output, the activation that is applied). q: x in steps of input_scale, where it is there."""
        weight_scale, bias, activation = self._epilogue()
        if self.is_pointwise:
            return partial(self._product, x, weight_scale, bias), activation
        dtype = x.float_dtype if isinstance(x, UnreadImage) else x.dtype
        quantized = self._quantized(x) if q is None or self.input_scale is None else (q, self.input_scale)
        return partial(self._convolution, *quantized, dtype, weight_scale, bias), activation

    def _convolution(
        self,
        q: Tensor,
        scale: Tensor,
        dtype: torch.dtype,
        weight_scale: Tensor,
        bias: Tensor | None,
        activation: str | None,
        residual: Tensor | None,
        residual_first: bool,
        out_scale: Tensor | None,
    ) -> Tensor:
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        return OPERATION(
            q, self.qweight, scale, weight_scale, self.stride, self.padding, self.dilation, self.groups, bias, activation,
            dtype if out_scale is None else torch.int8, out_scale, residual, residual_first, self._as_read(),
        )  # fmt: skip

    def _product(
        self,
        x: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        activation: str | None,
        residual: Tensor | None,
        residual_first: bool,
        _: None,
    ) -> Tensor:
        """The linear layer of each pixel, of a kernel of 1 x 1."""
        b, added = self._buffers, None
        if residual is not None:
            added = residual.permute(0, 2, 3, 1).contiguous()
        y = LINEAR(
            self._pixels(x), self.qweight.flatten(1), weight_scale, bias, None if residual_first else activation, x.dtype, None,
            None, False, b["channel_scale"], b["weight_sum"], self._as_read(), *(() if added is None else (added,)),
        ).permute(0, 3, 1, 2)  # fmt: skip
        if not residual_first:
            return y
        return (
            y.relu_() if activation == "relu" else activate(activation, y)
        )  # new memory costs more than the activation

    def _pixels(self, x: Tensor) -> Tensor:
        """Those that a kernel of 1 x 1 looks at, contiguous: [N, H_out, W_out, C]."""
        height, width = self.stride
        x = x if self.stride == (1, 1) else x[:, :, ::height, ::width]
        return x.permute(0, 2, 3, 1).contiguous()

    def _as_read(self) -> Tensor | None:
        """The weight packed, where this machine's kernel reads another than qweight."""
        packed = self._packed
        if torch.compiler.is_compiling():
            return None if torch.compiler.is_exporting() else packed[1]  # exported for other machines
        return packed[1] if packed[0] is self._buffers["qweight"] else self._pack()

    def _pack(self) -> Tensor | None:
        weight = self.qweight
        packed = packed_weight(weight.permute(0, 2, 3, 1).flatten(1)) if self.groups == 1 else None
        self._packed = weight, packed
        return packed

    def _quantized(self, x: Tensor, quantize: Callable[..., Any] = QUANTIZE) -> tuple[Tensor, Tensor]:
        """(x in int8, in channels_last; its scale, [N] or [1])."""
        pixels = x.permute(0, 2, 3, 1)
        static = self._buffers["input_scale"]
        if not pixels.is_contiguous():
            pixels = pixels.contiguous()
        rows = pixels.flatten(1) if static is None else pixels.flatten(0, 2)
        q, scale, _ = quantize(rows, torch.int8, static, None, None, True, None)
        if static is None:
            return q.unflatten(-1, pixels.shape[1:]).permute(0, 3, 1, 2), scale
        return q.unflatten(0, pixels.shape[:3]).permute(0, 3, 1, 2), static

    def _epilogue(self) -> tuple[Tensor, Tensor | None, str | None]:
        """(scales of the weight, bias, activation), with the norm in them where it is computed here."""
        scale, bias = self._buffers["weight_scale"], self._buffers["bias"]
        norm, activation = self.computed
        if norm is not None:
            scale, bias = self._made_of([scale, bias, *norm_tensors(norm)], partial(folded_norm, norm))
        return scale, bias, activation  # type: ignore[return-value]

    def activated(self, y: Tensor) -> Tensor:
        if self.norm is not None:
            y = normed(self.norm[0], y)
        return activate(self.activation, y)

    def as_rows(self, y: Tensor) -> Tensor:
        return y.movedim(-3, -1)

    def in_floats(self, x: Tensor) -> Tensor:
        """The convolution of x by the values of the weight, without the norm and the activation, in x's dtype."""
        weight, bias = self._reading()[0]().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def exact(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if x.dim() == 3:
            return self.exact(x[None])[0]
        weight_scale, bias, activation = self._epilogue()
        if self.is_pointwise:
            q, scale, zero = quantized_input(self._pixels(x), None, None, False, self.channel_scale)
            assert zero is not None
            of_pixels = (q.double() - zero.double()[..., None]) * scale.double()[..., None]
            sums = (of_pixels @ self.qweight.flatten(1).double().t()).permute(0, 3, 1, 2)
        else:
            q, scale = self._quantized(x, quantize_reference)
            geometry = self.stride, self.padding, self.dilation, self.groups
            sums = F.conv2d(q.double(), self.qweight.double(), None, *geometry) * scale.double()[:, None, None, None]
        y = sums * weight_scale.double()[:, None, None]
        return activate(activation, y if bias is None else y + bias.double()[:, None, None])

    def _reading(self) -> tuple[Callable[[], Tensor], tuple[int, ...]]:
        buffers = self._buffers

        def read() -> Tensor:
            q, scale = buffers["qweight"], buffers["weight_scale"]
            assert q is not None and scale is not None
            weight, smoothing = q.double() * scale.double()[:, None, None, None], buffers["channel_scale"]
            return weight if smoothing is None else weight * smoothing.double()[:, None, None]

        return read, tuple(self.qweight.shape)

    def stand_for(self, module: nn.Module, dtype_too: bool = True) -> None:
        """Gives `weight` the dtype that it has in the module that is replaced, where that is of floats."""
        weight = module.weight
        if dtype_too and isinstance(weight, Tensor) and weight.dtype in FLOATS:
            self._put_anchor(weight.dtype, self.qweight.device, weight.requires_grad)

    def adopt(self, module: nn.Module) -> None:
        super().adopt(module)
        self.stand_for(module)

    def _lay_out(self, name: str) -> None:
        if name != "qweight":
            return
        if self.is_pointwise:  # rows of 16 bytes, as a Linear's
            q = self.qweight.flatten(1)
            self.qweight = q.unflatten(1, (-1, 1, 1)) if q.stride(0) % 16 == 0 else pad_rows(q).unflatten(1, (-1, 1, 1))
        else:
            self.qweight = self.qweight.contiguous(memory_format=torch.channels_last)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModule:
        self.unfold()
        return super()._apply(fn, recurse)

    def settle(self) -> None:
        super().settle()
        self.unfold()
        self._lay_out("qweight")
        self._pack()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *others)
        self.settle()  # with assign=True the buffers are the file's

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_weight": None, "_folded": None, "_packed": (None, None)}

    def window(self) -> str:
        """In words: "3 x 3 / 2", with the stride where there is one."""
        kernel, stride = (" x ".join(map(str, p)) for p in (self.kernel_size, self.stride))
        shown = stride if self.stride[0] != self.stride[1] else str(self.stride[0])
        return kernel if self.stride == (1, 1) else f"{kernel} / {shown}"

    def config(self) -> dict[str, Any]:
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": list(self.kernel_size),
            "stride": list(self.stride),
            "padding": list(self.padding),
            "dilation": list(self.dilation),
            "groups": self.groups,
            "bias": self.bias is not None,
            "dtype": str(self.anchor.dtype if self.bias is None else self.bias.dtype).removeprefix("torch."),
            "static": self.input_scale is not None,
            "channel_scale": self.channel_scale is not None,
            "folds_norm": self.folds_norm,
            **({"then": list(self.then)} if self.then else {}),
            **({} if self.activation is None else {"activation": self.activation}),
        }

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}", f"kernel_size={self.kernel_size}", f"stride={self.stride}"]
        parts += [f"padding={self.padding}"] if any(self.padding) else []
        parts += [f"dilation={self.dilation}"] if self.dilation != (1, 1) else []
        parts += [f"groups={self.groups}"] if self.groups > 1 else []
        parts += ["bias=False"] if self.bias is None else []
        parts += ["norm"] if self.folds_norm else []
        parts += [f"activation={self.activation}"] if self.activation else []
        parts += [f"then {', '.join(self.then)}"] if self.then else []
        how = "a pixel" if self.is_pointwise else "a sample" if self.input_scale is None else "static"
        return ", ".join([*parts, f"activations=int8, {how}{', smoothed' if self.channel_scale is not None else ''}"])


def _check_scale(cls: str, name: str, scale: Tensor | None, size: int) -> None:
    if scale is None:
        return
    if not isinstance(scale, Tensor) or not scale.is_floating_point():
        raise TypeError(f"{cls}.from_torch: {name} must be a tensor of floats, not {type(scale).__name__}")
    if scale.numel() != size:
        raise ValueError(f"{cls}.from_torch: {name} must have {size} elements, and has shape {tuple(scale.shape)}")


def quantize_convolution(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [C_out, C, kh, kw] to int8 -127..127, in channels_last memory, and fp32 scales [C_out], nearest rounding."""
    rows = weight.float().permute(0, 2, 3, 1).flatten(1)
    scale = rows.abs().amax(1)
    scale = torch.where(scale < LEAST_RANGE, torch.ones_like(scale), scale / 127)
    q = (rows / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    n, c, kh, kw = weight.shape
    return q.view(n, kh, kw, c).permute(0, 3, 1, 2), scale


def normed(norm: Norm, y: Tensor) -> Tensor:
    """What the norm makes of y, in y's dtype."""
    gamma, beta, mean, variance = (None if t is None else t.to(y.dtype) for t in norm_tensors(norm))
    single = y.dim() == 3
    y = F.batch_norm(y[None] if single else y, mean, variance, gamma, beta, False, 0.0, norm.eps)  # type: ignore[arg-type]
    return y[0] if single else y
