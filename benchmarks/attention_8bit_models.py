"""What attention in 8 bits does to models: perplexity, embeddings, and retrieval from a long context.

python -m benchmarks.attention_8bit_models [--only perplexity embeddings needle retrieval] [--lengths 256 2048 8192] [--json FILE]

All attention is in 8 bits, however short a call (crossover=0). Needs the packaged models `minilm` and `smollm2`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import forwardpass as fp
from benchmarks import bench
from forwardpass.cli import embedding
from forwardpass.cli.readout import documentation, readout_of
from forwardpass.cli.source import find_model

#: Tokens of text that perplexity is measured on, of each length of a row.
TOKENS = 8192
#: Rows of a head that logits are computed for at once.
ROWS = 512
#: Of a prompt: pairs that are planted, and questions about them.
PAIRS = 16
#: Tokens of all prompts of one length.
PROMPTS = 8192


def load(name: str) -> tuple[Any, Any, Any]:
    source = find_model(name)
    readout = readout_of(source)
    model, tokenizer = embedding.load(source, "cpu", readout.auto)
    return model, tokenizer, readout


def logits(model: Any, ids: Tensor) -> Iterator[Tensor]:
    """Those of the tokens [1, S], [rows, vocabulary] at a time."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0]
    for rows in hidden.split(ROWS):
        yield model.lm_head(rows).float()


def loss(model: Any, ids: Tensor) -> float:
    """Mean of the next tokens', in nats."""
    targets = F.pad(ids[0, 1:], (0, 1), value=-100).split(ROWS)
    losses = [
        F.cross_entropy(x, y, ignore_index=-100, reduction="sum").item() for x, y in zip(logits(model, ids), targets)
    ]
    return sum(losses) / (ids.shape[1] - 1)


def text_ids(tokenizer: Any, tokens: int) -> Tensor:
    """[tokens] of the tenth of Python's documentation that decoders are measured on, and of what is before it."""
    text = documentation()
    text = text[len(text) * 9 // 10 :] + text
    return torch.tensor(tokenizer(text[: 8 * tokens], add_special_tokens=False, verbose=False)["input_ids"][:tokens])


def perplexity(model: Any, tokenizer: Any, lengths: list[int]) -> Iterator[dict[str, Any]]:
    for length in lengths:
        rows = text_ids(tokenizer, max(TOKENS, length)).split(length)
        figures = []
        for in_8_bits in (False, True):
            with attention_of(model, in_8_bits):
                figures.append(math.exp(sum(loss(model, row.unsqueeze(0)) for row in rows) / len(rows)))
        yield {"length": length, "rows": len(rows), "before": figures[0], "int8": figures[1],
               "increase": figures[1] / figures[0] - 1}  # fmt: skip


def attention_of(model: Any, in_8_bits: bool) -> Any:
    """The model with its attention swapped, in its own dtype or in 8 bits."""
    return fp.swap(model, attention="int8", crossover=0) if in_8_bits else fp.swap(model, attention=True)


def prompt(tokenizer: Any, length: int, seed: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """([1, about length] token ids, where the answers are): text with pairs of a name and a number planted in it at random places,
    then a question about each, and its answer, in another order."""
    rng = random.Random(seed)
    names = rng.sample(NAMES, PAIRS)
    numbers = {name: f"{rng.randrange(1000, 10000)}" for name in names}

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    facts = [ids(f"\nThe number of {name} is {numbers[name]}.\n") for name in names]
    asked = rng.sample(names, PAIRS)
    questions = [(ids(f"\nThe number of {name} is"), ids(f" {numbers[name]}."[:-1])) for name in asked]
    used = sum(map(len, facts)) + sum(len(q) + len(a) for q, a in questions)
    filler = text_ids(tokenizer, length - used).tolist()
    cuts = sorted(rng.sample(range(len(filler)), PAIRS))
    tokens: list[int] = []
    for begin, end, fact in zip([0, *cuts], cuts, facts):
        tokens += filler[begin:end] + fact
    tokens += filler[cuts[-1] :]
    answers = []
    for question, answer in questions:
        tokens += question
        answers.append((len(tokens), len(tokens) + len(answer)))
        tokens += answer
    return torch.tensor([tokens]), answers


NAMES = [
    "Alice", "Boris", "Clara", "David", "Elena", "Frank", "Greta", "Henry", "Irene", "James", "Karen", "Louis", "Maria", "Nancy",
    "Oscar", "Paula", "Quinn", "Robert", "Sarah", "Thomas", "Ursula", "Victor", "Wendy", "Xavier", "Yvonne", "Arthur", "Bella",
    "Carlos", "Diana", "Edward", "Fiona", "George", "Hannah", "Isaac", "Julia", "Kevin", "Laura", "Martin", "Nora", "Oliver",
]  # fmt: skip


def needle(model: Any, tokenizer: Any, lengths: list[int]) -> Iterator[dict[str, Any]]:
    """The share of numbers of which all digits are the likeliest tokens."""
    for length in lengths:
        right = {False: 0, True: 0}
        same = questions = 0
        for seed in range(max(1, PROMPTS // length)):
            ids, answers = prompt(tokenizer, length, seed)
            found = {}
            for in_8_bits in (False, True):
                with attention_of(model, in_8_bits):
                    likeliest = torch.cat([x.argmax(-1) for x in logits(model, ids)])
                found[in_8_bits] = [likeliest[a - 1 : b - 1] for a, b in answers]
                right[in_8_bits] += sum(torch.equal(x, ids[0, a:b]) for x, (a, b) in zip(found[in_8_bits], answers))
            questions += len(answers)
            same += sum(map(torch.equal, found[False], found[True]))
        yield {"length": length, "questions": questions, "before": right[False] / questions, "int8": right[True] / questions,
               "same_answers": same / questions}  # fmt: skip


def embeddings() -> Iterator[dict[str, Any]]:
    """Lowest cosines of MiniLM's embeddings with those of floats, on the texts of the command line."""
    model, tokenizer, readout = load("minilm")
    calibration, texts = readout.builtin()
    batches, others = (readout.tokenize(tokenizer, x, model, "cpu") for x in (texts, calibration))
    expected = readout.results(model, batches)
    ways: dict[str, dict[str, Any]] = {
        "int8 attention": {"attention": "int8", "crossover": 0},
        "int8 layers": {"precision": "int8", "calibrate": others, "attention": True},
        "int8 layers and attention": {"precision": "int8", "calibrate": others, "attention": "int8", "crossover": 0},
    }
    for name, options in ways.items():
        with fp.swap(model, unpad=True, **options):
            yield {"swapped": name, **readout.parity(readout.results(model, batches), expected)}


@torch.inference_mode()
def retrieval(keys: int, head_dim: int = 64, rows: int = 64) -> Iterator[dict[str, Any]]:
    """The operation alone: each row looks for one key, which gets a share of its weight; all others get the rest. Is what comes out
    nearest to that key's value, of all values? And how far is it from float64's?"""
    g = torch.Generator().manual_seed(keys)
    k, v = (torch.randn(1, keys, 1, head_dim, generator=g) for _ in range(2))
    wanted = torch.randint(keys, (rows,), generator=g)
    directions = F.normalize(k[0, wanted, 0], dim=-1)
    for share in (0.9, 0.5, 0.2):
        q = _looking_for(directions, k[0, :, 0], wanted, share)[None, :, None]
        exact = (
            torch.softmax(q[0, :, 0].double() @ k[0, :, 0].double().T / math.sqrt(head_dim), -1) @ v[0, :, 0].double()
        )
        result: dict[str, Any] = {"keys": keys, "head_dim": head_dim, "rows": rows, "weight": share}
        for name, op in (("float32", fp.ops.attention), ("int8", fp.ops.attention_8bit)):
            o = op(q, k, v)[0, :, 0]
            nearest = torch.cdist(o, v[0, :, 0] * share).argmin(-1)
            result[name] = {"found": (nearest == wanted).double().mean().item(),
                            "nrmse": ((o - exact).norm() / exact.norm()).item()}  # fmt: skip
        yield result


def _looking_for(directions: Tensor, k: Tensor, wanted: Tensor, share: float) -> Tensor:
    """[rows, D]: as long as gives the wanted key this share of a row's weight, found by halving."""
    low, high = torch.zeros(len(wanted), 1), torch.full((len(wanted), 1), 64.0)
    scores, scale = directions @ k.T, k.shape[1] ** -0.5
    for _ in range(30):
        middle = (low + high) / 2
        weight = torch.softmax(scores * middle * scale, -1).gather(1, wanted[:, None])
        low, high = torch.where(weight < share, middle, low), torch.where(weight < share, high, middle)
    return directions * (low + high) / 2


PARTS = ("perplexity", "needle", "embeddings", "retrieval")


@torch.inference_mode()
def main() -> None:
    p = bench.parser(__doc__)
    p.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    p.add_argument("--lengths", type=int, nargs="+", default=[256, 2048, 8192], help="tokens of a row of SmolLM2's")
    args = p.parse_args()
    result = bench.header("attention-8bit-models", "cpu", []) | {"threads": torch.get_num_threads()}

    def add(part: str, rows: Iterator[dict[str, Any]]) -> None:
        for row in rows:
            result.setdefault(part, []).append(row)
            print(part, row, flush=True)
            bench.write(result, args.json)

    if {"perplexity", "needle"} & {*args.only}:
        model, tokenizer, _ = load("smollm2")
        if "perplexity" in args.only:
            add("perplexity", perplexity(model, tokenizer, args.lengths))
        if "needle" in args.only:
            add("needle", needle(model, tokenizer, [n for n in args.lengths if n >= 1024]))
    if "embeddings" in args.only:
        with torch.inference_mode(False), torch.no_grad():  # layers are swapped
            add("embeddings", embeddings())
    if "retrieval" in args.only:
        for keys in (4096, 131072):
            add("retrieval", retrieval(keys))


if __name__ == "__main__":
    main()
