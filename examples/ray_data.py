"""Embeds the lines of text files with Ray Data: on each machine of a cluster actors that load a swapped model once.

    pip install 'ray[data]'
    python examples/ray_data.py FOLDER TEXTS... --out DIR [--actors 1] [--threads 1 | --gpus 1] [--batch 64]

FOLDER is a SentenceTransformer that `fp.save_pretrained` wrote, or any other with --plan of `fp.plan`. All machines must see it.
"""

from __future__ import annotations

import argparse
from typing import Any


class Embed:
    """An actor's state: the model, loaded and swapped once."""

    def __init__(self, folder: str, plan: str | None = None, threads: int = 1, device: str = "cpu") -> None:
        import torch

        import forwardpass as fp

        torch.set_num_threads(threads)  # each actor would take every core
        if plan is None:
            self.model: Any = fp.load_pretrained(folder, device=device)
        else:
            from sentence_transformers import SentenceTransformer

            self.model = SentenceTransformer(folder, device=device).eval()
            fp.swap(self.model, plan=plan, keep=False)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        texts = list(batch["text"])
        return {**batch, "embedding": self.model.encode(texts, batch_size=len(texts), show_progress_bar=False)}


def embed(texts: Any, model: dict[str, Any], *, actors: int, batch: int, gpus: int = 0, actor: type = Embed) -> Any:
    """The dataset `texts` with a column "embedding", in order.

    Ray starts an actor that dies again, and gives its blocks to the next one, as often as it takes. An exception of the model
    (memory that ran out) is tried again twice, and then ends the job: to drop such blocks set `max_errored_blocks`.

    Args:
        texts: a ray.data.Dataset with a column "text". A batch is of one block: give blocks of a multiple of `batch` rows.
        model: arguments of `actor`; its threads are the cores that an actor takes.
    """
    from ray.data import ActorPoolStrategy

    context = (
        texts.context
    )  # a dataset has its own from when it is made: what DataContext.get_current() is set to comes too late
    context.execution_options.preserve_order = True
    context.retried_map_errors, context.max_map_retries = True, 2
    return texts.map_batches(
        actor,
        fn_constructor_kwargs={**model, "device": "cuda" if gpus else "cpu"},
        compute=ActorPoolStrategy(size=actors),
        batch_size=batch,
        num_gpus=gpus or None,
        num_cpus=None if gpus else model.get("threads", 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("texts", nargs="+", help="files or folders, a text a line")
    parser.add_argument("--out", required=True, help="a folder, for parquet")
    parser.add_argument("--plan")
    parser.add_argument("--actors", type=int, default=1, help="of the whole cluster")
    parser.add_argument("--threads", type=int, default=1, help="of an actor")
    parser.add_argument("--gpus", type=int, default=0, help="of an actor")
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    import ray

    cores = int(ray.cluster_resources()["CPU"])
    if not args.gpus and args.actors * args.threads >= cores:  # reading would wait for ever
        parser.error(f"{args.actors} actors of {args.threads} threads leave none of the cluster's {cores} cores for reading and "
                     "writing: take fewer")  # fmt: skip
    model = {"folder": args.folder, "plan": args.plan, "threads": args.threads}
    texts = ray.data.read_text(args.texts)
    embed(texts, model, actors=args.actors, batch=args.batch, gpus=args.gpus).write_parquet(args.out)


if __name__ == "__main__":
    main()
