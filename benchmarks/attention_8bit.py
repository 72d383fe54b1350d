"""attention_8bit beside torch's scaled_dot_product_attention; where it takes no sinks or gives no lse, beside eager attention;
and quantize_attention beside plain torch.

python -m benchmarks.attention_8bit [--device cpu] [--rounds N] [--json FILE]
python -m benchmarks.attention_8bit --crossover    # on a CPU: beside fp.ops.attention, by the number of keys
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import bench
from benchmarks.attention import eager, sdpa
from forwardpass.ops import attention, attention_8bit
from forwardpass.ops.attention_8bit import ATTENTION_8BIT, ATTENTION_8BIT_WITH_LSE, QUANTIZE_ATTENTION
from forwardpass.ops.attention_8bit.reference import quantize_attention

#: Rows, of as many keys, that a crossover is looked for at.
KEYS = (64, 128, 256, 512, 1024, 2048)
#: Seconds of a timed loop.
LOOP = 0.02


def sdpa_of_16_bits(*, dtype: str, rotates: bool, **args: Any) -> Tensor:
    return sdpa(**args)


def eager_of_16_bits(*, dtype: str, rotates: bool, **args: Any) -> tuple[Tensor, Tensor]:
    return eager(**args)


BASELINES = {
    ATTENTION_8BIT: sdpa_of_16_bits,
    ATTENTION_8BIT_WITH_LSE: eager_of_16_bits,
    QUANTIZE_ATTENTION: quantize_attention,
}


def cpu_seconds(call: Callable[[], Any], calls: int) -> float:
    began = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - began) / calls


@torch.inference_mode()
def ratio(dtype: torch.dtype, head_dim: int, keys: int, causal: bool, rounds: int) -> float:
    """How many times as long `attention` takes as `attention_8bit`, in CPU time: other work on the machine does not count."""
    heads = 8 if keys <= 512 else 2
    q, k, v = (torch.randn(1, keys, heads, head_dim).to(dtype) for _ in range(3))
    calls = [lambda: attention(q, k, v, causal=causal), lambda: attention_8bit(q, k, v, causal=causal)]
    loops = [max(1, int(LOOP / max(cpu_seconds(call, 2), 1e-6))) for call in calls]
    times = [[cpu_seconds(call, n) for call, n in zip(calls, loops)] for _ in range(rounds)]
    before, after = (statistics.median(x) for x in zip(*times))
    return before / after


def crossover(args: argparse.Namespace) -> dict[str, Any] | None:
    if not args.crossover:
        return None
    torch.set_num_threads(1)
    result = bench.header("attention-8bit-crossover", "cpu", ["results"]) | {"results": []}
    print(f"{'':24}" + "".join(f"{n:>8}" for n in KEYS) + " keys")
    dtypes = torch.float32, torch.float16, torch.bfloat16
    for dtype, head_dim, causal in itertools.product(dtypes, (32, 64, 128), (False, True)):
        ratios = {n: ratio(dtype, head_dim, n, causal, args.rounds) for n in KEYS}
        name = f"{str(dtype).removeprefix('torch.')}, {head_dim}{', causal' if causal else ''}"
        result["results"].append({"dtype": str(dtype), "head_dim": head_dim, "causal": causal, "ratios": ratios})
        print(f"{name:24}" + "".join(f"{x:>8.2f}" for x in ratios.values()), flush=True)
    return result


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--crossover", action="store_true", help="beside fp.ops.attention, by the number of keys, on one thread"
    )


if __name__ == "__main__":
    bench.main(BASELINES, __doc__, options, crossover)
