"""MultiheadAttention on the fused attention operation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.modules import hook_alike
from ..dispatch import Reason
from ..dispatch.calls import decline, take
from ..ops.attention import ATTENTION
from ..ops.common.quantized_rows import FLOATS

_WEIGHTS = Reason(
    "need_weights",
    "need_weights=True asks for the probabilities, which fused attention never has in memory",
    "pass need_weights=False",
)


class MultiheadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention whose scores never are in memory. Same arguments, same state_dict, inference only.

    A call with need_weights=True, the default of torch, gets its weights from torch's own code, which is what ran before;
    `fp.call_counts()` counts such calls. A row whose keys are all masked gives the bias of out_proj, where torch may give NaN.

    Args:
        embed_dim, num_heads, dropout, bias, kdim, vdim, batch_first, device, dtype: as nn.MultiheadAttention has them. dropout
            is for a training mode that this module has not.
        add_bias_kv, add_zero_attn: refused, a key and value beside those of the input would take a copy of both.

    Raises:
        ValueError: embed_dim is not a multiple of num_heads, or an option is one that fused attention has not.
    """

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

    @classmethod
    def why_not(cls, module: nn.Module) -> Reason | None:
        """None where `from_torch` takes this module, else the reason."""
        if type(module) is not nn.MultiheadAttention:
            return Reason(
                "subclass", f"it is a {type(module).__name__}, not an nn.MultiheadAttention", "swap it by hand"
            )
        dtype = module.out_proj.weight.dtype
        if dtype not in FLOATS:
            return Reason("dtype", f"its weights are {dtype}", "use float32, float16 or bfloat16")
        return _extra_keys(module.bias_k is not None, module.add_zero_attn)

    @classmethod
    def from_torch(cls, module: nn.Module) -> MultiheadAttention:
        """The same attention on the very parameters and out_proj of `module`, which are shared and not copied.

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
            ValueError, TypeError: a shape, or the dtype of a mask, does not fit the others. RuntimeError: in training with dropout,
                and in grad mode where an input or a parameter requires grad.
        """
        if self.training and self.dropout:
            raise RuntimeError("fp.nn.MultiheadAttention is for inference and has no dropout: call eval() on the model")
        if query.is_nested or key.is_nested or value.is_nested:
            raise TypeError("fp.nn.MultiheadAttention takes padded tensors with key_padding_mask, and was given nested ones: "
                            "an nn.TransformerEncoder makes them unless its use_nested_tensor is False")  # fmt: skip
        if is_causal and attn_mask is None:
            raise ValueError(
                "MultiheadAttention: is_causal=True is a hint about attn_mask, which is missing: pass the mask"
            )
        if need_weights:
            decline("MultiheadAttention", _WEIGHTS)
            return self._with_weights(query, key, value, key_padding_mask, attn_mask, average_attn_weights, is_causal)
        batched = query.dim() == 3
        if not batched:
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        q, k, v = self._heads(query, key, value)
        causal = is_causal and q.shape[1] == k.shape[1]
        mask = self._mask(q, k, key_padding_mask, None if causal else attn_mask)
        take("MultiheadAttention")
        o = ATTENTION(q, k, v, None, causal, None, None, 0.0, mask, None, None, None, None, False).flatten(2)
        if not batched:
            o = o.squeeze(0)
        elif not self.batch_first:
            o = o.transpose(0, 1).contiguous()  # as torch returns it
        return self.out_proj(o), None

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The projections, [N, L or S, H, D]: views of one product where one input stands for several of them."""
        if any(x.dim() not in (2, 3) or x.dim() != query.dim() for x in (query, key, value)):
            shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
            raise ValueError(
                f"MultiheadAttention: query, key and value must all be [N, L, E], [L, N, E] or [L, E], not {shapes}"
            )
        biases: tuple[Tensor | None, ...]
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if self.in_proj_weight is None:
            parts = zip((query, key, value), (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight), biases)
            q, k, v = (F.linear(*part) for part in parts)
        elif query is key and key is value:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        elif key is value:
            e = self.embed_dim
            kv_bias = None if self.in_proj_bias is None else self.in_proj_bias[e:]
            q = F.linear(query, self.in_proj_weight[:e], biases[0])
            k, v = F.linear(key, self.in_proj_weight[e:], kv_bias).chunk(2, -1)
        else:
            weights = self.in_proj_weight.chunk(3)
            q, k, v = (F.linear(*part) for part in zip((query, key, value), weights, biases))

        def heads(x: Tensor) -> Tensor:
            x = x.unflatten(-1, (self.num_heads, self.head_dim))
            if x.dim() == 3:
                return x.unsqueeze(0)
            return x if self.batch_first else x.transpose(0, 1)

        return heads(q), heads(k), heads(v)

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

    def _with_weights(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """What nn.MultiheadAttention does off its fast path."""
        transposed = self.batch_first and query.dim() == 3
        if transposed:
            q = query.transpose(0, 1)
            k = q if key is query else key.transpose(0, 1)  # one input for several is told by identity
            query, key, value = q, k, k if value is key else value.transpose(0, 1)
        o, weights = F.multi_head_attention_forward(
            query, key, value, self.embed_dim, self.num_heads, self.in_proj_weight, self.in_proj_bias, None, None, False,
            self.dropout, self.out_proj.weight, self.out_proj.bias, training=self.training,
            key_padding_mask=key_padding_mask, need_weights=True, attn_mask=attn_mask,
            use_separate_proj_weight=self.in_proj_weight is None, q_proj_weight=self.q_proj_weight,
            k_proj_weight=self.k_proj_weight, v_proj_weight=self.v_proj_weight,
            average_attn_weights=average_attn_weights, is_causal=is_causal,
        )  # fmt: skip
        return (o.transpose(0, 1) if transposed else o), weights


def _extra_keys(add_bias_kv: bool, add_zero_attn: bool) -> Reason | None:
    if not add_bias_kv and not add_zero_attn:
        return None
    name = "add_bias_kv" if add_bias_kv else "add_zero_attn"
    return Reason("extra_keys", f"{name} puts a key and a value beside those of the input, which takes a copy of both",
                  "leave this layer to torch")  # fmt: skip
