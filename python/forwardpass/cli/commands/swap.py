"""`forwardpass swap`."""

from __future__ import annotations

import copy
import pathlib
import warnings
from typing import Annotated

import typer
from rich.console import Console

import forwardpass as fp

from ...common import environment
from ...integrations import sentence_transformers as sentences
from ...swap import checkpoint
from ...swap.folder import check_folder
from .. import comparison, embedding
from ..console import print_swap, tracking
from ..options import (
    Calibration,
    Device,
    Json,
    ModelName,
    PlanFile,
    PrecisionName,
    Texts,
    number,
    precision_or_plan,
    prepare,
    refusing,
    write_json,
)
from ..subject import load


def swap(
    model: ModelName,
    precision: PrecisionName = None,
    plan: PlanFile = None,
    text: Texts = None,
    calibrate: Calibration = None,
    batch: Annotated[int, number("Rows of the timed batch.", least=1)] = 8,
    length: Annotated[int, number("Tokens of each of its rows.", least=1)] = 128,
    min_cosine: Annotated[float, number("The lowest cosine over the texts that passes.", above=0, most=1)] = 0.999,
    device: Device = None,
    json: Json = None,
    save: Annotated[str | None, typer.Option(help="Store the swapped model and its tokenizer in this folder.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Let --save use a folder that holds other files, but "
                                            "for the model's own.")] = False,
) -> None:  # fmt: skip
    """Swaps a text embedding model or a cross-encoder, runs it on real text before and after, and shows what changed.

    A folder of sentence-transformers says itself how texts are pooled and prompted, or that pairs are scored."""
    console = Console(stderr=json == "-")
    planned, calibrates = precision_or_plan(precision, plan)
    where = prepare(device, json, read=(model, plan, text, calibrate))
    with refusing(ValueError, OSError):
        if save:
            if json and pathlib.Path(json).resolve() == pathlib.Path(save).resolve():
                raise ValueError(f"--json and --save are both {save}: give each a path of its own")
            check_folder(save, [embedding.find_model(model).path], overwrite)
        subject = load(model, where, text, calibrate, calibrates, console)
        timed = embedding.full_batch(subject.tokenizer, subject.texts, batch, length, subject.model, where)
    swapped = copy.deepcopy(subject.model)  # both are wanted at once: their timing takes turns
    with tracking() as track:
        track(subject.swapping(), None)
        with refusing(ValueError, TypeError, OSError, fp.Unsupported), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the report has them too
            report = fp.swap(swapped, precision=precision, plan=planned, calibrate=subject.calibration)
        compared = comparison.compare(subject.model, swapped, subject.batches, timed, subject.readout, track)
    if save:
        with refusing(ValueError, OSError):
            around = subject.source.around()
            named = swapped if around is None else sentences.bare(around, swapped)
            checkpoint.write(named, around, save, overwrite)
            subject.tokenizer.save_pretrained(save)
    reported = report.to_json()
    if not (reported["swapped"] or reported["attention"]):  # what two timings of one model differ by is no speed-up
        compared |= {"speedup": None, "reasons": {**compared["reasons"], "speedup": "nothing was changed"}}
    ok = compared["parity"]["cosine_min"] >= min_cosine  # false for NaN
    result = {
        "schema": "forwardpass.swap/1",
        "model": {"name": model, "origin": subject.source.origin},
        "readout": subject.readout.describe(),
        "padding": str(report.unpadding),
        "precision": precision,
        "plan": plan,
        **{
            name: reported[name]
            for name in ("swapped", "attention", "unpadding", "skipped", "other_layers", "warnings", "weight_bytes")
        },
        "calibration": {"texts": subject.calibrated_on} if subject.calibration else None,
        **compared,
        "batch": batch,
        "length": length,
        "checks": {"cosine_min": {"least": min_cosine, "ok": ok}},
        "versions": environment.versions(),
        "device": environment.device(where),
        "measured": ["parity", "latency_ms", "latency_quartiles_ms", "speedup", "weight_bytes"],
    }
    print_swap(result, console)
    if json:
        write_json(result, json)
    if not ok:
        typer.echo(
            f"forwardpass: the check cosine_min >= {min_cosine} failed: it is {compared['parity']['cosine_min']:.5f}",
            err=True,
        )
        raise typer.Exit(1)
