"""`fp.Pipeline` beside the plain loop, and beside what `fp.profile` predicted, on texts through a real model.

    python -m benchmarks.pipeline --model minilm --json FILE

Two loads: (a) tokenise and forward, which share all cores; (b) the same after a wait of 20 ms, as for a request to another
machine. In each round the profile, the plain loop and the pipeline take turns.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import forwardpass as fp
from benchmarks import bench
from forwardpass.cli import embedding, readout
from forwardpass.common.timing import keep_freed_memory

#: of (a) and (b): the pipeline is never slower than this times the plain loop; it gives this much of what is ideal
LEAST_SPEEDUP, LEAST_OF_IDEAL = 0.97, 0.90
#: prediction and measurement, both in per cent of the plain loop's time, differ by no more
MOST_POINTS = 10.0
WAIT_S = 0.020


def waiting(preprocess: Callable[[list[str]], Any], texts: list[str]) -> Any:
    time.sleep(WAIT_S)
    return preprocess(texts)


def run_load(
    request: readout.Request, preprocess: Callable[[list[str]], Any], items: list[list[str]], rounds: int
) -> dict[str, Any]:
    """Medians over the rounds, in milliseconds an item, and what follows from them."""
    stages = {"preprocess": preprocess, "forward": request.forward, "postprocess": request.postprocess}
    pipeline = fp.Pipeline(request.model, **stages)
    device = next(request.model.parameters()).device

    def plain() -> list[Any]:
        results = []
        with torch.inference_mode():
            for item in items:
                batch = {name: t.to(device) for name, t in preprocess(item).items()}
                results.append(request.postprocess(request.forward(request.model, batch).cpu()))
        return results

    if plain() != list(pipeline(items)):
        raise SystemExit("the pipeline's results are not those of the plain loop")
    samples: dict[str, list[float]] = {name: [] for name in ("plain", "pipeline", "predicted", "ideal")}
    cores = []
    for _ in range(rounds):
        profiled = fp.profile(request.model, items, **stages, rounds=1, layers=False)
        longest = max(p.total_ms for p in profiled.phases)
        item_ms = sum(p.total_ms for p in profiled.phases) / len(items)
        samples["predicted"].append(100 / profiled.overlap.speedup_of(len(items)))
        samples["ideal"].append(100 * (item_ms + longest * (1 - 1 / len(items))) / (item_ms * len(items)))
        cores.append(profiled.overlap.cores)
        for name, loop in (("plain", plain), ("pipeline", lambda: list(pipeline(items)))):
            start = time.perf_counter()
            loop()
            samples[name].append((time.perf_counter() - start) * 1e3 / len(items))
    measured = statistics.median(100 * b / a for a, b in zip(samples["plain"], samples["pipeline"]))
    predicted, ideal = (statistics.median(samples[name]) for name in ("predicted", "ideal"))
    return {
        "items": len(items),
        "plain_ms": statistics.median(samples["plain"]),
        "pipeline_ms": statistics.median(samples["pipeline"]),
        "measured_percent": measured,
        "predicted_percent": predicted,
        "ideal_percent": ideal,
        "speedup": 100 / measured,
        "points_apart": abs(measured - predicted),
        "of_ideal": (100 - measured) / (100 - ideal),
        "cores_free_of_others": statistics.median(cores),
        "rounds": samples,
    }


def main() -> None:
    p = bench.parser(__doc__)
    p.add_argument("--model", default="minilm", help="a folder, minilm, or a hub id")
    p.add_argument("--length", type=int, default=128)
    p.add_argument("--items", type=int, default=24)
    p.set_defaults(rounds=5)
    args = p.parse_args()
    try:
        source = embedding.find_model(args.model)
        model, tokenizer = embedding.load(source, args.device)
        request = readout.Request(model, tokenizer, args.length, readout.readout_of(source))
    except ValueError as e:
        p.error(str(e))
    texts = embedding.builtin_texts()[1]

    def items(batch: int) -> list[list[str]]:
        return [[texts[(i * batch + j) % len(texts)] for j in range(batch)] for i in range(args.items)]

    result = bench.header("pipeline", args.device, ["loads"]) | {"allocator": keep_freed_memory()}
    result |= {"model": source.origin, "length": args.length, "loads": {}, "checks": {}}
    loads = {
        "a: tokenise, 8 texts": (request.preprocess, items(8)),
        "b: wait 20 ms, tokenise, 1 text": (functools.partial(waiting, request.preprocess), items(1)),
    }
    print(
        f"{source.origin}; {result['device']['name']}, {torch.get_num_threads()} threads; medians of {args.rounds} rounds"
    )
    print(f"{'':<34}{'plain ms':>10}{'pipeline':>10}{'% of plain':>12}{'predicted':>11}{'ideal':>8}{'of ideal':>10}")
    for name, (preprocess, requests) in loads.items():
        r = result["loads"][name] = run_load(request, preprocess, requests, args.rounds)
        print(f"{name:<34}{r['plain_ms']:>10.2f}{r['pipeline_ms']:>10.2f}{r['measured_percent']:>12.1f}"
              f"{r['predicted_percent']:>11.1f}{r['ideal_percent']:>8.1f}{r['of_ideal']:>10.0%}", flush=True)  # fmt: skip
    a, b = result["loads"].values()
    result["checks"] = {
        f"a: speed-up >= {LEAST_SPEEDUP}": a["speedup"] >= LEAST_SPEEDUP,
        f"b: of the ideal >= {LEAST_OF_IDEAL}": b["of_ideal"] >= LEAST_OF_IDEAL,
        **{f"{n}: within {MOST_POINTS:.0f} points": r["points_apart"] <= MOST_POINTS for n, r in (("a", a), ("b", b))},
    }
    for check, ok in result["checks"].items():
        print(f"{'passes' if ok else 'FAILS ':<8}{check}")
    bench.write(result, args.json)


if __name__ == "__main__":
    main()
