"""Experts: all experts of a mixture in one module, their weights in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..dispatch import Reason, use_backend
from ..ops.common.activations import GATED, PLAIN, check_activation, interleave_gate_up, is_gated
from ..ops.common.experts import MOST_EXPERTS, rows_of_choices
from ..ops.common.quantized_rows import E4M3, FLOATS, empty_q
from ..ops.fp8_gemm import BLOCK
from ..ops.fp8_grouped_gemm import block_scales
from .linear.quantized_inputs import rows
from .linear.quantized_linear import QuantizedModule, as_dtype, quantize_weight, scales_shape

#: What activations are quantised to (None: they stay as they are), what weights are, and what has a scale, as `quantize_weight`
#: names it.
_KINDS: dict[str, tuple[torch.dtype | None, torch.dtype, str]] = {
    "int8": (torch.int8, torch.int8, "row"),
    "fp8": (E4M3, E4M3, "row"),
    "fp8_block": (E4M3, E4M3, "block"),
    "w8a16": (None, torch.int8, "row"),
    "w8a16_group": (None, torch.int8, "group"),
    "w8a16_fp8": (None, E4M3, "row"),
    "w8a16_fp8_group": (None, E4M3, "group"),
}
#: What transformers' `use_experts_implementation` sets.
_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
_Gate = Callable[[nn.Module, Tensor], Tensor]


class Experts(QuantizedModule):
    """What transformers' modules of experts compute: of each token the experts that its router chose, weighed and added up::

        y = sum over j of weights[:, j] * down[e](act(gate[e](x)) * up[e](x)),    e = index[:, j]

    Every chosen expert's weights are read once, in 8 bits. Its tokens are rows of one product (`fp.ops.int8_grouped_gemm`, or that
    of the kind); the activation is applied in its epilogue, the sum is in float32, in the order of the choices. A choice that is no
    expert (from num_experts on, as transformers marks those of another device) adds nothing. Made by `from_torch`; the constructor
    makes an empty module of the same form, for `load_state_dict`. Inference only.

    Args:
        num_experts, hidden_features, intermediate_features: E, H and I.
        kind: "int8": weights int8 with a scale an output channel, rows of activations int8 as they come, symmetric; "fp8": the same
            in e4m3, for GPUs from sm_89 on, where a CPU runs the reference, for trials of its accuracy; "fp8_block": in e4m3
            with scales of 128 x 128 weights and of 128 columns of a row (DeepSeek-V3's); "w8a16": int8 weights alone;
            "w8a16_fp8": e4m3 ones; with "_group" behind, for which CUDA has no kernel, with scales of 128 columns of a row.
        gated: whether there is a gate beside the up projection.
        activation: of the up projection, "silu_mul", "gelu_mul" or "gelu_tanh_mul" if gated, and then I is a multiple of 8; else as
            in `Int8Linear`. None: the module that was replaced applies its own, in its own code.
        bias: of both projections.
        dtype: of the biases; outputs have the dtype of the input.

    Shapes: hidden_states [..., H], top_k_index [..., k] int32 or int64, top_k_weights [..., k]; output [..., H]. Buffers:
    up_weight [E, U, H], up_scale fp32 [E, U], up_bias [E, U] or None, with U = 2 I if gated, by `interleave_gate_up` where an
    activation is given; down_weight [E, H, I], down_scale [E, H], down_bias [E, H] or None. With "fp8_block" scales are as
    `fp.ops.fp8_grouped_gemm` has those of blocks.

    Raises:
        ValueError: there is no such kind or activation, or a size does not fit them. Of a call: as `fp.ops.permute_quantize` and
            `fp.ops.unpermute` raise.

    Example:
        >>> from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeExperts
        >>> module = Qwen3MoeExperts(Qwen3MoeConfig(hidden_size=64, moe_intermediate_size=32, num_experts=4))
        >>> experts = fp.nn.Experts.from_torch(module, kind="int8", activation="silu_mul")
        >>> index, weights = torch.tensor([[0, 2], [1, 3], [3, 0]]), torch.rand(3, 2)  # 2 experts of each of 3 tokens
        >>> experts(torch.randn(3, 64), index, weights).shape
        torch.Size([3, 64])
    """

    kinds: ClassVar[tuple[str, ...]] = tuple(_KINDS)

    up_weight: Tensor
    up_scale: Tensor
    up_bias: Tensor | None
    down_weight: Tensor
    down_scale: Tensor
    down_bias: Tensor | None

    def __init__(
        self,
        num_experts: int,
        hidden_features: int,
        intermediate_features: int,
        *,
        kind: str,
        gated: bool = True,
        activation: str | None = None,
        bias: bool = False,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if kind not in self.kinds:
            raise ValueError(f"Experts: kind must be one of {', '.join(self.kinds)}, not {kind!r}")
        check_activation("Experts", activation, (None, *(GATED if gated else PLAIN)))
        if is_gated(activation) and intermediate_features % 8:
            raise ValueError(f"Experts: with {activation} intermediate_features must be a multiple of 8, and is "
                             f"{intermediate_features}: leave the activation out")  # fmt: skip
        if not 1 <= num_experts <= MOST_EXPERTS:
            raise ValueError(f"Experts: num_experts must be from 1 to {MOST_EXPERTS}, and is {num_experts}")
        self.num_experts, self.hidden_features, self.intermediate_features = (
            num_experts,
            hidden_features,
            intermediate_features,
        )
        self.kind, self.gated, self.activation = kind, gated, activation
        sizes = {
            "up": (intermediate_features * (2 if gated else 1), hidden_features),
            "down": (hidden_features, intermediate_features),
        }
        for name, (n, k) in sizes.items():
            weight = empty_q(torch.empty(0, device=device), (num_experts, n, k), self._weight_dtype)
            self.register_buffer(f"{name}_weight", weight)
            of_one = (
                block_scales(n, k, activation if name == "up" else None)
                if self._group
                else scales_shape(n, k, self.scales)
            )
            self.register_buffer(f"{name}_scale", torch.empty(num_experts, *of_one, dtype=torch.float32, device=device))
            self.register_buffer(
                f"{name}_bias", torch.empty(num_experts, n, dtype=as_dtype(dtype), device=device) if bias else None
            )
        self._gate: _Gate | None = None
        self._put_anchor(as_dtype(dtype), device)

    @classmethod
    def why_not(cls, module: nn.Module) -> Reason | None:
        """None where `from_torch` takes this module, else the reason."""
        if not is_experts(module):
            return Reason("experts", f"a {type(module).__name__} is no module of experts as transformers 5 has them",
                          "leave it, or swap its Linears")  # fmt: skip
        for name in weight_names(module):
            weight = module._parameters[name]
            assert weight is not None
            if weight.is_meta:
                return Reason("meta", f"its {name} is on the meta device", "load the weights first")
            if weight.dtype not in FLOATS:
                return Reason("dtype", f"its {name} is {weight.dtype}", "use float32, float16 or bfloat16")
            if not weight.numel():
                return Reason("empty", f"its {name} is {list(weight.shape)}", "nothing is to be gained")
        if (experts := experts_sizes(module)[0]) > MOST_EXPERTS:
            return Reason("experts", f"it has {experts} experts, and kernels take {MOST_EXPERTS}", "leave it")
        return None

    @classmethod
    def from_torch(cls, module: nn.Module, *, kind: str, activation: str | None = None) -> Experts:
        """The 8-bit form of a module of experts of transformers 5, on its device; its weights are read and not changed, those of
        one expert at a time.

        Args:
            kind, activation: see above. Without an activation the module's own `_apply_gate`, or `act_fn`, is called.

        Raises:
            ValueError: the module does not fit, and how.
        """
        if reason := cls.why_not(module):
            raise ValueError(f"Experts.from_torch: {reason}")
        up_name, down_name = weight_names(module)
        experts, intermediate, hidden = experts_sizes(module)
        up, up_bias = module._parameters[up_name], module._parameters.get(f"{up_name}_bias")
        assert up is not None
        new = cls(experts, hidden, intermediate, kind=kind, gated=bool(module.has_gate), activation=activation,
                  bias=up_bias is not None, dtype=up.dtype if up_bias is None else up_bias.dtype, device=up.device)  # fmt: skip
        for name, original in (("up", up_name), ("down", down_name)):
            weight, bias = module._parameters[original], module._parameters.get(f"{original}_bias")
            assert weight is not None
            for e in range(experts):
                w = weight.detach()[e]
                w = w.t() if module.is_transposed else w  # [N, K]
                parts = w.chunk(2) if new._apart(name) else (w,)
                new.fill(e, name, [quantize_weight(part, new._weight_dtype, new.scales) for part in parts],
                         None if bias is None else bias.detach()[e])  # fmt: skip
        new.adopt(module)
        return new.train(module.training)

    def fill(self, expert: int, name: str, parts: Sequence[tuple[Tensor, Tensor]], bias: Tensor | None) -> None:
        """The "up" or "down" projection of one expert: its weight [N, K] in 8 bits and its scales as `quantize_weight` gives them
        for these, in one part, or of a gate and an up projection in two; its bias [N].

        With blocks a gated activation wants two parts: blocks of each begin at its first row.
        """
        weight, scale = (torch.cat(tensors) for tensors in zip(*parts))
        if self._group is None:
            scale = self._arranged(name, scale)
        getattr(self, f"{name}_weight")[expert] = self._arranged(name, weight)
        getattr(self, f"{name}_scale")[expert] = scale.reshape(getattr(self, f"{name}_scale").shape[1:])
        if bias is not None:
            getattr(self, f"{name}_bias")[expert] = self._arranged(name, bias)

    @property
    def _weight_dtype(self) -> torch.dtype:
        return _KINDS[self.kind][1]

    @property
    def scales(self) -> str:
        """What of a weight has a scale, as `quantize_weight` names it."""
        return _KINDS[self.kind][2]

    @property
    def _group(self) -> int | None:
        """Columns of activations that share a scale; None: a row."""
        return BLOCK if self.scales == "block" else None

    def _apart(self, name: str) -> bool:
        """Whether blocks of the gate and of the up projection are each their own."""
        return self._group is not None and name == "up" and is_gated(self.activation)

    def _arranged(self, name: str, x: Tensor) -> Tensor:
        """Rows of the up projection as its epilogue wants them, of all gates and then all ups; others stay."""
        if name == "down" or not self.gated or self.activation is None:
            return x
        gate, up = x.chunk(2)
        return interleave_gate_up(gate, up)

    def adopt(self, module: nn.Module) -> None:
        """And how it applies its gate, whose code reads those attributes, and its norm behind each expert."""
        super().adopt(module)
        if self.activation is None:
            original: Any = type(module)
            self._gate = original._apply_gate if self.gated else _apply_activation
            if isinstance(act := module._modules.get("act_fn"), nn.Module):
                self.act_fn = act
        if isinstance(norm := module._modules.get("post_expert_norm"), nn.Module):
            self.post_expert_norm = norm

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        dtype, group_size = _KINDS[self.kind][0], self._group
        x = rows(hidden_states.flatten(0, -2))
        index, weights = (t.flatten(0, -2).contiguous() for t in (top_k_index, top_k_weights))
        if dtype is None:
            _check_choices(index, x)
            token, offs, position = rows_of_choices(index, self.num_experts)
            a, scale = x[token], None
        else:
            a, scale, offs, position = ops.permute_quantize(x, index, self.num_experts, dtype, group_size=group_size)
        up = self._product("up", a, scale, offs, self.activation, x.dtype)
        if self.activation is None:
            assert self._gate is not None
            up = rows(self._gate(self, up))
        if dtype is not None:
            up, scale, _ = ops.quantize(up, dtype, group_size=group_size)
        y = self._product("down", up, scale, offs, None, x.dtype)
        if (norm := self._modules.get("post_expert_norm")) is not None:
            y = norm(y)
        weights = weights if weights.dtype in (torch.float32, y.dtype) else weights.float()
        return ops.unpermute(y, position, weights).view(hidden_states.shape)

    def _product(
        self, name: str, a: Tensor, scale: Tensor | None, offs: Tensor, activation: str | None, dtype: torch.dtype
    ) -> Tensor:
        b: dict[str, Any] = self._buffers
        weight, weight_scale, bias = (b[f"{name}_{part}"] for part in ("weight", "scale", "bias"))
        if scale is None:
            return ops.w8a16_grouped_gemm(a, weight, weight_scale, offs, bias=bias, activation=activation)
        product = ops.fp8_grouped_gemm if self._weight_dtype is E4M3 else ops.int8_grouped_gemm
        return product(a, weight, scale, weight_scale, offs, bias=bias, activation=activation, out_dtype=dtype)

    def exact(self, *args: Tensor) -> Tensor:
        """By the reference of each operation, in float64 on the same operands; what is between two of them is rounded as in
        forward."""
        with use_backend("reference"):
            return self.forward(*args).double()  # not __call__: hooks are for forward

    def config(self) -> dict[str, Any]:
        bias = self.up_bias
        return {
            "num_experts": self.num_experts,
            "hidden_features": self.hidden_features,
            "intermediate_features": self.intermediate_features,
            "kind": self.kind,
            "gated": self.gated,
            **({} if self.activation is None else {"activation": self.activation}),
            "bias": bias is not None,
            "dtype": str(self.anchor.dtype if bias is None else bias.dtype).removeprefix("torch."),
        }

    def extra_repr(self) -> str:
        return (f"num_experts={self.num_experts}, hidden_features={self.hidden_features}, "
                f"intermediate_features={self.intermediate_features}, kind={self.kind}, gated={self.gated}, "
                f"activation={self.activation or 'its own'}, bias={self.up_bias is not None}")  # fmt: skip


def _check_choices(index: Tensor, x: Tensor) -> None:
    """What permute_quantize checks for the other kinds."""
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"Experts: top_k_index must be int32 or int64, not {index.dtype}: convert it with .long()")
    if index.shape[0] != x.shape[0]:
        raise ValueError(
            f"Experts: top_k_index must have a row for each of {x.shape[0]} tokens, and has {index.shape[0]}"
        )


def experts_operation(kind: str) -> str:
    """The operation that experts of a kind call for their products."""
    return f"{kind.partition('_')[0]}_grouped_gemm"


def is_experts(module: nn.Module) -> bool:
    """Whether it is a module of experts as transformers 5 has them: its decorator left its marks, and its weights are two
    parameters of 3 dimensions. Does not import transformers."""
    if not all(isinstance(vars(module).get(mark), bool) for mark in _MARKS):
        return False
    weights = [module._parameters.get(name) for name in weight_names(module)]
    return all(w is not None and w.dim() == 3 for w in weights)


def weight_names(module: nn.Module) -> tuple[str, str]:
    """The parameters that are the stacks of a module of experts: of its up and of its down projection."""
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def experts_sizes(module: nn.Module) -> tuple[int, int, int]:
    """(E, I, H) of a module of experts."""
    down = module._parameters["down_proj"]
    assert down is not None
    experts, n, k = down.shape
    return (experts, n, k) if module.is_transposed else (experts, k, n)


def _apply_activation(module: nn.Module, x: Tensor) -> Tensor:
    """What transformers does where there is no gate."""
    result: Tensor = module.act_fn(x)  # type: ignore[operator]
    return result
