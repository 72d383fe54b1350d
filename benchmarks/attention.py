"""attention beside torch's scaled_dot_product_attention; where it takes no sinks or gives no lse, beside eager attention."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import bench
from forwardpass.attention import ATTENTION, ATTENTION_WITH_LSE


def additive(
    q: Tensor, k: Tensor, causal: bool, left: int | None, right: int | None, mask: Tensor | None
) -> Tensor | None:
    """As models make it: what may not be attended to is -inf, of q's dtype."""
    rows, keys = q.shape[1], k.shape[1]
    right = 0 if causal else right
    if left is None and right is None and mask is None:
        return None
    distance = torch.arange(keys, device=q.device) - torch.arange(keys - rows, keys, device=q.device).unsqueeze(1)
    seen = (distance >= -(keys if left is None else left)) & (distance <= (keys if right is None else right))
    if mask is not None and mask.dtype == torch.bool:
        seen, mask = seen & mask, None
    hidden = torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, -torch.inf)
    return hidden if mask is None else hidden + mask


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, window_left: int | None, window_right: int | None,
         mask: Tensor | None, sinks: Tensor | None, **_: Any) -> Tensor:  # fmt: skip
    if sinks is not None:
        return eager(q, k, v, scale, causal, window_left, window_right, mask, sinks)[0]
    whole = causal and q.shape[1] == k.shape[1] and window_left is None and window_right is None and mask is None
    added = None if whole else additive(q, k, causal, window_left, window_right, mask)
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), added, is_causal=whole, scale=scale, enable_gqa=True
    )
    return o.transpose(1, 2)


def eager(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, window_left: int | None, window_right: int | None,
          mask: Tensor | None, sinks: Tensor | None, **_: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
    group = q.shape[2] // k.shape[2]
    k, v = (x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    s = q.transpose(1, 2) @ k.transpose(-1, -2) * (scale or 1 / math.sqrt(q.shape[-1]))
    if (added := additive(q, k.transpose(1, 2), causal, window_left, window_right, mask)) is not None:
        s = s + added
    if sinks is not None:
        s = torch.cat([s, sinks.to(s.dtype).reshape(-1, 1, 1).expand(*s.shape[:-1], 1)], -1)
    p = torch.softmax(s, -1)[..., : k.shape[2]]
    return (p @ v).transpose(1, 2), torch.logsumexp(s.float(), -1)


BASELINES = {ATTENTION: sdpa, ATTENTION_WITH_LSE: eager}

if __name__ == "__main__":
    bench.main(BASELINES, __doc__)
