"""What the quantised linear layers share: the weight they come from, buffers that keep their layout and their fp32 scales."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _is_any_autocast_enabled as is_any_autocast_enabled  # a third of the cost of asking for one device

from ...common.models.modules import HOOK, OLD_FORWARD, hook_alike, is_watched
from ...common.printing.quiet import warn_once
from ...dispatch import Reason, gpu_takes, operations
from ...ops import quantize
from ...ops.common.activations import GATED, PLAIN, activate, check_activation, is_gated, separate_gate_up
from ...ops.common.quantized_rows import E4M3, FLOATS, LEAST_RANGE, empty_q, pad_rows
from ...ops.common.rotation import rotate as rotated
from ...ops.fp8_gemm import BLOCK
from ...ops.w8a16_gemm.reference import dequantize_weight
from ..deferred import Deferred, DeferredProduct
from ..guard import InEpilogue
from .dequantized_weight import ReadableWeight
from .joined import Joined
from .quantized_inputs import Quantized

if TYPE_CHECKING:
    from .sharding import Sharding

#: What other libraries do something by: accelerate, and compressed-tensors, which decompresses what has a scheme.
_NOT_ADOPTED = (HOOK, OLD_FORWARD, "quantization_scheme", "quantization_status", "quantization_enabled")
CONV1D = "transformers.pytorch_utils.Conv1D"


def qualified(cls: type) -> str:
    """The name of a class, with its module's."""
    return f"{cls.__module__}.{cls.__qualname__}"


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a Linear with its weight transposed (GPT-2), or derives from it. Does not import
    transformers."""
    return any(qualified(cls) == CONV1D for cls in type(module).__mro__)


#: Classes that compute x W^T + b and nothing else, as read from their code; what another subclass computes is not known.
_LINEAR = {
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.linear.NonDynamicallyQuantizableLinear",  # out_proj of nn.MultiheadAttention
    CONV1D,
    "timm.layers.linear.Linear",
    "transformers.models.esm.modeling_esmfold.EsmFoldLinear",
    "transformers.models.falcon.modeling_falcon.FalconLinear",
}


#: Those, before users added theirs.
_OF_LIBRARIES = frozenset(_LINEAR)
_FORWARD = nn.Linear.forward


def register_linear(cls: type[nn.Linear]) -> None:
    """Tells `fp.swap` that a subclass of nn.Linear computes x W^T + b and nothing else, so that its layers may be swapped.

    Of a subclass that is not registered nobody knows what it computes: its layers stay, and the report says so.

    Raises:
        TypeError: `cls` is no subclass of nn.Linear.

    Example:
        >>> class NamedLinear(torch.nn.Linear):
        ...     "Differs from nn.Linear in its name."
        >>> fp.register_linear(NamedLinear)
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Linear)):
        raise TypeError(f"register_linear takes a subclass of torch.nn.Linear, not {cls!r}")
    _LINEAR.add(qualified(cls))


def is_linear(module: nn.Module) -> bool:
    """Whether it computes x W^T + b and nothing else: of nn.Linear, of Conv1D, or of a class that is registered."""
    return qualified(type(module)) in _LINEAR and not has_other_forward(type(module))


def has_other_forward(cls: type) -> bool:
    """Whether the forward of a library's Linear is not in that library's file: somebody has put another function there."""
    return qualified(cls) in _OF_LIBRARIES and forward_is_elsewhere(cls)


def forward_is_elsewhere(cls: type) -> bool:
    """Whether the function that is its forward is from another file than the class that has it."""
    owner = next(base for base in cls.__mro__ if "forward" in vars(base))
    code = getattr(vars(owner)["forward"], "__code__", None)
    return code is None or code.co_filename != getattr(sys.modules.get(owner.__module__), "__file__", None)


def linear_weight(module: nn.Module) -> Tensor:
    """The weight [N, K] of an nn.Linear or a Conv1D, detached."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().t() if is_conv1d(module) else weight.detach()


def scales_shape(n: int, k: int, scales: str) -> tuple[int, ...]:
    """The shape of a weight's scales, [N, K]: one for the whole ("tensor"), one an output channel ("row"), one for 128 columns of
    it ("group"), one for 128 x 128 weights ("block")."""
    groups = -(-k // BLOCK)
    return {"tensor": (1,), "row": (n,), "group": (n, groups), "block": (-(-n // BLOCK), groups)}[scales]


def quantize_weight(weight: Tensor, dtype: torch.dtype = torch.int8, scales: str = "row") -> tuple[Tensor, Tensor]:
    """weight [N, K] to int8 -127..127 or e4m3 and its fp32 scales (of "tensor" and "block", for e4m3), nearest rounding."""
    weight = weight.float().contiguous()
    if scales in ("row", "group"):
        q, scale, _ = quantize(weight, dtype, group_size=BLOCK if scales == "group" else None)
        return q, scale.clone(memory_format=torch.contiguous_format)
    if scales == "tensor":
        scale = (weight.abs().amax().clamp(min=LEAST_RANGE) / 448).reshape(1)
        return quantize(weight, dtype, scale=scale)[0], scale
    n, k = weight.shape
    tall, wide = scales_shape(n, k, scales)
    blocks = (
        F.pad(weight, (0, wide * BLOCK - k, 0, tall * BLOCK - n))
        .unflatten(1, (wide, BLOCK))
        .unflatten(0, (tall, BLOCK))
    )
    span = blocks.abs().amax((1, 3), keepdim=True).clamp(min=LEAST_RANGE)
    scaled = (blocks * (448 / span)).flatten(2).flatten(0, 1)[:n, :k]
    return pad_rows(scaled.clamp(-448, 448).to(E4M3)), (span / 448).reshape(tall, wide)


def as_multiplied(weight: Tensor, channel_scale: Tensor | None, rotate: int | None) -> Tensor:
    """weight [N, K] in fp32 as inputs are multiplied by it that were scaled by channel_scale [K], and rotated."""
    weight = weight.float() if channel_scale is None else weight.float() / channel_scale
    return weight if rotate is None else rotated(weight, rotate)


class QuantizedModule(nn.Module):
    """Base of the modules that hold smaller weights in plain buffers, beside their scales and biases (names that end in "bias").

    Rows of 8-bit weights are padded to 16 bytes in memory, for the kernels; `state_dict` has the plain shape. Weights keep
    their dtype and scales stay fp32 when the model is cast: `half()` and `to(torch.bfloat16)` change biases alone.

    Example:
        >>> layer = fp.nn.Int8Linear.from_torch(torch.nn.Linear(256, 512)).to(torch.bfloat16)
        >>> layer.qweight.dtype, layer.weight_scale.dtype, layer.bias.dtype
        (torch.int8, torch.float32, torch.bfloat16)
    """

    activation: str | None  #: that it applies besides
    #: whether `load_state_dict` gave it other values than those that it was made with
    is_loaded: bool = False
    #: Without elements: of the dtype and on the device of the floats that the module stands for, which torch's casts and moves
    #: change with it, and which `next(model.parameters())` finds.
    anchor: nn.Parameter

    def _put_anchor(self, dtype: torch.dtype, device: torch.device | str | None, requires_grad: bool = False) -> None:
        with torch.inference_mode(False):  # for a later cast, which changes it in place
            self.anchor = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad)

    def _move_anchor(self) -> None:
        """To where the values are, once there are some."""
        anchor, device = self._parameters.get("anchor"), next(iter(self._fixed().values())).device
        if anchor is not None and anchor.device != device:
            self._put_anchor(anchor.dtype, device, anchor.requires_grad)

    def as_rows(self, y: Tensor) -> Tensor:
        """An output as tokens or pixels are rows of it."""
        return y

    def exact(self, *args: Tensor) -> Tensor:
        """What forward gives, but for the error of its kernels: in fp64 on the operands that its input is quantised to."""
        raise NotImplementedError

    def activated(self, y: Tensor) -> Tensor:
        """What the module makes of the output of the one that it replaces."""
        return y

    def adopt(self, module: nn.Module) -> None:
        """Takes over from the module that is replaced what was set on it besides: attributes that this one has not, and the hook
        of accelerate that is on it."""
        for name, value in vars(module).items():
            if not hasattr(type(self), name) and name not in _NOT_ADOPTED:  # as `config`
                vars(self).setdefault(name, value)
        hook_alike(self, module)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON takes them: `cls(**config)` is this module without its values."""
        raise NotImplementedError

    def _fixed(self) -> dict[str, Tensor]:
        """The buffers that keep their dtype."""
        return {name: t for name, t in self._buffers.items() if t is not None and not name.endswith("bias")}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModule:
        before = self._fixed()
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:
                setattr(self, name, new := old.to(new.device))
            self._lay_out(name)
        if before:
            self._move_anchor()
        return self

    def _lay_out(self, name: str) -> None:
        """As kernels read a buffer, where it was replaced: .to() makes rows contiguous."""
        t = getattr(self, name)
        if t.itemsize == 1 and t.stride(-2) % 16:
            setattr(self, name, pad_rows(t))

    def settle(self) -> None:
        """Makes what the module keeps beside its buffers, which now have their values."""
        self._move_anchor()

    def _as_now(self, state_dict: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
        """A state dict by today's names: an earlier version, as a model of floats, has a `weight`."""
        name, before = f"{prefix}qweight", f"{prefix}weight"
        if "qweight" not in self._buffers or name in state_dict or before not in state_dict:
            return state_dict
        return {(name if key == before else key): value for key, value in state_dict.items()}

    def check_state_dict(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """RuntimeError where a state dict is of a module that is not swapped, or swapped another way: `copy_` would cut a float
        weight to integers, strict=False would leave weights under scales of another, or pass over all of them."""
        fixed, state_dict = self._fixed(), self._as_now(state_dict, prefix)
        stored = {n for n in self._buffers if not n.endswith("bias") and prefix + n in state_dict}
        cast = not any(t.itemsize == 1 for t in fixed.values())  # a weight of 16 bits
        misfits = [n for n, t in fixed.items() if n in stored and state_dict[prefix + n].dtype != t.dtype
                   and not (cast and state_dict[prefix + n].is_floating_point())]  # fmt: skip
        if misfits or (stored and stored != fixed.keys()):
            name = misfits[0] if misfits else next(iter(fixed))
            other = getattr(state_dict.get(prefix + name), "dtype", "none")
            holds = f"{prefix}{name} holds {fixed[name].dtype} with {', '.join(sorted(fixed))}"
            has = f"{other} with {', '.join(sorted(stored))}"
        elif any(prefix + n in state_dict for n, _ in self.named_buffers()):
            return
        elif others := {name[len(prefix) :].partition(".")[0] for name in state_dict if name.startswith(prefix)}:
            names = sorted({n.partition(".")[0] for n, _ in self.named_buffers()})
            holds, has = f"{prefix[:-1]} holds {', '.join(names)}", f"{', '.join(sorted(others))} in its place"
        else:
            return  # a part of a model, without this layer
        raise RuntimeError(f"load_state_dict: {holds}, and the state dict has {has}: load it into the original model "
                           "(fp.restore(model) brings it back) and swap that, or swap as that model was")  # fmt: skip

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:
        self.check_state_dict(state_dict, prefix)
        state_dict = self._as_now(state_dict, prefix)
        pairs = [
            (t, state_dict[prefix + n]) for n, t in self._buffers.items() if t is not None and prefix + n in state_dict
        ]
        if any(not t.is_meta and not torch.equal(new.to(t.device), t) for t, new in pairs):
            self.is_loaded = True
        if "anchor" in self._parameters and f"{prefix}anchor" not in state_dict:  # of a file, or of an earlier version
            state_dict = {**state_dict, f"{prefix}anchor": self.anchor}
        super()._load_from_state_dict(state_dict, prefix, *others)

    def __getstate__(self) -> dict[str, Any]:
        """torch 2.13 cannot read e4m3 tensors that pickle wrote (torch.save's it can): such a weight travels as bytes."""
        buffers = {n: t.view(torch.uint8) if t is not None and t.dtype == E4M3 else t for n, t in self._buffers.items()}
        return {**vars(self), "_buffers": buffers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, t in self._fixed().items():
            if t.dtype == torch.uint8:
                setattr(self, name, t.view(E4M3))


L = TypeVar("L", bound="QuantizedLinear")


class QuantizedLinear(ReadableWeight, QuantizedModule):
    """Base of the layers: qweight [N, K], of 8 bits or bfloat16, weight_scale fp32 (`scales_shape`; None for bfloat16), bias [N] or
    None.

    `weight` is for code that reads it, and not for the layer: a `DequantizedWeight` of the dtype and in the layout of the weight
    that was replaced. It cannot be written.

    With a gated activation ("silu_mul") rows are those of a gate and an up projection by `interleave_gate_up`, and outputs N / 2.

    Example:
        >>> layer = fp.nn.Int8Linear.from_torch(linear := torch.nn.Linear(256, 512))
        >>> isinstance(layer, fp.nn.QuantizedLinear), layer.weight.shape, layer.weight.dtype
        (True, torch.Size([512, 256]), torch.float32)
        >>> torch.allclose(layer.weight.clone(), linear.weight, atol=float(layer.weight_scale.max()))
        True
    """

    #: of the weight, where the constructor does not say another
    weight_dtype: ClassVar[torch.dtype] = torch.int8
    #: the operation that its forward calls; None: torch's own product
    operation: ClassVar[str | None]
    #: buffers with a row or an element an output
    output_buffers: ClassVar[tuple[str, ...]] = ("qweight", "weight_scale", "bias")
    #: the deepest K that the layer's kernels take
    max_in_features: ClassVar[int | None] = None

    qweight: Tensor
    weight_scale: Tensor  #: None where qweight is bfloat16
    bias: Tensor | None
    joined: Joined | None = None  #: with layers that are called with the same input
    #: what stands in the place of the activation that it computes; in a tuple, which holds no children
    applied: tuple[InEpilogue] | None = None
    #: whether sums are what becomes of its results, so that on a GPU it gives a `Deferred`; where `takes_residual`
    defers: bool = False
    takes_residual: ClassVar[bool] = True
    sharding: Sharding | None = None  #: where it is one process's part of a layer
    #: columns of its inputs, and of qweight, that are rotated together
    rotate: int | None = None
    #: of a part of another layer on the meta device: a copy of that part's buffer of a name
    values: Callable[[str], Tensor] | None = None
    is_transposed: bool = False  #: whether the weight that it stands for is [K, N], as in transformers' Conv1D
    #: input_scale and channel_scale, and the one over the other
    _divided: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None,
        weight_dtype: torch.dtype | None = None,
        scales: str | None = "row",
        activation: str | None = None,
    ) -> None:
        super().__init__()
        check_activation(type(self).__name__, activation, (None, *PLAIN, *GATED))
        if is_gated(activation) and out_features % 16:
            raise ValueError(f"{type(self).__name__}: with {activation} out_features must be a multiple of 16, blocks of 8 of gate "
                             f"and 8 of up, and is {out_features}: pad both")  # fmt: skip
        self.in_features, self.out_features, self.activation = in_features, out_features, activation
        shape, weight_dtype = (out_features, in_features), weight_dtype or self.weight_dtype
        if scales is None:
            self.register_buffer("qweight", torch.empty(shape, dtype=weight_dtype, device=device))
            self.register_buffer("weight_scale", None)
        else:
            self.register_buffer("qweight", empty_q(torch.empty(0, device=device), shape, weight_dtype))
            size = scales_shape(out_features, in_features, scales)
            self.register_buffer("weight_scale", torch.empty(size, dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)
        self._put_anchor(dtype, device)

    @classmethod
    def why_not(cls, module: nn.Module) -> Reason | None:
        """None where `from_torch` takes this module, else the reason."""
        if not is_linear(module):
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
        return operations[cls.operation].too_old(weight.device) if cls.operation else None

    @classmethod
    def _refuse(cls, module: nn.Module) -> None:
        if reason := cls.why_not(module):
            raise ValueError(f"{cls.__name__}.from_torch: {reason}")

    def _optional(self, name: str, present: bool, size: int, dtype: torch.dtype = torch.float32) -> None:
        """A vector that the layer may have beside its weight, on the weight's device."""
        empty = torch.empty(size, dtype=dtype, device=self.qweight.device) if present else None
        self.register_buffer(name, empty)

    @classmethod
    def _check_sizes(cls, **sizes: tuple[Tensor | None, int]) -> None:
        """Optional vectors by name, each with the size that it must have."""
        for name, (v, size) in sizes.items():
            if v is not None and not isinstance(v, Tensor):
                raise TypeError(f"{cls.__name__}.from_torch: {name} must be a tensor [{size}], not {type(v).__name__}")
            if v is not None and (v.numel() != size or (v.dim() > 1 and size > 1)):
                raise ValueError(f"{cls.__name__}.from_torch: {name} must have {size} elements in one dimension, and has shape "
                                 f"{tuple(v.shape)}")  # fmt: skip

    def _fill(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """Takes over an 8-bit weight [N, K], its scales and a copy of the bias."""
        self.qweight = weight if weight.stride(0) % 16 == 0 else pad_rows(weight)
        self.weight_scale = scale
        if bias is not None:
            self.bias = bias.detach().clone()

    def _copy(self, **vectors: Tensor | None) -> None:
        """Copies of optional vectors, beside a weight that has been filled in."""
        for name, v in vectors.items():
            if v is not None:
                buffer = getattr(self, name)
                setattr(self, name, v.detach().to(self.qweight.device, buffer.dtype).reshape(-1).clone())

    def filled(self: L, weight: Tensor, scale: Tensor, bias: Tensor | None, **vectors: Tensor | None) -> L:
        """This empty layer with values: a weight that is quantised already, its scales, and vectors beside it."""
        self._fill(weight, scale, bias)
        self._copy(**vectors)
        self.settle()  # here, as a graph that is compiled before the first call would not
        return self

    def forward(self, input: Tensor | Quantized, then: QuantizedLinear | None = None) -> Tensor | Quantized:
        """input: by nn.Linear's name for it. then: a layer for which `quantizes_for` holds, and which is called with the result and
        nothing else."""
        x = input
        if type(input) is not Tensor and isinstance(input, Deferred):  # of most, type alone is asked: it costs less
            x = input.rows_for(self)
        if nn.Linear.forward is not _FORWARD:
            warn_once("nn.Linear.forward is another function than when forwardpass was imported: the layers that were swapped "
                      "before it was put there do not call it")  # fmt: skip
        if is_any_autocast_enabled():
            x = as_autocast(x)
        if then is not None:
            return self.quantized_product(x, then)
        sharding = self.sharding
        if sharding is not None:
            x = sharding.input(x)
        if self.applied is not None and self.applied[0].is_apart:
            y = self._without_activation().product(x)
        elif self.defers and self._may_defer(x):
            samples, rows, _ = x.values.shape if isinstance(x, Quantized) else x.shape
            return DeferredProduct(self, x, torch.Size((samples, rows, self.out_features)))
        else:
            joined = self.joined
            y = self.product(x) if joined is None or isinstance(x, Quantized) else joined(self, x)
        return y if sharding is None else sharding.output(y)

    def _without_activation(self: L) -> L:
        """The same layer, its buffers and what it keeps beside them, which applies no activation."""
        alike = object.__new__(type(self))
        vars(alike).update(vars(self), activation=None)
        return alike

    def _may_defer(self, x: Tensor | Quantized) -> bool:
        """Whether whoever called it may get a `Deferred`: nobody else looks at the result."""
        t = x.values if isinstance(x, Quantized) else x
        if not gpu_takes(t.device) or self.joined is not None or self.sharding is not None or t.dim() != 3:
            return False
        if torch.compiler.is_compiling() or is_watched(self) or torch.is_autocast_enabled(t.device.type):
            return False
        return not (is_gated(self.activation) or (t.requires_grad and torch.is_grad_enabled()))

    def product(self, x: Tensor | Quantized, residual: Tensor | None = None, ada_gate: Tensor | None = None) -> Tensor:
        """x W^T + b and the activation, of this layer alone; with a residual, ada_gate times that plus the residual, as the
        operations have it."""
        raise NotImplementedError

    def row_quantization(self) -> tuple[torch.dtype, bool, Tensor | None, int | None] | None:
        """(dtype, symmetric, channel_scale, rotate), as `norm_quantize` takes them, of a layer that quantises each row of its input
        by itself; else None."""
        return None

    def quantizes_for(self, then: QuantizedLinear, device: torch.device) -> bool:
        """Whether this layer's epilogue can write its output as `then` quantises it, on the GPU that takes such tensors."""
        return False

    def quantized_product(self, x: Tensor | Quantized, then: QuantizedLinear) -> Quantized:
        """`product`, never rounded to 16 bits, as `then` quantises it but for the last bit of a quotient: where that decides
        between two neighbours it may be the other one."""
        raise NotImplementedError

    def divisor(self) -> Tensor:
        """What a static layer's inputs are divided by to be quantised, channel_scale included: [1] or [K]."""
        b, (scale, channel, divided) = self._buffers, self._divided
        if b["channel_scale"] is None:
            return b["input_scale"]  # type: ignore[return-value]
        if divided is None or scale is not b["input_scale"] or channel is not b["channel_scale"]:
            scale, channel = b["input_scale"], b["channel_scale"]
            divided = scale / channel  # type: ignore[operator, arg-type]
            if not torch.compiler.is_compiling():
                self._divided = scale, channel, divided
        return divided

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._divided = (None, None, None)  # it writes into buffers

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_divided": (None, None, None), "_weight": None}

    def _reading(self) -> tuple[Callable[[], Tensor], tuple[int, ...]]:
        q = self.qweight
        return self._read_weight(self._buffers, self.is_transposed, self.rotate), tuple(
            q.shape[::-1] if self.is_transposed else q.shape
        )

    @classmethod
    def _read_weight(
        cls, buffers: Mapping[str, Tensor | None], transposed: bool, rotate: int | None
    ) -> Callable[[], Tensor]:
        """What computes it. Of the buffers and not of the layer, which would then hold itself."""

        def read() -> Tensor:
            weight, smoothing = cls.dequantized(buffers), buffers.get("channel_scale")  # type: ignore[arg-type]
            weight = weight if rotate is None else rotated(weight, rotate)  # back: the matrix is its own inverse
            weight = weight if smoothing is None else weight * smoothing
            return weight.t().contiguous() if transposed else weight

        return read

    def adopt(self, module: nn.Module) -> None:
        super().adopt(module)
        self.stand_for(module)

    def stand_for(self, module: nn.Module, dtype_too: bool = True) -> None:
        """Gives `weight` the layout that it has in the module that is replaced, and the dtype where that is of floats."""
        weight = module.anchor if isinstance(module, QuantizedLinear) else module.weight
        if dtype_too and isinstance(weight, Tensor) and weight.dtype in FLOATS:
            self._put_anchor(weight.dtype, self.qweight.device, weight.requires_grad)
        self.is_transposed = module.is_transposed if isinstance(module, QuantizedLinear) else is_conv1d(module)

    def settle(self, alone: bool = True) -> None:
        """As the base's; not alone: drops what there is beside buffers, as another layer computes for this one."""
        super().settle()

    def outputs(self: L, start: int, size: int) -> L | None:
        """A layer of `size` outputs of this one from `start` on, on views of its buffers; None where they cannot be views."""
        if self.sharding is not None or is_gated(self.activation) or start % 8 or size % 8:
            return None  # 8: biases of 16 bits then begin at 16 bytes
        part = type(self)(**self.config() | {"out_features": size}, device="meta").train(self.training)
        for name, t in self._buffers.items():
            if t is not None and name in self.output_buffers and t.numel() > 1:
                if t.shape[0] != self.out_features:  # a scale for each block
                    return None
                t = t.narrow(0, start, size)
            part._buffers[name] = t
        part.settle()
        return part

    def exact(self, x: Tensor | Quantized) -> Tensor:  # type: ignore[override]
        sharding = self.sharding
        y = self._quantized(x if sharding is None else sharding.input(x)) @ self._dequantized_weight().t()
        y = self.activated(y if self.bias is None else y + self.bias.double())
        return y if sharding is None else sharding.output(y)

    def activated(self, y: Tensor) -> Tensor:
        gate, up = separate_gate_up(y, -1) if is_gated(self.activation) else (y, None)
        return activate(self.activation, gate, up)

    def _quantized(self, x: Any) -> Tensor:
        """In float64, the values that x is quantised to."""
        exact: Tensor = x.double()
        return exact

    def _dequantized_weight(self) -> Tensor:
        return self.dequantized(self._buffers)  # type: ignore[arg-type]

    @staticmethod
    def dequantized(buffers: Mapping[str, Tensor]) -> Tensor:
        """In float64, the weight [N, K] that a layer with these buffers multiplies by."""
        return dequantize_weight(buffers["qweight"], buffers["weight_scale"])

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON takes them: `cls(**config)` is this layer without its values."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "dtype": str(self.anchor.dtype if self.bias is None else self.bias.dtype).removeprefix("torch."),
            **({} if self.activation is None else {"activation": self.activation}),
            **({} if self.rotate is None else {"rotate": self.rotate}),
        }

    def extra_repr(self) -> str:
        activation = "" if self.activation is None else f", activation={self.activation}"
        rotate = "" if self.rotate is None else f", rotate={self.rotate}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}{activation}{rotate}"


def as_autocast(x: Tensor | Quantized) -> Tensor | Quantized:
    """As nn.Linear takes it under torch.autocast, if that is on for its device."""
    device = (x.values if isinstance(x, Quantized) else x).device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x
    dtype = torch.get_autocast_dtype(device)
    if isinstance(x, Quantized):
        return x._replace(dtype=dtype)
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """torch.float16 from "float16": what `config` writes."""
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype):
        raise ValueError(f"dtype must be a torch dtype or its name, not {dtype!r}")
    return resolved
