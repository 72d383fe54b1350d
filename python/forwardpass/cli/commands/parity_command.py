"""`forwardpass parity`."""

from __future__ import annotations

import warnings
from typing import Annotated

import typer
from rich.console import Console

import forwardpass as fp

from ...common.printing.plots import require as require_plot
from ...common.printing.text import count, wrapped
from ...swap.report import by_reason
from .. import comparison
from ..console import describe_calibration, say, tracking
from ..options import (
    Calibration,
    Device,
    Json,
    ModelName,
    PlanFile,
    PrecisionName,
    Texts,
    Yes,
    precision_or_plan,
    prepare,
    refuse_slow,
    refusing,
    write_json,
)
from ..subject import load


def parity(
    model: ModelName,
    precision: PrecisionName = None,
    plan: PlanFile = None,
    text: Texts = None,
    calibrate: Calibration = None,
    compiled: Annotated[bool, typer.Option(help="Compare the output under torch.compile too.")] = False,
    device: Device = None,
    yes: Yes = False,
    json: Json = None,
    html: Annotated[str | None, typer.Option(help="Also write the report to this file, for a browser.")] = None,
    plot: Annotated[str | None, typer.Option(help="Draw the errors by depth: a .png, .svg or .pdf file.")] = None,
) -> None:  # fmt: skip
    """Shows how far each swapped layer of a model is from the original, the worst first."""
    console = Console(stderr=json == "-")
    precision, planned, calibrates = precision_or_plan(precision, plan)
    where = prepare(device, json, html, plot, read=(model, plan, text, calibrate))
    refuse_slow(precision, planned, where, yes)
    with refusing(ValueError, TypeError, OSError, fp.Unsupported), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the report has them too
        if plot:
            require_plot(plot)
        subject = load(model, where, text, calibrate, calibrates, console)
        with tracking() as track:
            track(subject.swapping(), None)
            report = fp.swap(subject.model, fp.Config(precision, planned, unpad=True, calibrate=subject.calibration))
            if not report.swapped:
                reasons = [why for why, _ in by_reason((s.fqn, s.reason.code, s.reason.text) for s in report.skipped)]
                raise ValueError(
                    f"no layer of this model is swapped, so there is nothing to compare: {'; '.join(reasons)}"
                )
            advance = track("comparing", len(subject.batches))
            parity_report = fp.parity(
                subject.model,
                comparison.ticking(subject.batches, advance),
                forward=subject.readout.forward,
                task=subject.readout.task,
                compiled=compiled,
            )
    if subject.calibration:
        say(console, "\n".join(wrapped(f"calibrated {describe_calibration(subject.calibrated_on)}")))
    say(console, subject.readout.describe())
    say(console, str(parity_report))
    if json:
        about = {"model": {"name": model, "origin": subject.source.origin}, "precision": precision, "plan": plan}
        about["readout"] = subject.readout.describe()
        write_json({**parity_report.to_json(), **about}, json)
    if html:
        parity_report.save_html(html)
    if plot:
        parity_report.save_plot(plot)
    if unreached := parity_report.unreached:
        swapped = count(len(parity_report.layers), "swapped layer")
        typer.echo(
            f"forwardpass: no text reaches {unreached[0]} ({len(unreached)} of {swapped}), and nobody knows how far it is from the "
            "original: pass texts that do, or leave it in floats by a plan",
            err=True,
        )
        raise typer.Exit(1)
