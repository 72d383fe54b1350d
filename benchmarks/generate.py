"""A decoder, swapped, beside what else a CPU user could generate text with: tokens a second of prefill and decode, perplexity.

    python -m benchmarks.generate [--model smollm2] [--precisions int8,int8+head+compiled] [--peers …] [--json FILE]

All candidates are built of the same fp32 model and take turns, each in a process of its own, with the same number of threads. A
turn is one prefill of the prompts and the steps that follow it, each of one token for every sequence, greedily.
"""

from __future__ import annotations

import argparse
import itertools
import math
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import bench, generate_peers, own_process
from benchmarks.generate_peers import Candidate, Subject
from forwardpass.cli import embedding
from forwardpass.cli.console import tracking
from forwardpass.cli.readout import NextTokens
from forwardpass.cli.source import find_model
from forwardpass.common.models import decoding
from forwardpass.common.models.decoding import Decoding, Run
from forwardpass.common.timing import Track, keep_freed_memory
from forwardpass.integrations.transformers.kv_scales import KV_CACHES
from forwardpass.profiling.roofline import roofline

#: The least and most rounds of a cell.
ROUNDS = (2, 21)
FIRST = "eager fp32"  #: what others are compared with
#: of ours
PRECISIONS = [
    "int8", "int8+head", "int8+head+decoder", "w8a16+head+decoder", "w8a16+bf16+head+cache", "int8+head+compiled",
]  # fmt: skip


#: A candidate of its name.
Make = Callable[[str, Subject], Candidate]


def cells_of(args: argparse.Namespace) -> list[Decoding]:
    return [Decoding(batch, prompt, args.steps) for batch in args.batch for prompt in args.prompt]


def time_cell(
    cell: Decoding,
    built: dict[str, Candidate],
    ids: torch.Tensor,
    rounds: tuple[int, int],
    share: float,
    track: Track,
) -> dict[str, Any]:
    """An untimed round, in which candidates that fail fall out; then as many as fit into `share` seconds, within `rounds`."""
    runs: dict[str, Run] = {}
    failed: dict[str, str] = {}
    seconds = 0.0
    for name, candidate in built.items():
        track(f"{cell}: {name}, untimed", None)
        try:
            run = candidate.prepare(cell)
            times = run(ids, cell.steps)  # compiles, and chooses kernels
            step = statistics.median(end - begin for begin, end in itertools.pairwise(times[1:]))
            seconds += times[1] - times[0] + cell.steps * step
            runs[name] = run
        except Exception as e:  # a peer's failure is its result
            failed[name] = generate_peers.failure(e)
    low, high = rounds
    count = max(low, min(high, int(share / max(seconds, 1e-9))))
    on_round = track(f"{cell}: {len(runs)} candidates", count)
    rates = decoding.rates(runs, ids, cell.steps, count, warmup=0, on_round=on_round)
    named = {name: {phase: t.to_json() for phase, t in phases.items()} for name, phases in rates.items()}
    return {**asdict(cell), "rounds": count, "tokens_per_s": named, "not_run": failed}


def bytes_of_step(candidate: Candidate, cell: Decoding, config: Any) -> float:
    """That a step reads at least: the weights once, and of every sequence the keys and values so far, on average."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = 2 * config.num_hidden_layers * heads * width * (cell.prompt + cell.steps / 2)
    return candidate.weight_bytes + cell.batch * values * candidate.cache_itemsize


def inputs(args: argparse.Namespace, subject: Subject) -> tuple[torch.Tensor, dict[Decoding, torch.Tensor], Any]:
    """(pieces of text [n, length], prompts [batch, tokens] of each cell, the model's config); saves the model for the candidates.
    ValueError, in one sentence, where it takes no such cell.
    """
    (model, tokenizer), readout = embedding.load(subject.source, "cpu", NextTokens.auto), NextTokens()
    for part in () if subject.source.swapped else (model, tokenizer):
        part.save_pretrained(subject.saved)
    texts, cells = readout.builtin()[1], cells_of(args)
    rows = torch.cat([b["input_ids"] for b in readout.tokenize(tokenizer, texts, model, "cpu")])[: args.texts]
    prompts = {c: embedding.full_batch(tokenizer, texts, c.batch, c.prompt, model)["input_ids"] for c in cells}
    for cell in cells:
        embedding.check_length(cell.length, tokenizer, model)
    return rows, prompts, model.config


def measure(args: argparse.Namespace, make: Make = own_process.make) -> Iterator[dict[str, Any]]:
    """The result of a run so far, after each cell. Raises ValueError in one sentence where there is no such model, or it takes no
    such cell."""
    began = time.monotonic()
    names = generate_peers.candidates(args.precisions)
    if unknown := [name for name in args.peers or () if name not in names]:
        raise ValueError(f"unknown peers {', '.join(unknown)}; there are {', '.join(generate_peers.PEERS)}")
    asked = [n for n in names if args.peers is None or n.startswith(generate_peers.OURS) or n in (FIRST, *args.peers)]
    source = find_model(args.model)
    if not source.decoder:
        raise ValueError(f"{args.model} is no decoder: pass smollm2, or the folder of one")
    result = bench.header("generate", "cpu", ["candidates", "cells", "copy_bytes_per_s"])
    result |= {"allocator": keep_freed_memory(), "threads": torch.get_num_threads(), "kv_cache": args.kv_cache}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(), tracking() as track:
        rows, prompts, config = inputs(args, subject := Subject(source, pathlib.Path(folder), args.kv_cache))
        missing = {name: "not asked for" for name in names if name not in asked}
        built: dict[str, Candidate] = {}
        perplexities: dict[str, float] = {}
        for name in asked:
            track(f"building {name}, and its perplexity", None)
            try:
                candidate = make(name, subject)
                perplexities[name] = math.exp(candidate.losses(rows).double().mean().item())
                built[name] = candidate
            except Exception as e:
                missing[name] = generate_peers.failure(e)
        track("measuring the bandwidth of a copy", None)
        copy = roofline(torch.device("cpu"), set()).bytes_per_s
        rounds = (args.rounds, args.rounds) if args.rounds else ROUNDS
        result |= {
            "model": source.origin,
            "perplexity_tokens": rows[:, 1:].numel(),
            "copy_bytes_per_s": copy,
            "not_run": missing,
            "candidates": {
                name: {
                    "perplexity": perplexities[name],
                    "weight_bytes": candidate.weight_bytes,
                    "version": generate_peers.version(name),
                }
                for name, candidate in built.items()
            },
        }
        measured: list[dict[str, Any]] = []
        cells = list(prompts)
        for i, cell in enumerate(cells):
            left = 60 * args.minutes - (time.monotonic() - began)
            # of the time that is left; in proportion to its tokens a small cell would have the least rounds
            weights = [math.sqrt(c.batch * c.length) for c in cells[i:]]
            share = left * weights[0] / sum(weights)
            timed = time_cell(cell, built, prompts[cell], rounds, share, track)
            for name, rates in timed["tokens_per_s"].items():
                moved = bytes_of_step(built[name], cell, config)
                timed.setdefault("decode_bytes", {})[name] = {
                    "a_token": moved / cell.batch,
                    "of_copy": moved / cell.batch * rates["decode"]["median"] / copy,
                }
            measured.append(timed)
            yield result | {"cells": measured, "seconds": time.monotonic() - began}


def lines(result: dict[str, Any]) -> Iterable[str]:
    yield (
        f"{result['model']}; {result['device']['name']}, {result['threads']} threads; a copy moves "
        f"{result['copy_bytes_per_s'] / 1e9:.1f} GB/s, read and written; {result['seconds']:.0f} s"
    )
    yield f"{'':<24}{'perplexity':>11}{'weights, MB':>13}  of {result['perplexity_tokens']} tokens"
    for name, c in result["candidates"].items():
        told = f"  {c['version']}" if c["version"] else ""
        yield f"{name:<24}{c['perplexity']:>11.3f}{c['weight_bytes'] / 1e6:>13.1f}{told}"
    for cell in result["cells"]:
        rates = cell["tokens_per_s"]
        yield f"\n{Decoding(*(cell[n] for n in ('batch', 'prompt', 'steps')))}; {cell['rounds']} rounds"
        yield f"{'':<24}{'prefill, tokens/s':>28}{'decode, tokens/s':>28}{'times ' + FIRST:>18}{'MB a token':>12}{'of copy':>9}"
        for name, phases in rates.items():
            cells = (f"{t['median']:.1f} [{t['low']:.1f}, {t['high']:.1f}]" for t in phases.values())
            times = [t["median"] / rates[FIRST][p]["median"] for p, t in phases.items()] if FIRST in rates else []
            moved = cell["decode_bytes"][name]
            yield (
                f"{name:<24}" + "".join(f"{c:>28}" for c in cells) + f"{', '.join(f'{x:.2f}' for x in times):>18}"
                f"{moved['a_token'] / 1e6:>12.1f}{moved['of_copy']:>9.0%}"
            )
        yield from (f"{name:<24}not run: {why}" for name, why in cell["not_run"].items())
    yield from (f"{name:<24}not run: {why}" for name, why in result["not_run"].items())


def numbers(least: int) -> Callable[[str], list[int]]:
    """For an option: whole numbers, with commas between them."""

    def parse(text: str) -> list[int]:
        values = [int(part) for part in text.split(",")]
        if min(values) < least:
            raise argparse.ArgumentTypeError(f"{text} has a number below {least}")
        return values

    return parse


def words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--model", default="smollm2", help="smollm2, or the folder of a decoder")
    p.add_argument("--precisions", type=words, default=PRECISIONS,
                   help="of ours, with commas; behind one, +bf16 swaps a model in bfloat16, +head puts the head into w8a16, "
                        "+cache has kv_cache=auto, +decoder runs all layers as one operation besides, +compiled compiles "
                        "steps")  # fmt: skip
    p.add_argument("--kv-cache", choices=tuple(KV_CACHES), help="of ours, passed on to fp.swap")
    p.add_argument(
        "--peers", type=words, help=f"beside {FIRST} and ours; default: all of {', '.join(generate_peers.PEERS)}"
    )
    p.add_argument("--batch", type=numbers(1), default=[1, 4, 16])
    p.add_argument("--prompt", type=numbers(1), default=[16, 512, 2048], help="tokens of each prompt")
    p.add_argument("--steps", type=int, default=32, help="tokens generated after each")
    p.add_argument("--texts", type=int, help="pieces of 256 tokens that the perplexity is of; default: all")
    p.add_argument("--rounds", type=int, help=f"default: as many as fit, of {ROUNDS[0]} to {ROUNDS[1]}")
    p.add_argument("--minutes", type=float, default=60.0, help="for all; the least rounds may take longer")
    p.add_argument("--small", action="store_true", help="a trial of a minute: one small cell, one piece, two rounds")
    p.add_argument("--json", metavar="FILE", help="also write the result to this file")
    return p


def main() -> None:
    p = arguments()
    args = p.parse_args()
    if args.small:
        args.batch, args.prompt, args.steps, args.texts, args.rounds = [2], [8], 2, 1, 2
    result: dict[str, Any] = {}
    try:
        for result in measure(args):
            bench.write(result, args.json)
    except ValueError as e:
        p.error(" ".join(str(e).split()))
    for line in lines(result):
        print(line)


if __name__ == "__main__":
    main()
