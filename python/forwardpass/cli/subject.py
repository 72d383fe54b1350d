"""The model that a command is about, found and loaded, and the texts that it runs on (extra `cli`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from rich.console import Console

from ..common.text import count
from . import embedding
from .console import say
from .readout import Embeddings, Readout, readout_of


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model that a command is about, and its texts."""

    source: embedding.Source
    model: torch.nn.Module
    tokenizer: Any
    texts: list[str]  #: to compare on
    batches: list[embedding.Batch]  #: of them
    calibration: list[embedding.Batch] | None  #: None where there is none
    readout: Readout

    @property
    def calibrated_on(self) -> int:
        """How many texts there are to calibrate on."""
        return sum(len(b["input_ids"]) for b in self.calibration or ())

    def swapping(self) -> str:
        """What a swap of it does first, in words: the long part of it is silent."""
        return f"calibrating on {count(self.calibrated_on, 'text')}, and swapping" if self.calibration else "swapping"


def find(name: str, where: str, console: Console, swaps: bool) -> tuple[embedding.Source, torch.nn.Module, Any]:
    """Where the model comes from, which is printed, the model, and its tokenizer. swaps: whether the command takes the originals
    of its layers, which a swapped model that was saved has not.
    """
    source = _source(name, console, swaps)
    return source, *embedding.load(source, where)


def _source(name: str, console: Console, swaps: bool) -> embedding.Source:
    source = embedding.find_model(name)
    if source.swapped and swaps:
        raise ValueError(f"{name} holds a model that is swapped already, without its original layers: give this command the "
                         "original model")  # fmt: skip
    say(console, f"model: {source.origin}")
    return source


def load(
    name: str,
    where: str,
    text: str | None,
    calibrate: str | None,
    calibrates: bool,
    console: Console,
    swaps: bool = True,
    as_its_folder_says: bool = False,
) -> Subject:
    """calibrates: whether there is calibration by default. as_its_folder_says: of a folder of sentence-transformers its pooling and
    prompt, or its scores; else texts are embedded by the mean of their tokens.
    """
    texts = embedding.read_texts(text) if text else embedding.builtin_texts()[1]
    calibration = calibration_texts(calibrate or ("builtin" if calibrates else "none"))
    source = _source(name, console, swaps)
    readout = readout_of(source) if as_its_folder_says else Embeddings()
    model, tokenizer = embedding.load(source, where, readout.head)
    batches, others = (readout.tokenize(tokenizer, t, model, where) for t in (texts, calibration))
    return Subject(source, model, tokenizer, texts, batches, others or None, readout)


def calibration_texts(source: str) -> list[str]:
    if source == "none":
        return []
    return embedding.builtin_texts()[0] if source == "builtin" else embedding.read_texts(source)
