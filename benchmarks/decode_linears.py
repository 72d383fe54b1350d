"""The Linears of one decode step, in their order, as generate calls them: 30 layers of SmolLM2-135M and its head, swapped and not.

Swapped ones as a swapped model has them: q, k and v are one product, and gate and up.

Their weights, 135 MB in 8 bits, are more than a last-level cache holds, so that each is read from memory. Beside the milliseconds
stands what share of the copy bandwidth, measured in the same run, the bytes of the weights make.

python -m benchmarks.decode_linears [--rows 1 4 16] [--threads N] [--rounds N] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import forwardpass as fp
from benchmarks import bench, on_cpu
from forwardpass.common.timing import interleave

HIDDEN, INTERMEDIATE, KEYS, LAYERS, VOCABULARY = 576, 1536, 192, 30, 49152
#: [N, K] of q, k, v, o, gate, up, down
LAYER = ((HIDDEN, HIDDEN), (KEYS, HIDDEN), (KEYS, HIDDEN), (HIDDEN, HIDDEN),
         (INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))  # fmt: skip
#: of q with k and v, o, gate with up, down
JOINED = ((HIDDEN + 2 * KEYS, HIDDEN), (HIDDEN, HIDDEN), (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
HEAD = (VOCABULARY, HIDDEN)

E4M3 = torch.float8_e4m3fn
#: name -> what becomes of a Linear, and the dtype of its inputs
CANDIDATES: dict[str, tuple[Callable[[nn.Linear], nn.Module], torch.dtype]] = {
    "fp32": (lambda linear: linear, torch.float32),
    "bf16": (lambda linear: fp.nn.Bf16Linear.from_torch(linear), torch.bfloat16),
    "int8": (lambda linear: fp.nn.Int8Linear.from_torch(linear), torch.float32),
    "w8a16": (lambda linear: fp.nn.W8A16Linear.from_torch(linear), torch.float32),
    "w8a16 bf16": (lambda linear: fp.nn.W8A16Linear.from_torch(linear), torch.bfloat16),
    "w8a16 groups": (lambda linear: fp.nn.W8A16Linear.from_torch(linear, scales="group"), torch.float32),
    "w8a16 e4m3": (lambda linear: fp.nn.W8A16Linear.from_torch(linear, weight_dtype=E4M3), torch.float32),
}


def weight_bytes(layers: list[nn.Module]) -> int:
    """What a step reads of weights."""
    weights = [getattr(layer, "qweight", layer.weight) for layer in layers]
    return sum(w.numel() * w.element_size() for w in weights if isinstance(w, Tensor))


def measure(rows: int, candidates: dict[str, tuple[list[nn.Module], torch.dtype]], rounds: int) -> dict[str, Any]:
    def step(layers: list[nn.Module], dtype: torch.dtype) -> Callable[[], None]:
        inputs = {k: torch.randn(rows, 1, k).to(dtype) for k in (HIDDEN, INTERMEDIATE)}
        calls = [(layer, inputs[layer.in_features]) for layer in layers]  # type: ignore[index]

        def run() -> None:
            for layer, x in calls:
                layer(x)

        return run

    timings = interleave({name: step(*candidate) for name, candidate in candidates.items()}, rounds=rounds)
    return {
        name: {**t.to_json(), "bytes": weight_bytes(candidates[name][0]),
               "times_as_fast_as_fp32": timings["fp32"].median / t.median}
        for name, t in timings.items()
    }  # fmt: skip


@torch.inference_mode()
def main() -> None:
    args, result = on_cpu.begin(
        __doc__,
        "decode-linears",
        lambda p: p.add_argument(
            "--rows", type=int, nargs="+", default=[1, 4, 16], help="sequences that are decoded together"
        ),
    )
    linears = {layer: [nn.Linear(k, n, bias=False) for n, k in (*layer * LAYERS, HEAD)] for layer in (LAYER, JOINED)}
    candidates = {
        name: ([make(x) for x in linears[LAYER if name == "fp32" else JOINED]], dtype)
        for name, (make, dtype) in CANDIDATES.items()
    }
    for rows in args.rows:
        row = measure(rows, candidates, args.rounds)
        for name, t in row.items():
            print(f"rows {rows:<4}{name:<14}{t['median']:9.2f} ms [{t['low']:.2f}, {t['high']:.2f}]  "
                  f"{t['bytes'] / t['median'] / 1e6:6.1f} GB/s, {on_cpu.of_copy(t, result):.2f} of the copy; "
                  f"{t['times_as_fast_as_fp32']:5.2f} x fp32", flush=True)  # fmt: skip
        result["results"].append({"rows": rows, "timings": row})
    bench.write(result, args.json)


if __name__ == "__main__":
    main()
