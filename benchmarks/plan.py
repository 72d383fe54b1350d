"""fp.plan on all-MiniLM-L6-v2 beside what else one could run: one precision everywhere, and layers taken greedily by their error.

    python -m benchmarks.plan [--rounds N] [--json FILE] [--plot FILE]

All are built from the same measurements, run on the same 288 texts, and timed in turn in one process. A greedy plan takes layers
in the order of their error in INT8, calibrated, until one more would pass the budget on those texts; the others stay as they are
or run in bfloat16.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import forwardpass as fp
from benchmarks import bench
from forwardpass.calibration.running import calibration_arguments
from forwardpass.cli import embedding
from forwardpass.cli.embedding import Batch
from forwardpass.cli.readout import Embeddings
from forwardpass.common.printing import plots
from forwardpass.common.timing import interleave, keep_freed_memory
from forwardpass.planning.candidates.measure import CALIBRATED, find_candidate
from forwardpass.proofs.walker import linear_like
from forwardpass.swap.plan import Plan
from forwardpass.swap.swapping import planned, swap_planned

BUDGETS = (0.999, 0.9995, 0.9999)
BEST = f"int8{CALIBRATED}"  #: what greedy plans are made of


@dataclasses.dataclass
class Entry:
    """A plan and what is measured of it: lowest cosine and mean of 1 - cosine over the texts, ms of its layers by the
    measurements of fp.plan, and of the whole model."""

    name: str
    plan: Plan
    layers_ms: float
    cosine_min: float
    error_mean: float
    latency_ms: dict[str, float] | None = None


class Subject:
    """The model under one plan after another."""

    def __init__(self, model: nn.Module, batches: list[Batch], calibration: list[Batch], evidence: dict[str, Any]):
        self.model, self.batches, self.rows = model, batches, {x["fqn"]: x for x in evidence["layers"]}
        self.leaves = {leaf.fqn: leaf for leaf in linear_like(model)}
        candidates = [find_candidate(name) for name in evidence["candidates"]]
        rotations = {fqn: {p.rotate for p in candidates if p.calibrated} for fqn in self.leaves}
        self.arguments, *_ = calibration_arguments(model, [*self.leaves.values()], calibration, None, rotations)
        self.expected = embedding.embed(embedding.hidden_states(model), batches)
        self.current: Plan | None = None

    def plan(self, choices: dict[str, str]) -> Plan:
        """The plan that gives each layer its candidate. A plan names the layers of a model as it is before any."""
        self.put(None)
        return planned(
            self.model, [(self.leaves[fqn], find_candidate(name)) for fqn, name in choices.items()], (), None, None
        )

    def entry(self, name: str, plan: Plan) -> Entry:
        self.put(plan)
        actual = embedding.embed(embedding.hidden_states(self.model), self.batches)
        cosine = torch.nn.functional.cosine_similarity(actual.double(), self.expected.double())
        ms = {fqn: x["before"]["ms"]["low"] for fqn, x in self.rows.items()}
        ms |= {
            x.fqn: self.rows[x.fqn]["candidates"][x.precision + CALIBRATED * x.calibrated]["ms"]["low"]
            for x in plan.layers
        }
        return Entry(name, plan, sum(ms.values()), cosine.min().item(), (1 - cosine).mean().item())

    def put(self, plan: Plan | None) -> None:
        if plan is not self.current:
            if self.current is not None and self.current.layers:
                fp.restore(self.model)
            self.current = None
            if plan is not None and plan.layers:
                swap_planned(self.model, plan, self.arguments)
            self.current = plan

    def greedy(self, name: str, order: list[str], fallback: str | None) -> Callable[[float], Entry]:
        """For a budget: the most layers, in that order, that hold it together, the others in `fallback`."""
        tried: dict[int, Entry] = {}

        def evaluate(count: int) -> Entry:
            if count not in tried:
                choices = dict.fromkeys(order, fallback) | dict.fromkeys(order[:count], BEST)
                plan = self.plan({fqn: c for fqn, c in choices.items() if c is not None})
                tried[count] = self.entry(f"greedy by {name}, {count} {BEST}, others {fallback or 'fp32'}", plan)
            return tried[count]

        def within(budget: float) -> Entry:
            low, high = 0, len(order) + 1
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if evaluate(middle).cosine_min >= budget else (low, middle)
            return evaluate(low)

        return within


def competitors(subject: Subject) -> list[Entry]:
    """One precision everywhere, and greedy plans for each budget."""
    gain = [fqn for fqn, x in subject.rows.items() if x["candidates"][BEST]["output"]]
    entries = [
        subject.entry(f"{name} everywhere", subject.plan(dict.fromkeys(gain, name)))
        for name in ("int8", BEST, "w8a16", "bf16")
    ]
    by_output = sorted(gain, key=lambda fqn: subject.rows[fqn]["candidates"][BEST]["output"]["mean"])
    by_layer = sorted(gain, key=lambda fqn: subject.rows[fqn]["candidates"][BEST]["error"])
    for name, order, fallback in (
        ("error of the output", by_output, "bf16"),
        ("error of the output", by_output, None),
        ("error of the layer", by_layer, "bf16"),
    ):
        within = subject.greedy(name, order, fallback)
        entries += [within(budget) for budget in BUDGETS]
    return list({e.name: e for e in entries}.values())


def draw(entries: list[Entry], file: str) -> None:
    figure, axes = plots.axes("all-MiniLM-L6-v2: error over time of whole models")
    for kind, mark in (("plan", "o-"), ("greedy", "x"), ("everywhere", "s")):
        series = sorted((e for e in entries if kind in e.name), key=lambda e: e.layers_ms)
        axes.plot([e.layers_ms for e in series], [1 - e.cosine_min for e in series], mark, label=kind)
    for e in entries:
        if "everywhere" in e.name:
            axes.annotate(
                e.name, (e.layers_ms, 1 - e.cosine_min), fontsize=8, xytext=(4, 4), textcoords="offset points"
            )
    for budget in BUDGETS:
        axes.axhline(1 - budget, color="grey", lw=0.5, ls=":")
    axes.set_yscale("log")
    axes.set_xlabel("ms of the linear layers, 8 x 128 tokens")
    axes.set_ylabel("1 - lowest cosine of 288 texts")
    axes.legend()
    figure.savefig(file)


def main() -> None:
    p = bench.parser(__doc__)
    p.add_argument("--plot", metavar="FILE", help="draw error over time")
    args = p.parse_args()
    try:
        if args.plot:
            plots.require(args.plot)
        model, tokenizer = embedding.load(embedding.find_model("minilm"), args.device)
    except ValueError as e:
        p.error(str(e))
    calibration, texts = (embedding.tokenize(tokenizer, t, model, args.device) for t in embedding.builtin_texts())
    timed = embedding.full_batch(tokenizer, embedding.builtin_texts()[1], 8, 128, model, args.device)
    result = bench.header("plan-benchmark", args.device, ["plans", "seconds"]) | {"allocator": keep_freed_memory()}

    plans, seconds = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for budget in BUDGETS:
            began = time.perf_counter()
            print(f"planning for {budget}", file=sys.stderr)
            plans[budget] = fp.plan(
                model, texts, min_cosine=budget, shapes=[timed], calibrate=calibration, forward=Embeddings().forward,
                resume=os.path.join(folder, "measurements.json"),
            )  # fmt: skip
            seconds[str(budget)] = time.perf_counter() - began
    first = plans[BUDGETS[0]].evidence
    assert first is not None
    subject = Subject(model, texts, calibration, dict(first))
    print("running what else there is", file=sys.stderr)
    planned = {budget: subject.entry(f"plan {budget}", plan) for budget, plan in plans.items()}
    entries = [*planned.values(), *competitors(subject)]
    as_it_is = subject.entry("fp32", subject.plan({}))

    def call(plan: Plan) -> Callable[[], object]:
        def run() -> object:
            subject.put(plan)  # in the call before the timed ones
            return model(**timed)

        return run

    with torch.inference_mode():
        timings = interleave({e.name: call(e.plan) for e in (as_it_is, *entries)}, args.device, rounds=args.rounds)
    subject.put(None)
    for e in (as_it_is, *entries):
        e.latency_ms = timings[e.name].to_json()
    fp32 = timings["fp32"].low
    print(f"{result['device']['name']}, {torch.get_num_threads()} threads; seconds to plan: "
          + ", ".join(f"{s:.0f}" for s in seconds.values()))  # fmt: skip
    print(f"{'':<62}{'lowest cosine':>14}{'mean error':>12}{'layers, ms':>12}{'model, ms':>11}{'times':>7}")
    for e in sorted((as_it_is, *entries), key=lambda e: e.cosine_min):
        ms = timings[e.name].low
        print(f"{e.name:<62}{e.cosine_min:>14.6f}{e.error_mean:>12.2e}{e.layers_ms:>12.2f}{ms:>11.1f}{fp32 / ms:>7.2f}")
    result["plans"] = [{k: v for k, v in vars(e).items() if k != "plan"} for e in (as_it_is, *entries)]
    result |= {"seconds": seconds, "checks": checks(planned, entries, fp32)}
    for name, check in result["checks"].items():
        print(f"{'ok    ' if check['ok'] else 'MISSED'} {name}: {check['found']}")
    if args.plot:
        draw(entries, args.plot)
    bench.write(result, args.json)


def checks(planned: dict[float, Entry], entries: list[Entry], fp32: float) -> dict[str, dict[str, Any]]:
    """What is claimed of plans. Times of layers decide which of two plans is faster: they are the same for equal choices."""
    verdicts: dict[str, dict[str, Any]] = {}
    for budget, e in planned.items():
        better = [x.name for x in entries if x.cosine_min > e.cosine_min and x.layers_ms < e.layers_ms]
        verdicts[f"plan {budget} holds its budget"] = {"ok": e.cosine_min >= budget, "found": e.cosine_min}
        verdicts[f"nothing is better in both than plan {budget}"] = {"ok": not better, "found": better or "nothing is"}
    middle, int8 = planned[0.9995], next(e for e in entries if e.name == "int8 everywhere")
    assert middle.latency_ms and int8.latency_ms
    speed = fp32 / middle.latency_ms["low"]
    verdicts["plan 0.9995 is at least 2.5 times as fast as fp32"] = {"ok": speed >= 2.5, "found": speed}
    error = (1 - middle.cosine_min) / (1 - int8.cosine_min)
    speed_ratio = int8.latency_ms["low"] / middle.latency_ms["low"]
    verdicts["its error is at most half of int8's"] = {"ok": error <= 0.5, "found": error}
    verdicts["at 80 % or more of int8's speed"] = {"ok": speed_ratio >= 0.8, "found": speed_ratio}
    return verdicts


if __name__ == "__main__":
    main()
