"""How the commands print what they found, and tell on stderr how far they are (extra `cli`)."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.progress import Progress

from ..common.models.decoding import PHASES
from ..common.printing.text import count, megabytes, table, wrapped
from ..common.timing import Track
from ..swap.report import IN_ITS_DTYPE, by_reason, mostly, tied
from .comparison import DYNAMIC_INT8

#: Seconds between lines of progress where stderr is no terminal.
EVERY = 15.0
#: What `qualities` shows of embeddings.
SEARCHES = {"cosine_min": "lowest\ncosine", "spearman": "Spearman of\nsimilarities", "recall_at_10": "recall\n@10"}
#: Of a CPU on which int8 products are sgemm's.
NO_INT8_GAIN = "no gain: without AMX, VNNI or AVX2 it would be slower than fp32"


def say(console: Console, text: str) -> None:
    """As it is: rich would read markup and emoji in it, and wrap it to the terminal."""
    console.out(text, highlight=False)


@contextlib.contextmanager
def tracking() -> Iterator[Track]:
    """Progress on stderr: bars where that is a terminal, else a line as each step begins, and others while it takes long."""
    errors = Console(stderr=True)
    if not errors.is_terminal:
        with telling() as track:
            yield track
        return
    with Progress(console=errors, transient=True) as progress:

        def with_bar(label: str, steps: int | None) -> Callable[[], object]:
            task = progress.add_task(label, total=steps)
            return lambda: progress.advance(task)

        yield with_bar


@contextlib.contextmanager
def telling() -> Iterator[Track]:
    """A thread tells, as some steps cannot: a swap calibrates for minutes in one call."""
    latest: list[Callable[[], str]] = []
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(EVERY):
            if latest:
                typer.echo(latest[-1](), err=True)

    def track(label: str, steps: int | None) -> Callable[[], object]:
        began, steps_done = time.monotonic(), 0

        def advance() -> None:
            nonlocal steps_done
            steps_done += 1

        def so_far() -> str:
            seconds = time.monotonic() - began
            part = f"{steps_done} of {steps}, " if steps else ""
            remaining = (
                f", about {seconds / steps_done * (steps - steps_done):.0f} s left" if steps and steps_done else ""
            )
            return f"{label}: {part}{seconds:.0f} s{remaining} …"

        typer.echo(f"{label} …", err=True)
        latest.append(so_far)
        return advance

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield track
    finally:
        ended.set()
        thread.join()


def print_examination(examination: dict[str, Any], console: Console) -> None:
    build, driver, cpu = examination["build"], examination["driver"], examination["device"]
    build_line = f"with torch {build.get('torch')}, " + (
        f"CUDA {build['nvcc']} for {', '.join(build['arches'])}"
        if build.get("nvcc")
        else f"no CUDA kernels: {build['cuda_skipped']}"
    )
    if build.get("arches_left_out"):
        build_line += f", without {', '.join(build['arches_left_out'])}"
    requirement = f"the CUDA kernels need {driver['needed']} or later" if driver["needed"] else "none is needed"
    threads, cores = count(cpu["threads"], "thread"), count(cpu["cores"], "core")
    facts = [
        ("versions", ", ".join(f"{name} {v or 'none'}" for name, v in examination["versions"].items())),
        ("built", build_line),
        ("driver", f"{driver['present'] or 'none'}; {requirement}"),
        ("nvcc", examination["nvcc"] or "none; only building the CUDA kernels needs one"),
        ("CPU", f"{cpu['name']}, {cpu['capability']}, {threads} on {cores}"),
        ("int8", describe_int8(cpu)),
        ("interpreter", describe_interpreter(examination["interpreter"])),
        *(("GPU", f"{g['name']}, {g['arch']}, {g['memory_bytes'] / 2**30:.0f} GiB") for g in examination["gpus"]),
    ]
    lines = [*table(facts, heading=False), ""]

    kernels = {(k["operation"], k["backend"]): k for k in examination["kernels"]}
    operations, backends = (list(dict.fromkeys(names)) for names in zip(*kernels))
    reasons: dict[str, defaultdict[str, list[str]]] = {}
    for (operation, backend), k in kernels.items():
        if k["code"]:
            reasons.setdefault(f"{k['text']}; {k['fix']}", defaultdict(list))[backend].append(operation)

    def cell(k: dict[str, Any]) -> str:
        if k["code"]:
            return "FAILS" if k["parity"] else "-"
        return f"{k['parity']['relative_error']:.1e}" if k["parity"] else "yes"

    lines += table([("operation", *backends), *((o, *(cell(kernels[o, b]) for b in backends)) for o in operations)])
    lines += [
        "",
        *wrapped("a figure: it runs here, and this is its relative error beside the reference; -: it does not"),
    ]
    for why, where in reasons.items():
        alike: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
        for backend, names in where.items():
            alike[tuple(names)].append(backend)
        subjects = "; ".join(
            ", ".join(b) + ("" if list(names) == operations else f" of {listed(names, operations)}")
            for names, b in alike.items()
        )
        lines += wrapped(f"{subjects}: {why}")
    problems = [line for problem in examination["problems"] for line in wrapped(f"problem: {problem}")]
    say(console, "\n".join([*lines, "", *(problems or ["everything that should work here does"])]))


def listed(names: Sequence[str], operations: Sequence[str]) -> str:
    """These of the operations, or those that are not among them where they are fewer."""
    others = [o for o in operations if o not in names]
    if len(others) >= len(names):
        return ", ".join(names)
    return f"all operations but {', '.join(others)}" if others else "every operation"


def describe_interpreter(interpreter: dict[str, Any]) -> str:
    """The GPUs that it stands in for, and which kernels it runs as them."""
    if interpreter["problem"]:
        return f"none: {interpreter['problem']}"
    gpus = ", ".join(f"{name} ({arch})" for arch, name in interpreter["architectures"].items())
    kernels = interpreter["kernels"]
    runs = defaultdict(list)
    for k in kernels:
        if k["code"] is None:
            runs[k["operation"]].append(k["backend"])
    sentences = []
    for backends in dict.fromkeys(map(tuple, runs.values())):
        names = [o for o in runs if tuple(runs[o]) == backends]
        operations = list(dict.fromkeys(k["operation"] for k in kernels))
        sentences.append(f"{' and '.join(backends)} kernels of {listed(names, operations)}")
    sentences += dict.fromkeys(
        f"no {k['backend']} kernels: {k['text']}" for k in kernels if k["code"] not in (None, "not_written")
    )
    return f"{gpus}: {'; '.join(sentences)}"


def print_swap(result: dict[str, Any], console: Console) -> None:
    parity, weights = result["parity"], result["weight_bytes"]
    changed = result["speedup"] is not None
    summary = f"{count(len(result['swapped']), 'layer')} to {result['precision'] or result['plan']}"
    facts = [("swapped", summary if changed else "nothing was changed: the model is as it was")]
    facts += [("head", tied(x["fqn"], x["tied_to"])) for x in result["swapped"] if x.get("tied_to")]
    if result["attention"]:
        computes = [x for x in dict.fromkeys(x.get("bits") for x in result["attention"]) if x]
        in_8_bits = f", {' and '.join(computes)}; {IN_ITS_DTYPE}" if computes else ""
        facts.append(("attention", f"{count(len(result['attention']), 'module')} swapped{in_8_bits}"))
    if result["padding"]:
        facts.append(("padding", result["padding"]))
    reasons = by_reason(
        (s["fqn"], s["code"], "; ".join(filter(None, (s["text"], s["fix"])))) for s in result["skipped"]
    )
    facts += [("skipped", f"{', '.join(names)} ({reason})") for reason, names in reasons]
    others = [(x["code"], x["module"], x["bytes"]) for x in result["other_layers"]]
    others += [("convolution", "", x["bytes"]) for x in result["skipped"] if "bytes" in x]
    stays = mostly(others, weights["before"])
    facts += [
        ("other layers", f"{x['module']} ({x['first']}, {x['count']} in all, {megabytes(x['bytes'])}): {x['text']}")
        for x in result["other_layers"]
    ]
    facts += [("warning", warning) for warning in result["warnings"]]
    if result["calibration"] and changed:
        facts.append(("calibrated", describe_calibration(result["calibration"]["texts"])))
    ((name, check),) = result["checks"].items()
    bound = f">= {check['least']}" if name == "cosine_min" else f"<= {check['most']:.2%}"
    facts += [
        ("read out", result["readout"]),
        ("parity", describe_parity(parity, f"{'passes' if check['ok'] else 'FAILS'} {bound}")),
        ("weights", "; ".join(filter(None, (
            f"{megabytes(weights['before'])} before, {megabytes(weights['after'])} after", stays,
            f"{megabytes(weights['originals'])} of originals kept for restore")))),
        ("device", describe_device(result["device"])),
    ]  # fmt: skip
    names = {"before": "before", "after": "after"} if changed else {"before": "as it is"}
    rows = rates(result, names) if "tokens_per_s" in result else latencies(result, names)
    lines = [*table(facts, heading=False), "", *table(rows, right=range(1, len(rows[0])))]
    if "spearman" in parity:
        lines += ["", *table(qualities(result, names), right=range(1, 1 + len(SEARCHES)))]
    if why := result["reasons"].get("latency_ms.torch_dynamic_int8"):
        lines += wrapped(f"torch's dynamic INT8: {why}")
    say(console, "\n".join(lines))


def rates(result: dict[str, Any], names: dict[str, str]) -> list[tuple[str, ...]]:
    """A decoder's tokens a second."""
    prompts = f"{result['batch']} x {result['length']} tokens, then {result['steps']} more"
    rows: list[tuple[str, ...]] = [(prompts, "tokens/s", "quartiles", "times\nas fast")]
    for phase in PHASES:
        for key, name in names.items():
            low, high = result["tokens_per_s_quartiles"][key][phase]
            gain = f"{result['speedup'][phase]:.2f}" if key == "after" else ""
            median = f"{result['tokens_per_s'][key][phase]:.1f}"
            rows.append((f"{phase}, {name}", median, f"{low:.1f} to {high:.1f}", gain))
    return rows if "after" in names else [row[:3] for row in rows]


def latencies(result: dict[str, Any], names: dict[str, str]) -> list[tuple[str, ...]]:
    latency, parity = result["latency_ms"], {"after": result["parity"], DYNAMIC_INT8: result[DYNAMIC_INT8]}
    rows: list[tuple[str, ...]] = [
        (f"{result['batch']} x {result['length']} tokens", "median", "quartiles", "times\nas fast", "lowest\ncosine")
    ]
    for key, name in (names | {DYNAMIC_INT8: "torch's dynamic INT8"}).items():
        if latency[key] is None:
            continue
        low, high = result["latency_quartiles_ms"][key]
        gain = (
            () if key == "before" else (f"{latency['before'] / latency[key]:.2f}", f"{parity[key]['cosine_min']:.5f}")
        )
        rows.append((name, f"{latency[key]:.1f} ms", f"{low:.1f} to {high:.1f}", *(gain or ("", ""))))
    return rows


def qualities(result: dict[str, Any], names: dict[str, str]) -> list[tuple[str, ...]]:
    """What a search by a model's embeddings keeps of what it found before."""
    rows = [(f"search in {count(result['parity']['texts'], 'text')}", *SEARCHES.values())]
    parities = {"after": result["parity"], DYNAMIC_INT8: result[DYNAMIC_INT8]}
    for key, name in (names | {DYNAMIC_INT8: "torch's dynamic INT8"}).items():
        if parities.get(key) is not None:
            rows.append((name, *(f"{parities[key][quality]:.5f}" for quality in SEARCHES)))
    return rows


def describe_device(device: dict[str, Any]) -> str:
    return device["name"] + (f"; int8: {describe_int8(device)}" if device["type"] == "cpu" else "")


def describe_int8(cpu: dict[str, Any]) -> str:
    return f"products by {cpu['int8']}" if cpu["int8"] else NO_INT8_GAIN


def describe_parity(parity: dict[str, Any], verdict: str) -> str:
    if "perplexity_after" in parity:
        return (
            f"perplexity {parity['perplexity_before']:.3f} before, {parity['perplexity_after']:.3f} after "
            f"({parity['perplexity_increase']:+.2%}) over {count(parity['tokens'], 'token')}, {verdict}; the likeliest token "
            f"stays for {parity['top1_agreement']:.1%}"
        )
    error = f"relative error {parity['relative_error']:.1e}"
    if "order" not in parity:
        return f"lowest cosine {parity['cosine_min']:.5f} over {count(parity['texts'], 'text')}, {verdict}; {error}"
    return (
        f"lowest cosine {parity['cosine_min']:.5f} of a query's scores about their mean, {verdict}; {error}; "
        f"{parity['order']:.2%} of two texts in the same order, the first one for {parity['first']} of "
        f"{count(parity['queries'], 'query').replace('querys', 'queries')}"
    )


def describe_calibration(texts: int) -> str:
    in_python = "as fp.swap(model, …, calibrate=batches) does in Python; without calibrate= the error is larger"
    return f"on {count(texts, 'text')}, {in_python}"
