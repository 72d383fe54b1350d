"""A model before and after a swap: the same texts, the same batch, in turn, in one process."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from ..common.models import decoding
from ..common.timing import Track, interleave, keep_freed_memory, untracked
from .embedding import Batch
from .readout import Readout

T = TypeVar("T")
#: what is compared, in JSON and in words
DYNAMIC_INT8 = "torch_dynamic_int8"
NAMES = {"before": "before", "after": "after", DYNAMIC_INT8: "with torch's dynamic INT8"}


def compare(
    original: torch.nn.Module,
    swapped: torch.nn.Module,
    batches: list[Batch],
    timed: Batch,
    readout: Readout,
    track: Track = untracked,
) -> dict[str, Any]:
    """The measured part of what `forwardpass swap` writes.

    Args:
        batches: real texts, for parity: what `readout` makes of both models' results.
        timed: one batch without padding, for latency; on a CPU torch's own dynamic INT8 takes part.
    """
    models = {"before": original, "after": swapped}
    dynamic, reason = torch_dynamic_int8(original)
    if dynamic is not None:
        models[DYNAMIC_INT8] = dynamic
    parity = compare_results(models, batches, readout, track)
    calls = {name: _forward(model, timed) for name, model in models.items()}
    rounds, warmup = 7, 1
    device = timed["input_ids"].device
    allocator = keep_freed_memory()
    with torch.inference_mode():
        timings = interleave(calls, device, rounds=rounds, warmup=warmup, on_round=track("timing", rounds + warmup))
    medians = {name: t.median for name, t in timings.items()}
    return {
        "parity": parity["after"],
        "torch_dynamic_int8": parity.get(DYNAMIC_INT8),
        "latency_ms": {DYNAMIC_INT8: None, **medians},
        "latency_quartiles_ms": {name: [t.low, t.high] for name, t in timings.items()},
        "allocator": allocator,
        "speedup": medians["before"] / medians["after"],
        "reasons": {"latency_ms.torch_dynamic_int8": reason} if reason else {},
    }


def compare_results(
    models: Mapping[str, torch.nn.Module], batches: list[Batch], readout: Readout, track: Track
) -> dict[str, dict[str, Any]]:
    """What the readout says of the results on real texts of each model but "before", beside those of that one."""
    before, *others = (
        readout.results(model, ticking(batches, track(f"running texts {NAMES[name]}", len(batches))))
        for name, model in models.items()
    )
    return {name: readout.parity(results, before) for name, results in zip([*models][1:], others)}


def compare_decoding(
    original: torch.nn.Module,
    swapped: torch.nn.Module,
    batches: list[Batch],
    prompts: Batch,
    steps: int,
    readout: Readout,
    track: Track = untracked,
) -> dict[str, Any]:
    """The same of a decoder: tokens a second of prefill and of decode, from `prompts` on for so many steps."""
    models = {"before": original, "after": swapped}
    parity = compare_results(models, batches, readout, track)["after"]
    rounds, allocator = 7, keep_freed_memory()
    on_round = track("timing", rounds + 1)
    runs = {name: decoding.run_of(model) for name, model in models.items()}
    timings = decoding.rates(runs, prompts["input_ids"], steps, rounds, on_round=on_round)
    medians = {name: {phase: t.median for phase, t in phases.items()} for name, phases in timings.items()}
    return {
        "parity": parity,
        "tokens_per_s": medians,
        "tokens_per_s_quartiles": {
            name: {phase: [t.low, t.high] for phase, t in phases.items()} for name, phases in timings.items()
        },
        "allocator": allocator,
        "speedup": {phase: medians["after"][phase] / medians["before"][phase] for phase in decoding.PHASES},
        "reasons": {},
    }


def torch_dynamic_int8(model: torch.nn.Module) -> tuple[torch.nn.Module | None, str | None]:
    """(a copy of the model under torch's dynamic quantisation, None), or (None, why there is none)."""
    if next(model.parameters()).device.type != "cpu":
        return None, "torch's dynamic quantisation runs on CPUs only"
    try:
        quantize_dynamic = importlib.import_module("torch.ao.quantization").quantize_dynamic
    except (ImportError, AttributeError):
        return None, f"torch {torch.__version__} has no torch.ao.quantization.quantize_dynamic"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, which is why it may be missing one day
        return quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8), None


def _forward(model: torch.nn.Module, batch: Batch) -> Callable[[], object]:
    return lambda: model(**batch)


def ticking(items: Iterable[T], advance: Callable[[], object]) -> Iterator[T]:
    for item in items:
        yield item
        advance()
