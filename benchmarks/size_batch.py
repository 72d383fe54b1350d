"""fp.size_batch's simulated queue beside real runs of fp.Pipeline, at shares of the rate at which it saturates.

python -m benchmarks.size_batch [--length 32] [--requests 3000] [--runs 3] [--loads 0.3 0.7] [--json FILE]

all-MiniLM-L6-v2 in fp32. Each run measures service times anew, takes the policy that they give, and sends it the same Poisson
arrivals that are simulated.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import forwardpass as fp
from benchmarks import bench
from forwardpass.cli import embedding
from forwardpass.common.timing import keep_freed_memory
from forwardpass.serving.queueing import Policy, bootstrap, percentile, poisson, settled, simulate
from forwardpass.serving.size_batch import try_policy

#: percentile -> how far the simulation may be off, relative; p99 may also be within the interval of the real run
BARS = {50: 0.10, 95: 0.20, 99: 0.20}


def run(model: Any, make_batch: Any, load: float, requests: int, seed: int, slo_ms: float) -> dict[str, Any]:
    sizing = fp.size_batch(model, make_batch, latency_slo_ms=slo_ms, arrival_rate=1.0, max_batch=16)
    rate = load * sizing.saturation_rate
    arrivals = poisson(rate, requests, seed)
    largest = max(sizing.points, key=lambda p: p.rate).batch
    policy = Policy(largest, slo_ms / 20)
    simulated = settled(simulate(arrivals, policy, sizing.service, seed).latencies)
    real = try_policy(model, make_batch, policy, arrivals)
    latencies = settled(real.latencies)
    row: dict[str, Any] = {
        "load": load,
        "rate": rate,
        "saturation_rate": sizing.saturation_rate,
        "policy": vars(policy),
        "seed": seed,
        "requests": requests,
        "lateness_ms": {f"p{p}": 1e3 * percentile(real.lateness, p) for p in (50, 99)},
        "percentiles": {},
    }
    for p in BARS:
        s, r, interval = percentile(simulated, p), percentile(latencies, p), bootstrap(latencies, p)
        row["percentiles"][f"p{p}"] = {
            "simulated_ms": 1e3 * s,
            "measured_ms": 1e3 * r,
            "interval_ms": [1e3 * x for x in interval],
            "error": s / r - 1,
            "within_interval": interval[0] <= s <= interval[1],
        }
    return row


def line(row: dict[str, Any]) -> str:
    errors = [
        f"{name} {x['simulated_ms']:.1f} simulated, {x['measured_ms']:.1f} measured ms "
        f"[{x['interval_ms'][0]:.1f}, {x['interval_ms'][1]:.1f}] ({x['error']:+.1%})"
        for name, x in row["percentiles"].items()
    ]
    p = row["policy"]
    return (
        f"load {row['load']:.0%}, {row['rate']:.1f} of {row['saturation_rate']:.1f} requests a second, max_batch "
        f"{p['max_batch']}, max_wait {p['max_wait_ms']:g} ms: {'; '.join(errors)}; sent late by "
        f"{row['lateness_ms']['p50']:.2f} ms (p99 {row['lateness_ms']['p99']:.2f})"
    )


def verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The median error of each percentile against its bar, over the runs at one load."""
    verdicts = {}
    for p, bar in BARS.items():
        percentiles = [row["percentiles"][f"p{p}"] for row in rows]
        error = statistics.median(abs(x["error"]) for x in percentiles)
        inside = statistics.median(float(x["within_interval"]) for x in percentiles) == 1
        verdicts[f"p{p}"] = {"median_error": error, "bar": bar, "ok": error <= bar or (p == 99 and inside)}
    return verdicts


def summary(verdicts: dict[str, Any]) -> str:
    return ", ".join(
        f"{p} {x['median_error']:.1%} of {x['bar']:.0%} {'ok' if x['ok'] else 'MISSED'}" for p, x in verdicts.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32, help="tokens of a request")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.3, 0.7], help="of the saturation rate")
    parser.add_argument("--slo-ms", type=float, default=200.0)
    parser.add_argument("--json", metavar="FILE", help="also write the result to this file")
    args = parser.parse_args()
    keep_freed_memory()
    model, tokenizer = embedding.load(embedding.find_model("minilm"), "cpu")
    rows_of = embedding.full_batch(tokenizer, embedding.builtin_texts()[1], 64, args.length, model, "cpu")

    def make_batch(n: int) -> embedding.Batch:
        return {name: t[:n] for name, t in rows_of.items()}

    result = bench.header("size_batch-check", "cpu", ["results"]) | {"length": args.length, "results": []}
    for seed in range(args.runs):
        for load in args.loads:  # in turn: the machine changes
            row = run(model, make_batch, load, args.requests, seed, args.slo_ms)
            result["results"].append(row)
            print(line(row), flush=True)
    result["verdicts"] = {
        str(load): verdict([row for row in result["results"] if row["load"] == load]) for load in args.loads
    }
    for load, verdicts in result["verdicts"].items():
        print(f"load {float(load):.0%}, median error of {args.runs} runs: {summary(verdicts)}")
    bench.write(result, args.json)


if __name__ == "__main__":
    main()
