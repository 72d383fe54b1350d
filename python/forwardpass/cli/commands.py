"""The commands: what they take, and how they print what doctor.py and comparison.py found (extra `cli`).

Exit codes: 0 all is well, 1 a check failed, 2 bad usage. With `--json -` stdout carries the JSON alone.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import os
import pathlib
import warnings
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console

import forwardpass as fp

from ..common import environment
from ..common.plots import require as require_plot
from ..common.text import count, wrapped
from ..common.timing import keep_freed_memory
from ..planning.measure import CALIBRATED
from ..planning.plan import CANDIDATES, TARGETS
from ..planning.plots import plan as plot_plan
from ..serving.load import Load
from ..serving.queueing import percentile as percentile_of
from ..serving.queueing import poisson, settled
from ..serving.size_batch import try_policy
from ..swap.folder import check_folder
from ..swap.precision import PRECISIONS
from . import comparison, embedding
from .console import describe_calibration, print_examination, print_swap, say, tracking
from .doctor import examine

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain errors and help: one line each, and the same in a log
    pretty_exceptions_enable=False,
    help="Faster inference of PyTorch models: what works here, where time goes, which precision and which batch to run.",
)
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


ModelName = Annotated[str, typer.Argument(help="A folder that save_pretrained wrote, `minilm`, or a hub id.")]
SwappedName = Annotated[str, typer.Argument(help="As for swap, or a folder that `forwardpass swap --save` wrote.")]
PrecisionName = Annotated[str | None, typer.Option(help=f"One of {', '.join(CALIBRATES)}.")]
PlanFile = Annotated[str | None, typer.Option(help="A plan file, instead of a precision.")]
Texts = Annotated[str | None, typer.Option(help="Texts to compare on, one a line; default: 288 built in.")]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="Texts to calibrate with: a file, builtin or none; default: builtin for what is calibrated (int8, and plans "
        "with it). In Python nothing is calibrated without calibrate=batches."
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU where torch finds one.")]
Json = Annotated[str | None, typer.Option(help="Also write the result to this file, or to stdout for -.")]


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
    written = [pathlib.Path(file) for file in files if file not in (None, "-")]
    inputs = [pathlib.Path(name) for name in read if name and pathlib.Path(name).exists()]
    for i, file in enumerate(written):
        if not file.parent.is_dir():
            refuse(f"cannot write {file}: its folder does not exist")
        if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
            refuse(f"cannot write {file}: it is a folder, or may not be written")
        if any(file.resolve() == other.resolve() for other in written[:i]):
            refuse(f"cannot write two results to {file}: give each a file of its own")
        if file.exists() and any(x.samefile(file) or (x.is_dir() and x.samefile(file.parent)) for x in inputs):
            refuse(f"cannot write {file}: this command reads it")
    if device not in (None, "cpu", "cuda"):
        refuse(f"--device is cpu or cuda, not {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        refuse("torch finds no GPU here: drop --device cuda")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model that a command is about, and its texts."""

    source: embedding.Source
    model: torch.nn.Module
    tokenizer: Any
    texts: list[str]  #: to compare on
    batches: list[embedding.Batch]  #: of them
    calibration: list[embedding.Batch] | None  #: None where there is none

    @property
    def calibrated_on(self) -> int:
        """How many texts there are to calibrate on."""
        return sum(len(b["input_ids"]) for b in self.calibration or ())

    def swapping(self) -> str:
        """What a swap of it does first, in words: the long part of it is silent."""
        return f"calibrating on {count(self.calibrated_on, 'text')}, and swapping" if self.calibration else "swapping"


def find(name: str, where: str, console: Console, swaps: bool) -> tuple[embedding.Source, torch.nn.Module, Any]:
    """Where the model comes from, which is printed, the model, and its tokenizer. swaps: whether the command takes the originals
    of its layers, which a swapped model that was saved has not.
    """
    source = embedding.find_model(name)
    if source.swapped and swaps:
        raise ValueError(f"{name} holds a model that is swapped already, without its original layers: give this command the "
                         "original model")  # fmt: skip
    say(console, f"model: {source.chosen}")
    return source, *embedding.load(source, where)


def load(
    name: str,
    where: str,
    text: str | None,
    calibrate: str | None,
    calibrates: bool,
    console: Console,
    swaps: bool = True,
) -> Subject:
    """calibrates: whether there is calibration by default."""
    texts = embedding.read_texts(text) if text else embedding.builtin_texts()[1]
    calibration = calibration_texts(calibrate or ("builtin" if calibrates else "none"))
    source, model, tokenizer = find(name, where, console, swaps)
    batches, others = (embedding.tokenize(tokenizer, t, model, where) for t in (texts, calibration))
    return Subject(source, model, tokenizer, texts, batches, others or None)


def calibration_texts(chosen: str) -> list[str]:
    if chosen == "none":
        return []
    return embedding.builtin_texts()[0] if chosen == "builtin" else embedding.read_texts(chosen)


def refuse_precision(precision: str | None) -> None:
    if precision is not None and precision not in CALIBRATES:
        refuse(f"--precision is one of {', '.join(CALIBRATES)}, not {precision!r}")


def precision_or_plan(precision: str | None, plan: str | None) -> tuple[fp.Plan | None, bool]:
    """The plan, where it is one, and whether there is something to calibrate. Exactly one of them is given."""
    if (precision is None) == (plan is None):
        refuse("pass either --precision or --plan")
    refuse_precision(precision)
    with refusing(ValueError, OSError):
        planned = fp.Plan.load(plan) if plan else None
    return planned, planned.calibrated if planned else CALIBRATES[precision or ""]


def print_version(wanted: bool) -> None:
    if wanted:
        print(f"forwardpass {fp.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command."""


@app.command()
def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False) -> None:
    """Shows versions, build, driver, and every kernel with the reason where it cannot run; exits 1 on a problem."""
    examination = examine()
    if json:
        write_json(examination, "-")
    else:
        print_examination(examination, Console())
    raise typer.Exit(1 if examination["problems"] else 0)


@app.command()
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
    """Swaps a text embedding model, runs it on real text before and after, and shows what changed."""
    console = Console(stderr=json == "-")
    planned, calibrates = precision_or_plan(precision, plan)
    where = prepare(device, json, read=(model, plan, text, calibrate))
    with refusing(ValueError, OSError):
        if save:
            if json and pathlib.Path(json).resolve() == pathlib.Path(save).resolve():
                raise ValueError(f"--json and --save are both {save}: give each a path of its own")
            check_folder(save, [embedding.find_model(model).path], overwrite)
        it = load(model, where, text, calibrate, calibrates, console)
        timed = embedding.full_batch(it.tokenizer, it.texts, batch, length, it.model, where)
    swapped = copy.deepcopy(it.model)  # both are wanted at once: their timing takes turns
    with tracking() as track:
        track(it.swapping(), None)
        with refusing(ValueError, TypeError, OSError, fp.Unsupported), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the report has them too
            report = fp.swap(swapped, precision=precision, plan=planned, calibrate=it.calibration)
        compared = comparison.compare(it.model, swapped, it.batches, timed, track)
    if save:
        with refusing(ValueError, OSError):
            fp.save_pretrained(swapped, save, overwrite=overwrite)
            it.tokenizer.save_pretrained(save)
    reported = report.to_json()
    if not (reported["swapped"] or reported["attention"]):  # what two timings of one model differ by is no speed-up
        compared |= {"speedup": None, "reasons": {**compared["reasons"], "speedup": "nothing was changed"}}
    ok = compared["parity"]["cosine_min"] >= min_cosine  # false for NaN
    result = {
        "schema": "forwardpass.swap/1",
        "model": {"name": model, "chosen": it.source.chosen},
        "precision": precision,
        "plan": plan,
        **{name: reported[name] for name in ("swapped", "attention", "skipped", "left", "warnings", "weight_bytes")},
        "calibration": {"texts": it.calibrated_on} if it.calibration else None,
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


@app.command()
def plan(
    model: ModelName,
    min_cosine: Annotated[float | None, number("The lowest cosine over the texts that may be; or", above=0, most=1)] = None,
    max_error: Annotated[float | None, number("the largest relative error of the embeddings.", least=0)] = None,
    candidates: Annotated[str | None, typer.Option(help=f"Comma-separated, of {', '.join(CANDIDATES)}; "
                                                   "default: all.")] = None,
    target: Annotated[str, typer.Option(help=f"What is minimised: {' or '.join(TARGETS)}.")] = "latency",
    text: Annotated[str | None, typer.Option(help="Texts that the budget must hold on, one a line; "
                                             "default: 288 built in.")] = None,
    calibrate: Annotated[str | None, typer.Option(help="Other texts, to calibrate with: a file, builtin or none; "
                                                  "default: builtin for what is calibrated.")] = None,
    batch: Annotated[int, number("Rows of the timed batch.", least=1)] = 8,
    length: Annotated[int, number("Tokens of each of its rows.", least=1)] = 128,
    device: Device = None,
    json: Annotated[str | None, typer.Option(help="Write the plan to this file, for `forwardpass swap --plan`, "
                                             "or to stdout for -.")] = None,
    plot: Annotated[str | None, typer.Option(help="Draw what was to choose from: a .png, .svg or .pdf file.")] = None,
    resume: Annotated[str | None, typer.Option(help="Keep measurements in this file, and go on from it: after an "
                                               "interrupt, or for another budget.")] = None,
) -> None:  # fmt: skip
    """Plans each layer's precision: the fastest text embedding model within a budget of error, from measurements."""
    console = Console(stderr=json == "-")
    if (min_cosine is None) == (max_error is None):
        refuse("pass either --min-cosine or --max-error")
    where = prepare(device, json, plot, resume, read=(model, text, calibrate))
    named = [name.strip() for name in candidates.split(",")] if candidates is not None else list(CANDIDATES)
    calibrates = any(name.endswith(CALIBRATED) for name in named)
    if candidates is None and calibrate == "none":
        named, calibrates = [name for name in named if not name.endswith(CALIBRATED)], False
    with refusing(ValueError, OSError):
        if plot:
            require_plot(plot)
        it = load(model, where, text, calibrate, calibrates, console)
        timed = embedding.full_batch(it.tokenizer, it.texts, batch, length, it.model, where)
    allocator = keep_freed_memory()
    with tracking() as track, refusing(ValueError, TypeError, OSError, fp.Unsupported):
        try:
            chosen_plan = fp.plan(
                it.model,
                it.batches,
                candidates=named,
                min_cosine=min_cosine,
                max_error=max_error,
                target=target,
                shapes=[timed],
                calibrate=it.calibration,
                forward=embedding.forward,
                resume=resume,
                progress=track,
            )
        except KeyboardInterrupt as e:
            typer.echo(f"forwardpass: interrupted {'; '.join(getattr(e, '__notes__', []))}", err=True)
            raise typer.Exit(130) from None
    assert chosen_plan.evidence is not None
    about = {
        "model": it.source.chosen,
        "allocator": allocator,
        "texts": len(it.texts),
        "batch": batch,
        "length": length,
    }
    chosen_plan = dataclasses.replace(chosen_plan, evidence={**about, **chosen_plan.evidence})
    if it.calibration:
        say(console, f"candidates {CALIBRATED}: on {count(it.calibrated_on, 'text')}, in Python calibrate=batches")
    say(console, str(chosen_plan))
    if json:
        write_json(chosen_plan.to_json(), json)
    if plot:
        plot_plan(chosen_plan.evidence or {}, plot)


@app.command()
def profile(
    model: SwappedName,
    text: Annotated[str | None, typer.Option(help="Texts to run, one a line; default: 288 built in.")] = None,
    batch: Annotated[int, number("Texts of a batch.", least=1)] = 8,
    length: Annotated[int, number("Tokens that each text is padded or cut to.", least=1)] = 128,
    batches: Annotated[int, number("Batches, one after the other.", least=1)] = 8,
    rounds: Annotated[int, number("Timed passes over the batches.", least=1)] = 3,
    device: Device = None,
    json: Json = None,
    html: Annotated[str | None, typer.Option(help="Also write a report with plots to this file.")] = None,
    trace: Annotated[str | None, typer.Option(help="Also write a Chrome trace to this file.")] = None,
) -> None:  # fmt: skip
    """Shows where the time of a text embedding goes: tokenising, transfer, forward, pooled output; then by layer."""
    console = Console(stderr=json == "-")
    where = prepare(device, json, html, trace, read=(model, text))
    with refusing(ValueError, OSError):
        texts = embedding.read_texts(text) if text else embedding.builtin_texts()[1]
        source, loaded, tokenizer = find(model, where, console, swaps=False)
        request = embedding.Request(loaded, tokenizer, length)
    items = [[texts[(i * batch + j) % len(texts)] for j in range(batch)] for i in range(batches)]
    with tracking() as track, refusing(ValueError, TypeError, fp.Unsupported):
        profiled = fp.profile(
            loaded,
            items,
            preprocess=request.preprocess,
            forward=request.forward,
            postprocess=request.postprocess,
            rounds=rounds,
            progress=track,
        )
    say(console, str(profiled))
    if html:
        profiled.save_html(html)
    if trace:
        profiled.save_trace(trace)
    if json:
        request_of = {"name": model, "chosen": source.chosen}
        write_json(profiled.to_json() | {"model": request_of, "batch": batch, "length": length}, json)


@app.command()
def parity(
    model: ModelName,
    precision: PrecisionName = None,
    plan: PlanFile = None,
    text: Texts = None,
    calibrate: Calibration = None,
    compiled: Annotated[bool, typer.Option(help="Compare the output under torch.compile too.")] = False,
    device: Device = None,
    json: Json = None,
    plot: Annotated[str | None, typer.Option(help="Draw the errors by depth: a .png, .svg or .pdf file.")] = None,
) -> None:  # fmt: skip
    """Shows how far each swapped layer of a text embedding model is from the original, the worst first."""
    console = Console(stderr=json == "-")
    planned, calibrates = precision_or_plan(precision, plan)
    where = prepare(device, json, plot, read=(model, plan, text, calibrate))
    with refusing(ValueError, TypeError, OSError, fp.Unsupported), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the report has them too
        if plot:
            require_plot(plot)
        it = load(model, where, text, calibrate, calibrates, console)
        with tracking() as track:
            track(it.swapping(), None)
            fp.swap(it.model, precision=precision, plan=planned, calibrate=it.calibration)
            advance = track("comparing", len(it.batches))
            parity_report = fp.parity(it.model, comparison.ticking(it.batches, advance), compiled=compiled)
    if it.calibration:
        say(console, "\n".join(wrapped(f"calibrated {describe_calibration(it.calibrated_on)}")))
    say(console, str(parity_report))
    if json:
        about = {"model": {"name": model, "chosen": it.source.chosen}, "precision": precision, "plan": plan}
        write_json({**parity_report.to_json(), **about}, json)
    if plot:
        parity_report.save_plot(plot)


@app.command("size-batch")
def size_batch(
    model: SwappedName,
    slo_ms: Annotated[float, number("The latency objective, milliseconds.", above=0)],
    rate: Annotated[float | None, number("Requests a second, arriving independently of each other.", above=0)] = None,
    trace: Annotated[str | None, typer.Option(help="Instead: a file of arrival times in seconds, one a line.")] = None,
    percentile: Annotated[float, number("The percentile of the latencies that has to be within it.", above=0, below=100)] = 99,
    precision: Annotated[str | None, typer.Option(help=f"Swap first, to one of {', '.join(CALIBRATES)}.")] = None,
    length: Annotated[int, number("Tokens of each request.", least=1)] = 128,
    max_batch: Annotated[int, number("No larger batch is tried.", least=1)] = 64,
    memory_limit_mb: Annotated[int | None, number("Memory of a batch beyond the model, MB.", least=1)] = None,
    price_per_hour: Annotated[float | None, number("Of one replica; prints the cost of a million.", least=0)] = None,
    seconds: Annotated[float, number("How long times are gathered.", above=0)] = 30,
    check: Annotated[float, number("Seconds of a real run with the policy; 0: none.", least=0)] = 20,
    device: Device = None,
    json: Json = None,
    plot: Annotated[str | None, typer.Option(help="Draw the measured points and the frontier to this image.")] = None,
) -> None:  # fmt: skip
    """Finds the batches of a text embedding model that hold a latency objective at the least cost, and tries them."""
    console = Console(stderr=json == "-")
    where = prepare(device, json, plot, read=(model, trace))
    refuse_precision(precision)
    if (rate is None) == (trace is None):
        refuse(f"pass either --rate or --trace: {'neither was' if rate is None else 'both were'} given")
    with refusing(ValueError, OSError):
        if plot:
            require_plot(plot)
        arrivals = None if trace is None else [float(line) for line in pathlib.Path(trace).read_text().split()]
        calibrates = precision is not None and CALIBRATES[precision]
        it = load(model, where, None, None, calibrates, console, swaps=precision is not None)
        rows = embedding.full_batch(it.tokenizer, it.texts, max_batch, length, it.model, where)

    def make_batch(n: int) -> embedding.Batch:
        return {name: rows_of[:n] for name, rows_of in rows.items()}

    keep_freed_memory()
    with tracking() as track, refusing(ValueError, TypeError, fp.Unsupported), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        if precision is not None:
            track(it.swapping(), None)
            fp.swap(it.model, precision, calibrate=it.calibration)
        sizing = fp.size_batch(
            it.model, make_batch, latency_slo_ms=slo_ms, percentile=percentile, arrival_rate=rate, arrivals=arrivals,
            memory_limit=None if memory_limit_mb is None else memory_limit_mb * 1_000_000,
            price_per_hour=price_per_hour, max_batch=max_batch, seconds=seconds, progress=track,
        )  # fmt: skip
        result = {
            **sizing.to_json(),
            "model": {"name": model, "chosen": it.source.chosen, "precision": precision, "length": length},
        }
        ok = sizing.policy is not None
        if sizing.policy is not None and check:
            track("trying the policy", None)
            rate_per_replica = sizing.arrival_rate / sizing.policy.replicas
            times = poisson(rate_per_replica, max(1, round(check * rate_per_replica)), seed=1)
            if arrivals is not None:
                times = [t - arrivals[0] for t in arrivals[:: sizing.policy.replicas] if t - arrivals[0] <= check]
            tried = try_policy(it.model, make_batch, sizing.policy, times)
            result["check"] = checked(tried, percentile, slo_ms)
            result["measured"].append("check")
            ok = result["check"]["ok"]
    lines = [str(sizing)]
    if it.calibration:
        lines[:0] = wrapped(f"calibrated {describe_calibration(it.calibrated_on)}")
    if "check" in result:
        run = result["check"]
        lines += wrapped(
            f"real run of {count(run['requests'], 'request')}: "
            + ", ".join(f"{name} {ms:.1f} ms" for name, ms in run["latency_ms"].items())
            + f"; sent at most {run['lateness_ms']:.1f} ms late; {'holds' if ok else 'FAILS'} the objective"
        )
    say(console, "\n".join(lines))
    if plot:
        with refusing(ValueError, RuntimeError, OSError):
            sizing.save_plot(plot)
    if json:
        write_json(result, json)
    if not ok:
        raise typer.Exit(1)


def checked(tried: Load, percentile: float, slo_ms: float) -> dict[str, Any]:
    """What a real run shows, the first requests left out as in the simulation."""
    latencies = settled(tried.latencies)
    of = {f"p{p:g}": 1e3 * percentile_of(latencies, p) for p in sorted({50.0, 95.0, percentile})}
    return {
        "requests": len(tried.latencies),
        "latency_ms": of,
        "lateness_ms": 1e3 * max(tried.lateness),
        "ok": of[f"p{percentile:g}"] <= slo_ms,
    }
