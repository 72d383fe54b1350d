"""What an error means for a model's task: perplexity and the next token, the class, the neighbours of an embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.batches import padding_mask

#: of embeddings, which are all compared with one another
MOST_EMBEDDINGS = 4096
#: what a label says that is none, as in torch's cross_entropy
IGNORED = -100


class Agreement(Protocol):
    """Gathers over batches; `values` is what there is to say then."""

    def add(self, actual: Tensor, expected: Tensor, batch: Any) -> None: ...

    def values(self) -> dict[str, float | int]: ...


def next_tokens(logits: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """(logits [tokens, V], the token that came [tokens]) of logits [B, S, V] for input_ids, or labels, [B, S], without padding."""
    if isinstance(batch, Mapping):
        ids = batch.get("labels", batch.get("input_ids"))
    else:
        ids = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(ids, Tensor) or logits.dim() != 3 or ids.shape != logits.shape[:2]:
        raise ValueError('task="causal_lm" and a perplexity take logits [B, S, V] and batches with input_ids [B, S], and this is '
                         f"{list(logits.shape)}: pass another task or criterion, or output=fn(result)")  # fmt: skip
    target = ids[:, 1:].to(logits.device)
    mask = padding_mask(batch, ids.shape)
    counted = target != IGNORED if mask is None else (target != IGNORED) & mask[:, 1:].to(logits.device)
    return logits[:, :-1][counted], target[counted]


class CausalLm:
    """Logits [B, S, V] of a model that predicts the next token of input_ids (or of labels), before and after.

    Perplexity is exp of the mean negative log-likelihood of a token, in nats; padding is left out.
    """

    def __init__(self) -> None:
        self.tokens = self.agree = 0
        self.before = self.after = 0.0  # sums

    def add(self, actual: Tensor, expected: Tensor, batch: Any) -> None:
        (actual, target), (expected, _) = next_tokens(actual, batch), next_tokens(expected, batch)
        if not len(target):
            return
        self.tokens += len(target)
        self.agree += int((actual.argmax(-1) == expected.argmax(-1)).sum())
        self.before += F.cross_entropy(expected.float(), target, reduction="sum").item()
        self.after += F.cross_entropy(actual.float(), target, reduction="sum").item()

    def values(self) -> dict[str, float | int]:
        if not self.tokens:
            raise ValueError(
                "no batch has a second token that is no padding, so there is no perplexity: pass longer ones"
            )
        before, after = (math.exp(min(x / self.tokens, 700.0)) for x in (self.before, self.after))
        return {
            "perplexity_before": before,
            "perplexity_after": after,
            "top1_agreement": self.agree / self.tokens,
            "tokens": self.tokens,
        }


class Classification:
    """Logits [B, C]: how often the class stays; and how often it is the label, where batches have labels."""

    def __init__(self) -> None:
        self.samples = self.agree = self.labelled = self.right_before = self.right_after = 0

    def add(self, actual: Tensor, expected: Tensor, batch: Any) -> None:
        if actual.dim() != 2:
            raise ValueError(f'task="classification" takes logits [B, C], and this output is {list(actual.shape)}: '
                             "pass another task, or output=fn(result)")  # fmt: skip
        after, before = actual.argmax(-1), expected.argmax(-1)
        self.samples += len(actual)
        self.agree += int((after == before).sum())
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if isinstance(labels, Tensor) and labels.shape == after.shape:
            labels = labels.to(after.device)
            self.labelled += len(labels)
            self.right_before += int((before == labels).sum())
            self.right_after += int((after == labels).sum())

    def values(self) -> dict[str, float | int]:
        figures: dict[str, float | int] = {"class_agreement": self.agree / self.samples, "samples": self.samples}
        if self.labelled:
            figures |= {
                "accuracy_before": self.right_before / self.labelled,
                "accuracy_after": self.right_after / self.labelled,
            }
        return figures


class Embedding:
    """Hidden states [B, S, H], averaged over what is no padding, or embeddings [B, H]: cosine of each with itself before, and
    how the order of the others by their cosine with it changes.

    Rank agreement is Spearman's correlation, averaged over the samples; nearest-neighbour agreement the share of samples
    whose nearest other sample stays the same. Of at most 4096 samples.
    """

    def __init__(self) -> None:
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []

    def add(self, actual: Tensor, expected: Tensor, batch: Any) -> None:
        if actual.dim() not in (2, 3):
            raise ValueError(f'task="embedding" takes hidden states [B, S, H] or embeddings [B, H], and this output is '
                             f"{list(actual.shape)}: pass another task, or output=fn(result)")  # fmt: skip
        for embeddings, t in ((self.before, expected), (self.after, actual)):
            t = t.double()
            if t.dim() == 3:
                mask = padding_mask(batch, t.shape[:2])
                weight = (torch.ones(t.shape[:2]) if mask is None else mask).to(t).unsqueeze(-1)
                t = (t * weight).sum(1) / weight.sum(1).clamp_min(1)
            if (room := MOST_EMBEDDINGS - sum(map(len, embeddings))) > 0:
                embeddings.append(F.normalize(t[:room], dim=-1).cpu())

    def values(self) -> dict[str, float | int]:
        before, after = torch.cat(self.before), torch.cat(self.after)
        cosine = (before * after).sum(-1)
        figures: dict[str, float | int] = {"samples": len(before), "cosine_min": cosine.min().item(),
                                         "cosine_mean": cosine.mean().item()}  # fmt: skip
        if len(before) > 2:
            orders = [_off_diagonal(t @ t.t()) for t in (before, after)]
            ranks = [order.argsort(-1).argsort(-1).double() for order in orders]
            a, b = (r - r.mean(-1, keepdim=True) for r in ranks)
            correlation = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
            figures["rank_agreement"] = correlation.mean().item()
            figures["nearest_neighbour_agreement"] = (
                (orders[0].argmax(-1) == orders[1].argmax(-1)).double().mean().item()
            )
        return figures


def _off_diagonal(similarity: Tensor) -> Tensor:
    """[n, n - 1]: without the diagonal, each row's others in their order."""
    n = len(similarity)
    return similarity.flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1)


TASKS: dict[str, type[Agreement]] = {"causal_lm": CausalLm, "classification": Classification, "embedding": Embedding}


def task_of(model: nn.Module, task: str | None) -> str | None:
    """`task`, or for "auto" what the model's class is called, as transformers does it; None where that says nothing."""
    if task is not None and task != "auto" and task not in TASKS:
        raise ValueError(f"task is one of {', '.join(map(repr, TASKS))}, 'auto' or None, not {task!r}")
    if task != "auto":
        return task
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal_lm"
    if name.endswith("Classification"):
        return "classification"
    return "embedding" if name.endswith("Model") and hasattr(model, "config") else None
