"""What to do about the largest part of a request's time: actions with the numbers that speak for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..batches import map_tensors, tensors
from ..timing import interleave
from .layers import Inside, Row
from .phases import PHASES, Phase, Request, predict
from .roofline import roofline

#: what gives less than this is not advised
LEAST_GAIN = 1.05
_MOST_WORKERS = 16


@dataclass(frozen=True)
class Advice:
    """An action, and how many times as fast a request would be: at most, or as modelled."""

    phase: str
    action: str  #: "overlap", "pin", "batch", "lower precision", "fuse", "return less"
    text: str
    speedup: float

    def __str__(self) -> str:
        return f"{self.action} ({self.phase}): {self.text}"


def advise(
    request: Request,
    item: Any,
    phases: Sequence[Phase],
    wall: Sequence[float],
    cpu: Sequence[float],
    cores: float,
    inside: Inside | None,
) -> list[Advice]:
    """For the plain loop that took `wall` and `cpu` seconds a phase, the largest gain first."""
    found = _overlap(wall, cpu, cores)
    largest = max(phases, key=lambda p: p.total_ms).name
    if request.device.type == "cuda":
        if largest == "transfer" and not phases[1].details["pinned"]:
            found += _pin(request, item, phases[1])
        if largest == "output":
            moved = phases[3].details["bytes"] / 1e6
            found.append(Advice("output", "return less", f"{moved:.2f} MB an item come back to the host: pass "
                                "output=fn(result) that pools, slices or takes the arg max on the device", 1.0))  # fmt: skip
    if largest == "forward" and inside and inside.layers:
        found += _forward(request, inside, phases[2].share)
    return sorted(found, key=lambda a: -a.speedup)


def _overlap(wall: Sequence[float], cpu: Sequence[float], cores: float) -> list[Advice]:
    best = predict(wall, cpu, cores)
    for workers in range(2, _MOST_WORKERS + 1):  # for an input that waits, until something else is the limit
        more = predict(wall, cpu, cores, workers)
        if more.speedup < best.speedup * LEAST_GAIN:
            break
        best = more
    if best.speedup < LEAST_GAIN:
        return []
    given = f", workers={best.workers}" if best.workers > 1 else ""
    hidden = max(range(4), key=lambda i: wall[i] if i != wall.index(max(wall)) else -1.0)
    return [
        Advice(
            PHASES[hidden],
            "overlap",
            f"fp.Pipeline(model, preprocess, postprocess{given}) would take {best.period_ms:.2f} ms an item in place of "
            f"{best.plain_ms:.2f}, {best.speedup:.2f} times as fast (modelled); {best.reason}",
            best.speedup,
        )
    ]


def _pin(request: Request, item: Any, transfer: Phase) -> list[Advice]:
    """By a copy of the same batch from both kinds of memory."""
    batch = request.input(item)
    pinned = map_tensors(batch, lambda t: t if t.is_cuda else t.contiguous().pin_memory())
    if not any(t.numel() for t in tensors(batch)):
        return []
    times = interleave({"pageable": lambda: request.transfer(batch), "pinned": lambda: request.transfer(pinned)},
                       request.device)  # fmt: skip
    before, after = times["pageable"].median, times["pinned"].median
    if before < after * LEAST_GAIN:
        return []
    gain = 1 / (1 - transfer.share * (1 - after / before))
    return [Advice("transfer", "pin", f"a batch takes {before:.3f} ms from pageable memory and {after:.3f} from pinned "
                   f"(measured): fp.Pipeline stages in pinned memory, a DataLoader does with pin_memory=True", gain)]  # fmt: skip


def _forward(request: Request, inside: Inside, share: float) -> list[Advice]:
    found = []

    def at_most(part: float, times: float) -> float:
        """Of the whole request, where `part` of the forward becomes `times` as fast."""
        return 1 / (1 - share * part * (1 - 1 / times))

    products = [
        r for r in inside.layers if r.kind in ("Linear", "Conv1D", "NonDynamicallyQuantizableLinear") and r.flops
    ]
    part, reached = _sum(products)
    memory = sum(r.ms for r in products if r.bound == "memory") > sum(r.ms for r in products) / 2
    if products and part > 0.1:
        dtype = products[0].dtype
        say = f"{len(products)} linear layers take {part:.0%} of the forward at {reached:.0%} of the device's limit"
        if memory:
            times = 4.0 if dtype == "float32" else 2.0
            found.append(Advice("forward", "lower precision", f"{say}, which is memory here: 8-bit weights are a "
                f"{times:.0f}th of the bytes, a request at most {at_most(part, times):.2f} times as fast; try "
                f"fp.swap(model, precision=\"w8a16\")", at_most(part, times)))  # fmt: skip
            ridge = inside.limits.flops[dtype] / inside.limits.bytes_per_s
            intensity = sum(r.flops for r in products) / sum(r.bytes for r in products)
            found.append(Advice("forward", "batch", f"{say}, which is memory here: {intensity:.0f} operations a byte where the "
                f"device could do {ridge:.0f}, so a batch up to {ridge / intensity:.0f} times as large costs little more: "
                "fp.size_batch", at_most(part, ridge / intensity)))  # fmt: skip
        else:
            limits = roofline(request.device, {dtype, "int8"})
            times = limits.flops["int8"] / limits.flops[dtype]
            if times > LEAST_GAIN:
                found.append(Advice("forward", "lower precision", f"{say}, which is arithmetic here: int8's limit is "
                    f"{times:.1f} times {dtype}'s, a request at most {at_most(part, times):.2f} times as fast; try "
                    "fp.swap(model, precision=\"int8\")", at_most(part, times)))  # fmt: skip
    others = [r for r in inside.operations if not r.flops]
    part, reached = _sum(others)
    times = 1 / reached if reached else math.inf
    if at_most(part, times) >= LEAST_GAIN:
        names = ", ".join(r.name.rpartition("::")[2] for r in others[:4])
        found.append(Advice("forward", "fuse", f"operations without products ({names}, …) take {part:.0%} of the forward and "
            f"reach {reached:.0%} of the memory's rate: torch.compile(model) fuses them, a request at most "
            f"{at_most(part, times):.2f} times as fast", at_most(part, times)))  # fmt: skip
    _, reached = _sum(inside.layers)
    if reached < 0.1:
        found.append(Advice("forward", "batch", f"the forward reaches {reached:.0%} of the device's limits: what a call costs "
            "whatever its size prevails, and larger batches share it: fp.size_batch", 1.0))  # fmt: skip
    return found


def _sum(rows: Sequence[Row]) -> tuple[float, float]:
    """Share of the forward, and share of the limit that is reached in it."""
    ms = sum(r.ms for r in rows)
    return sum(r.share for r in rows), sum(r.roofline * r.ms for r in rows) / ms if ms else 0.0
