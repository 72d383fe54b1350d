"""An MLP with a gate, `down(silu(gate(x)) * up(x))`: `fp.nn.GatedMLP` beside its three swapped layers, and the original in fp32.

On a CPU in milliseconds; several MLPs take turns, more than a cache holds, as a model's layers do. With --launches also what
kernels of a GPU do, counted by the interpreter: launches, and bytes of global memory that each touches; of layers with torch's
product of gate and up, which the interpreter does not run: a launch, and the bytes of its operands.

python -m benchmarks.gated_mlp [--sizes 576x1536 2048x5632] [--rows 1 4 16 128 512] [--launches] [--threads N] [--rounds N]
    [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import forwardpass as fp
from benchmarks import bench, on_cpu
from forwardpass.common.timing import interleave

BYTES = 64 << 20  #: of 8-bit weights that take turns
CLASSES: dict[str, type[fp.nn.QuantizedLinear]] = {
    "int8": fp.nn.Int8Linear,
    "w8a16": fp.nn.W8A16Linear,
    "bf16": fp.nn.Bf16Linear,
}


class Layers(nn.Module):
    """The three layers, as they are without a module of their own."""

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.gate(x) * self.up(x))
        return y


def made(hidden: int, intermediate: int, dtype: torch.dtype, names: list[str]) -> dict[str, nn.Module]:
    """The original, and of each class the layers and the module."""
    linears = [
        nn.Linear(k, n, bias=False).to(dtype) for k, n in ((hidden, intermediate),) * 2 + ((intermediate, hidden),)
    ]
    result: dict[str, nn.Module] = {"original": Layers(nn.Sequential(linears[0], nn.SiLU()), *linears[1:])}
    for name in names:
        cls: Any = CLASSES[name]
        layers = cls.from_torch(linears[0], activation="silu"), *(cls.from_torch(x) for x in linears[1:])
        result |= {f"{name} layers": Layers(*layers), f"{name} GatedMLP": fp.nn.GatedMLP.from_layers(*layers)}
    return result


def measure(rows: int, hidden: int, intermediate: int, candidates: dict[str, nn.Module], rounds: int) -> dict[str, Any]:
    weights = 3 * hidden * intermediate
    x = torch.randn(rows, hidden)

    def call(module: nn.Module) -> Callable[[], object]:
        turns = itertools.cycle([module, *(copy.deepcopy(module) for _ in range(BYTES // weights))])
        return lambda: next(turns)(x)

    timings = interleave({name: call(module) for name, module in candidates.items()}, rounds=rounds)
    result = {}
    for name, t in timings.items():
        itemsize = {"original": 4, "bf16": 2}.get(name.partition(" ")[0], 1)
        result[name] = {**t.to_json(), "bytes": weights * itemsize}
        if name.endswith("GatedMLP"):
            result[name]["times_as_fast_as_layers"] = timings[name.replace("GatedMLP", "layers")].median / t.median
    return result


def launches(rows: int, hidden: int, intermediate: int) -> list[dict[str, Any]]:
    """What the interpreter counts of either way, with the CUDA backend."""
    results = []
    for arch in ("sm_80", "sm_90a"):
        for name, module in made(hidden, intermediate, torch.bfloat16, ["int8", "w8a16"]).items():
            if name == "original":
                continue
            x = torch.randn(rows, hidden, dtype=torch.bfloat16)
            with fp.interpret(arch, counters=True) as device, fp.use_backend("cuda"):
                module(x)
            kernels, between = device.kernels(), rows * intermediate * 2 * name.endswith("layers")
            counted = {"launches": sum(k.launches for k in kernels) + bool(between),
                       "read": sum(k.footprint_read for k in kernels) + 2 * between,
                       "written": sum(k.footprint_written for k in kernels) + between}  # fmt: skip
            shape = {"rows": rows, "hidden": hidden, "intermediate": intermediate}
            results.append({"arch": arch, "name": name, **shape, **counted})
    return results


def _size(text: str) -> tuple[int, int]:
    hidden, _, intermediate = text.partition("x")
    return int(hidden), int(intermediate)


def _options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--sizes", type=_size, nargs="+", default=[(576, 1536), (2048, 5632)])
    p.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 128, 512])
    p.add_argument("--launches", action="store_true", help="count what kernels of a GPU do, too")


@torch.inference_mode()
def main() -> None:
    args, result = on_cpu.begin(__doc__, "gated-mlp", _options)
    for hidden, intermediate in args.sizes:
        candidates = made(hidden, intermediate, torch.float32, [*CLASSES])
        for rows in args.rows:
            row = measure(rows, hidden, intermediate, candidates, args.rounds)
            for name, t in row.items():
                gain = f"{t['times_as_fast_as_layers']:6.2f} x its layers" if "times_as_fast_as_layers" in t else ""
                print(f"{hidden} x {intermediate}, {rows:>4} rows  {name:<16}{t['median']:9.3f} ms "
                      f"[{t['low']:.3f}, {t['high']:.3f}], {on_cpu.of_copy(t, result):.2f} of the copy{gain}",
                      flush=True)  # fmt: skip
            result["results"].append({"hidden": hidden, "intermediate": intermediate, "rows": rows, "timings": row})
    if args.launches:
        result["launches"] = [*launches(16, 256, 512), *launches(256, 256, 512)]
        for x in result["launches"]:
            print(f"{x['arch']:<7}{x['rows']:>4} rows of {x['hidden']} x {x['intermediate']}  {x['name']:<16}"
                  f"{x['launches']} launches, {x['read'] / 1e3:.0f} kB read, {x['written'] / 1e3:.0f} kB written")  # fmt: skip
    bench.write(result, args.json)


if __name__ == "__main__":
    main()
