"""What a model's result is for, as the files in its folder say: embeddings of texts, or scores of pairs."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.compare import relative_error
from ..common.text import count
from . import embedding
from .embedding import Batch, Source


class Readout(Protocol):
    """How texts go into a model, what is compared of its results, and how."""

    head: bool  #: whether the model is loaded with its head

    def tokenize(self, tokenizer: Any, texts: list[str], model: torch.nn.Module, device: str) -> list[Batch]: ...

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

    head = False

    def tokenize(self, tokenizer: Any, texts: list[str], model: torch.nn.Module, device: str) -> list[Batch]:
        return embedding.tokenize(tokenizer, [self.prompt + text for text in texts], model, device)

    @torch.inference_mode()
    def results(self, model: torch.nn.Module, batches: Iterable[Batch]) -> Tensor:
        """fp32 [texts, hidden] on the CPU."""
        vectors = []
        for batch in batches:
            hidden = model(**batch).last_hidden_state.float().cpu()
            vectors.append(POOLING[self.pooling](hidden, batch["attention_mask"].cpu()))
        embeddings = torch.cat(vectors)
        return F.normalize(embeddings, dim=-1) if self.normalize else embeddings

    def parity(self, actual: Tensor, expected: Tensor) -> dict[str, Any]:
        return {**embedding.parity(actual, expected), "texts": len(expected)}

    def describe(self) -> str:
        prompt = f", prompt {self.prompt!r}" if self.prompt else ""
        return f"embeddings: {self.pooling} of the tokens, {'' if self.normalize else 'not '}normalised{prompt}"


@dataclass(frozen=True)
class Scores:
    """A number for a pair of texts, as a reranker has it: of each batch of texts the first is the query, the others are ranked."""

    head = True
    size = 32  #: texts in a batch

    def tokenize(self, tokenizer: Any, texts: list[str], model: torch.nn.Module, device: str) -> list[Batch]:
        groups = [texts[i : i + self.size] for i in range(0, len(texts), self.size)]
        limit = embedding.most_tokens(tokenizer, model)
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

    @torch.inference_mode()
    def results(self, model: torch.nn.Module, batches: Iterable[Batch]) -> Tensor:
        """Logits, fp32 [queries, most documents] on the CPU; NaN where a query has fewer."""
        scores = [model(**batch).logits.float().cpu().flatten() for batch in batches]
        return torch.nn.utils.rnn.pad_sequence(scores, batch_first=True, padding_value=torch.nan)

    def parity(self, actual: Tensor, expected: Tensor) -> dict[str, Any]:
        """cosine_min: of a query's scores about their mean, as the order is what counts; order: the share of pairs of documents
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


def readout_of(source: Source) -> Readout:
    """Raises ValueError, in one sentence, on what is read out in another way than is known here."""
    folder = pathlib.Path(source.path)
    config = _json(folder / "config.json")
    settings = _json(folder / "config_sentence_transformers.json")
    architecture = next(iter(config.get("architectures") or ()), "")
    known_as = settings.get("model_type") == "CrossEncoder" or "sentence_transformers" in config
    old_name = "sbert_ce_default_activation_function" in config
    if architecture.endswith("ForSequenceClassification") and (known_as or old_name or _labels(config) == 1):
        if _labels(config) != 1:
            raise ValueError(f"{source.path} is a cross-encoder of {count(_labels(config), 'label')}, and a ranking has one: "
                             "use fp.swap in Python")  # fmt: skip
        return Scores()
    modules = _json(folder / "modules.json")
    if not modules:
        return Embeddings()
    kinds = {str(m.get("type", "")).rpartition(".")[2]: str(m.get("path", "")) for m in modules}
    if unknown := [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise ValueError(f"{source.path} has a module {unknown[0]} behind its model, which is not read out here: use fp.swap in "
                         "Python on the SentenceTransformer")  # fmt: skip
    pooling = _json(folder / kinds["Pooling"] / "config.json") if "Pooling" in kinds else {}
    prompt = (settings.get("prompts") or {}).get(settings.get("default_prompt_name")) or ""
    modes = _modes(pooling)
    if len(modes) != 1 or modes[0] not in POOLING or (prompt and pooling.get("include_prompt") is False):
        raise ValueError(f"{source.path} pools by {', '.join(modes) or 'nothing'}, and what is known here is one of "
                         f"{', '.join(POOLING)}, prompts included: use fp.swap in Python on the SentenceTransformer")  # fmt: skip
    return Embeddings(modes[0], "Normalize" in kinds, prompt)


def _labels(config: dict[str, Any]) -> int:
    return len(config.get("id2label") or ()) or 2  # transformers' default


def _modes(pooling: dict[str, Any]) -> list[str]:
    """The modes in a Pooling's config, which has them as it is written now or as a flag for each mode."""
    if isinstance(mode := pooling.get("pooling_mode"), str):
        return [mode]
    names = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max"}
    flags = [name.removeprefix("pooling_mode_") for name, is_on in pooling.items() if is_on is True]
    return [names.get(name, name) for name in flags if f"pooling_mode_{name}" in pooling]


def _json(file: pathlib.Path) -> Any:
    """Empty where there is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise ValueError(f"cannot read {file} ({type(e).__name__}): save the model again") from None
