"""attention beside torch's scaled_dot_product_attention; where it takes no sinks or gives no lse, beside eager attention.

python -m benchmarks.attention [--device cpu|cuda] [--rounds N] [--json FILE]
python -m benchmarks.attention --sweep [--rounds N] [--json FILE]  # on a GPU
python -m benchmarks.attention --interpret sm_90a [--triton-tutorial FILE] [--json FILE]
"""

import argparse
import dataclasses
import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import attention_on_gpu, bench, interpreted
from benchmarks.interpreted import Interpreted, number
from benchmarks.triton_tutorial import Tutorial
from forwardpass.ops.attention import ATTENTION, ATTENTION_WITH_LSE
from forwardpass.ops.attention.cases import Case, real
from gpuless.core import ARCHITECTURES


def additive(
    q: Tensor, k: Tensor, causal: bool, left: int | None, right: int | None, mask: Tensor | None
) -> Tensor | None:
    """As models make it: what may not be attended to is -inf, of q's dtype."""
    rows, keys = q.shape[1], k.shape[1]
    right = 0 if causal else right
    if left is None and right is None and mask is None:
        return None
    distance = torch.arange(keys, device=q.device) - torch.arange(keys - rows, keys, device=q.device).unsqueeze(1)
    visible = (distance >= -(keys if left is None else left)) & (distance <= (keys if right is None else right))
    if mask is not None and mask.dtype == torch.bool:
        visible, mask = visible & mask, None
    hidden = torch.zeros_like(visible, dtype=q.dtype).masked_fill(~visible, -torch.inf)
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

#: What is interpreted: 16 heads of 1024 rows, which are as many tiles as multiprocessors; all keys, and causal; with what
#: makes the kernel another one; the rows of a head dim below its bucket; more rows than keys
SHAPES = (
    *(dataclasses.replace(real((1024, 1024), d, 1, (16, 16), torch.float16), causal=causal)
      for d in (64, 128, 256) for causal in (False, True)),
    Case((1024, 1024), (192, 128), heads=(16, 16), batch=1, causal=True, awkward=False),
    real((1024, 1024), 128, 1, (16, 4), torch.float16, mask="bool bj"),
    real((1024, 1024), 72, 1, (16, 16), torch.float16),
)  # fmt: skip


def row_of(implementation: str, arch: str, case: Case) -> dict[str, Any]:
    row = head(implementation, case)
    try:
        result = interpreted.run(ATTENTION, implementation, arch, case)
    except RuntimeError as e:
        return {**row, "missing": str(e).splitlines()[0]}
    row |= figures(result, case)
    if not case.causal:  # what twice the keys add
        twice = dataclasses.replace(case, sizes=(case.sizes[0], 2 * case.sizes[1]))
        more = interpreted.run(ATTENTION, implementation, arch, twice)
        row["main_loop_ptx_per_score"] = 32 * (more.counts.issued - result.counts.issued) / case.scores()
    return row


def row_of_tutorial(tutorial: Tutorial, case: Case) -> dict[str, Any]:
    row = head("tutorial", case)
    try:
        result, row["config"] = tutorial.run(case)
    except RuntimeError as e:
        return {**row, "missing": str(e)}
    return row | figures(result, case)


def head(implementation: str, case: Case) -> dict[str, Any]:
    described = dataclasses.asdict(case) | {"dtype": str(case.dtype)}
    return {"operation": case.op, "implementation": implementation, "case": described}


def figures(result: Interpreted, case: Case) -> dict[str, Any]:
    return result.row(case) | {
        "tflops": case.flops() / result.seconds / 1e12,
        "ptx_per_score": 32 * result.counts.issued / case.scores(),
    }


def interpret_all(arch: str, tutorial: Tutorial | None) -> dict[str, Any]:
    print(interpreted.heading(arch))
    print(
        f"{'':10}{'modelled':>12}{'TFLOP/s':>9}    {'bound by':<22}{'DRAM':>8}{'L2':>10} of least bytes"
        "  PTX/score (loop) wavefronts"
    )
    rows = []
    for case in SHAPES:
        (sq, sk), (d, dv), (h, hk) = case.sizes, case.dims, case.heads
        dims = str(d) if d == dv else f"{d}/{dv}"
        with_ = "".join(f", {x}" for x in ("causal" if case.causal else "", case.mask) if x)
        print(f"{sq} x {sk}, head dim {dims}, {h} heads of {hk}{with_}")
        for implementation in interpreted.IMPLEMENTATIONS:
            rows.append(row_of(implementation, arch, case))
            print(line(rows[-1]), flush=True)
        if tutorial and tutorial.takes(case):
            rows.append(row_of_tutorial(tutorial, case))
            print(line(rows[-1]), flush=True)
    return interpreted.result("attention", arch, rows)


def line(row: dict[str, Any]) -> str:
    if "missing" in row:
        return f"  {row['implementation']:<8}not there: {row['missing']}"
    return (
        f"  {row['implementation']:<8}{row['modelled_us']:9.2f} us{row['tflops']:9.0f} by {row['binding']:<22}"
        f"{row['dram_bytes'] / row['least_bytes']:8.2f} x{row['l2_bytes'] / row['least_bytes']:8.2f} x"
        f"{row['ptx_per_score']:18.1f}{number(row.get('main_loop_ptx_per_score'), '.1f'):>7}"
        f"{number(row['wavefronts_per_ideal'], '.2f'):>11}"
    )


def add_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--sweep", action="store_true", help="on a GPU: many sizes beside torch's fused kernels, and bars")
    p.add_argument("--interpret", choices=ARCHITECTURES, help="count and model the kernels on this architecture")
    p.add_argument("--triton-tutorial", metavar="FILE",
                   help="interpreted too: python/tutorials/06-fused-attention.py of Triton's repository")  # fmt: skip


def other(args: argparse.Namespace) -> dict[str, Any] | None:
    if args.triton_tutorial and not args.interpret:
        sys.exit("--triton-tutorial goes with --interpret")
    if args.interpret:
        file = args.triton_tutorial
        return interpret_all(args.interpret, Tutorial(file, args.interpret) if file else None)
    if args.sweep:
        if not torch.cuda.is_available():
            sys.exit("torch finds no GPU, and --sweep needs one: run it where nvidia-smi lists one, or use --interpret")
        rows = attention_on_gpu.measure_all(args.rounds, sdpa)
        return bench.header("attention-sweep", "cuda", ["results"]) | {"results": rows}
    return None


if __name__ == "__main__":
    bench.main(BASELINES, __doc__, add_options, other)
