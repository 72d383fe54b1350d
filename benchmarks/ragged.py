"""A text encoder on texts of their own lengths: tokens a second in fp32, and swapped with padding and without.

    python -m benchmarks.ragged --model minilm --precision int8 --batch 32 [--batches 9] [--sort] [--rounds N] [--json FILE]

The texts are those built in, in batches as they come, or by length, as sentence-transformers has them. Candidates take turns on
each of the batches that are timed, a few spread over all, in one process; a rate is of real tokens, padding does not count.
Cosines are over all texts.
"""

from __future__ import annotations

import copy
from functools import partial

import torch

import forwardpass as fp
from benchmarks import bench
from forwardpass.cli import embedding
from forwardpass.cli.console import tracking
from forwardpass.common.timing import interleave, keep_freed_memory


def main() -> None:
    p = bench.parser(__doc__)
    p.add_argument("--model", default="minilm", help="a folder, minilm, or a hub id")
    p.add_argument("--precision", default="int8")
    p.add_argument("--batch", type=int, default=32, help="texts in a batch")
    p.add_argument("--batches", type=int, default=3, help="how many are timed, spread over all")
    p.add_argument("--sort", action="store_true", help="by length first")
    args = p.parse_args()
    if args.batches < 1:
        p.error(f"--batches is at least 1, not {args.batches}")
    try:
        source = embedding.find_model(args.model)
        model, tokenizer = embedding.load(source, args.device)
    except ValueError as e:
        p.error(str(e))
    texts = embedding.builtin_texts()[1]
    if args.sort:
        texts.sort(key=lambda text: len(tokenizer(text, verbose=False)["input_ids"]))
    batches = embedding.tokenize(tokenizer, texts, model, args.device, args.batch)
    timed = batches[:: -(-len(batches) // args.batches)]
    padded, unpadded = copy.deepcopy(model), copy.deepcopy(model)
    fp.swap(padded, precision=args.precision, unpad=False, keep=False)
    report = fp.swap(unpadded, precision=args.precision, unpad=True, keep=False)
    if not report.unpadding.encoders:
        p.error(f"{args.model} is not unpadded: {report.unpadding.reason}")
    models = {"fp32, padded": model, f"{args.precision}, padded": padded, f"{args.precision}, unpadded": unpadded}
    slots = sum(b["attention_mask"].numel() for b in timed)
    tokens = sum(int(b["attention_mask"].sum()) for b in timed)

    result = bench.header("ragged", args.device, ["candidates"]) | {
        "allocator": keep_freed_memory(),
        "model": source.origin,
        "batch": args.batch,
        "batches": len(timed),
        "batches_in_all": len(batches),
        "rounds": args.rounds,
        "sorted": args.sort,
        "tokens": tokens,
        "padding": 1 - tokens / slots,
    }
    with torch.inference_mode(), tracking() as track:
        embeddings = {}
        for name, candidate in models.items():
            track(f"embedding {len(texts)} texts in {name}", None)
            embeddings[name] = embedding.embed(embedding.hidden_states(candidate), batches)
        advance, timings = track("timing rounds", len(timed) * (args.rounds + 1)), []
        for b in timed:
            calls = {n: partial(m, **b) for n, m in models.items()}
            timings.append(interleave(calls, args.device, rounds=args.rounds, warmup=1, on_round=advance))
    result["candidates"] = {
        name: {
            # of the batches that are timed: sums of their medians and quartiles
            **{key: sum(t[name].to_json()[key] for t in timings) for key in ("median", "low", "high")},
            **embedding.parity(embeddings[name], embeddings["fp32, padded"]),
        }
        for name in models
    }
    print(
        f"{source.origin}; {result['device']['name']}, {torch.get_num_threads()} threads; "
        f"{len(timed)} of {len(batches)} batches of {args.batch}, {args.rounds} rounds"
    )
    print(f"{tokens} tokens, {result['padding']:.0%} of the rows are padding")
    print(f"{'':<20}{'lowest cosine':>14}{'ms, these batches':>28}{'tokens/s':>12}{'as fast as fp32':>18}")
    slowest = result["candidates"]["fp32, padded"]["median"]
    for name, c in result["candidates"].items():
        c["tokens_per_s"] = tokens / c["median"] * 1e3
        ms = f"{c['median']:.0f} [{c['low']:.0f}, {c['high']:.0f}]"
        print(f"{name:<20}{c['cosine_min']:>14.5f}{ms:>28}{c['tokens_per_s']:>12.0f}{slowest / c['median']:>18.2f}")
    bench.write(result, args.json)


if __name__ == "__main__":
    main()
