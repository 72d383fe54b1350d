"""MultiheadAttention on the fused attention operation, whose projections may be layers of 8 bits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.models.modules import has_hooks, hook_alike
from ..dispatch import Reason
from ..dispatch.calls import decline
from ..ops.common.quantized_rows import FLOATS
from .eight_bits import EightBits, attend
from .linear.quantized_linear import QuantizedLinear

_WEIGHTS = Reason(
    "need_weights",
    "need_weights=True asks for the probabilities, which fused attention never has in memory",
    "pass need_weights=False",
)


class MultiheadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention whose scores never are in memory. Same arguments, same state_dict, inference only.

    A call with need_weights=True, the default of torch, computes its weights by plain matrix products; `fp.call_counts()` counts
    such calls. A row whose keys are all masked gives the bias of out_proj, where torch may give NaN.

    `fp.swap` replaces the projections too, by layers `in_proj` and `out_proj`: in_proj_weight and in_proj_bias are None then, and
    state_dict has the buffers of `in_proj`. Query, key and value of different tensors are multiplied by their rows of it alone.

    Args:
        embed_dim, num_heads, dropout, bias, kdim, vdim, batch_first, device, dtype: as nn.MultiheadAttention has them. dropout
            is for a training mode that fused attention has not.
        add_bias_kv, add_zero_attn: refused, a key and value beside those of the input would take a copy of both.

    Attributes:
        fused: whether the fused operation computes softmax(q k) v; False: torch's scaled_dot_product_attention.
        bits: what of that is computed in 8 bits, as `fp.swap(attention="int8")` sets it; None: nothing.

    Raises:
        ValueError: embed_dim is not a multiple of num_heads, or an option is one that fused attention has not.

    Example:
        >>> attention = torch.nn.MultiheadAttention(64, 4, batch_first=True).eval()
        >>> fused, x = fp.nn.MultiheadAttention.from_torch(attention), torch.randn(2, 16, 64)
        >>> with torch.inference_mode():
        ...     y, _ = fused(x, x, x, need_weights=False)
        >>> y.shape
        torch.Size([2, 16, 64])
    """

    bits: EightBits | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if reason := _extra_keys(add_bias_kv, add_zero_attn):
            raise ValueError(f"MultiheadAttention: {reason}")
        if embed_dim % num_heads:
            raise ValueError(f"MultiheadAttention: embed_dim must be a multiple of num_heads, and they are {embed_dim} and "
                             f"{num_heads}")  # fmt: skip
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            kdim=kdim,
            vdim=vdim,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )
        # nn.TransformerEncoderLayer and nn.TransformerEncoder look here before they pass self_attn by and read its weights.
        self._qkv_same_embed_dim = False
        self.fused = True
        self._parts: dict[tuple[int, int], tuple[list[Any], QuantizedLinear]] = {}

    @classmethod
    def why_not(cls, module: nn.Module) -> Reason | None:
        """None where `from_torch` takes this module, else the reason."""
        if not isinstance(module, nn.MultiheadAttention) or type(module) not in (nn.MultiheadAttention, cls):
            return Reason(
                "subclass", f"it is a {type(module).__name__}, not an nn.MultiheadAttention", "swap it by hand"
            )
        if others := [p.dtype for p in module.parameters() if p.dtype not in FLOATS]:
            return Reason("dtype", f"its weights are {others[0]}", "use float32, float16 or bfloat16")
        return _extra_keys(module.bias_k is not None, module.add_zero_attn)

    @classmethod
    def from_torch(cls, module: nn.Module, *, fused: bool = True) -> MultiheadAttention:
        """The same attention on the very parameters and out_proj of `module`, which are shared and not copied.

        Args:
            fused: the attribute of that name.

        Raises:
            ValueError: the module does not fit, and why.
        """
        if reason := cls.why_not(module):
            raise ValueError(f"{cls.__name__}.from_torch: {reason}")
        assert isinstance(module, nn.MultiheadAttention)
        new = cls(module.embed_dim, module.num_heads, module.dropout, module.in_proj_bias is not None, kdim=module.kdim,
                  vdim=module.vdim, batch_first=module.batch_first, device="meta")  # fmt: skip
        new._parameters.update(module._parameters)
        new._modules.update(module._modules)
        new.fused = fused
        hook_alike(new, module)
        return new.train(module.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention.

        Args:
            query: [N, L, E] where batch_first, else [L, N, E], or unbatched [L, E].
            key, value: [N, S, kdim], [N, S, vdim], in the same order.
            key_padding_mask: [N, S], unbatched [S]: bool, True where a key is left out, or floats that are added.
            need_weights: True: torch's own code runs.
            attn_mask: [L, S] or [N * num_heads, L, S], bool or float as key_padding_mask.
            average_attn_weights: of the weights.
            is_causal: a hint that attn_mask, which has to be given, is the causal one: it is then not read where L = S.

        Returns:
            the output, in the order of query; the weights or None.

        Raises:
            ValueError, TypeError: a shape, or the dtype of a mask, does not fit the others. RuntimeError: in training with dropout
                where it is fused, and in grad mode where an input or a parameter requires grad.
        """
        dropout = self.dropout if self.training else 0.0
        if dropout and self.fused:
            raise RuntimeError("fp.nn.MultiheadAttention is for inference and has no dropout: call eval() on the model")
        if query.is_nested or key.is_nested or value.is_nested:
            raise TypeError("fp.nn.MultiheadAttention takes padded tensors with key_padding_mask, and was given nested ones: "
                            "an nn.TransformerEncoder makes them unless its use_nested_tensor is False")  # fmt: skip
        if is_causal and attn_mask is None:
            raise ValueError(
                "MultiheadAttention: is_causal=True is a hint about attn_mask, which is missing: pass the mask"
            )
        batched = query.dim() == 3
        if not batched:
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        q, k, v = self._heads(query, key, value)
        # torch's function takes a mask or the hint, ours both
        causal = (
            is_causal and not need_weights and q.shape[1] == k.shape[1] and (self.fused or key_padding_mask is None)
        )
        mask = self._mask(q, k, key_padding_mask, None if causal else attn_mask)
        weights = None
        if need_weights:
            if self.fused:
                decline("MultiheadAttention", _WEIGHTS)
            o, weights = _with_weights(q, k, v, mask, dropout)
            weights = weights.mean(1) if average_attn_weights else weights
        elif self.fused:
            call = q, k, v, None, causal, None, None, 0.0, mask, None, None, None, None, False
            o = attend(self, call, self.bits, "MultiheadAttention").flatten(2)
        else:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            o = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal).transpose(1, 2).flatten(2)
        if not batched:
            o, weights = o.squeeze(0), None if weights is None else weights.squeeze(0)
        elif not self.batch_first:
            o = o.transpose(0, 1).contiguous()  # as torch returns it
        return self.out_proj(o), weights

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The projections, [N, L or S, H, D]: views of one product where one input stands for several of them."""
        if any(x.dim() not in (2, 3) or x.dim() != query.dim() for x in (query, key, value)):
            shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
            raise ValueError(
                f"MultiheadAttention: query, key and value must all be [N, L, E], [L, N, E] or [L, E], not {shapes}"
            )
        e = self.embed_dim
        if self.in_proj_weight is None and "in_proj" not in self._modules:
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            parts = zip((query, key, value), (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight), biases)
            q, k, v = (F.linear(*part) for part in parts)
        elif query is key and key is value:
            q, k, v = self._rows(query, 0, 3 * e).chunk(3, -1)
        elif key is value:
            q = self._rows(query, 0, e)
            k, v = self._rows(key, e, 2 * e).chunk(2, -1)
        else:
            q, k, v = (self._rows(x, i * e, e) for i, x in enumerate((query, key, value)))

        def heads(x: Tensor) -> Tensor:
            x = x.unflatten(-1, (self.num_heads, self.head_dim))
            if x.dim() == 3:
                return x.unsqueeze(0)
            return x if self.batch_first else x.transpose(0, 1)

        return heads(q), heads(k), heads(v)

    def _rows(self, x: Tensor, start: int, size: int) -> Tensor:
        """x multiplied by these rows of the projection's weight, [*, size]."""
        layer = self._modules.get("in_proj")
        if layer is None:
            bias = self.in_proj_bias
            rows = slice(start, start + size)
            return F.linear(x, self.in_proj_weight[rows], None if bias is None else bias[rows])
        if size == 3 * self.embed_dim:
            return layer(x)
        # A hook on the layer (calibration's, parity's) has to see each input, whatever that costs.
        part = None if has_hooks(layer) else self._part(layer, start, size)
        return layer(x).narrow(-1, start, size) if part is None else part(x)

    def _part(self, layer: nn.Module, start: int, size: int) -> QuantizedLinear | None:
        """A layer of these outputs alone, kept as long as the whole one's buffers are the same tensors."""
        if not isinstance(layer, QuantizedLinear) or torch.compiler.is_exporting():
            return None
        buffers = list(layer._buffers.values())
        buffers_then, part = self._parts.get((start, size), ([], None))
        if len(buffers_then) == len(buffers) and all(a is b for a, b in zip(buffers_then, buffers)):
            return part
        if torch.compiler.is_compiling():
            return None
        part = layer.outputs(start, size)
        if part is not None:
            self._parts[start, size] = buffers, part
            layer.settle(alone=False)  # what is kept beside the buffers is in the parts
        return part

    def _mask(self, q: Tensor, k: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """One mask of the operation, broadcastable to [N, H, L, S]: bool and True where a key is allowed, or added."""
        batch, rows, heads, keys = q.shape[0], q.shape[1], self.num_heads, k.shape[1]
        if padding is not None:
            if padding.dim() != 2 or padding.shape[0] != batch or padding.shape[1] != keys:
                raise ValueError(f"MultiheadAttention: key_padding_mask must be [N, S], here [{batch}, {keys}] (unbatched [S]), "
                                 f"and has shape {tuple(padding.shape)}")  # fmt: skip
            padding = padding.reshape(batch, 1, 1, keys)
        if mask is not None:
            whole = mask.dim() == 3 and mask.shape[0] == batch * heads
            if not (whole or mask.dim() == 2) or mask.shape[-2] != rows or mask.shape[-1] != keys:
                raise ValueError(f"MultiheadAttention: attn_mask must be [L, S] or [N * num_heads, L, S], here [{rows}, {keys}] "
                                 f"or [{batch * heads}, {rows}, {keys}], and has shape {tuple(mask.shape)}")  # fmt: skip
            mask = mask.reshape(batch if whole else 1, heads if whole else 1, rows, keys)
        masks = [m for m in (padding, mask) if m is not None]
        for m in masks:
            if m.dtype != torch.bool and not m.is_floating_point():
                raise TypeError(f"MultiheadAttention: masks must be bool or float, not {m.dtype}: use .bool()")
        if all(m.dtype == torch.bool for m in masks):
            allowed = [~m for m in masks]
            return allowed[0] & allowed[1] if len(allowed) == 2 else allowed[0] if allowed else None
        added = [
            m.to(q.dtype) if m.dtype != torch.bool else torch.zeros_like(m, dtype=q.dtype).masked_fill(m, -torch.inf)
            for m in masks
        ]
        return added[0] + added[1] if len(added) == 2 else added[0]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        """Refuses the weights of a module that is not swapped, which would leave those of the layer as they are."""
        layer = self._modules.get("in_proj")
        if layer is not None and f"{prefix}in_proj_weight" in state_dict:
            raise RuntimeError(f"load_state_dict: {prefix}in_proj is a {type(layer).__name__} here, and the state dict has "
                               f"{prefix}in_proj_weight: load it into the original model (fp.restore(model) brings it back) and "
                               "swap that")  # fmt: skip
        super()._load_from_state_dict(state_dict, prefix, *others)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_parts": {}}


def _with_weights(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """(the output [N, L, H * D], the weights [N, H, L, S]), by the products that torch makes where it is asked for weights."""
    scores = (q * q.shape[-1] ** -0.5).transpose(1, 2) @ k.permute(0, 2, 3, 1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = F.dropout(F.softmax(scores, -1), dropout, training=dropout > 0)
    return (weights @ v.transpose(1, 2)).transpose(1, 2).flatten(2), weights


def _extra_keys(add_bias_kv: bool, add_zero_attn: bool) -> Reason | None:
    if not add_bias_kv and not add_zero_attn:
        return None
    name = "add_bias_kv" if add_bias_kv else "add_zero_attn"
    return Reason("extra_keys", f"{name} puts a key and a value beside those of the input, which takes a copy of both",
                  "leave this layer to torch")  # fmt: skip
