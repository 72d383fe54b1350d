"""append_kv beside plain torch: rotary embedding, quantisation and index_put."""

from typing import Any

import torch
from torch import Tensor

from benchmarks import bench, eager
from forwardpass.ops.append_kv import OPERATION


def baseline(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, block_table: Tensor | None, k_scale: Tensor | None,
    v_scale: Tensor | None, cos: Tensor | None, sin: Tensor | None,
) -> None:  # fmt: skip
    """One new token a sequence, none of them empty, and a cache without static scales."""
    position = (seq_lens - 1).long()
    first, row = torch.arange(len(k), device=k.device), position
    if block_table is not None:
        page = k_cache.shape[1]
        first, row = block_table.gather(1, (position // page)[:, None])[:, 0].long(), position % page
    if cos is not None and sin is not None:
        low, high = k.chunk(2, -1)
        k = k * cos.unsqueeze(2) + torch.cat((-high, low), -1) * sin.unsqueeze(2)
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        x = x[:, 0]
        if scale is not None:
            x, s = eager.quantize_rows(x.float(), cache.dtype, True)[:2]
            scale[first, row] = s.reshape(x.shape[:-1])
        cache[first, row] = x


BASELINES: dict[Any, Any] = {OPERATION: baseline}

if __name__ == "__main__":
    bench.main(BASELINES, __doc__)
