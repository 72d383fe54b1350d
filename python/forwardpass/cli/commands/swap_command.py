"""`forwardpass swap`."""

from __future__ import annotations

import copy
import dataclasses
import pathlib
import warnings
from typing import Annotated, Any

import typer
from rich.console import Console

import forwardpass as fp

from ...checkpoints.folder import check_folder
from ...checkpoints.save import write
from ...common import environment
from ...common.models.patterns import patterns
from ...common.printing.text import together
from ...integrations import sentence_transformers as sentences
from ...integrations.transformers.kv_scales import KV_CACHES
from ...swap.precision import STORED
from .. import comparison, embedding, vision
from ..console import print_swap, tracking
from ..options import (
    ATTENTION,
    Batch,
    Calibration,
    Crossover,
    Device,
    Json,
    Length,
    ModelName,
    PlanFile,
    PrecisionName,
    Steps,
    Texts,
    Yes,
    attention_option,
    number,
    precision_or_plan,
    prepare,
    refuse_slow,
    refusing,
    share,
    share_of,
    write_json,
)
from ..stored_summary import as_reported
from ..subject import load
from .swap_pictures_command import refuse_options, swap_pictures


def refuse_unmatched(include: list[str], report: fp.types.Report) -> None:
    """Refuses an --include that names no layer, before anything is run."""
    entries: list[Any] = [*report.swapped, *report.attention, *report.skipped]
    names = [x.fqn for x in entries]
    for pattern in patterns("include", include):
        if not any(pattern.matches(name) for name in names):
            has = [name for name, _ in together(names, lambda name: name)]
            more = f" and {len(has) - 6} more" if len(has) > 6 else ""
            raise ValueError(
                f"--include {pattern.text} names no layer of this model, which has {', '.join(has[:6])}{more}"
            )


def swap(
    context: typer.Context,
    model: ModelName,
    precision: PrecisionName = None,
    plan: PlanFile = None,
    text: Texts = None,
    calibrate: Calibration = None,
    include: Annotated[list[str] | None, typer.Option(help="As in fp.swap: swap nothing but what this names; a name "
                                                     "spelled out, as lm_head, overrides a default skip.")] = None,
    kv_cache: Annotated[str | None, typer.Option(metavar=" | ".join(KV_CACHES), help="Of a decoder: what its cache of keys and "
                                                 "values becomes, as in fp.swap; perplexity is then that of steps.")] = None,
    attention: Annotated[str, attention_option("What attention becomes, as in fp.swap.")] = "auto",
    crossover: Crossover = None,
    batch: Batch = None,
    length: Length = 128,
    steps: Steps = 32,
    min_cosine: Annotated[float, number("The lowest cosine over the texts that passes.", above=0, most=1)] = 0.999,
    max_perplexity_increase: Annotated[str, share("Of a decoder: the most that its perplexity may rise.")] = "2%",
    device: Device = None,
    yes: Yes = False,
    json: Json = None,
    save: Annotated[str | None, typer.Option(help="Store the swapped model and its tokenizer in this folder.")] = None,
    images: Annotated[str | None, typer.Option(help="Of a model of pictures: a folder of pictures to run on, of which one half "
                                               "calibrates; default: the photographs of scikit-image and scikit-learn.")] = None,
    weights: Annotated[str | None, typer.Option(help="Of torchvision:NAME and timm:NAME: a file with its state dict; default: what "
                                                "the package has downloaded before.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Let --save use a folder that holds other files, but "
                                            "for the model's own.")] = False,
) -> None:  # fmt: skip
    """Swaps a text embedding model, a cross-encoder, a decoder or a model of pictures, runs it before and after, and shows what
    changed.

    Of a folder that another library stored in 8 bits the bytes are taken over as they are, without --precision; what was before
    is the model that transformers loads from it. A folder of sentence-transformers says itself how texts are pooled and
    prompted, or that pairs are scored. Of a decoder tokens a second are timed, those of prompts and those that it generates
    apart, and its perplexity is compared.

    A model of pictures is torchvision:NAME, timm:NAME, or a folder of timm, of transformers (…ForImageClassification) or of
    diffusers (Autoencoder…). It runs on photographs. Nothing is downloaded."""
    if vision.is_vision(model):
        swap_pictures(context)
        return
    refuse_options(context, False)
    console = Console(stderr=json == "-")
    with refusing(ValueError, OSError):
        stored = embedding.find_model(model).stored
        options_of_floats = precision, plan, calibrate, kv_cache, include, crossover
        if stored and (any(x is not None for x in options_of_floats) or attention != "auto"):
            raise ValueError(f"{model} holds a model whose layers have 8 bits already, which are taken over as they are: drop "
                             "--precision, --plan, --calibrate, --include, --kv-cache, --attention and --crossover")  # fmt: skip
    precision, planned, calibrates = (STORED.name, None, False) if stored else precision_or_plan(precision, plan)
    with refusing(ValueError):
        config = fp.Config(precision, planned, include=include or (), kv_cache=kv_cache, attention=ATTENTION[attention],
                           crossover=crossover, unpad=True)  # fmt: skip  # a readout leaves padding out
    limit_of_perplexity = share_of(max_perplexity_increase) or 0.0
    where = prepare(device, json, read=(model, plan, text, calibrate))
    if not stored:
        refuse_slow(precision, planned, where, yes)
    with refusing(ValueError, OSError):
        if save:
            if json and pathlib.Path(json).resolve() == pathlib.Path(save).resolve():
                raise ValueError(f"--json and --save are both {save}: give each a path of its own")
            check_folder(save, [embedding.find_model(model).path], overwrite)
        subject = load(model, where, text, calibrate, calibrates, console, swaps=not stored)
        decoder = subject.source.decoder
        batch = batch or (1 if decoder else 8)
        if decoder:
            embedding.check_length(length + steps, subject.tokenizer, subject.model)
        timed = embedding.full_batch(subject.tokenizer, subject.texts, batch, length, subject.model, where)
    with tracking() as track:
        if stored:
            track("loading it with transformers", None)
            swapped = subject.model
            with refusing(ValueError):
                source = dataclasses.replace(subject.source, stored=False)
                original, _ = embedding.load(source, where, subject.readout.auto)
            reported, padding = as_reported(swapped, original), ""
        else:
            original, swapped = subject.model, copy.deepcopy(subject.model)  # both at once: their timing takes turns
            with refusing(ValueError, TypeError, OSError, fp.Unsupported), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the report has them too
                config = dataclasses.replace(config, calibrate=subject.calibration)
                if include:
                    refuse_unmatched(include, fp.swap(swapped, config, dry_run=True))
                track(subject.swapping(), None)
                report = fp.swap(swapped, config)
            reported, padding = report.to_json(), str(report.unpadding)
        if decoder:
            compared = comparison.compare_decoding(
                original, swapped, subject.batches, timed, steps, subject.readout, track
            )
        else:
            compared = comparison.compare(original, swapped, subject.batches, timed, subject.readout, track)
    if save:
        with refusing(ValueError, OSError):
            around = subject.source.around()
            named = swapped if around is None else sentences.bare(around, swapped)
            write(named, around, save, overwrite, processor=subject.tokenizer.save_pretrained)
    if not (reported["swapped"] or reported["attention"]):  # what two timings of one model differ by is no speed-up
        compared |= {"speedup": None, "reasons": {**compared["reasons"], "speedup": "nothing was changed"}}
    if decoder:
        name, bound, limit = "perplexity_increase", "most", limit_of_perplexity
        ok = compared["parity"][name] <= limit  # false for NaN
    else:
        name, bound, limit = "cosine_min", "least", min_cosine
        ok = compared["parity"][name] >= limit
    result = {
        "schema": "forwardpass.swap/1",
        "model": {"name": model, "origin": subject.source.origin},
        "readout": subject.readout.describe(),
        "padding": padding,
        "kv_cache": reported["kv_cache"],
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
        **({"steps": steps} if decoder else {}),
        "checks": {name: {bound: limit, "ok": ok}},
        "versions": environment.versions(),
        "device": environment.device(where),
        "measured": [
            "parity",
            *(
                x
                for x in compared
                if x.startswith(("torch_dynamic_int8", "latency_ms", "latency_quartiles", "tokens_per_s"))
            ),
            "speedup",
            "weight_bytes",
        ],
    }
    print_swap(result, console)
    if json:
        write_json(result, json)
    if not ok:
        typer.echo(
            f"forwardpass: the check {name} {'<=' if decoder else '>='} {limit} failed: it is {compared['parity'][name]:.5f}",
            err=True,
        )
        raise typer.Exit(1)
