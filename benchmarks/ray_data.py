"""The example for Ray Data beside a plain loop: all-MiniLM-L6-v2 in int8 on built-in texts, texts a second and seconds to start.

    python -m benchmarks.ray_data [--texts 1000] [--batch 50] [--rounds 5] [--json FILE]

Candidates take turns, each in processes of its own; loops and actors have a thread each, and the same priority (Ray's own processes
would give way to all others). Texts a second are those after the first batch, by the time at which each batch is done; the first
one comes after imports, loading, and Ray's actors. All give the same embeddings, bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import pathlib
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any

from benchmarks import bench
from examples import ray_data

CANDIDATES = {"loop": 0, "ray, 1 actor": 1, "ray, 2 actors": 2}


def write(folder: pathlib.Path) -> list[str]:
    """all-MiniLM-L6-v2 as a SentenceTransformer in int8; the texts."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    import forwardpass as fp
    from forwardpass.cli import embedding

    transformer = Transformer(str(embedding.find_model("minilm").path))
    pooling = Pooling(transformer.get_embedding_dimension(), "mean")
    model = SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu").eval()
    fp.swap(model, precision="int8")
    fp.save_pretrained(model, folder)
    return embedding.builtin_texts()[1]


class Timed(ray_data.Embed):
    """With the time at which a batch was done, of one clock for all processes (CLOCK_MONOTONIC)."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        result = super().__call__(batch)
        return {**result, "done": [time.monotonic()] * len(batch["text"])}


def loop(folder: str, texts: list[str], batch: int, connection: Connection) -> None:
    """Rows of a plain loop, in a process that was just started."""
    embed = Timed(folder)
    results = [embed({"text": texts[i : i + batch]}) for i in range(0, len(texts), batch)]
    connection.send([row for r in results for row in zip(r["embedding"], r["done"])])


def timed(actors: int, folder: str, texts: list[str], batch: int) -> tuple[float, float, str]:
    """(texts a second, seconds to the first batch, digest of the embeddings)"""
    began = time.monotonic()
    if actors == 0:
        here, there = multiprocessing.get_context("spawn").Pipe()
        process = multiprocessing.get_context("spawn").Process(target=loop, args=(folder, texts, batch, there))
        process.start()
        embeddings, done = zip(*here.recv())
        process.join()
    else:
        import ray

        items = ray.data.from_items([{"text": t} for t in texts], override_num_blocks=len(texts) // batch)
        rows = ray_data.embed(items, {"folder": folder}, actors=actors, batch=batch, actor=Timed).take_all()
        embeddings, done = zip(*((row["embedding"], row["done"]) for row in rows))
    digest = hashlib.sha256(b"".join(x.tobytes() for x in embeddings)).hexdigest()
    return (len(texts) - batch) / (max(done) - min(done)), min(done) - began, digest


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import ray

    if args.texts % args.batch:
        raise SystemExit(f"--texts must be a multiple of --batch, {args.batch}")
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112, as Ray spells it
    result = bench.header("ray_data", "cpu", ["candidates"])
    paths = {"PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parents[1]), *sys.path])}
    with tempfile.TemporaryDirectory() as name:
        folder = str(pathlib.Path(name) / "int8")
        builtin = write(pathlib.Path(folder))
        texts = (builtin * (args.texts // len(builtin) + 1))[: args.texts]
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": paths})
        ray.data.DataContext.get_current().enable_progress_bars = False
        rates: dict[str, list[float]] = {candidate: [] for candidate in CANDIDATES}
        starts: dict[str, list[float]] = {candidate: [] for candidate in CANDIDATES}
        digests = set()
        for _ in range(args.rounds):
            for candidate, actors in CANDIDATES.items():
                rate, start, digest = timed(actors, folder, texts, args.batch)
                rates[candidate].append(rate)
                starts[candidate].append(start)
                digests.add(digest)
        ray.shutdown()
    if len(digests) > 1:
        raise SystemExit("the candidates' embeddings differ")
    candidates = {x: {"texts_per_s": sorted(rates[x]), "start_s": sorted(starts[x])} for x in CANDIDATES}
    return result | {"ray": ray.__version__, "texts": args.texts, "batch": args.batch, "candidates": candidates}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    result = measure(args)
    print(f"{'':14}{'texts/s':>9}{'lowest':>9}{'highest':>9}{'start, s':>10}")
    for name, c in result["candidates"].items():
        rates, start = c["texts_per_s"], statistics.median(c["start_s"])
        print(f"{name:14}{statistics.median(rates):9.1f}{rates[0]:9.1f}{rates[-1]:9.1f}{start:10.1f}")
    bench.write(result, args.json)


if __name__ == "__main__":
    main()
