"""A real model, swapped, beside what else a CPU user could pick: latency and how far its embeddings move.

    python -m benchmarks.models [--grid | --ragged | --compiled] [--tier avx2] [--json FILE]

All candidates are built from the same fp32 model and take turns in one process, with the same number of threads.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import bench, peers, tiers
from benchmarks.peers import PEERS, Built, Run
from forwardpass.cli import embedding
from forwardpass.cli.console import tracking
from forwardpass.cli.embedding import Batch
from forwardpass.common.timing import Timing, Track, interleave, keep_freed_memory

#: A lowest cosine from which on a candidate counts as the same model.
SAME_MODEL = 0.999
OURS, OURS_COMPILED, FP32_COMPILED = "forwardpass int8", "forwardpass int8 compiled", "fp32 compiled"
#: Batches of texts at their own lengths that are timed, of all of them: a round of all takes a minute.
RAGGED = 3


@dataclass(frozen=True)
class Cell:
    """What is timed at once: one batch without padding, or with length None texts in RAGGED padded batches."""

    threads: int
    batch: int
    length: int | None

    def __str__(self) -> str:
        return f"{self.batch} x {self.length or 'texts'}, {self.threads} thread{'s' * (self.threads > 1)}"

    @property
    def share(self) -> int:
        """By which time is divided among cells: their tokens, so that large ones have their rounds, and a little more."""
        return self.batch * (self.length or 128) + 1000


@dataclass(frozen=True)
class Mode:
    """What a run measures: cells, candidates, the least and most rounds, how it is printed."""

    cells: Callable[[argparse.Namespace], list[Cell]]
    peers: tuple[str, ...]
    rounds: tuple[int, int]
    lines: Callable[[dict[str, Any]], Iterable[str]]


def table_cells(args: argparse.Namespace) -> list[Cell]:
    batches = (int(n) for n in (args.batch or "8,32").split(","))
    return [Cell(torch.get_num_threads(), batch, args.length or 128) for batch in batches]


def grid_cells(args: argparse.Namespace) -> list[Cell]:
    threads = sorted({1, torch.get_num_threads()})
    return [Cell(t, b, length) for t in threads for length in (16, 128, 384) for b in (1, 2, 8, 32)]


def ragged_cells(args: argparse.Namespace) -> list[Cell]:
    return [Cell(torch.get_num_threads(), 32, None)]


def medians(cell: dict[str, Any]) -> dict[str, float]:
    return {name: t["median"] for name, t in cell["timings"].items()}


def title(cell: dict[str, Any]) -> str:
    return str(Cell(cell["threads"], cell["batch"], cell["length"]))


def others(result: dict[str, Any], cell: dict[str, Any], least_cosine: float = -1.0) -> dict[str, float]:
    """peer -> milliseconds: those that are neither ours nor below the cosine."""
    return {
        name: ms
        for name, ms in medians(cell).items()
        if not name.startswith("forwardpass") and result["peers"][name]["cosine_min"] >= least_cosine
    }


def table_lines(result: dict[str, Any]) -> Iterable[str]:
    yield f"{'':<27}{'lowest cosine':>13}" + "".join(f"{title(c):>28}" for c in result["cells"]) + "  instructions"
    for name, peer in result["peers"].items():
        timings = (c["timings"][name] for c in result["cells"])
        cells = (f"{t['median']:.1f} ms [{t['low']:.1f}, {t['high']:.1f}]" for t in timings)
        yield (
            f"{name:<27}{peer['cosine_min']:>13.5f}" + "".join(f"{c:>28}" for c in cells) + f"  {peer['instructions']}"
        )
    if result["lowered"]:
        yield from (f"{name} on this tier: {peer['lowering']}" for name, peer in result["peers"].items())
    for cell in result["cells"]:
        peer, ms = fastest(others(result, cell, SAME_MODEL))
        own_ms, cosine = medians(cell)[OURS], result["peers"][OURS]["cosine_min"]
        yield (
            f"{title(cell)}, {cell['rounds']} rounds: fastest peer with a lowest cosine >= {SAME_MODEL}: {peer}, {ms:.1f} ms; "
            f"ours, with {cosine:.5f}: {own_ms:.1f} ms, {ms / own_ms:.2f} times as fast"
        )


def compiled_lines(result: dict[str, Any]) -> Iterable[str]:
    yield from table_lines(result)
    for cell in result["cells"]:
        ms = medians(cell)
        if FP32_COMPILED in ms and OURS_COMPILED in ms:
            gain = ms[FP32_COMPILED] / ms[OURS_COMPILED]
            yield f"{title(cell)}, both under torch.compile: ours is {gain:.2f} times as fast as fp32"


def fastest(candidates: dict[str, float]) -> tuple[str, float]:
    return min(candidates.items(), key=lambda item: item[1])


def grid_lines(result: dict[str, Any]) -> Iterable[str]:
    same = f"fastest >= {SAME_MODEL}"
    yield f"{'':<24}{'ours, ms':>28}{'eager, ms':>28}  ours is … times as fast as eager, as the {same}, as the fastest of all"
    ratios: dict[str, list[float]] = {"eager": [], same: [], "fastest": []}
    for cell in result["cells"]:
        timing, eager = (cell["timings"][name] for name in (OURS, "eager"))
        line = f"{title(cell):<24}" + "".join(
            f"{t['median']:>9.2f} [{t['low']:.2f}, {t['high']:.2f}]".rjust(28) for t in (timing, eager)
        )
        compared = {
            "eager": ("eager", eager["median"]),
            same: fastest(others(result, cell, SAME_MODEL)),
            "fastest": fastest(others(result, cell)),
        }
        for label, (_, ms) in compared.items():
            ratios[label].append(ms / timing["median"])
        yield line + "".join(f"  {ms / timing['median']:5.2f} {name}" for name, ms in compared.values())
    for label, of_cells in ratios.items():
        below = [title(c) for c, ratio in zip(result["cells"], of_cells) if ratio < 1]
        yield f"times as fast as {label}: {f'below 1.0 in {len(below)}: ' + '; '.join(below) if below else 'no cell below 1.0'}"


def ragged_lines(result: dict[str, Any]) -> Iterable[str]:
    (cell,) = result["cells"]
    timed = f"{cell['batches']} of {result['ragged_batches']} batches"
    yield f"{title(cell)}, {timed}, {cell['tokens']} tokens, {cell['rounds']} rounds"
    yield f"{'':<27}{'lowest cosine':>13}{'tokens a second':>28}{'times eager':>13}  instructions"
    for name, t in cell["timings"].items():
        rate, low, high = (cell["tokens"] / t[part] * 1e3 for part in ("median", "high", "low"))
        peer = result["peers"][name]
        yield (
            f"{name:<27}{peer['cosine_min']:>13.5f}{f'{rate:.0f} [{low:.0f}, {high:.0f}]':>28}"
            f"{medians(cell)['eager'] / t['median']:>13.2f}  {peer['instructions']}"
        )


EAGER = tuple(n for n in PEERS if n not in (OURS_COMPILED, FP32_COMPILED))
MODES = {
    "table": Mode(table_cells, EAGER, (5, 41), table_lines),
    "grid": Mode(grid_cells, tuple(n for n in EAGER if n != "forwardpass w8a16"), (3, 31), grid_lines),
    "ragged": Mode(
        ragged_cells, ("onnxruntime", "openvino", "openvino f32", "openvino without int8"), (5, 31), ragged_lines
    ),
    "compiled": Mode(table_cells, (FP32_COMPILED, OURS_COMPILED, "torchao"), (5, 41), compiled_lines),
}  # fmt: skip


def time_cells(
    cells: list[Cell],
    built: dict[str, Built],
    batches: Callable[[Cell], list[Batch]],
    device: str,
    rounds: tuple[int, int],
    ends: float,
    track: Track,
) -> list[dict[str, Any]]:
    """Each cell gets its share of the time that is left until `ends`, by time.monotonic, within the limits of its rounds."""
    measured: list[dict[str, Any]] = []
    runs: dict[str, Run] = {}
    at_first, threads = torch.get_num_threads(), 0
    for index, cell in enumerate(cells):
        if cell.threads != threads:
            threads = cell.threads
            torch.set_num_threads(threads)
            runs = {name: b.candidate.with_threads(threads) for name, b in built.items()}
        todo = batches(cell)
        share = (ends - time.monotonic()) * cell.share / sum(c.share for c in cells[index:])
        label = f"{cell} (cell {index + 1} of {len(cells)})"
        timings = time_cell(
            {n: partial(run_all, run, todo) for n, run in runs.items()}, device, rounds, share, label, track
        )
        tokens = int(sum(batch["attention_mask"].sum() for batch in todo))
        done_rounds = next(iter(timings.values())).rounds
        named = {name: t.to_json() for name, t in timings.items()}
        facts = {"rounds": done_rounds, "batches": len(todo), "tokens": tokens, "timings": named}
        measured.append(asdict(cell) | facts)
    torch.set_num_threads(at_first)
    return measured


def time_cell(
    calls: dict[str, Callable[[], None]],
    device: str,
    rounds: tuple[int, int],
    share: float,
    label: str,
    track: Track,
) -> dict[str, Timing]:
    """As many rounds as fit into `share` seconds, by what the untimed one took, but no fewer and no more than `rounds`."""
    advance = track(f"{label}, untimed round", None)

    def planned(seconds: float) -> int:
        nonlocal advance
        low, high = rounds
        count = max(low, min(high, int(share / seconds) - 1))
        advance = track(f"{label}, {len(calls)} candidates", count)
        return count

    return interleave(calls, device, rounds=planned, warmup=1, on_round=lambda: advance())


def run_all(run: Run, batches: list[Batch]) -> None:
    for batch in batches:
        run(batch)


def measure(args: argparse.Namespace, tier: str | None, highest: str | None) -> dict[str, Any]:
    """The result of a run. Raises ValueError in one sentence where there is no such model, or it takes no such batch."""
    ends = time.monotonic() + 60 * args.minutes
    mode = MODES[args.mode]
    cells = mode.cells(args)
    names = ["eager", OURS, *args.peers]
    names = [n for n in PEERS if n in names]  # eager first: all are compared with it
    varies = len({c.threads for c in cells}) > 1
    recompiled = {n: str(PEERS[n].recompiled) for n in names if varies and PEERS[n].recompiled}
    source = embedding.find_model(args.model)
    model, tokenizer = embedding.load(source, args.device)
    calibration_texts, texts = embedding.builtin_texts()
    texts = texts[: args.texts]
    calibration = embedding.tokenize(tokenizer, calibration_texts[: args.texts], model, args.device)
    ragged = embedding.tokenize(tokenizer, texts, model, args.device)

    def batches(cell: Cell) -> list[Batch]:
        if cell.length is None:
            return ragged[:: -(-len(ragged) // RAGGED)]
        return [embedding.full_batch(tokenizer, texts, cell.batch, cell.length, model, args.device)]

    for cell in cells:
        batches(cell)  # refuses a length that the model does not take
    result = bench.header("models", args.device, ["peers", "cells"])
    result |= {"schema": "forwardpass.models/2", "allocator": keep_freed_memory()}
    subject = peers.Subject(model, batches(cells[0])[0], calibration, tier if tier != highest else None, highest)
    with torch.inference_mode(), tracking() as track:
        built, missing = peers.build([n for n in names if n not in recompiled], subject, track)
        runs = {n: b.candidate.with_threads(torch.get_num_threads()) for n, b in built.items()}
        embeddings = {}
        for name, run in runs.items():
            track(f"embedding {len(texts)} texts with {name}", None)
            embeddings[name] = embedding.embed(run, ragged)
        rounds = (args.rounds, args.rounds) if args.rounds else mode.rounds
        measured = time_cells(cells, built, batches, args.device, rounds, ends, track)
    return result | {
        "mode": args.mode,
        "tier": tier,
        "lowered": tier != highest,
        "model": source.origin,
        "texts": len(texts),
        "ragged_batches": len(ragged),
        "seconds": time.monotonic() - ends + 60 * args.minutes,
        "not_run": missing | recompiled,
        "peers": {
            n: {
                **embedding.parity(embeddings[n], embeddings["eager"]),
                "instructions": b.candidate.instructions,
                "lowering": PEERS[n].lowering,
                "versions": PEERS[n].versions(),
                "build_seconds": b.seconds,
            }
            for n, b in built.items()
        },
        "cells": measured,
    }


def arguments() -> argparse.ArgumentParser:
    p = bench.parser(__doc__)
    p.set_defaults(rounds=None, mode="table")
    p.add_argument("--model", default="minilm", help="a folder, minilm, or a hub id")
    p.add_argument(
        "--tier", help=f"hold the process to a lesser CPU: {', '.join(tiers.TIERS)}; by default the machine's own"
    )
    modes = p.add_mutually_exclusive_group()
    for mode, text in (
        ("grid", "batches of 1, 2, 8, 32 with 16, 128, 384 tokens, on one thread and on all"),
        ("ragged", f"built-in texts at their own lengths, in {RAGGED} padded batches of 32"),
        ("compiled", "fp32 and ours both under torch.compile, which takes minutes"),
    ):
        modes.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, help=text)
    p.add_argument("--peers", help=f"comma-separated, beside eager and {OURS}: {', '.join(PEERS)}")
    p.add_argument("--batch", help="comma-separated, by default 8,32; not with --grid or --ragged")
    p.add_argument("--length", type=int, help="tokens a text, by default 128; not with --grid or --ragged")
    p.add_argument("--texts", type=int, help="the first of the built-in ones alone: a trial")
    p.add_argument(
        "--minutes", type=float, default=9.0, help="as many rounds as fit, within limits that --rounds overrides"
    )
    return p


def main() -> None:
    p = arguments()
    args = p.parse_args()
    args.peers = args.peers.split(",") if args.peers is not None else MODES[args.mode].peers
    if unknown := [n for n in args.peers if n not in PEERS]:
        p.error(f"unknown peers {', '.join(unknown)}; there are {', '.join(PEERS)}")
    if args.mode in ("grid", "ragged") and (args.batch or args.length):
        p.error(f"--{args.mode} has batches of its own: drop --batch and --length")
    try:
        tier, highest = tiers.choose(args.tier, os.environ.get(tiers.OURS), tiers.cpu_flags())
        environment = tiers.hold_to(tier) if tier and tier != highest else {}
        result = measure(args, tier, highest) | {"environment": environment}
    except ValueError as e:
        p.error(str(e))
    lowered = f", held to tier {tier}" if result["lowered"] else f", tier {tier}"
    print(f"{result['model']}; {result['device']['name']}{lowered}; {result['texts']} texts; {result['seconds']:.0f} s")
    for line in MODES[args.mode].lines(result):
        print(line)
    for name, why in result["not_run"].items():
        print(f"{name:<27}not run: {why}")
    bench.write(result, args.json)


if __name__ == "__main__":
    main()
