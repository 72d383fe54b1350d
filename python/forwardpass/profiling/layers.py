"""Inside the forward: the time of every layer and operation, and how near to the device's limits it is.

Times come from torch.profiler, in passes of their own; operations and bytes from another pass, which looks at every
operation's operands. So neither disturbs the four phases.
"""

from __future__ import annotations

import os
import pathlib
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from ..common.batches import tensors
from ..common.models.modules import hooked
from .phases import FORWARDS, Request, sample
from .roofline import Roofline, roofline

_LAYER = "layer "
#: below this share of the device's limit neither arithmetic nor memory explains the time
OVERHEAD = 0.1
BEYOND = "Beyond 100 % of a limit: data came from a cache, and the limit is that of the memory behind"


@dataclass(frozen=True)
class Row:
    """A layer, all layers of a class, or an operation, per item: what it took and what it did."""

    name: str
    kind: str  #: of a layer its class
    share: float  #: of the forward
    ms: float
    calls: float
    flops: float
    bytes: float
    dtype: str
    #: the share of the device's limit that it reached; 0 of what neither computes nor moves, such as a view. Above 1 where
    #: operands were in a cache: the limit is that of the memory behind it, and every byte counts as if it came from there.
    roofline: float
    bound: str  #: "compute", "memory", or "overhead": it reaches less than a tenth of either limit

    @staticmethod
    def together(name: str, rows: Sequence[Row]) -> Row:
        """Rows of one kind as one, whose limit is that of the most of its time."""

        def total(field: str) -> float:
            return sum(getattr(row, field) for row in rows)

        main, ms = max(rows, key=lambda row: row.ms), total("ms")
        reached = sum(row.roofline * row.ms for row in rows) / ms
        bound = (
            "overhead"
            if reached < OVERHEAD
            else max(("compute", "memory"), key=lambda b: sum(row.roofline * row.ms for row in rows if row.bound == b))
        )
        return Row(
            name,
            main.kind,
            total("share"),
            ms,
            total("calls"),
            total("flops"),
            total("bytes"),
            main.dtype,
            reached,
            bound,
        )

    def to_json(self) -> dict[str, Any]:
        seconds = self.ms / 1e3
        rates = {"flops_per_s": self.flops / seconds, "bytes_per_s": self.bytes / seconds} if seconds else {}
        return {**vars(self), **rates}


@dataclass(frozen=True)
class Inside:
    """What is inside the forward: rows by time, the longest first; and a Chrome trace of the passes."""

    kinds: list[Row]  #: the layers of a class together
    layers: list[Row]
    operations: list[Row]
    ms: float  #: of the forward, under the profiler
    limits: Roofline
    trace: str


@dataclass
class Work:
    """The work of all calls of one operation in one layer: operations (2 a multiply-accumulate), bytes, and the dtype."""

    calls: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    dtype: str = "float32"


class _Count(TorchDispatchMode):
    """Adds up what the operations of each layer do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[str] = [""]
        self.work: defaultdict[tuple[str, str], Work] = defaultdict(Work)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # inference mode hands composite operations over whole
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        work = self.work[self.layers[-1], func.name().partition(".")[0]]
        work.calls += 1
        operands, results = [*tensors([args, kwargs])], [*tensors(result)]
        work.flops += _flops(func, args, kwargs, result)
        work.bytes += _bytes(func, operands, results)
        if operands:
            work.dtype = _dtype(operands)
        return result


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> float:
    from torch.utils.flop_counter import flop_registry  # not at import: it is not quick

    name = func.name().partition(".")[0]
    count = flop_registry.get(func.overloadpacket)
    if count is not None:
        return count(*args, **kwargs, out_val=result)
    operands = [*tensors(args)]
    if name == "aten::_scaled_dot_product_flash_attention_for_cpu":
        q, k, v = operands[:3]  # [B, H, S, D]
        return 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
    if not name.startswith("forwardpass::"):
        return 0.0
    operation = name.removeprefix("forwardpass::").rpartition("_")[0]
    if operation.endswith(("_gemm", "_linear", "_gemm_quantize")):
        x, weight = operands[:2]
        return 2 * x.numel() * weight.shape[0]
    if operation.startswith("attention") and operands[0].dim() == 4:
        q, k, v = operands[:3]  # [B, S, H, D]; without regard to masks
        return 2 * q.shape[:-1].numel() * k.shape[1] * (q.shape[-1] + v.shape[-1])
    return 0.0


#: these read of their first operands what they return
_LOOKUPS = {"aten::embedding", "aten::index_select", "aten::gather", "aten::index"}


def _bytes(func: Any, operands: Sequence[Tensor], results: Sequence[Tensor]) -> float:
    """That must be moved at least: every operand once, every result once, nothing for views."""
    result_bytes = sum(map(_own_bytes, results))
    if not func._schema.is_mutable and results and {*map(_storage, results)} <= {*map(_storage, operands)}:
        return (
            0.0  # by what it did: schemas do not say that _unsafe_view, or a reshape that needs no copy, gives a view
        )
    if func.name().partition(".")[0] in _LOOKUPS:
        return 2 * result_bytes
    return result_bytes + sum(map(_own_bytes, operands))


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _own_bytes(t: Tensor) -> int:
    """Without what is repeated by expansion."""
    n = 1
    for size, stride in zip(t.shape, t.stride()):
        n *= size if stride or not size else 1
    return n * t.element_size()


def _dtype(operands: Sequence[Tensor]) -> str:
    """In which an operation computes: 8-bit products by their weight, others by their first floating operand."""
    small = [t.dtype for t in operands if t.dtype in (torch.int8, torch.float8_e4m3fn) and t.dim() > 1]
    floating = [t.dtype for t in operands if t.dtype.is_floating_point]
    return str((small or floating or [torch.float32])[0]).removeprefix("torch.")


def _at_layers(
    model: nn.Module, enter: Callable[[str], object], leave: Callable[[], object]
) -> AbstractContextManager[None]:
    """Within it every call of a module is announced, from its beginning to its end, also where it raises."""
    return hooked(model.named_modules(), lambda fqn, *_: enter(fqn), lambda *_: leave(), always=True)


def look_inside(request: Request, items: Sequence[Any], passes: int = 3) -> Inside:
    """Measures layers and operations over `passes` passes over the items.

    The model runs eagerly here, compiled or not: a compiled graph has no layers.
    """
    count = _Count()
    with _at_layers(request.model, count.layers.append, count.layers.pop):
        for item in items:
            batch = request.transfer(request.input(item))
            with count:
                request.run(batch)
    times, trace = _profiled(request, items, passes, {name for _, name in count.work})
    limits = roofline(request.device, {w.dtype for w in count.work.values() if w.flops} or {"float32"})
    runs = len(items) * passes
    layers: defaultdict[str, _Sum] = defaultdict(_Sum)
    operations: defaultdict[str, _Sum] = defaultdict(_Sum)
    for (fqn, name), (calls, seconds) in times.operations.items():
        # what a call does, from the counted ones; the profiler says how often it is really called
        work = count.work.get((fqn, name), Work())
        scale = calls / work.calls if work.calls else 0.0
        for total in (layers[fqn], operations[name]):
            total.add(work, scale, limits)
        operations[name].take(seconds, calls)
    for fqn, (calls, seconds) in times.layers.items():
        layers[fqn].take(seconds, calls)
    classes = {fqn: type(m).__name__ for fqn, m in request.model.named_modules()}
    kinds: defaultdict[str, _Sum] = defaultdict(_Sum)
    for fqn, layer in layers.items():
        kinds[classes[fqn]].merge(layer)

    def rows(sums: Mapping[str, _Sum], kind: Mapping[str, str]) -> list[Row]:
        nonzero = [s.row(name, kind.get(name, ""), runs, times.forward) for name, s in sums.items() if s.seconds > 0]
        return sorted(nonzero, key=lambda row: -row.ms)

    return Inside(
        rows(kinds, {}),
        rows(layers, classes),
        rows(operations, {}),
        times.forward / runs * 1e3,
        limits,
        trace,
    )


@dataclass
class _Sum:
    """The sums of one row over all runs."""

    seconds: float = 0.0
    calls: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    least: float = 0.0  #: seconds at the device's limits
    compute: float = 0.0  #: of them, those that arithmetic sets
    dtypes: dict[str, float] = field(default_factory=dict)  #: by what is computed, or moved, in each

    def take(self, seconds: float, calls: float) -> None:
        self.seconds += seconds
        self.calls += calls

    def add(self, work: Work, scale: float, limits: Roofline) -> None:
        flops, moved = work.flops * scale, work.bytes * scale
        least, limit = limits.least_seconds(flops, moved, work.dtype)
        self.flops += flops
        self.bytes += moved
        self.least += least
        self.compute += least if limit == "compute" else 0.0
        self.dtypes[work.dtype] = self.dtypes.get(work.dtype, 0.0) + least

    def merge(self, other: _Sum) -> None:
        self.take(other.seconds, other.calls)
        self.flops += other.flops
        self.bytes += other.bytes
        self.least += other.least
        self.compute += other.compute
        for dtype, least in other.dtypes.items():
            self.dtypes[dtype] = self.dtypes.get(dtype, 0.0) + least

    def row(self, name: str, kind: str, runs: int, forward: float) -> Row:
        reached = self.least / self.seconds
        limit = "compute" if self.compute > self.least / 2 else "memory"
        return Row(
            name, kind, self.seconds / forward, self.seconds / runs * 1e3, self.calls / runs, self.flops / runs,
            self.bytes / runs, max(self.dtypes, key=lambda d: self.dtypes[d], default=""), reached,
            limit if reached >= OVERHEAD else "overhead",
        )  # fmt: skip


@dataclass
class _Times:
    """(calls, seconds) of all runs: of each (layer, operation), of each layer without the layers within it."""

    operations: dict[tuple[str, str], tuple[int, float]]
    layers: dict[str, tuple[int, float]]
    forward: float


def _profiled(request: Request, items: Sequence[Any], passes: int, names: set[str]) -> tuple[_Times, str]:
    """Times under torch.profiler, and its Chrome trace."""
    cuda = request.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    ranges: list[Any] = []

    def enter(fqn: str) -> None:
        ranges.append(record_function(_LAYER + (fqn or request.model._get_name())))
        ranges[-1].__enter__()

    profiler = torch.profiler.profile(activities=activities, acc_events=True)
    with _quiet():
        profiler.start()
    try:
        with _at_layers(request.model, enter, lambda: ranges.pop().__exit__(None, None, None)):
            for _ in range(passes):
                for item in items:
                    sample(request, item, around=record_function)
    finally:
        with _quiet():
            profiler.stop()
    root = _LAYER + request.model._get_name()
    operations: defaultdict[tuple[str, str], tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    layers: defaultdict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))

    def seconds(event: Any) -> float:
        return (event.device_time_total if cuda else event.cpu_time_total) / 1e6

    def add(totals: dict[Any, tuple[int, float]], key: Any, seconds: float, calls: int = 1) -> None:
        totals[key] = (totals[key][0] + calls, totals[key][1] + seconds)

    def walk(event: Any, layer: str) -> float:
        """Seconds of the layers within the event."""
        inner = 0.0
        for child in event.cpu_children:
            if child.name.startswith(_LAYER):
                fqn = "" if child.name == root else child.name.removeprefix(_LAYER)
                add(layers, fqn, seconds(child) - walk(child, fqn))
                inner += seconds(child)
            elif child.name in names:
                add(operations, (layer, child.name), seconds(child))
            else:
                inner += walk(child, layer)
        return inner

    forward = 0.0
    for event in profiler.events():
        if event.name in FORWARDS and event.device_type == torch.autograd.DeviceType.CPU:
            forward += seconds(event)
            add(layers, "", seconds(event) - walk(event, ""), calls=0)
    with tempfile.TemporaryDirectory() as folder:  # the profiler writes its trace once, to a file
        path = pathlib.Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return _Times(operations, layers, forward), path.read_text()


@contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's library writes lines about itself to stderr, which no level of its own turns off."""
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
