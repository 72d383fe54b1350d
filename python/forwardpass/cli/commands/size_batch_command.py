"""`forwardpass size-batch`."""

from __future__ import annotations

import pathlib
import warnings
from typing import Annotated, Any

import typer
from rich.console import Console

import forwardpass as fp

from ...common.printing.plots import require as require_plot
from ...common.printing.text import count, wrapped
from ...common.timing import keep_freed_memory
from ...serving.load_generator import Load
from ...serving.queueing import Arrivals, Spread, settled
from ...serving.queueing import percentile as percentile_of
from ...serving.size_batch import RUN_SECONDS, try_policy
from .. import embedding
from ..console import describe_calibration, say, tracking
from ..options import (
    CALIBRATES,
    Device,
    Json,
    SwappedName,
    Yes,
    number,
    precision_option,
    prepare,
    refuse,
    refuse_slow,
    refusing,
    write_json,
)
from ..subject import load


def size_batch(
    model: SwappedName,
    slo_ms: Annotated[float, number("The latency objective, milliseconds.", above=0)],
    rate: Annotated[float | None, number("Requests a second, arriving independently of each other.", above=0)] = None,
    trace: Annotated[str | None, typer.Option(help="Instead: a file of arrival times in seconds, one a line.")] = None,
    percentile: Annotated[float, number("The percentile of the latencies that has to be within it.", above=0, below=100)] = 99,
    precision: Annotated[str | None, precision_option(f"Swap first, to one of {', '.join(CALIBRATES)}.")] = None,
    length: Annotated[int, number("Tokens of each request.", least=1)] = 128,
    max_batch: Annotated[int, number("No larger batch is tried.", least=1)] = 64,
    memory_limit_mb: Annotated[int | None, number("Memory of a batch beyond the model, MB.", least=1)] = None,
    price_per_hour: Annotated[float | None, number("Of one replica; prints the cost of a million.", least=0)] = None,
    seconds: Annotated[float, number("How long times are gathered.", above=0)] = 30,
    check: Annotated[float, number("Seconds of a real run with the policy; 0: none.", least=0)] = 20,
    device: Device = None,
    yes: Yes = False,
    json: Json = None,
    plot: Annotated[str | None, typer.Option(help="Draw the measured points and the frontier to this image.")] = None,
) -> None:  # fmt: skip
    """Finds the batches of a text embedding model that hold a latency objective at the least cost, and tries them."""
    console = Console(stderr=json == "-")
    where = prepare(device, json, plot, read=(model, trace))
    refuse_slow(precision, None, where, yes)
    if (rate is None) == (trace is None):
        refuse(f"pass either --rate or --trace: {'neither was' if rate is None else 'both were'} given")
    with refusing(ValueError, OSError):
        if plot:
            require_plot(plot)
        arrivals = None if trace is None else [float(line) for line in pathlib.Path(trace).read_text().split()]
        calibrates = precision is not None and CALIBRATES[precision]
        subject = load(model, where, None, None, calibrates, console, swaps=precision is not None)
        rows = embedding.full_batch(subject.tokenizer, subject.texts, max_batch, length, subject.model, where)

    def make_batch(n: int) -> embedding.Batch:
        return {name: rows_of[:n] for name, rows_of in rows.items()}

    keep_freed_memory()
    with tracking() as track, refusing(ValueError, TypeError, fp.Unsupported), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        if precision is not None:
            track(subject.swapping(), None)
            fp.swap(subject.model, precision, unpad=True, calibrate=subject.calibration)
        sizing = fp.size_batch(
            subject.model, make_batch, forward=subject.readout.outputs, latency_slo_ms=slo_ms, percentile=percentile,
            arrival_rate=rate, arrivals=arrivals,
            memory_limit=None if memory_limit_mb is None else memory_limit_mb * 1_000_000,
            price_per_hour=price_per_hour, max_batch=max_batch, run_seconds=check or RUN_SECONDS, seconds=seconds,
            progress=track,
        )  # fmt: skip
        result = {
            **sizing.to_json(),
            "model": {"name": model, "origin": subject.source.origin, "precision": precision, "length": length},
        }
        ok = sizing.policy is not None
        if sizing.policy is not None and sizing.spread is not None and check:
            track("trying the policy", None)
            replicas = sizing.policy.replicas
            count_of_run = max(1, round(check * sizing.arrival_rate / replicas))
            times = Arrivals(sizing.arrival_rate, arrivals).of_replica(replicas, count_of_run, seed=1)
            if arrivals is not None:
                times = [t for t in times if t <= check]
            trial = try_policy(subject.model, make_batch, sizing.policy, times, forward=subject.readout.outputs)
            result["check"] = checked(trial, percentile, slo_ms, sizing.spread)
            result["measured"].append("check")
            ok = result["check"]["ok"]
    lines = [str(sizing)]
    if subject.calibration:
        lines[:0] = wrapped(f"calibrated {describe_calibration(subject.calibrated_on)}")
    if "check" in result:
        run = result["check"]
        lines += wrapped(
            f"real run of {count(run['requests'], 'request')}: "
            + ", ".join(f"{name} {ms:.1f} ms" for name, ms in run["latency_ms"].items())
            + f"; sent at most {run['lateness_ms']:.1f} ms late; {'holds' if ok else 'FAILS'} the objective"
        )
        if not run["as_simulated"]:
            lines += wrapped(
                f"p{percentile:g} is not as simulated: batches took longer or shorter than when they were timed, as they do "
                "beside other work on the machine"
            )
    say(console, "\n".join(lines))
    if plot:
        with refusing(ValueError, RuntimeError, OSError):
            sizing.save_plot(plot)
    if json:
        write_json(result, json)
    if not ok:
        raise typer.Exit(1)


def checked(trial: Load, percentile: float, slo_ms: float, spread: Spread) -> dict[str, Any]:
    """What a real run shows, the first requests left out as in the simulation."""
    latencies = settled(trial.latencies)
    latency_ms = {f"p{p:g}": 1e3 * percentile_of(latencies, p) for p in sorted({50.0, 95.0, percentile})}
    return {
        "requests": len(trial.latencies),
        "latency_ms": latency_ms,
        "lateness_ms": 1e3 * max(trial.lateness),
        "as_simulated": spread.low_ms <= latency_ms[f"p{percentile:g}"] <= spread.high_ms,
        "ok": latency_ms[f"p{percentile:g}"] <= slo_ms,
    }
