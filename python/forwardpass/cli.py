"""The commands: what they take, and how they print what doctor.py and comparison.py found (extra `cli`).

Exit codes: 0 all is well, 1 a check failed, 2 bad usage. With `--json -` stdout carries the JSON alone.
"""

from __future__ import annotations

import contextlib
import copy
import json
import pathlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import forwardpass as fp

from . import comparison, embedding, environment
from .doctor import examine
from .swap.precision import PRECISIONS

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain errors and help: one line each, and the same in a log
    pretty_exceptions_enable=False,
    help="Faster inference of PyTorch models: what works here, where time goes, and a trial on a real model.",
)
#: name -> whether calibration texts change the result
CALIBRATES = {p.name: p.calibrates for p in PRECISIONS}


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


@app.command()
def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False) -> None:
    """Shows versions, build, driver, and every kernel with the reason where it cannot run; exits 1 on a problem."""
    found = examine()
    if json:
        write_json(found, "-")
    else:
        print_examination(found, Console())
    raise typer.Exit(1 if found["problems"] else 0)


def print_examination(found: dict[str, Any], console: Console) -> None:
    facts = Table(show_header=False, box=None)
    versions = ", ".join(f"{name} {v or 'none'}" for name, v in found["versions"].items())
    build, driver, cpu = found["build"], found["driver"], found["device"]
    made = f"with torch {build.get('torch')}, " + (
        f"CUDA {build['nvcc']} for {', '.join(build['arches'])}"
        if build.get("nvcc")
        else f"no CUDA kernels: {build['cuda_skipped']}"
    )
    facts.add_row("versions", versions)
    facts.add_row("built", made)
    needed = f"the CUDA kernels need {driver['needed']} or later" if driver["needed"] else "none is needed"
    facts.add_row("driver", f"{driver['present'] or 'none'}; {needed}")
    facts.add_row("nvcc", found["nvcc"] or "none; only building the CUDA kernels needs one")
    facts.add_row("CPU", f"{cpu['name']}, {cpu['capability']}, {cpu['threads']} threads on {cpu['cores']} cores")
    facts.add_row("interpreter", describe_interpreter(found["interpreter"]))
    for gpu in found["gpus"]:
        facts.add_row("GPU", f"{gpu['name']}, {gpu['arch']}, {gpu['memory_bytes'] / 2**30:.0f} GiB")
    console.print(facts)

    kernels = Table("operation", "runs here", "why not the others", title="kernels", title_justify="left")
    for name in dict.fromkeys(k["operation"] for k in found["kernels"]):
        mine = [k for k in found["kernels"] if k["operation"] == name]
        runs = [
            f"{k['backend']} ({k['parity']['text']})" if k["parity"] else k["backend"] for k in mine if not k["code"]
        ]
        reasons = defaultdict(list)
        for k in mine:
            if k["code"]:
                reasons[f"{k['text']}; {k['fix']}"].append(k["backend"])
        kernels.add_row(
            name, ", ".join(runs), "\n".join(f"{', '.join(names)}: {why}" for why, names in reasons.items())
        )
    console.print(kernels)
    for problem in found["problems"]:
        console.print(f"[red]problem[/red] {problem}")
    if not found["problems"]:
        console.print("everything that should work here does")


def describe_interpreter(found: dict[str, Any]) -> str:
    if found["problem"]:
        return f"none: {found['problem']}"
    gpus = ", ".join(f"{name} ({arch})" for arch, name in found["architectures"].items())
    said = [f"stands in for {gpus}"]
    runs = defaultdict(list)
    for k in found["kernels"]:
        if k["code"] is None:
            runs[k["operation"]].append(k["backend"])
    for backends in dict.fromkeys(map(tuple, runs.values())):
        said.append(
            f"runs the {' and '.join(backends)} kernels of {', '.join(o for o in runs if tuple(runs[o]) == backends)}"
        )
    said += dict.fromkeys(f"no {k['backend']} kernels: {k['text']}" for k in found["kernels"]
                          if k["code"] not in (None, "not_written"))  # fmt: skip
    return "; ".join(said)


@app.command()
def swap(
    model: Annotated[str, typer.Argument(help="A folder that save_pretrained wrote, `minilm`, or a hub id.")],
    precision: Annotated[str | None, typer.Option(help=f"One of {', '.join(CALIBRATES)}.")] = None,
    plan: Annotated[str | None, typer.Option(help="A plan file, instead of a precision.")] = None,
    text: Annotated[str | None, typer.Option(help="Texts to compare on, one a line; default: 288 built in.")] = None,
    calibrate: Annotated[str | None, typer.Option(help="Texts to calibrate with: a file, builtin or none; "
                                                  "default: builtin for what is calibrated.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of the timed batch.")] = 8,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each of its rows.")] = 128,
    min_cosine: Annotated[float, typer.Option(help="The lowest cosine over the texts that passes.")] = 0.999,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU where torch finds one.")] = None,
    json: Annotated[str | None, typer.Option(help="Also write the result to this file, or to stdout for -.")] = None,
    save: Annotated[str | None, typer.Option(help="Store the swapped model in this folder.")] = None,
) -> None:  # fmt: skip
    """Swaps a text embedding model, runs it on real text before and after, and shows what changed."""
    console = Console(stderr=json == "-")
    if (precision is None) == (plan is None):
        refuse("pass either --precision or --plan")
    if precision is not None and precision not in CALIBRATES:
        refuse(f"--precision is one of {', '.join(CALIBRATES)}, not {precision!r}")
    where = prepare(device, json)
    with refusing(ValueError, OSError):
        planned = fp.Plan.load(plan) if plan else None
        calibrates = planned.calibrated if planned else CALIBRATES[precision or ""]
        texts = embedding.read_texts(text) if text else embedding.builtin_texts()[1]
        calibration = calibration_texts(calibrate or ("builtin" if calibrates else "none"))
        source = embedding.find_model(model)
        console.print(f"model: {source.chosen}", highlight=False, soft_wrap=True)
        original, tokenizer = embedding.load(source, where)
        batches = embedding.tokenize(tokenizer, texts, original, where)
        timed = embedding.full_batch(tokenizer, texts, batch, length, original, where)
    swapped = copy.deepcopy(original)  # both are wanted at once: their timing takes turns
    with progressing() as track:
        track("swapping", None)
        with refusing(ValueError, TypeError, OSError, fp.Unsupported), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the report has them too
            report = fp.swap(
                swapped,
                precision=precision,
                plan=planned,
                calibrate=embedding.tokenize(tokenizer, calibration, original, where) or None,
            )
        compared = comparison.compare(original, swapped, batches, timed, track)
    if save:
        with refusing(ValueError, OSError):
            fp.save_pretrained(swapped, save)
    reported = report.to_json()
    ok = compared["parity"]["cosine_min"] >= min_cosine  # false for NaN
    result = {
        "schema": "forwardpass.swap/1",
        "model": {"name": model, "chosen": source.chosen},
        "precision": precision,
        "plan": plan,
        **{name: reported[name] for name in ("swapped", "attention", "skipped", "warnings", "weight_bytes")},
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


def calibration_texts(chosen: str) -> list[str]:
    if chosen == "none":
        return []
    return embedding.builtin_texts()[0] if chosen == "builtin" else embedding.read_texts(chosen)


@app.command()
def profile(
    model: Annotated[str, typer.Argument(help="A folder that save_pretrained wrote, `minilm`, or a hub id.")],
    text: Annotated[str | None, typer.Option(help="Texts to run, one a line; default: 288 built in.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Texts of a batch.")] = 8,
    length: Annotated[int, typer.Option(min=1, help="Tokens that each text is padded or cut to.")] = 128,
    batches: Annotated[int, typer.Option(min=1, help="Batches, one after the other.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Timed passes over the batches.")] = 3,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU where torch finds one.")] = None,
    json: Annotated[str | None, typer.Option(help="Also write the result to this file, or to stdout for -.")] = None,
    html: Annotated[str | None, typer.Option(help="Also write a report with plots to this file.")] = None,
    trace: Annotated[str | None, typer.Option(help="Also write a Chrome trace to this file.")] = None,
) -> None:  # fmt: skip
    """Shows where the time of a text embedding goes: tokenising, transfer, forward, pooled output; then by layer."""
    console = Console(stderr=json == "-")
    where = prepare(device, json, html, trace)
    with refusing(ValueError, OSError):
        texts = embedding.read_texts(text) if text else embedding.builtin_texts()[1]
        source = embedding.find_model(model)
        console.print(f"model: {source.chosen}", highlight=False, soft_wrap=True)
        loaded, tokenizer = embedding.load(source, where)
        request = embedding.Request(loaded, tokenizer, length)
    items = [[texts[(i * batch + j) % len(texts)] for j in range(batch)] for i in range(batches)]
    with progressing() as track, refusing(ValueError, TypeError, fp.Unsupported):
        found = fp.profile(
            loaded,
            items,
            preprocess=request.preprocess,
            forward=request.forward,
            postprocess=request.postprocess,
            rounds=rounds,
            track=track,
        )
    typer.echo(str(found), err=json == "-")
    if html:
        found.save_html(html)
    if trace:
        found.save_trace(trace)
    if json:
        request_of = {"name": model, "chosen": source.chosen}
        write_json(found.to_json() | {"model": request_of, "batch": batch, "length": length}, json)


def prepare(device: str | None, *files: str | None) -> str:
    """The device to run on; refuses one that is not there, and files that cannot be written."""
    for file in files:
        if file not in (None, "-") and not pathlib.Path(file).parent.is_dir():
            refuse(f"cannot write {file}: its folder does not exist")
    if device not in (None, "cpu", "cuda"):
        refuse(f"--device is cpu or cuda, not {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        refuse("torch finds no GPU here: drop --device cuda")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def progressing() -> Iterator[comparison.Track]:
    """A progress bar on a terminal's stderr."""
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:

        def track(what: str, steps: int | None) -> Callable[[], object]:
            task = progress.add_task(what, total=steps)
            return lambda: progress.advance(task)

        yield track


def print_swap(result: dict[str, Any], console: Console) -> None:
    parity, latency, weights = result["parity"], result["latency_ms"], result["weight_bytes"]
    table = Table(show_header=False, box=None)
    table.add_row("swapped", f"{len(result['swapped'])} layers to {result['precision'] or result['plan']}")
    if result["attention"]:
        table.add_row("attention", f"of {len(result['attention'])} modules swapped")
    reasons = defaultdict(list)
    for skipped in result["skipped"]:
        reasons[skipped["code"], skipped["text"], skipped["fix"]].append(skipped["fqn"])
    for (code, text, fix), names in reasons.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        table.add_row("skipped", f"{', '.join(names[:3])}{more} ({code}): {text}" + (f"; {fix}" if fix else ""))
    for warning in result["warnings"]:
        table.add_row("warning", warning)
    check = result["checks"]["cosine_min"]
    passed = "passes" if check["ok"] else "FAILS"
    table.add_row("parity", f"lowest cosine {parity['cosine_min']:.5f} over {parity['texts']} texts, "
                            f"{passed} >= {check['least']}; relative error {parity['relative_error']:.1e}")  # fmt: skip
    size, times = f"{result['batch']} x {result['length']} tokens", f"{result['speedup']:.2f} times as fast"
    table.add_row("latency", f"{latency['before']:.1f} ms before, {latency['after']:.1f} ms after: {times}, {size}")
    why = result["reasons"].get("latency_ms.torch_dynamic_int8")
    table.add_row("", f"torch's own dynamic INT8: {why or '{:.1f} ms'.format(latency['torch_dynamic_int8'])}")
    table.add_row("weights", f"{weights['before'] / 1e6:.1f} MB before, {weights['after'] / 1e6:.1f} MB after; "
                             f"{weights['kept'] / 1e6:.1f} MB of originals kept for restore")  # fmt: skip
    table.add_row("device", result["device"]["name"])
    console.print(table, highlight=False)
