"""What commands take: their options, and what is refused of them in one sentence with exit code 2 (extra `cli`)."""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn

import torch
import typer

from ..common.files.json_files import why_not_writable
from ..dispatch import only_reference_on
from ..swap import Plan
from ..swap.attention.choices import CHOICES
from ..swap.precision import PRECISIONS, find_precision

#: name -> whether calibration texts change the result
CALIBRATES = {p.name: p.takes_calibration for p in PRECISIONS}


def number(
    help: str, above: float = -math.inf, least: float = -math.inf, most: float = math.inf, below: float = math.inf
) -> Any:
    """An option that is a finite number within these bounds; another is refused in one sentence."""
    bounds = f"above {above:g}" if above > least else f"of {least:g} or more"
    if (high := min(most, below)) < math.inf:
        bounds += f" and {'at most' if most <= below else 'below'} {high:g}"

    def check(param: typer.CallbackParam, value: float | None) -> float | None:
        if value is not None and not (above < value < below and least <= value <= most and math.isfinite(value)):
            refuse(f"{param.opts[0]} is a number {bounds}, not {value}")
        return value

    return typer.Option(help=help, callback=check)


def share(help: str) -> Any:
    """An option that is a share of something; `share_of` reads it."""
    return typer.Option(help=f"{help} 0.5% or 0.005 is half a per cent.", metavar="SHARE")


def share_of(text: str | None) -> float | None:
    """The number that 0.5% or 0.005 says. Refuses what is none above 0, in one sentence."""
    if text is None:
        return None
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        refuse(f"a share is above 0 and written 0.5% or 0.005, not {text}")
    return value


ModelName = Annotated[
    str,
    typer.Argument(
        help="A folder that save_pretrained wrote, `minilm`, the decoder `smollm2`, or a hub id; for swap also torchvision:NAME or "
        "timm:NAME."
    ),
]
SwappedName = Annotated[str, typer.Argument(help="As for swap, or a folder that `forwardpass swap --save` wrote.")]


def precision_option(help: str) -> Any:
    """An option that is the name of a precision, in capitals or not; another is refused in one sentence."""

    def check(param: typer.CallbackParam, value: str | None) -> str | None:
        name = value and value.lower()
        if name is not None and name not in CALIBRATES:
            refuse(f"{param.opts[0]} is one of {', '.join(CALIBRATES)}, not {value!r}")
        return name

    return typer.Option(help=help, callback=check)


PrecisionName = Annotated[str | None, precision_option(f"One of {', '.join(CALIBRATES)}; default: int8.")]
PlanFile = Annotated[str | None, typer.Option(help="A plan file, instead of a precision.")]
Texts = Annotated[
    str | None,
    typer.Option(help="Texts to compare on, one a line; default: 288 built in, for a decoder Python's documentation."),
]
Batch = Annotated[int | None, number("Rows of the timed batch; default: 8, of a decoder 1.", least=1)]
Length = Annotated[int, number("Tokens of each of its rows; of a decoder those of the prompt.", least=1)]
Steps = Annotated[int, number("Of a decoder: tokens that it generates after a prompt.", least=1)]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="Texts to calibrate with: a file, builtin or none; default: builtin for what is calibrated (int8, "
        "int8_rotated, and plans with them). In Python nothing is calibrated without calibrate=batches."
    ),
]
#: --attention -> `attention=` of `fp.swap`
ATTENTION: dict[str, str | bool] = {"true": True, "false": False} | {str(x): x for x in CHOICES if isinstance(x, str)}
Crossover = Annotated[
    int | None,
    number("Keys from which attention is computed in 8 bits, 0: always; default: where that is faster.", least=0),
]
Yes = Annotated[
    bool, typer.Option("--yes", help="Run a precision that has no kernel here too: slower than the model as it is.")
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU where torch finds one.")]
Json = Annotated[str | None, typer.Option(help="Also write the result to this file, or to stdout for -.")]


def attention_option(help: str) -> Any:
    """An option that names what attention becomes; another is refused in one sentence."""

    def check(param: typer.CallbackParam, value: str | None) -> str | None:
        if value is not None and value.lower() not in ATTENTION:
            refuse(f"{param.opts[0]} is one of {', '.join(ATTENTION)}, not {value!r}")
        return value and value.lower()

    return typer.Option(metavar=" | ".join(ATTENTION), help=help, callback=check)


def refuse(message: str) -> NoReturn:
    typer.echo(f"forwardpass: {message}", err=True)
    raise typer.Exit(2)


@contextlib.contextmanager
def refusing(*errors: type[Exception]) -> Iterator[None]:
    """Errors that blame the arguments become one sentence and exit code 2."""
    try:
        yield
    except errors as e:
        refuse(" ".join(str(e).split()))


def write_json(result: dict[str, Any], out: str) -> None:
    text = json.dumps(result, indent=1) + "\n"
    if out == "-":
        typer.echo(text, nl=False)
    else:
        pathlib.Path(out).write_text(text)


def prepare(device: str | None, *files: str | None, read: tuple[str | None, ...] = ()) -> str:
    """The device to run on; refuses one that is not there, and files that cannot be written.

    files: what is written. read: what is read, a model's folder included: none of its files is written over.
    """
    outputs = [pathlib.Path(file) for file in files if file not in (None, "-")]
    inputs = [pathlib.Path(name) for name in read if name and pathlib.Path(name).exists()]
    for i, file in enumerate(outputs):
        if not file.parent.is_dir():
            refuse(f"cannot write {file}: its folder does not exist")
        if file.is_dir():
            refuse(f"cannot write {file}: it is a folder")
        if reason := why_not_writable(file):
            refuse(f"cannot write {file}: {reason}")
        if any(file.resolve() == other.resolve() for other in outputs[:i]):
            refuse(f"cannot write two results to {file}: give each a file of its own")
        if file.exists() and any(x.samefile(file) or (x.is_dir() and x.samefile(file.parent)) for x in inputs):
            refuse(f"cannot write {file}: this command reads it")
    if device and device.lower() not in ("cpu", "cuda"):
        refuse(f"--device is cpu or cuda, not {device!r}")
    device = device and device.lower()
    if device == "cuda" and not torch.cuda.is_available():
        refuse("torch finds no GPU here: drop --device cuda")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def precision_or_plan(precision: str | None, plan: str | None) -> tuple[str | None, Plan | None, bool]:
    """The precision or the plan, and whether there is something to calibrate. Without either it is int8."""
    if precision is not None and plan is not None:
        refuse("pass either --precision or --plan")
    if plan is None:
        precision = precision or "int8"
    with refusing(ValueError, OSError):
        planned = Plan.load(plan) if plan else None
    return precision, planned, planned.calibrated if planned else CALIBRATES[precision or ""]


def refuse_slow(precision: str | None, plan: Plan | None, device: str, yes: bool) -> None:
    """Refuses a precision that a CPU runs by plain torch, unless the user knows: `yes`. A GPU without a kernel keeps its layers."""
    names = {x.precision for x in plan.layers} if plan else {precision} if precision else set()
    for name in sorted(names) if device == "cpu" and not yes else ():
        operation = find_precision(name).operation()
        if operation and only_reference_on(operation, torch.device(device), torch.float32):
            refuse(f"{name} has no kernel for a CPU, and by plain torch it is many times slower than the model as it is: pass "
                   "another precision, or --yes to run it all the same")  # fmt: skip
