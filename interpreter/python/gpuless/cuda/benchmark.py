"""What Triton's benchmarks and autotuners measure on the interpreted GPU: modelled time, never the host's.

Of a launch a few CTAs run, checked as ever, and count for all (`Device.sampled`); model.py makes a time of what they did.
Operations of torch's are not carried out at all: they are timed by their bytes and their floating-point operations, the
latter counted by torch.utils.flop_counter. So what a benchmarked function leaves in its outputs means nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .. import core
from ..capture import prohibit_in_capture
from ..device import Device
from ..finding import Finding
from ..rates import rates

#: clusters of a launch: those of many kernels differ at their edges, and the first wave has some of each
SAMPLE = 16
_KINDS = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "tf32", torch.int8: "s8"}


class Benchmark:
    """The time of one call of a function."""

    running: Benchmark | None = None

    def __init__(self, device: Device):
        self.device, self.rates = device, rates(device.arch)
        self.torch_seconds = 0.0

    def seconds(self, call: Callable[[], Any]) -> float:
        prohibit_in_capture("a benchmark")
        sampled = self._once(call, SAMPLE)
        if sampled is not None:
            return sampled
        whole = self._once(call, 0)
        assert whole is not None
        return whole

    def _once(self, call: Callable[[], Any], clusters: int) -> float | None:
        """None where a launch of which so many ran has waited for what was left out, perhaps: it has no finding then."""
        findings = self.device.findings
        before, Benchmark.running = Benchmark.running, self
        self.torch_seconds, already = 0.0, len(findings)
        try:
            with self.device.sampled(clusters):
                try:
                    call()
                except Finding as e:
                    if not clusters or e.kind != "deadlock":
                        raise
                late = [f for f in findings[already:] if f.kind == "deadlock"] if clusters else []
                if late:
                    findings[already:] = [f for f in findings[already:] if f not in late]
                    return None
                return self.torch_seconds + sum(m.seconds for m in self.device.model())
        finally:
            Benchmark.running = before

    def operation(self, op: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        """Counts an operation of torch's, whose result has shapes alone."""
        tensors = {id(t): t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)}.values()
        moved = sum(t.numel() * t.element_size() for t in tensors)
        seconds = moved / (self.rates["DRAM"] * 1e9)
        if count := flop_registry.get(op._overloadpacket):
            macs = count(*args, **kwargs, out_val=result) / 2
            kind = next((_KINDS[t.dtype] for t in tensors if t.dtype in _KINDS), "tf32")
            rate = self.rates[f"mma {kind}"] * core.device_properties().multiprocessors * self.rates["clock"] * 1e6
            seconds = max(seconds, macs / rate)
        self.torch_seconds += seconds


def do_bench(device: Device) -> Callable[..., Any]:
    """In place of triton.testing's do_bench and do_bench_cudagraph: one call says all, as it is the same each time."""

    def measure(fn: Callable[[], Any], *_: Any, quantiles: Any = None, return_mode: str = "mean", **__: Any) -> Any:
        ms = 1e3 * Benchmark(device).seconds(fn)
        if quantiles is not None:
            return ms if len(quantiles) == 1 else [ms] * len(quantiles)
        return [ms] if return_mode == "all" else ms

    return measure


def refuse_proton() -> None:
    """Triton's profiler counts by CUPTI, which watches a GPU's driver: its own words would be an error's number."""
    try:
        from triton._C.libproton import proton
    except ImportError:  # a Triton built without it
        return

    def start(*_: Any) -> int:
        raise RuntimeError(
            "Proton profiles by CUPTI, which the interpreted GPU has not: measure with triton.testing.do_bench"
        )

    proton.start = start
