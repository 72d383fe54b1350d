"""What to do about the largest part of a request's time: actions with the numbers that speak for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..common.batches import map_tensors, tensors
from ..common.timing import interleave
from .layers import OVERHEAD, Inside, Row
from .phases import FORWARDS, Overlap, Phase, Request
from .roofline import roofline

#: what gives less than this is not advised
LEAST_GAIN = 1.05
_MOST_WORKERS = 16
#: classes that fp.swap swaps; dtypes that 8 bits are shorter than, and by how much
_LINEAR = ("Linear", "Conv1D", "NonDynamicallyQuantizableLinear")
_WIDE = {"float32": (4, "quarter"), "bfloat16": (2, "half"), "float16": (2, "half")}


@dataclass(frozen=True)
class Advice:
    """An action, and how many times as fast a request would be: at most, or as modelled; 1 where no figure is known."""

    phase: str  #: or "all"
    action: str  #: "overlap", "pin", "batch", "lower precision", "fuse", "return less"
    text: str
    speedup: float

    def __str__(self) -> str:
        return f"{self.action} ({self.phase}): {self.text}"


def advise(
    request: Request,
    item: Any,
    phases: Sequence[Phase],
    overlap: Callable[[int], Overlap],
    inside: Inside | None,
) -> list[Advice]:
    """The largest gain first. overlap: what overlapping gives with so many threads for the input."""
    advice = _overlap(overlap)
    largest = max(phases, key=lambda p: p.total_ms).name
    if largest == "transfer":
        advice += _pin(request, item, phases[1])
    if largest == "output" and request.device.type == "cuda":
        moved = phases[-1].details["bytes"] / 1e6
        text = (
            f"{moved:.2f} MB an item come back to the host: pass output=fn(result) that pools, slices or takes the arg "
            "max on the device"
        )
        advice.append(Advice("output", "return less", text, 1.0))
    if largest in FORWARDS and inside and inside.layers:
        advice += _forward(request, inside, sum(p.share for p in phases if p.name in FORWARDS))
    return sorted(advice, key=lambda a: -a.speedup)


def _overlap(overlap: Callable[[int], Overlap]) -> list[Advice]:
    best = overlap(1)
    for workers in range(2, _MOST_WORKERS + 1):  # for an input that waits, until something else is the limit
        more = overlap(workers)
        if more.speedup < best.speedup * LEAST_GAIN:
            break
        best = more
    if best.speedup < LEAST_GAIN:
        return []
    workers_argument = f", workers={best.workers}" if best.workers > 1 else ""
    text = (
        f"fp.Pipeline(model, preprocess, postprocess{workers_argument}) would take {best.period_ms:.2f} ms an item in place of "
        f"{best.plain_ms:.2f}, {best.speedup:.2f} times as fast (modelled); {best.reason}"
    )
    return [Advice("all", "overlap", text, best.speedup)]


def _pin(request: Request, item: Any, transfer: Phase) -> list[Advice]:
    """By copies of the same batch from both kinds of memory."""
    batch = request.input(item)
    if transfer.details["pinned"] or not any(t.numel() for t in tensors(batch)):
        return []
    pinned = map_tensors(batch, lambda t: t if t.is_cuda else t.contiguous().pin_memory())
    calls = {"pageable": lambda: request.transfer(batch), "pinned": lambda: request.transfer(pinned)}
    before, after = (timing.median for timing in interleave(calls, request.device).values())
    gain = 1 / (1 - transfer.share * (1 - min(1.0, after / before)))
    if gain < LEAST_GAIN:
        return []
    text = (
        f"a batch takes {before:.3f} ms from pageable memory and {after:.3f} from pinned (measured): fp.Pipeline stages in "
        "pinned memory, a DataLoader does with pin_memory=True"
    )
    return [Advice("transfer", "pin", text, gain)]


def _forward(request: Request, inside: Inside, share: float) -> list[Advice]:
    limits = inside.limits
    advice: list[Advice] = []

    def advise(action: str, part: float, times: float, text: str) -> None:
        """Where `part` of the forward could become `times` as fast."""
        gain = 1 / (1 - share * part * (1 - 1 / times))
        if gain >= LEAST_GAIN:
            advice.append(Advice("forward", action, f"{text}; a request at most {gain:.2f} times as fast", gain))

    for bound in ("compute", "memory"):  # where neither binds, 8 bits are no faster
        rows = [r for r in inside.layers if r.kind in _LINEAR and r.flops and r.bound == bound and r.dtype in _WIDE]
        if not rows:
            continue
        part, reached = _sum(rows)
        dtype = rows[0].dtype
        plural = "layer takes" if len(rows) == 1 else "layers take"
        sentence = (
            f"{len(rows)} linear {plural} {part:.0%} of the forward at {reached:.0%} of the device's limit, which is "
        )
        if bound == "compute":
            limit = roofline(request.device, {"int8"}).flops["int8"]
            times = limit / limits.flops[dtype]
            sentence += f"arithmetic here; int8's limit is {limit / 1e9:.0f} GOP/s, {times:.1f} times {dtype}'s"
            if times > 1:
                advise("lower precision", part, times, f'{sentence}: try fp.swap(model, precision="int8")')
        else:
            times, fraction = _WIDE[dtype]
            sentence += "memory here"
            text = f'{sentence}; 8-bit weights are a {fraction} of the bytes: try fp.swap(model, precision="w8a16")'
            advise("lower precision", part, times, text)
            more = limits.flops[dtype] / limits.bytes_per_s * sum(r.bytes for r in rows) / sum(r.flops for r in rows)
            text = f"{sentence}: a batch up to {more:.0f} times as large costs little more; fp.size_batch finds the one to run"
            advise("batch", part, more, text)
    others = [r for r in inside.operations if not r.flops]
    part, reached = _sum(others)
    if reached:
        names = ", ".join(r.name.rpartition("::")[2] for r in others[:4])
        text = (
            f"operations without products ({names}, …) take {part:.0%} of the forward and reach {reached:.0%} of the "
            "memory's rate: torch.compile(model) fuses them"
        )
        advise("fuse", part, max(1.0, 1 / reached), text)
    _, reached = _sum(inside.layers)
    if reached < OVERHEAD:
        text = (
            f"the forward reaches {reached:.0%} of the device's limits: what a call costs whatever its size prevails, and "
            "a larger batch shares it; fp.size_batch finds the one to run"
        )
        advice.append(Advice("forward", "batch", text, 1.0))
    return advice


def _sum(rows: Sequence[Row]) -> tuple[float, float]:
    """Share of the forward, and share of the limit that is reached in it."""
    ms = sum(r.ms for r in rows)
    return sum(r.share for r in rows), sum(r.roofline * r.ms for r in rows) / ms if ms else 0.0
