"""attention_decode beside torch's scaled_dot_product_attention on a contiguous cache; pages are gathered, and 8 bits dequantised,
before it, as it takes neither.

python -m benchmarks.attention_decode [--device cpu|cuda] [--rounds N] [--json FILE]
python -m benchmarks.attention_decode --sweep [--rounds N] [--json FILE]  # lengths, beside the copy bandwidth
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import bench
from forwardpass.common.timing import interleave
from forwardpass.dispatch import use_backend
from forwardpass.ops.attention_decode import OPERATION, WITH_LSE
from forwardpass.ops.attention_decode.cases import Case, real


def sdpa(sinks: Tensor | None, **options: Any) -> Tensor:
    """One new token a sequence."""
    if sinks is not None:
        return eager(sinks, **options)[0]
    q, k, v, seen = operands(**options)
    return F.scaled_dot_product_attention(q, k, v, seen, scale=options["scale"], enable_gqa=True).transpose(1, 2)


def eager(sinks: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """o and the log-sum-exp, which torch's fused attention does not return."""
    q, k, v, seen = operands(**options)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    s = q @ k.transpose(-1, -2) * (options["scale"] or q.shape[-1] ** -0.5)
    s = s.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.to(s.dtype).reshape(-1, 1, 1).expand(*s.shape[:-1], 1)], -1)
    return (torch.softmax(s, -1)[..., : k.shape[2]] @ v).transpose(1, 2), torch.logsumexp(s.float(), -1)


def operands(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, block_table: Tensor | None, k_scale: Tensor | None,
    v_scale: Tensor | None, window_left: int | None, **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k and v with heads before rows, and which keys each sequence's row sees, [B, 1, 1, L]."""
    k, v = (
        in_order(cache, s, block_table, q.dtype) for cache, s in ((k_cache, k_scale), (v_cache, v_scale))
    )  # [B, L, Hk, D]
    keys = torch.arange(k.shape[1], device=q.device)
    seen = keys < seq_lens[:, None]
    if window_left is not None:
        seen = seen & (keys >= seq_lens[:, None] - 1 - window_left)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return q, k, v, seen[:, None, None]


def in_order(cache: Tensor, scale: Tensor | None, block_table: Tensor | None, dtype: torch.dtype) -> Tensor:
    if scale is not None:
        scale = scale.unsqueeze(-1)
        cache = (cache.float() * scale).nan_to_num(0).to(dtype)  # beyond a sequence's end there may be anything
    if block_table is None:
        return cache
    return cache[block_table.clamp(min=0)].flatten(1, 2)


BASELINES = {OPERATION: sdpa, WITH_LSE: eager}


def sweep_cases() -> Iterator[Case]:
    for dtype, cache in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.int8)):
        for dim, heads in ((128, (32, 4)), (128, (8, 8)), (64, (32, 4)), (64, (8, 8))):
            for batch in (1, 16):
                for length in (128, 1024, 4096, 16384):
                    if batch * length <= 2**16:
                        yield real(length, batch, heads, dim, dtype, cache=cache)


def copy_bandwidth(rounds: int) -> float:
    """Bytes a second, read and written, of a copy of 256 MiB."""
    x, y = torch.ones(2**26), torch.ones(2**26)
    milliseconds = interleave({"copy": lambda: y.copy_(x)}, rounds=rounds)["copy"].median
    return 2 * x.nbytes / milliseconds * 1e3


@torch.inference_mode()
def sweep(args: argparse.Namespace) -> dict[str, Any] | None:
    """The cpu backend beside torch's attention, which is given a cache of the length, float32 or of q's dtype, and no mask."""
    if not args.sweep:
        return None
    result = bench.header("attention_decode", "cpu", ["copy_gb_per_s", "results"])
    result["copy_gb_per_s"] = copy_bandwidth(args.rounds) / 1e9
    result["results"] = []
    print(f"copy: {result['copy_gb_per_s']:.1f} GB/s, read and written")
    for case in sweep_cases():
        call = case.arguments()
        q, k, v = call[0].transpose(1, 2), *(in_order(c, s, None, call[0].dtype).transpose(1, 2) for c, s in
                                             ((call[1], call[5]), (call[2], call[6])))  # fmt: skip
        with use_backend("cpu"):
            timings = interleave(
                {
                    "cpu": lambda call=call: OPERATION(*call),
                    "sdpa": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
                },
                rounds=args.rounds,
            )
        own, torchs = timings["cpu"], timings["sdpa"]
        row = {
            "case": OPERATION.describe(call),
            "bytes": case.bytes(),
            "timings": {name: t.to_json() for name, t in timings.items()},
            "gb_per_s": case.bytes() / own.median / 1e6,
            "of_copy": case.bytes() / own.median * 1e3 / result["copy_gb_per_s"] / 1e9,
            "times_as_fast_as_sdpa": torchs.median / own.median,
        }
        result["results"].append(row)
        dtype = str(case.cache or case.dtype)[6:]
        print(f"{dtype:<9} D {case.dim:<4} heads {case.heads!s:<8} batch {len(case.lengths):<3} keys {case.lengths[0]:<6}"
              f"{own.median:9.3f} ms {row['gb_per_s']:6.1f} GB/s, {row['of_copy']:.2f} of the copy; "
              f"{row['times_as_fast_as_sdpa']:5.2f} x sdpa", flush=True)  # fmt: skip
    return result


def add_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--sweep", action="store_true", help="the cpu backend over lengths, beside the copy bandwidth")


if __name__ == "__main__":
    bench.main(BASELINES, __doc__, add_options, sweep)
