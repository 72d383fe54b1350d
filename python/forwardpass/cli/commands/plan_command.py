"""`forwardpass plan`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer
from rich.console import Console

import forwardpass as fp

from ...common.printing.plots import require as require_plot
from ...common.printing.text import count
from ...common.timing import keep_freed_memory
from ...integrations.transformers.kv_scales import KV_CACHES
from ...ops.attention_8bit import DTYPES
from ...planning.candidates.measure import CALIBRATED
from ...planning.plan_plots import plan as plot_plan
from ...planning.planner import CANDIDATES, TARGETS
from .. import embedding
from ..console import say, tracking
from ..options import (
    Batch,
    Crossover,
    Device,
    Length,
    ModelName,
    Steps,
    number,
    prepare,
    refuse,
    refusing,
    share,
    share_of,
    write_json,
)
from ..subject import load


def plan(
    model: ModelName,
    min_cosine: Annotated[float | None, number("The lowest cosine over the texts that may be; or", above=0, most=1)] = None,
    max_error: Annotated[float | None, number("the largest relative error of the embeddings; or", least=0)] = None,
    max_perplexity_increase: Annotated[str | None, share("of a decoder: the most that its perplexity may rise.")] = None,
    candidates: Annotated[str | None, typer.Option(help=f"Comma-separated, of {', '.join(CANDIDATES)}; "
                                                   "default: all.")] = None,
    target: Annotated[str, typer.Option(help=f"What is minimised: {' or '.join(TARGETS)}.")] = "latency",
    text: Annotated[str | None, typer.Option(help="Texts that the budget must hold on, one a line; "
                                             "default: 288 built in.")] = None,
    calibrate: Annotated[str | None, typer.Option(help="Other texts, to calibrate with: a file, builtin or none; "
                                                  "default: builtin for what is calibrated.")] = None,
    kv_cache: Annotated[str | None, typer.Option(help=f"Of a decoder: what its cache of keys and values may become, "
                                                 f"comma-separated, of {', '.join(KV_CACHES)}.")] = None,
    attention: Annotated[str | None, typer.Option(help="What attention may be computed in, comma-separated, of "
                                                  f"{', '.join(DTYPES)}; default: in the model's dtype.")] = None,
    crossover: Crossover = None,
    batch: Batch = None,
    length: Length = 128,
    steps: Steps = 32,
    device: Device = None,
    json: Annotated[str | None, typer.Option(help="Write the plan to this file, for `forwardpass swap --plan`, "
                                             "or to stdout for -.")] = None,
    plot: Annotated[str | None, typer.Option(help="Draw what was to choose from: a .png, .svg or .pdf file.")] = None,
    resume: Annotated[str | None, typer.Option(help="Keep measurements in this file, and go on from it: after an "
                                               "interrupt, or for another budget.")] = None,
) -> None:  # fmt: skip
    """Plans each layer's precision: the fastest text embedding model, cross-encoder or decoder within a budget, as measured."""
    console = Console(stderr=json == "-")
    increase = share_of(max_perplexity_increase)
    if sum(bound is not None for bound in (min_cosine, max_error, increase)) != 1:
        refuse("pass either --min-cosine or --max-error, or of a decoder --max-perplexity-increase")
    where = prepare(device, json, plot, resume, read=(model, text, calibrate))
    named = [name.strip() for name in candidates.split(",")] if candidates is not None else list(CANDIDATES)
    calibrates = any(name.endswith(CALIBRATED) for name in named)
    if candidates is None and calibrate == "none":
        named, calibrates = [name for name in named if not name.endswith(CALIBRATED)], False
    with refusing(ValueError, OSError):
        if plot:
            require_plot(plot)
        subject = load(model, where, text, calibrate, calibrates, console)
        batch = batch or (1 if subject.source.decoder else 8)
        if subject.source.decoder:
            embedding.check_length(length + steps, subject.tokenizer, subject.model)
            timed: Any = fp.Decoding(batch, length, steps)
        elif increase is not None:
            raise ValueError("--max-perplexity-increase is for decoders, and this is none: pass --min-cosine")
        else:
            timed = embedding.full_batch(subject.tokenizer, subject.texts, batch, length, subject.model, where)
    allocator = keep_freed_memory()
    with tracking() as track, refusing(ValueError, TypeError, OSError, fp.Unsupported):
        try:
            chosen_plan = fp.plan(
                subject.model,
                subject.batches,
                candidates=named,
                min_cosine=min_cosine,
                max_error=max_error,
                max_perplexity_increase=increase,
                target=target,
                shapes=[timed],
                unpad=True,  # the readout leaves padding out
                attention=[name.strip() for name in attention.split(",")] if attention is not None else "auto",
                crossover=crossover,
                kv_cache=[name.strip() for name in kv_cache.split(",")] if kv_cache is not None else None,
                calibrate=subject.calibration,
                forward=subject.readout.forward,
                resume=resume,
                progress=track,
            )
        except KeyboardInterrupt as e:
            typer.echo(f"forwardpass: interrupted {'; '.join(getattr(e, '__notes__', []))}", err=True)
            raise typer.Exit(130) from None
    assert chosen_plan.evidence is not None
    about = {
        "model": subject.source.origin,
        "readout": subject.readout.describe(),
        "allocator": allocator,
        "texts": len(subject.texts),
        "batch": batch,
        "length": length,
        **({"steps": steps} if subject.source.decoder else {}),
    }
    chosen_plan = dataclasses.replace(chosen_plan, evidence={**about, **chosen_plan.evidence})
    if subject.calibration:
        say(console, f"candidates {CALIBRATED}: on {count(subject.calibrated_on, 'text')}, in Python calibrate=batches")
    say(console, subject.readout.describe())
    say(console, str(chosen_plan))
    if json:
        write_json(chosen_plan.to_json(), json)
    if plot:
        plot_plan(chosen_plan.evidence or {}, plot)
