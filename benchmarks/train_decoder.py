"""Trains a small decoder on text that ships with Python, plans it, and compares perplexity, speed and generation.

    python -m benchmarks.train_decoder [--seconds N] [--json FILE]

A Llama of 4 layers over bytes, trained for two minutes on the documentation that `help()` prints. The plan keeps the perplexity of
every batch of text that it was not trained on within 1 %.
"""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import forwardpass as fp
from benchmarks import bench
from forwardpass.cli.readout import documentation
from forwardpass.common.timing import keep_freed_memory

LENGTH, BATCH = 128, 16
TOLERANCE = 0.01  #: of the perplexity


def rows(data: bytes, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A batch of `count` pieces from random places."""
    starts = torch.randint(len(data) - LENGTH, (count,), generator=generator).tolist()
    return {"input_ids": torch.tensor([list(data[i : i + LENGTH]) for i in starts])}


def build() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def loss_of(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["input_ids"][:, 1:].flatten())


def train(model: nn.Module, data: bytes, seconds: float) -> int:
    """AdamW, the learning rate down to nothing at the end; how many steps there was time for."""
    generator, began, steps = torch.Generator().manual_seed(0), time.perf_counter(), 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    model.train()
    while (spent := (time.perf_counter() - began) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (steps + 1) / 50) * (1 + math.cos(math.pi * spent)) / 2
        batch = rows(data, BATCH, generator)
        loss = loss_of(model(**batch).logits, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
        if steps % 50 == 0:
            print(f"step {steps}: loss {loss.item():.3f}", file=sys.stderr)
    model.eval().requires_grad_(False)
    return steps


@torch.inference_mode()
def perplexity(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    return math.exp(sum(loss_of(model(**b).logits, b).item() for b in batches) / len(batches))


def perplexity_change(logits: Tensor, reference: Tensor, batch: dict[str, Tensor]) -> float:
    """A metric of fp.plan: how far a batch's perplexity moves, as a share of it."""
    return abs(math.exp((loss_of(logits, batch) - loss_of(reference, batch)).item()) - 1)


@torch.inference_mode()
def generate(model: Any, prompt: bytes, count: int = 64) -> bytes:
    ids = torch.tensor([list(prompt)])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False
    )
    return bytes(output[0].tolist())


def main() -> None:
    p = bench.parser(__doc__)
    p.add_argument("--seconds", type=float, default=120, help="of training")
    args = p.parse_args()
    data = documentation().encode()
    split = len(data) * 9 // 10
    training, evaluation = data[:split], data[split:]
    model = build()
    steps = train(model, training, args.seconds)
    generator = torch.Generator().manual_seed(1)
    batches = [rows(evaluation, BATCH, generator) for _ in range(8)]
    calibration = [rows(training, BATCH, generator) for _ in range(4)]
    before, text_before = perplexity(model, batches), generate(model, b"The value of ")
    result = bench.header("train-decoder", "cpu", ["perplexity", "latency_ms"]) | {"allocator": keep_freed_memory()}

    plan = fp.plan(
        model, batches, metric=perplexity_change, tolerance=TOLERANCE, shapes=batches[:1], calibrate=calibration
    )
    print(plan)
    fp.swap(model, plan=plan, calibrate=calibration if plan.calibrated else None)
    after, text_after = perplexity(model, batches), generate(model, b"The value of ")
    assert plan.evidence is not None
    latency = {name: t["low"] for name, t in plan.evidence["latency_ms"].items()}
    print(f"\n{steps} steps; perplexity of a byte {before:.4f} before, {after:.4f} after ({after / before - 1:+.2%})")
    print(f"{BATCH} x {LENGTH} bytes: " + ", ".join(f"{ms:.1f} ms {name}" for name, ms in latency.items()))
    for name, sample in (("before", text_before), ("after", text_after)):
        print(f"{name}: {sample.decode(errors='replace')!r}")
    result |= {
        "steps": steps,
        "perplexity": {"before": before, "after": after},
        "latency_ms": latency,
        "generated": {"before": list(text_before), "after": list(text_after)},
        "plan": plan.to_json(),
    }
    bench.write(result, args.json)
    if abs(after / before - 1) > TOLERANCE:
        sys.exit(f"the perplexity moved by more than {TOLERANCE:.0%}")


if __name__ == "__main__":
    main()
