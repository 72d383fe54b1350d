"""What a model's result is for, as the files in its folder say: embeddings of texts, scores of pairs, or the next token."""

from __future__ import annotations

import math
import pathlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.models.compare import relative_error
from ..common.models.decoding import logits_by_steps
from ..common.printing.text import count
from ..integrations import sentence_transformers as sentences
from ..planning.agreement import next_tokens
from ..swap.attention.kv_cache import kv_cache_of
from . import embedding
from .embedding import Batch
from .source import Source

#: Characters of the built-in documentation that decoders are calibrated and measured on, about four to a token.
CALIBRATION, EVALUATION = 32_000, 18_000


class Readout(Protocol):
    """How texts go into a model, what is compared of its results, and how."""

    @property
    def auto(self) -> str:
        """The class of transformers that loads the model."""

    @property
    def task(self) -> str | None:
        """What `fp.parity` calls it."""

    def builtin(self) -> tuple[list[str], list[str]]:
        """(texts to calibrate with, others to measure on)."""

    def inputs(self, texts: list[str]) -> tuple[list[str], ...]:
        """What a tokenizer takes for them, a row for a text."""

    def tokenize(self, tokenizer: Any, texts: list[str], model: torch.nn.Module, device: str) -> list[Batch]: ...

    def outputs(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """What the model is run for: a row for a row of the batch, fp32, where the model is."""

    def forward(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """[samples, …]: of what the cosines are that a budget bounds, as `fp.plan` and `fp.parity` take a forward."""

    def results(self, model: torch.nn.Module, batches: Iterable[Batch]) -> Tensor: ...

    def parity(self, actual: Tensor, expected: Tensor) -> dict[str, Any]: ...

    def describe(self) -> str: ...


def _max(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(~mask.bool().unsqueeze(-1), -torch.inf).amax(1)


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    mask = mask.unsqueeze(-1)
    return (hidden * mask).sum(1) / mask.sum(1)


POOLING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "cls": lambda hidden, mask: hidden[:, 0],
    "max": _max,
    "lasttoken": _last,
}


@dataclass(frozen=True)
class Embeddings:
    """One vector for a text. The default is what most models of sentence-transformers have."""

    pooling: str = "mean"
    normalize: bool = True
    prompt: str = ""  #: before every text
    most: int | None = None  #: tokens that a longer text is cut to, as the library's encode does; None: it is refused
    width: int | None = None  #: how many of the values are kept
    lower: bool = False  #: whether texts are put into lower case

    auto = "AutoModel"
    task = "embedding"
    builtin = staticmethod(embedding.builtin_texts)

    def inputs(self, texts: list[str]) -> tuple[list[str], ...]:
        prompted = [self.prompt + text for text in texts]
        return ([text.lower() for text in prompted] if self.lower else prompted,)

    def tokenize(self, tokenizer: Any, texts: list[str], model: torch.nn.Module, device: str) -> list[Batch]:
        return embedding.tokenize(tokenizer, self.inputs(texts)[0], model, device, most=self.most)

    def outputs(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """[texts, hidden]"""
        embeddings = POOLING[self.pooling](model(**batch).last_hidden_state.float(), batch["attention_mask"])
        return (F.normalize(embeddings, dim=-1) if self.normalize else embeddings)[:, : self.width]

    forward = outputs

    @torch.inference_mode()
    def results(self, model: torch.nn.Module, batches: Iterable[Batch]) -> Tensor:
        """fp32 [texts, hidden] on the CPU."""
        return torch.cat([self.outputs(model, batch).cpu() for batch in batches])

    def parity(self, actual: Tensor, expected: Tensor) -> dict[str, Any]:
        agreement = embedding.search_agreement(actual, expected)
        return {**embedding.parity(actual, expected), **agreement, "texts": len(expected)}

    def describe(self) -> str:
        prompt = f", prompt {self.prompt!r}" if self.prompt else ""
        width = f", the first {self.width} values" if self.width else ""
        cut = f", texts cut to {self.most} tokens" if self.most else ""
        return f"embeddings: {self.pooling} of the tokens, {'' if self.normalize else 'not '}normalised{width}{prompt}{cut}"


@dataclass(frozen=True)
class Scores:
    """A number for a pair of texts, as a reranker has it: of each batch of texts the first is the query, the others are ranked."""

    most: int | None = None  #: tokens that a longer pair is cut to, where that is fewer than the model takes

    auto = "AutoModelForSequenceClassification"
    task = None
    size = 32  #: texts in a batch
    builtin = staticmethod(embedding.builtin_texts)

    def inputs(self, texts: list[str]) -> tuple[list[str], ...]:
        """The first one with each."""
        return texts[:1] * len(texts), texts

    def tokenize(self, tokenizer: Any, texts: list[str], model: torch.nn.Module, device: str) -> list[Batch]:
        groups = [texts[i : i + self.size] for i in range(0, len(texts), self.size)]
        limit = min(embedding.most_tokens(tokenizer, model), self.most or sys.maxsize)
        batches = []
        for query, *documents in groups:
            if documents:
                pairs = [query] * len(documents), documents
                batch = tokenizer(
                    *pairs, padding=True, truncation=True, max_length=limit, return_tensors="pt", verbose=False
                )
                batches.append({name: x.to(device) for name, x in batch.items()})
        if texts and not batches:
            raise ValueError("a single text makes no pair to score: pass a query and texts to rank, one a line")
        return batches

    def outputs(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """Logits [documents, 1]"""
        logits: Tensor = model(**batch).logits
        return logits.float()

    def forward(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """[1, documents], about their mean, as the order is what counts."""
        scores = self.outputs(model, batch).flatten()
        return (scores - scores.mean()).unsqueeze(0)

    @torch.inference_mode()
    def results(self, model: torch.nn.Module, batches: Iterable[Batch]) -> Tensor:
        """Logits, fp32 [queries, most documents] on the CPU; NaN where a query has fewer."""
        scores = [self.outputs(model, batch).cpu().flatten() for batch in batches]
        return torch.nn.utils.rnn.pad_sequence(scores, batch_first=True, padding_value=torch.nan)

    def parity(self, actual: Tensor, expected: Tensor) -> dict[str, Any]:
        """cosine_min: of a query's scores about their mean; order: the share of pairs of documents
        that are ordered the same; first: of how many queries the first one is."""
        cosines, same, pairs, first = [], 0, 0, 0
        for a_row, e_row in zip(actual.double(), expected.double()):
            a, e = (x[~e_row.isnan()] for x in (a_row, e_row))
            cosines.append(F.cosine_similarity(a - a.mean(), e - e.mean(), dim=0).item() if len(e) > 1 else 1.0)
            upper = torch.triu_indices(len(e), len(e), 1)
            before, after = ((x.unsqueeze(1) > x.unsqueeze(0))[tuple(upper)] for x in (e, a))
            same += int((before == after).sum())
            pairs += before.numel()
            first += int(a.argmax() == e.argmax())
        present = ~expected.isnan()
        return {
            "cosine_min": min(cosines),
            "relative_error": relative_error(actual[present], expected[present]),
            "texts": int(present.sum()),
            "queries": len(expected),
            "order": same / pairs if pairs else 1.0,
            "first": first,
        }

    def describe(self) -> str:
        return "scores of pairs of texts: of every 32 texts the first is the query"


@dataclass(frozen=True)
class NextTokens:
    """How well the tokens of a text foretell each next one: what the perplexity is the mean of."""

    auto = "AutoModelForCausalLM"
    task = "causal_lm"
    length = 256  #: tokens of a piece

    def builtin(self) -> tuple[list[str], list[str]]:
        """Documentation that ships with Python: its last tenth is measured on."""
        text = documentation()
        split = len(text) * 9 // 10
        return [text[:CALIBRATION]], [text[split : split + EVALUATION]]

    def inputs(self, texts: list[str]) -> tuple[list[str], ...]:
        return ("\n".join(texts),)  # type: ignore[return-value]

    def tokenize(self, tokenizer: Any, texts: list[str], model: torch.nn.Module, device: str) -> list[Batch]:
        """The texts one after the other, in pieces of one length: what is left over is dropped. One piece a batch, as logits are
        large."""
        if not texts:
            return []
        ids = tokenizer(*self.inputs(texts), add_special_tokens=False, verbose=False)["input_ids"]
        length = min(self.length, embedding.most_tokens(tokenizer, model), len(ids))
        if length < 2:
            raise ValueError("the texts have fewer than two tokens, and nothing can be foretold: pass longer ones")
        rows = torch.tensor(ids[: len(ids) // length * length], device=device).view(-1, 1, length)
        return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]

    def outputs(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """Logits [texts, length, vocabulary]; where the swap changed the cache, as steps give them, which read it."""
        if kv_cache_of(model) is not None:
            return logits_by_steps(model, batch["input_ids"]).float()
        logits: Tensor = model(**batch).logits
        return logits.float()

    forward = outputs

    @torch.inference_mode()
    def results(self, model: torch.nn.Module, batches: Iterable[Batch]) -> Tensor:
        """fp32 [tokens, 2] on the CPU: of each token that is foretold its loss in nats, and the one that was likeliest."""
        results = []
        for batch in batches:
            logits, target = next_tokens(self.outputs(model, batch), batch)
            results.append(
                torch.stack([F.cross_entropy(logits, target, reduction="none"), logits.argmax(-1).float()], -1)
            )
        return torch.cat(results).cpu()

    def parity(self, actual: Tensor, expected: Tensor) -> dict[str, Any]:
        """top1_agreement: how often the likeliest token stays. relative_error: of the losses."""
        before, after = (math.exp(t[:, 0].double().mean().item()) for t in (expected, actual))
        return {
            "perplexity_before": before,
            "perplexity_after": after,
            "perplexity_increase": after / before - 1,
            "top1_agreement": (actual[:, 1] == expected[:, 1]).double().mean().item(),
            "relative_error": relative_error(actual[:, 0], expected[:, 0]),
            "tokens": len(expected),
        }

    def describe(self) -> str:
        return f"next tokens: logits, in pieces of {self.length} tokens"


def documentation() -> str:
    """What `help()` knows, which ships with Python."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def readout_of(source: Source) -> Readout:
    """Raises ValueError, in one sentence, on what is read out in another way than is known here."""
    if source.decoder:
        return NextTokens()
    folder = pathlib.Path(source.path)
    around = source.around()
    config, architecture = source.config, source.architecture
    kinds = {} if around is None else sentences.module_configs(around)
    most = kinds.get("Transformer", {}).get("max_seq_length")
    if around is not None and most is None:  # newer versions of the library leave it to the tokenizer
        most = sentences.json_of(folder / "tokenizer_config.json").get("model_max_length")
    saved_as = (around is not None and around["class"] == "CrossEncoder") or "sentence_transformers" in config
    old_name = "sbert_ce_default_activation_function" in config
    if architecture.endswith("ForSequenceClassification") and (saved_as or old_name or _labels(config) == 1):
        if _labels(config) != 1:
            raise ValueError(f"{source.path} is a cross-encoder of {count(_labels(config), 'label')}, and a ranking has one: "
                             "use fp.swap in Python")  # fmt: skip
        return Scores(most)
    if around is None:
        return Embeddings()
    if unknown := [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise ValueError(f"{source.path} has a module {unknown[0]} behind its model, which is not read out here: use fp.swap in "
                         "Python on the SentenceTransformer")  # fmt: skip
    settings, pooling = around["settings"], kinds.get("Pooling", {})
    prompt = settings.get("prompts", {}).get(settings.get("default_prompt_name")) or ""
    mode = pooling.get("pooling_mode", "mean" if "Pooling" in kinds else "nothing")
    if not isinstance(mode, str) or mode not in POOLING or (prompt and pooling.get("include_prompt") is False):
        modes = mode if isinstance(mode, str) else ", ".join(map(str, mode))
        raise ValueError(f"{source.path} pools by {modes}, and what is known here is one of {', '.join(POOLING)}, with its prompt: "
                         "use fp.swap in Python on the SentenceTransformer")  # fmt: skip
    lower = kinds["Transformer"].get("do_lower_case", False)
    return Embeddings(mode, "Normalize" in kinds, prompt, most, settings.get("truncate_dim"), lower)


def _labels(config: dict[str, Any]) -> int:
    return len(config.get("id2label") or ()) or 2  # transformers' default


@dataclass(frozen=True)
class Request:
    """Texts to embeddings or scores, as a service would: the arguments of `fp.profile` and `fp.Pipeline`.

    Raises:
        ValueError: the model takes fewer than `length` tokens.
    """

    model: torch.nn.Module
    tokenizer: Any
    length: int
    readout: Readout

    def __post_init__(self) -> None:
        embedding.check_length(self.length, self.tokenizer, self.model)

    def preprocess(self, texts: list[str]) -> Batch:
        """int64 [texts, length]: each text padded or cut."""
        options = {"padding": "max_length", "truncation": True, "max_length": self.length}
        encoded = self.tokenizer(*self.readout.inputs(texts), **options, return_tensors="pt", verbose=False)
        return dict(encoded)

    def forward(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """[texts, …], pooled where the model is: less to bring back."""
        return self.readout.outputs(model, batch)

    @staticmethod
    def postprocess(outputs: Tensor) -> list[Any]:
        return outputs.tolist()


@dataclass(frozen=True)
class Prompts:
    """Texts to prompts of one length, and tokens to texts, around a decoder: as a `Request` for `fp.profile`.

    Raises:
        ValueError: the model takes fewer than `length` tokens and the `steps` that follow.
    """

    model: torch.nn.Module
    tokenizer: Any
    length: int
    steps: int

    def __post_init__(self) -> None:
        embedding.check_length(self.length + self.steps, self.tokenizer, self.model)

    def pieces(self, texts: list[str]) -> list[str]:
        """One after the other, cut so that each has as many tokens as a prompt, or more: a token is rarely of eight letters."""
        text, size = "\n".join(texts), 8 * self.length
        return [text[i : i + size] for i in range(0, max(1, len(text) - size), size)]

    def preprocess(self, texts: list[str]) -> Batch:
        """int64 [texts, length]: without padding, so all of them as short as the shortest."""
        rows = self.tokenizer(texts, truncation=True, max_length=self.length, verbose=False)["input_ids"]
        ids = torch.tensor([row[: min(map(len, rows))] for row in rows])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def postprocess(self, tokens: Tensor) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(tokens)
        return texts
