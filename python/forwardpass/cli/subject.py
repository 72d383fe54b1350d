"""The model that a command is about, found and loaded, and the texts that it runs on (extra `cli`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from rich.console import Console

from ..common.printing.text import count
from . import embedding
from .console import say
from .readout import Readout, readout_of
from .source import Source, find_model


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model that a command is about, and its texts."""

    source: Source
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


def find(name: str, where: str, console: Console, swaps: bool) -> tuple[Source, torch.nn.Module, Any, Readout]:
    """Where the model comes from, which is printed, the model, its tokenizer, and what it is run for, as its folder says. swaps:
    whether the command takes the originals of its layers, which a swapped model that was saved has not.
    """
    source = find_model(name)
    if source.stored and swaps:
        raise ValueError(f"{name} holds a model whose layers have 8 bits already: `forwardpass swap` runs it as it is; give this "
                         "command the original model")  # fmt: skip
    if source.swapped and swaps:
        raise ValueError(f"{name} holds a model that is swapped already, without its original layers: give this command the "
                         "original model")  # fmt: skip
    say(console, f"model: {source.origin}")
    readout = readout_of(source)
    return source, *embedding.load(source, where, readout.auto), readout


def load(
    name: str,
    where: str,
    text: str | None,
    calibrate: str | None,
    calibrates: bool,
    console: Console,
    swaps: bool = True,
) -> Subject:
    """calibrates: whether there is calibration by default."""
    calibrate = calibrate or ("builtin" if calibrates else "none")
    texts = embedding.read_texts(text) if text else None
    calibration = embedding.read_texts(calibrate) if calibrate not in ("builtin", "none") else []
    source, model, tokenizer, readout = find(name, where, console, swaps)
    for_calibration, to_measure = readout.builtin()
    texts = to_measure if texts is None else texts
    calibration = for_calibration if calibrate == "builtin" else calibration
    batches, others = (readout.tokenize(tokenizer, t, model, where) for t in (texts, calibration))
    return Subject(source, model, tokenizer, texts, batches, others or None, readout)
