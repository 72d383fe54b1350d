"""A swapped model's layers, each by its GPU kernels, beside the CPU's and the plain-torch reference (extra `cli`)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common.models.compare import relative_error
from ..dispatch import interpreted, only_reference_on, use_backend
from ..nn import QuantizedLinear

#: rows of a text that run: as many as tell a layer's kernels from one another, in seconds without a GPU
ROWS = 24


@dataclasses.dataclass
class Layer:
    """Layers of one kind and one shape, of which the first was run.

    Attributes:
        name: of that one; count: how many there are.
        rows, shape: of what went in, and of its weights.
        errors: backend -> relative L2 error to the reference.
        launches, warp_instructions: of its CUDA kernels; 0 on a GPU, which does not count.
        modelled_us: the time that those would take, modelled from counts and data sheets; None on a GPU.
        findings: what the checks of gpuless had to say.
    """

    name: str
    count: int
    rows: int
    shape: str
    errors: dict[str, float]
    launches: int = 0
    warp_instructions: int = 0
    modelled_us: float | None = None
    findings: list[str] = dataclasses.field(default_factory=list)


@torch.inference_mode()
def examine(model: nn.Module, names: Sequence[str], batch: dict[str, Tensor], arch: str | None) -> list[Layer]:
    """Runs each distinct layer among `names` on what it gets of this batch.

    Args:
        arch: the GPU that gpuless stands in for; None: the model is on a GPU, whose kernels run.
    """
    kinds: dict[tuple[Any, ...], list[str]] = {}
    inputs: dict[str, Tensor] = {}
    for name, x in _inputs(model, names, batch):
        key = (type(model.get_submodule(name)), _shape(model.get_submodule(name)), x.shape[-1])
        kinds.setdefault(key, []).append(name)
        inputs[name] = x.reshape(-1, x.shape[-1])[:ROWS]
    return [_run(model.get_submodule(same[0]), same, inputs[same[0]], arch) for same in kinds.values()]


def _inputs(model: nn.Module, names: Sequence[str], batch: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    seen: list[tuple[str, Tensor]] = []
    with contextlib.ExitStack() as stack:
        for name in names:

            def note(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                if args and isinstance(args[0], Tensor):
                    seen.append((name, args[0]))

            stack.callback(model.get_submodule(name).register_forward_pre_hook(note).remove)
        model(**batch)
    yield from dict(seen).items()


def _shape(layer: nn.Module) -> str:
    """[N, K] of each weight."""
    weights = (b for n, b in layer.state_dict().items() if n.rpartition(".")[2] == "qweight" and b.dim() == 2)
    return " ".join(f"{n}x{k}" for n, k in (w.shape for w in weights))


def _run(layer: nn.Module, same: list[str], x: Tensor, arch: str | None) -> Layer:
    with use_backend("reference"):
        expected = layer(x)
    row = Layer(same[0], len(same), len(x), _shape(layer), {})
    if arch is None:
        with use_backend("cuda"):
            row.errors["cuda"] = relative_error(layer(x), expected)
        return row
    operations = [m.operation for m in layer.modules() if isinstance(m, QuantizedLinear) and m.operation]
    if not any(only_reference_on(o, x.device, x.dtype) for o in operations):
        row.errors["cpu"] = relative_error(layer(x), expected)
    with interpreted.interpret(arch, counters=True, findings="collect") as gpu, use_backend("cuda"):
        row.errors["cuda"] = relative_error(layer(x), expected)
    row.launches, row.warp_instructions = (gpu.counters[name] for name in ("launches", "warp_instructions"))
    row.modelled_us = sum(m.seconds for m in gpu.model()) * 1e6
    row.findings = [str(f) for f in gpu.findings if f.breaks == "hardware"]
    return row
