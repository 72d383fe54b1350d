"""A module of experts on a CPU: `fp.nn.Experts` in int8 and w8a16 beside the ways that transformers has, in fp32 and bf16.

64 experts of 1024 x 512 with a gate, of which each token chooses 8, random weights and routings. Calls take turns with 16 routings,
so that with one token too the chosen experts' weights come from memory. `batched_mm` copies the weights of every choice: it is left
out from 64 tokens on.

python -m benchmarks.experts [--tokens 1 16 512] [--threads N] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import copy
import importlib
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import forwardpass as fp
from benchmarks import bench, on_cpu
from forwardpass.common.timing import interleave

EXPERTS, CHOSEN, HIDDEN, INTERMEDIATE, ROUTINGS = 64, 8, 1024, 512, 16
FIRST = "fp32 grouped_mm"  #: what others are compared with


def experts_of_transformers() -> nn.Module:
    transformers = importlib.import_module("transformers")
    modeling = importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
    config = transformers.Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS, num_experts_per_tok=CHOSEN
    )
    module: nn.Module = modeling.Qwen3MoeExperts(config).eval()
    for p in module.parameters():
        nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return module


def candidates() -> dict[str, tuple[Callable[..., Any], torch.dtype, int]]:
    """name -> (what is called, the dtype of its inputs, bytes of a weight)."""
    functions = importlib.import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS
    fp32 = experts_of_transformers()
    bf16 = copy.deepcopy(fp32).bfloat16()
    theirs = {
        f"{name} {way}": (lambda *x, way=way, m=m: functions[way](m, *x), dtype, dtype.itemsize)
        for name, m, dtype in (("fp32", fp32, torch.float32), ("bf16", bf16, torch.bfloat16))
        for way in ("grouped_mm", "batched_mm")
    }
    ours = {
        f"forwardpass {kind}": (fp.nn.Experts.from_torch(fp32, kind=kind, activation="silu_mul"), torch.float32, 1)
        for kind in fp.nn.Experts.kinds
    }
    return {**theirs, **ours}


def measure(tokens: int, made: dict[str, tuple[Callable[..., Any], torch.dtype, int]], rounds: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=g)
    routings = []
    for _ in range(ROUTINGS):
        scores = torch.rand(tokens, EXPERTS, generator=g).softmax(-1)
        weights, index = scores.topk(CHOSEN)
        routings.append((index, weights / weights.sum(-1, keepdim=True)))
    expected = made[FIRST][0](x, *routings[0])

    def call(run: Callable[..., Any], dtype: torch.dtype) -> Callable[[], object]:
        turns = itertools.cycle([(x.to(dtype), index, weights.to(dtype)) for index, weights in routings])
        return lambda: run(*next(turns))

    taken = {name: c for name, c in made.items() if tokens < 64 or "batched_mm" not in name}
    timings = interleave({name: call(run, dtype) for name, (run, dtype, _) in taken.items()}, rounds=rounds)
    asked = sum(len(index.unique()) for index, _ in routings) / ROUTINGS
    result = {}
    for name, (run, dtype, itemsize) in taken.items():
        index, weights = routings[0]
        y = run(x.to(dtype), index, weights.to(dtype)).float()
        result[name] = {
            **timings[name].to_json(),
            "bytes": asked * 3 * HIDDEN * INTERMEDIATE * itemsize,
            "relative_error": ((y - expected).norm() / expected.norm()).item(),
            "times_as_fast_as_fp32": timings[FIRST].median / timings[name].median,
        }
    return result


@torch.inference_mode()
def main() -> None:
    args, result = on_cpu.begin(
        __doc__, "experts", lambda p: p.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 512])
    )
    made = candidates()
    for tokens in args.tokens:
        row = measure(tokens, made, args.rounds)
        for name, t in row.items():
            print(f"{tokens:>4} tokens  {name:<18}{t['median']:9.2f} ms [{t['low']:.2f}, {t['high']:.2f}]  "
                  f"{t['times_as_fast_as_fp32']:6.2f} x {FIRST}, {on_cpu.of_copy(t, result):.2f} of the copy, "
                  f"relative error {t['relative_error']:.1e}", flush=True)  # fmt: skip
        result["results"].append({"tokens": tokens, "timings": row})
    bench.write(result, args.json)


if __name__ == "__main__":
    main()
