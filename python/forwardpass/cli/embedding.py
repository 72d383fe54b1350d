"""Text embedding models: found by name, loaded, run on real text, compared; for the command line and benchmarks."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoints.load import load_transformer
from ..common.extras import pip_install
from ..common.models.compare import relative_error
from ..common.printing.quiet import quiet_libraries
from ..common.printing.text import count
from ..integrations.transformers import model_config
from .source import Source, is_in_reach
from .source import find_model as find_model

Batch = dict[str, Tensor]


def load(source: Source, device: torch.device | str = "cpu", auto: str = "AutoModel") -> tuple[torch.nn.Module, Any]:
    """(model in eval mode, tokenizer); on a CPU in float32, on a GPU, or where it holds 8 bits, in the dtype that it was stored in.
    auto: the class of transformers that loads it; of a swapped model with a head `AutoModel` gives the model below it. One that
    another library stored in 8 bits is loaded into layers of forwardpass. Raises ValueError in one sentence.
    """
    try:
        import transformers
    except ImportError as e:
        raise ValueError(f"loading a model needs transformers: {pip_install('hf')}") from e
    transformers.utils.logging.disable_progress_bar()  # a bar for a second's work, also where stderr is a file
    file = {"gguf_file": source.gguf} if source.gguf else {}
    if missing := [name for name in ("gguf", "accelerate") if file and importlib.util.find_spec(name) is None]:
        raise ValueError(f"reading {source.gguf} needs {' and '.join(missing)}: {pip_install('generate')}")
    options = {"trust_remote_code": False, "local_files_only": not (source.hub and is_in_reach(source.path)), **file}
    try:
        with quiet_libraries():
            model: Any = None
            config: Any
            if source.swapped or source.stored:
                model = load_transformer(source.path, device=device)
                model = getattr(model, "base_model", model) if auto == "AutoModel" else model
                config = model.config
            else:
                config = transformers.AutoConfig.from_pretrained(source.path, **options)
                model_config.check_attention(config)
            if config.is_encoder_decoder:
                raise ValueError(
                    "it is an encoder-decoder, and forwardpass swap embeds text with one stack: use fp.swap in Python"
                )
            tokenizer = transformers.AutoTokenizer.from_pretrained(source.path, **options)
            if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # made up where there are no files of one
                raise ValueError("there is no tokenizer beside the model: save it there with tokenizer.save_pretrained")
            if model is None:
                model = _from_floats(getattr(transformers, auto), source, torch.device(device), options)
    except (
        Exception
    ) as e:  # whatever a stranger's folder or a hub out of reach raises: OSError, ValueError, SafetensorError, …
        reason = " ".join(str(e).split())
        raise ValueError(f"cannot load {source.origin}: {reason[:300]}") from e
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = model.eval().requires_grad_(False).to(device)
    as_stored = source.stored or hasattr(model, "hf_quantizer")  # which transformers does not convert
    return (model.float() if torch.device(device).type == "cpu" and not as_stored else model), tokenizer


def _from_floats(cls: Any, source: Source, device: torch.device, options: dict[str, Any]) -> torch.nn.Module:
    """What a class of transformers loads. Weights that the file lacks are told on stderr; ValueError where shapes differ."""
    # Q4_1 says nothing of the dtype that it was made from, which was bfloat16
    dtype = torch.bfloat16 if source.gguf and device.type == "cuda" else "auto"
    # it draws a bar of its own as it reads GGUF
    with contextlib.redirect_stderr(io.StringIO()) if source.gguf else contextlib.nullcontext():
        model, about = cls.from_pretrained(
            source.path, torch_dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    if other := sorted(about["mismatched_keys"]):
        has = "has another shape" if len(other) == 1 else "have other shapes"
        raise ValueError(f"{count(len(other), 'weight')} of its file ({other[0][0]}, …) {has} than its config says")
    if missing := sorted(about["missing_keys"]):
        print(f"forwardpass: the file has no {listed(missing)}: what reads them gets random numbers", file=sys.stderr)
    if source.gguf:
        _forget_file(model)
    return model


def listed(names: list[str]) -> str:
    """One or two names, or the first and how many more there are."""
    return " and ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} other weights"


def _forget_file(model: Any) -> None:
    """Its weights are plain floats, and transformers calls it quantised, which it then refuses to save."""
    for owner, names in (
        (model, ("hf_quantizer", "is_quantized", "quantization_method")),
        (model.config, ("quantization_config",)),
    ):
        for name in names:
            vars(owner).pop(name, None)


def builtin_texts() -> tuple[list[str], list[str]]:
    """(64 texts to calibrate with, 288 others to measure on)."""
    data = json.loads((pathlib.Path(__file__).parent / "data" / "texts.json").read_text())
    return data["calibration"], data["evaluation"]


def read_texts(file: str) -> list[str]:
    """The lines of a UTF-8 file that are not blank. Raises ValueError in one sentence."""
    try:
        lines = [line.strip() for line in pathlib.Path(file).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else f"it is not UTF-8 at byte {e.start}"
        raise ValueError(f"cannot read {file}: {reason}; pass a UTF-8 file with one text a line") from e
    texts = [line for line in lines if line]
    if not texts:
        raise ValueError(f"{file} has no text: pass a UTF-8 file with one text a line")
    return texts


def most_tokens(tokenizer: Any, model: torch.nn.Module) -> int:
    """The most tokens of a text that the model takes."""
    positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    return min(positions, tokenizer.model_max_length)


def tokenize(
    tokenizer: Any,
    texts: list[str],
    model: torch.nn.Module,
    device: torch.device | str = "cpu",
    size: int = 32,
    most: int | None = None,
) -> list[Batch]:
    """Padded batches of `size` texts in the order given. most: tokens that a longer text is cut to; None: ValueError on one that
    is too long for the model.
    """
    limit, batches = most_tokens(tokenizer, model), []
    cut = {} if most is None else {"truncation": True, "max_length": min(limit, most)}
    for start in range(0, len(texts), size):
        batch = tokenizer(texts[start : start + size], padding=True, **cut, return_tensors="pt", verbose=False)
        lengths = batch["attention_mask"].sum(1)
        if lengths.max() > limit:
            worst = int(lengths.argmax())
            raise ValueError(
                f"text {start + worst + 1} has {lengths[worst]} tokens, and the model takes {limit}: split it"
            )
        batches.append({name: batch[name].to(device) for name in ("input_ids", "attention_mask")})
    return batches


def full_batch(
    tokenizer: Any,
    texts: list[str],
    batch: int,
    length: int,
    model: torch.nn.Module,
    device: torch.device | str = "cpu",
) -> Batch:
    """[batch, length] of real token ids without padding: the texts one after the other, repeated if need be."""
    check_length(length, tokenizer, model)
    ids = [i for text in texts for i in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    if not ids:
        raise ValueError("the texts have no tokens: pass others")
    ids = ids * -(-batch * length // len(ids))
    rows = torch.tensor(ids[: batch * length], device=device).view(batch, length)
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}


def check_length(length: int, tokenizer: Any, model: torch.nn.Module) -> None:
    if length > (limit := most_tokens(tokenizer, model)):
        raise ValueError(f"a length of {length} tokens is more than the model's {limit}: pass --length {limit} or less")


@torch.inference_mode()
def embed(run: Callable[[Batch], Tensor], batches: Iterable[Batch]) -> Tensor:
    """Sentence embeddings fp32 [texts, hidden] on the CPU: last hidden states, mean over the mask, normalised.

    Args:
        run: batch -> last hidden states [batch, length, hidden].
    """

    return torch.cat([pool(run(b).float().cpu(), b["attention_mask"].cpu()) for b in batches])


def pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Sentence embeddings [texts, hidden] of last hidden states: the mean over the mask, normalised."""
    mask = mask.unsqueeze(-1)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def hidden_states(model: torch.nn.Module) -> Callable[[Batch], Tensor]:
    """A transformers model as `embed` takes it."""
    return lambda batch: model(**batch).last_hidden_state


def parity(actual: Tensor, expected: Tensor) -> dict[str, float]:
    """cosine_min: the lowest over samples; relative_error: L2 over all of them."""
    a, b = actual.double(), expected.double()
    return {
        "cosine_min": F.cosine_similarity(a, b, dim=-1).min().item(),
        "relative_error": relative_error(actual, expected),
    }


def search_agreement(actual: Tensor, expected: Tensor) -> dict[str, float]:
    """What a search by these embeddings [texts, hidden] keeps; nothing of fewer than 21 texts, where ten are half of all.

    spearman: the correlation of the ranks of all similarities of two texts. recall_at_10: of each text's ten most similar others
    the share that stays among its ten, on average.
    """
    if len(expected) < 21:
        return {}
    similarities = [x @ x.T for x in (F.normalize(t.double(), dim=-1) for t in (actual, expected))]
    upper = tuple(torch.triu_indices(len(expected), len(expected), 1))
    ranks = torch.stack([_ranks(x[upper]) for x in similarities])
    nearest = [x.fill_diagonal_(-torch.inf).topk(10).indices for x in similarities]
    stays = (nearest[0].unsqueeze(2) == nearest[1].unsqueeze(1)).any(2)
    return {"spearman": torch.corrcoef(ranks)[0, 1].item(), "recall_at_10": stays.double().mean().item()}


def _ranks(x: Tensor) -> Tensor:
    """Equal values share the middle of their ranks."""
    _, place, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[place]
