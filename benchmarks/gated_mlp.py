"""MLPs as one module, `fp.nn.GatedMLP` (`down(silu(gate(x)) * up(x))`) and `fp.nn.MLP` (`down(gelu(up(x)))`), beside their swapped
layers, and the original in fp32.

On a CPU in milliseconds; several MLPs take turns, more than a cache holds, as a model's layers do. With --launches also what
kernels of a GPU do, counted by the interpreter: launches, and bytes of global memory that each touches; of layers with torch's
product of gate and up, which the interpreter does not run: a launch, and the bytes of its operands. "8 bits" has a static scale
for what is between the products, which the first of them then writes in 8 bits; its "layers" have it too. And the CPU time of
a call of small layers.

python -m benchmarks.gated_mlp [--sizes 576x1536 2048x5632] [--rows 1 4 16 128 512] [--mlps GatedMLP MLP] [--launches]
    [--threads N] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import time
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


MLPS = ("GatedMLP", "MLP")


class Layers(nn.Module):
    """The three layers, as they are without a module of their own."""

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.gate(x) * self.up(x))
        return y


class TwoLayers(nn.Module):
    """The two layers as a model has them: of a swapped one the activation is an nn.Identity."""

    def __init__(self, up: nn.Module, act: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up, self.act, self.down = up, act, down

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        x = self.act(x)
        y: Tensor = self.down(x)
        return y


def made(
    hidden: int, intermediate: int, dtype: torch.dtype, classes: dict[str, Any], mlp: str, static: bool = False
) -> dict[str, nn.Module]:
    """The original, and of each class the layers and the module; static: with a scale of down's that is the same for all inputs."""
    gate, up = (nn.Linear(hidden, intermediate, bias=False).to(dtype) for _ in range(2))
    down = nn.Linear(intermediate, hidden, bias=False).to(dtype)
    gated = mlp == "GatedMLP"
    original = Layers(nn.Sequential(gate, nn.SiLU()), up, down) if gated else TwoLayers(up, nn.GELU(), down)
    result: dict[str, nn.Module] = {f"original {mlp}": original}
    for name, cls in classes.items():
        symmetric = {"symmetric": True} if cls is fp.nn.Int8Linear else {}
        last = cls.from_torch(down, **({"input_scale": torch.full((1,), 0.01), **symmetric} if static else {}))
        if gated:
            layers = cls.from_torch(gate, activation="silu"), cls.from_torch(up), last
            pair: tuple[nn.Module, nn.Module] = Layers(*layers), fp.nn.GatedMLP.from_layers(*layers)
        else:
            first = cls.from_torch(up, activation="gelu")
            pair = TwoLayers(first, nn.Identity(), last), fp.nn.MLP.from_layers(first, last)
        result |= dict(zip((f"{name} layers of {mlp}", f"{name} {mlp}"), pair))
    return result


def measure(rows: int, hidden: int, intermediate: int, candidates: dict[str, nn.Module], rounds: int) -> dict[str, Any]:
    weights = (2 + any(name.endswith("GatedMLP") for name in candidates)) * hidden * intermediate
    x = torch.randn(rows, hidden)

    def call(module: nn.Module) -> Callable[[], object]:
        turns = itertools.cycle([module, *(copy.deepcopy(module) for _ in range(BYTES // weights))])
        return lambda: next(turns)(x)

    timings = interleave({name: call(module) for name, module in candidates.items()}, rounds=rounds)
    result = {}
    for name, t in timings.items():
        itemsize = {"original": 4, "bf16": 2}.get(name.partition(" ")[0], 1)
        result[name] = {**t.to_json(), "bytes": weights * itemsize}
        precision, _, mlp = name.partition(" ")
        if beside := timings.get(f"{precision} layers of {mlp}"):
            result[name]["times_as_fast_as_layers"] = beside.median / t.median
    return result


def launches(rows: int, hidden: int, intermediate: int, mlp: str) -> list[dict[str, Any]]:
    """What the interpreter counts of either way, with the CUDA backend."""
    results = []
    for arch in ("sm_80", "sm_90a"):
        fp8 = {} if arch == "sm_80" else {"fp8": fp.nn.Fp8Linear}
        for static in (False, True):
            classes = {"int8": fp.nn.Int8Linear, **fp8, **({} if static else {"w8a16": fp.nn.W8A16Linear})}
            modules = made(hidden, intermediate, torch.bfloat16, classes, mlp, static)
            for name, module in modules.items():
                if name.startswith("original"):
                    continue
                x = torch.randn(rows, hidden, dtype=torch.bfloat16)
                with fp.interpret(arch, counters=True) as device, fp.use_backend("cuda"):
                    module(x)
                kernels, between = device.kernels(), rows * intermediate * 2 * isinstance(module, Layers)
                counted = {"launches": sum(k.launches for k in kernels) + bool(between),
                           "read": sum(k.footprint_read for k in kernels) + 2 * between,
                           "written": sum(k.footprint_written for k in kernels) + between}  # fmt: skip
                shape = {"rows": rows, "hidden": hidden, "intermediate": intermediate}
                results.append({"arch": arch, "name": f"{name}{', 8 bits' * static}", **shape, **counted})
    return results


def cpu_time(mlp: str, calls: int = 3000) -> dict[str, float]:
    """Microseconds of the CPU that a call of one row takes where layers are so small that it is the call that costs: the least of
    nine times that many calls, in turn."""
    modules = made(64, 128, torch.float32, CLASSES, mlp)
    x, least = torch.randn(1, 64), dict.fromkeys(modules, math.inf)
    for name, module in [*modules.items()] * 9:
        before = time.process_time()
        for _ in range(calls):
            module(x)
        least[name] = min(least[name], (time.process_time() - before) / calls * 1e6)
    return least


def _size(text: str) -> tuple[int, int]:
    hidden, _, intermediate = text.partition("x")
    return int(hidden), int(intermediate)


def _options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--sizes", type=_size, nargs="+", default=[(576, 1536), (2048, 5632)])
    p.add_argument("--rows", type=int, nargs="*", default=[1, 4, 16, 128, 512])
    p.add_argument("--mlps", nargs="+", choices=MLPS, default=[*MLPS])
    p.add_argument("--launches", action="store_true", help="count what kernels of a GPU do, and a call's CPU time, too")


@torch.inference_mode()
def main() -> None:
    args, result = on_cpu.begin(__doc__, "gated-mlp", _options)
    for (hidden, intermediate), mlp in itertools.product(args.sizes, args.mlps):
        candidates = made(hidden, intermediate, torch.float32, CLASSES, mlp)
        for rows in args.rows:
            row = measure(rows, hidden, intermediate, candidates, args.rounds)
            for name, t in row.items():
                gain = f"{t['times_as_fast_as_layers']:6.2f} x its layers" if "times_as_fast_as_layers" in t else ""
                print(f"{hidden} x {intermediate}, {rows:>4} rows  {name:<23}{t['median']:9.3f} ms "
                      f"[{t['low']:.3f}, {t['high']:.3f}], {on_cpu.of_copy(t, result):.2f} of the copy{gain}",
                      flush=True)  # fmt: skip
            result["results"].append({"hidden": hidden, "intermediate": intermediate, "rows": rows, "timings": row})
    if args.launches:
        result["launches"] = [x for mlp in args.mlps for rows in (16, 256) for x in launches(rows, 256, 512, mlp)]
        for x in result["launches"]:
            print(f"{x['arch']:<7}{x['rows']:>4} rows of {x['hidden']} x {x['intermediate']}  {x['name']:<35}"
                  f"{x['launches']} launches, {x['read'] / 1e3:.0f} kB read, {x['written'] / 1e3:.0f} kB written")  # fmt: skip
        result["cpu_time_us"] = {name: us for mlp in args.mlps for name, us in cpu_time(mlp).items()}
        for name, us in result["cpu_time_us"].items():
            print(f"CPU time of a call  {name:<35}{us:6.2f} us")
    bench.write(result, args.json)


if __name__ == "__main__":
    main()
