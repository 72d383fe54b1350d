"""A model of pictures before and after a swap: the same photographs, the same batch, in turn, in one process (extra `cli`)."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import forwardpass as fp

from ..common import environment
from ..common.printing.text import count, megabytes, table
from ..common.timing import Track, interleave, keep_freed_memory
from ..planning.criterion import samples
from ..planning.parity import Comparison
from ..swap.report import by_reason
from .console import describe_device, say
from .vision import Photographs, Vision

ROUNDS, WARMUP = 11, 2
LAST = "channels_last"


def swapped(
    vision: Vision, config: fp.Config, track: Track, calibration: Tensor | None
) -> tuple[nn.Module, fp.types.Report]:
    """A copy of the model, swapped: both are there at once, as their timing takes turns."""
    model = copy.deepcopy(vision.model)
    text = "swapping" if calibration is None else f"calibrating on {count(len(calibration), 'picture')}, and swapping"
    track(text, None)
    batches = None if calibration is None else list(calibration.split(16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the report has them too
        return model, fp.swap(model, fp.Config.of(config, calibrate=batches))


def compare(vision: Vision, model: nn.Module, pictures: Photographs, batch: int, track: Track) -> dict[str, Any]:
    """What changed of the results on photographs, and the time of a batch of them."""
    parity = _parity(vision, model, pictures, track)
    x = pictures.measured[:1].expand(batch, -1, -1, -1).contiguous()
    last = x.contiguous(memory_format=torch.channels_last)
    calls = {
        "before": lambda: vision.model(x),
        f"before, {LAST}": lambda: vision.model(last),
        "after": lambda: model(last),
    }
    allocator = keep_freed_memory()
    with torch.inference_mode():
        times = interleave(calls, x.device, rounds=ROUNDS, warmup=WARMUP, on_round=track("timing", ROUNDS + WARMUP))
    medians = {name: t.median for name, t in times.items()}
    before = min(medians["before"], medians[f"before, {LAST}"])
    return {
        "parity": parity,
        "latency_ms": medians,
        "latency_quartiles_ms": {name: [t.low, t.high] for name, t in times.items()},
        "allocator": allocator,
        "speedup": before / medians["after"],
    }


def _parity(vision: Vision, model: nn.Module, pictures: Photographs, track: Track) -> dict[str, Any]:
    from ..planning.pictures import psnr

    output, agree, lowest = Comparison(), [], []
    advance = track("running photographs", len(pictures.batches))
    for x in pictures.batches:
        with torch.inference_mode():
            after, before = (vision.result(m, x).float().cpu() for m in (model, vision.model))
        output.add(samples(after, None), samples(before, None))
        drawn = [vision.as_pictures(y) for y in (after, before)]
        if drawn[0] is not None and drawn[1] is not None:
            lowest += psnr(drawn[0], drawn[1]).tolist()
        elif before.dim() == 2:
            agree += (after.argmax(1) == before.argmax(1)).tolist()
        advance()
    return {
        **output.to_json(),
        "pictures": output.samples,
        "top1_agreement": sum(agree) / len(agree) if agree else None,
        "psnr_min": min(lowest) if lowest else None,
    }


def result_of(
    name: str, vision: Vision, report: fp.types.Report, pictures: Photographs, compared: dict[str, Any], batch: int,
    least: float, precision: str | None, plan: str | None, calibrated: int, where: str,
) -> dict[str, Any]:  # fmt: skip
    """What `--json` writes."""
    reported = report.to_json()
    if not (reported["swapped"] or reported["attention"]):
        compared |= {"speedup": None}
    ok = compared["parity"]["cosine_min"] is not None and compared["parity"]["cosine_min"] >= least
    entries = ("swapped", "attention", "skipped", "other_layers", "warnings", "weight_bytes")
    return {
        "schema": "forwardpass.swap_images/1",
        "model": {"name": name, "origin": vision.origin},
        "photographs": pictures.origin,
        "size": vision.size,
        "precision": precision,
        "plan": plan,
        **{entry: reported[entry] for entry in entries},
        "calibration": {"pictures": calibrated} if calibrated else None,
        **compared,
        "batch": batch,
        "checks": {"cosine_min": {"least": least, "ok": ok}},
        "versions": environment.versions(),
        "device": environment.device(where),
        "measured": ["parity", "latency_ms", "latency_quartiles_ms", "speedup", "weight_bytes"],
    }


def print_result(result: dict[str, Any], console: Console) -> None:
    parity, weights, check = result["parity"], result["weight_bytes"], result["checks"]["cosine_min"]
    changed = result["speedup"] is not None
    summary = f"{count(len(result['swapped']), 'layer')} to {result['precision'] or result['plan']}"
    reasons = by_reason(
        (s["fqn"], s["code"], "; ".join(filter(None, (s["text"], s["fix"])))) for s in result["skipped"]
    )
    cosine = "-" if parity["cosine_min"] is None else f"{parity['cosine_min']:.5f}"
    facts = [
        ("model", result["model"]["origin"]),
        ("swapped", summary if changed else "nothing was changed: the model is as it was"),
        *((("attention", f"{count(len(result['attention']), 'module')} swapped"),) if result["attention"] else ()),
        *(("skipped", f"{', '.join(names)} ({reason})") for reason, names in reasons),
        *(("warning", warning) for warning in result["warnings"]),
        ("photographs", f"{result['photographs']}, {result['size']} x {result['size']} pixels"),
        ("calibrated", f"on {result['calibration']['pictures']} of them" if result["calibration"] else "no"),
        ("parity", f"lowest cosine {cosine} over {count(parity['pictures'], 'picture')}, "
                   f"{'passes' if check['ok'] else 'FAILS'} >= {check['least']}; relative error {parity['relative_error']:.1e}"),
    ]  # fmt: skip
    if parity["top1_agreement"] is not None:
        facts.append(("best class", f"stays for {parity['top1_agreement']:.1%}"))
    if parity["psnr_min"] is not None:
        facts.append(("lowest PSNR", f"{parity['psnr_min']:.2f} dB"))
    facts += [
        ("weights", f"{megabytes(weights['before'])} before, {megabytes(weights['after'])} after"),
        ("device", describe_device(result["device"])),
    ]
    rows: list[tuple[str, ...]] = [
        (f"{result['batch']} x 3 x {result['size']} x {result['size']}", "median", "quartiles", "times\nas fast")
    ]
    for name, ms in result["latency_ms"].items():
        low, high = result["latency_quartiles_ms"][name]
        gain = f"{result['speedup']:.2f}" if name == "after" and changed else ""
        rows.append((name, f"{ms:.1f} ms", f"{low:.1f} to {high:.1f}", gain))
    say(console, "\n".join([*table(facts, heading=False), "", *table(rows, right=range(1, 4))]))
