"""`forwardpass kernels`."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

import forwardpass as fp

from ...dispatch import interpreted
from ...swap.precision import find_precision
from ..console import say, tracking
from ..kernels import examine
from ..options import Json, ModelName, precision_option, prepare, refuse, refusing, write_json
from ..subject import load


def kernels(
    model: ModelName = "minilm",
    precision: Annotated[str | None, precision_option("int8, fp8 or w8a16; default: int8.")] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="The GPU to stand in for where there is none: sm_80, sm_89, sm_90a or sm_120; default: sm_90a."
        ),
    ] = None,
    json: Json = None,
) -> None:
    """Runs the CUDA kernels of a swapped model's layers beside plain torch: on a GPU, or in gpuless, which also checks them."""
    console = Console(stderr=json == "-")
    where = prepare("cpu" if gpu else None, json, read=(model,))
    arch = None if where == "cuda" else gpu or "sm_90a"
    precision = precision or "int8"
    if find_precision(precision).operation() is None:
        refuse(
            f"--precision is one that has kernels of forwardpass for Linear layers, and {precision} runs torch's own"
        )
    with refusing(ValueError, TypeError, OSError, ImportError, fp.Unsupported), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        if arch:
            with interpreted.interpret(arch):
                if reason := fp.dispatch.interpreter().why_not("cuda"):  # type: ignore[union-attr]
                    raise ValueError(str(reason))
        subject = load(model, where, None, None, False, console)
        with tracking() as track:
            track("swapping", None)
            report = fp.swap(subject.model, precision=precision, unpad=True)
            if not report.swapped:
                raise ValueError(
                    "no layer of this model is swapped here, so there is no kernel to run: forwardpass swap says why"
                )
            track("running its kernels", None)
            batch = {k: v[:1] for k, v in subject.batches[0].items()}
            layers = examine(subject.model, [s.fqn for s in report.swapped], batch, arch)
    on = f"gpuless's {arch}" if arch else torch.cuda.get_device_name()
    say(console, f"CUDA kernels on {on}, {layers[0].rows} rows; errors are relative, to plain torch")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("layers", no_wrap=True)
    for column in ("weights", *layers[0].errors, *(("launches", "issued", "model") if arch else ())):
        table.add_column(column, justify="right", no_wrap=True)
    for row in layers:
        errors = (f"{e:.0e}" if e else "0" for e in row.errors.values())
        counts = [str(row.launches), f"{row.warp_instructions:,}", f"{row.modelled_us:.1f} µs"] if arch else []
        table.add_row(f"{row.count} × {'.'.join(row.name.split('.')[-2:])}", row.shape, *errors, *counts)
    console.print(table)
    findings = [f for row in layers for f in row.findings]
    if arch:
        launches = sum(row.launches for row in layers)
        clean = f"checked for races, weak waits and bad accesses: none in {launches} launches"
        say(console, "\n\n".join(findings) or f"{clean}; times are modelled, nothing ran on a GPU")
    if json:
        write_json({"schema": "forwardpass.kernels/1", "device": on, "precision": precision,
                    "layers": [dataclasses.asdict(row) for row in layers]}, json)  # fmt: skip
    if findings:
        raise typer.Exit(1)
