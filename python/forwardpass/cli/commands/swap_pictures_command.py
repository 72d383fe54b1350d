"""`forwardpass swap` of a model of pictures."""

from __future__ import annotations

import pathlib
from typing import Any

import torch
import typer
from rich.console import Console

import forwardpass as fp

from ...checkpoints.folder import check_folder
from .. import picture_results, vision
from ..console import tracking
from ..options import ATTENTION, precision_or_plan, prepare, refuse, refuse_slow, refusing, write_json

#: Options of `forwardpass swap` that are for models of text, and for those of pictures.
OF_TEXT = ("text", "kv_cache", "length", "steps", "max_perplexity_increase")
OF_PICTURES = ("images", "weights")


def refuse_options(context: typer.Context, of_pictures: bool) -> None:
    """Refuses those that a user gave for a model of the other kind."""
    others = [n for n in (OF_TEXT if of_pictures else OF_PICTURES)
             if getattr(context.get_parameter_source(n), "name", "") == "COMMANDLINE"]  # fmt: skip
    if others:
        kind = (
            "text, and this is one of pictures"
            if of_pictures
            else "pictures (torchvision:NAME, timm:NAME, or a folder of one)"
        )
        refuse(f"--{others[0].replace('_', '-')} is for models of {kind}: drop it")


def swap_pictures(context: typer.Context) -> None:
    """Swaps the model, runs it on photographs before and after, and shows what changed."""
    options: dict[str, Any] = context.params
    name, json, save, least = (options[n] for n in ("model", "json", "save", "min_cosine"))
    refuse_options(context, True)
    console = Console(stderr=json == "-")
    precision, planned, calibrates = precision_or_plan(options["precision"], options["plan"])
    with refusing(ValueError):
        config = fp.Config(precision, planned, include=options["include"] or (), attention=ATTENTION[options["attention"]],
                           crossover=options["crossover"])  # fmt: skip
    where = prepare(options["device"], json, read=(name, options["plan"], options["images"], options["weights"]))
    refuse_slow(precision, planned, where, options["yes"])
    batch = options["batch"] or 4
    with refusing(ValueError, OSError):
        if save:
            if json and pathlib.Path(json).resolve() == pathlib.Path(save).resolve():
                raise ValueError(f"--json and --save are both {save}: give each a path of its own")
            check_folder(save, [], options["overwrite"])
        subject = vision.load(name, options["weights"], where)
        photographs = vision.photographs(subject, options["images"], where)
        calibration = _calibration(subject, photographs, options["calibrate"], calibrates, where)
    with tracking() as track, refusing(ValueError, TypeError, OSError, fp.Unsupported):
        swapped, report = picture_results.swapped(subject, config, track, calibration)
        compared = picture_results.compare(subject, swapped, photographs, batch, track)
        if save:
            fp.save_pretrained(swapped, save, overwrite=options["overwrite"])
    calibrated = 0 if calibration is None else len(calibration)
    about = precision, options["plan"], calibrated, where
    result = picture_results.result_of(name, subject, report, photographs, compared, batch, least, *about)
    picture_results.print_result(result, console)
    if json:
        write_json(result, json)
    if not result["checks"]["cosine_min"]["ok"]:
        lowest = compared["parity"]["cosine_min"]
        typer.echo(
            f"forwardpass: the check cosine_min >= {least} failed: it is {lowest if lowest is None else f'{lowest:.5f}'}",
            err=True,
        )
        raise typer.Exit(1)


def _calibration(
    subject: vision.Vision, photographs: vision.Photographs, calibrate: str | None, calibrates: bool, where: str
) -> torch.Tensor | None:
    """Pictures to calibrate with, by --calibrate: a folder's, builtin (the half that is not compared), or none."""
    calibrate = calibrate or ("builtin" if calibrates else "none")
    if calibrate == "none":
        return None
    if calibrate == "builtin":
        return photographs.others
    pictures = vision.photographs(subject, calibrate, where)
    return torch.cat([pictures.measured, pictures.others])
