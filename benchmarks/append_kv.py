"""append_kv beside plain torch: norms, rotary embedding, quantisation and index_put."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import bench, eager
from forwardpass.ops.append_kv import OPERATION


def baseline(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, block_table: Tensor | None, k_scale: Tensor | None,
    v_scale: Tensor | None, cos: Tensor | None, sin: Tensor | None, q: Tensor | None, q_out: Tensor | None, q_norm: Tensor | None,
    k_norm: Tensor | None, norm_eps: float, interleaved: bool,
) -> None:  # fmt: skip
    """One new token a sequence, none of them empty, a cache without static scales, and rotation of halves."""
    position = (seq_lens - 1).long()
    first, row = torch.arange(len(k), device=k.device), position
    if block_table is not None:
        page = k_cache.shape[1]
        first, row = block_table.gather(1, (position // page)[:, None])[:, 0].long(), position % page

    def prepare(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            x = F.rms_norm(x, x.shape[-1:], weight, norm_eps)
        if cos is None or sin is None:
            return x
        low, high = x.chunk(2, -1)
        return x * cos.unsqueeze(2) + torch.cat((-high, low), -1) * sin.unsqueeze(2)

    k = prepare(k, k_norm)
    if q is not None and q_out is not None:
        q_out.copy_(prepare(q, q_norm))
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        x = x[:, 0]
        if scale is not None:
            x, s = eager.quantize_rows(x.float(), cache.dtype, True)[:2]
            scale[first, row] = s.reshape(x.shape[:-1])
        cache[first, row] = x


BASELINES: dict[Any, Any] = {OPERATION: baseline}

if __name__ == "__main__":
    bench.main(BASELINES, __doc__)
