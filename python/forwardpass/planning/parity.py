"""How far a swapped model is from the original: at its output, and layer by layer with the kernel's error apart."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..common.batches import Forward, Output, device_of, eval_mode, evaluating, main_output, padding_mask, run, several
from ..common.models.compare import relative_error
from ..common.models.modules import hooked, plain_module
from ..common.printing.printed import Block, Printed, Table, page
from ..common.printing.text import count
from ..nn import QuantizedModule
from ..nn.mlp import quantised_layers
from ..swap import originals
from ..version import __version__
from .agreement import TASKS, task_of
from .criterion import cosines, norm_errors, samples
from .pictures import Images, PictureComparison, drawing, refuse_others

SCHEMA = "forwardpass.parity/1"


@dataclass
class Comparison:
    """Errors of a tensor against its reference, gathered over batches in fp64. A NaN on either side makes all of them
    NaN.
    """

    samples: int = 0
    cosine_min: float = math.inf  #: lowest of the samples
    relative_error: float = 0.0  #: L2 norm of the error over that of the reference, worst of the batches
    max_abs_error: float = 0.0
    norm_error: float = 0.0  #: by how much a sample's norm is off, relative to the reference's; the largest

    def add(self, actual: Tensor, expected: Tensor) -> None:
        """actual and expected [samples, n] of one batch."""
        if not expected.numel():
            return
        actual, expected = actual.double(), expected.double()
        self.samples += len(expected)
        self.cosine_min = -_largest(-self.cosine_min, -cosines(actual, expected).min().item())
        self.norm_error = _largest(self.norm_error, norm_errors(actual, expected).max().item())
        self.relative_error = _largest(self.relative_error, relative_error(actual, expected))
        self.max_abs_error = _largest(self.max_abs_error, (actual - expected).abs().max().item())

    @property
    def worst(self) -> float:
        """The relative error of the worst batch, or of the worst sample where that is larger: a cosine c is one of sqrt(1 - c²) at
        least. One wrong sample among many hardly shows in a batch's error, and a wrong scale in no cosine."""
        cosine = self.cosine_min
        of_a_sample = cosine if math.isnan(cosine) else math.sqrt(max(0.0, 1 - max(0.0, cosine) ** 2))
        return _largest(self.relative_error, of_a_sample)

    def to_json(self) -> dict[str, float | int | None]:
        """NaN and infinity, which JSON has not, are null; so is everything where nothing was compared."""
        return {k: v if k == "samples" or (self.samples and math.isfinite(v)) else None for k, v in vars(self).items()}

    def cells(self) -> tuple[str, str, str]:
        if not self.samples:
            return ("-", "-", "-")
        return f"{self.cosine_min:.6f}", f"{self.relative_error:.2e}", f"{self.max_abs_error:.2e}"


def _largest(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


@dataclass
class LayerParity:
    """One swapped layer, or module of experts, all three on the very input that it gets in the swapped model; a sample is a row
    (a token; of a convolution a pixel).

    `total` compares the layer with the original, `kernel` with the exact product of the same quantised operands
    (fp64), and `quantisation` that exact product with the original. No batch reached the layer where they have no
    samples.
    """

    fqn: str
    precision: str
    total: Comparison = field(default_factory=Comparison)
    quantisation: Comparison = field(default_factory=Comparison)
    kernel: Comparison = field(default_factory=Comparison)

    def add(
        self, module: QuantizedModule, inputs: tuple[Any, ...], y: Tensor, expected: Tensor, mask: Tensor | None
    ) -> None:
        """One call: what the layer made of its inputs, and what the original does; rows that the mask leaves out do not count."""
        y, expected, exact = (_rows(module.as_rows(t), mask) for t in (y, expected, module.exact(*inputs)))
        self.total.add(y, expected)
        self.quantisation.add(exact, expected)
        self.kernel.add(y, exact)


@dataclass(repr=False)
class ParityReport(Printed):
    """What `fp.parity` found. `print` shows a table, a notebook HTML."""

    output: Comparison
    layers: list[LayerParity]  #: in the model's order
    batches: int
    device: str
    compiled: Comparison | None = None  #: of the output of the model under torch.compile
    task: str | None = None  #: a name of agreement.TASKS
    agreement: dict[str, float | int] = field(default_factory=dict)  #: what the error means for the task
    images: PictureComparison | None = None  #: of the pictures that `images=` drew

    @property
    def unreached(self) -> list[str]:
        """Swapped layers that no batch reached, whose error nobody knows."""
        return [x.fqn for x in self.layers if not x.total.samples]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "versions": {"forwardpass": __version__, "torch": torch.__version__},
            "device": self.device,
            "batches": self.batches,
            **self.output.to_json(),
            "compiled": self.compiled and self.compiled.to_json(),
            "task": self.task,
            "agreement": {k: v if math.isfinite(v) else None for k, v in self.agreement.items()},
            "images": self.images and self.images.to_json(),
            "unreached": self.unreached,
            "measured": ["samples", "cosine_min", "norm_error", "relative_error", "max_abs_error", "compiled", "agreement",
                         "images", "layers"],
            "layers": [
                {"fqn": x.fqn, "precision": x.precision, **x.total.to_json(),
                 "quantisation": x.quantisation.to_json(), "kernel": x.kernel.to_json()}
                for x in self.layers
            ],
        }  # fmt: skip

    def worst_first(self) -> list[LayerParity]:
        """The layers by their `Comparison.worst`, the largest first; before all those that no batch reached, and NaN."""

        def key(layer: LayerParity) -> tuple[bool, float]:
            worst = layer.total.worst
            return bool(layer.total.samples), -math.inf if math.isnan(worst) else -worst

        return sorted(self.layers, key=key)

    def _blocks(self) -> Iterator[Block]:
        over = f"{count(self.output.samples, 'sample')} in {count(self.batches, 'batch')}"
        yield f"output over {over}: {_sentence(self.output)}"
        if unreached := self.unreached:
            more = ", …" if len(unreached) > 3 else ""
            yield (f"not compared: no batch reached {len(unreached)} of {count(len(self.layers), 'swapped layer')} "
                   f"({', '.join(unreached[:3])}{more})")  # fmt: skip
        if self.compiled is not None:
            yield f"under torch.compile: {_sentence(self.compiled)}"
        if self.task is not None:
            figures = (f"{k.replace('_', ' ')} {v:.6g}" for k, v in self.agreement.items())
            yield f"as {self.task.replace('_', ' ')}: {', '.join(figures)}"
        if self.images is not None:
            yield from self.images.blocks()
        rows = [(
            "layer, worst first", "precision", "lowest\ncosine", "relative\nerror", "largest\nerror",
            "quanti-\nsation", "kernel",
        )]  # fmt: skip
        for x in self.worst_first():
            rows.append((x.fqn, x.precision, *x.total.cells(), x.quantisation.cells()[1], x.kernel.cells()[1]))
        yield from ("", Table(rows, right=range(2, 7)), "")
        yield "worst first: by the relative error of a batch, or by that of a row, sqrt(1 - cosine²), where it is larger"
        yield "quantisation, kernel: the relative error that rounding alone brings, and the kernel's own"

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Writes one HTML file with the tables, and with the worst pictures side by side, which needs nothing else."""
        title = "How far the swapped model is from the original"
        body = f'<h1>{title}</h1><p class="soft">forwardpass {__version__}, torch {torch.__version__}, on {self.device}</p>'
        style = "table { margin: 1.5rem 0; } td { overflow-wrap: anywhere; }"
        text = page(f"{title}: forwardpass parity", [body, self._repr_html_()], style)
        pathlib.Path(path).write_text(text, encoding="utf-8")

    def save_plot(self, path: str | os.PathLike[str]) -> None:
        """Error by depth, and a map of blocks by layers of a block, as an image; needs matplotlib (extra `cli`)."""
        from . import plan_plots as plots

        plots.parity(self.layers, os.fspath(path))


def _sentence(comparison: Comparison) -> str:
    cosine, relative, largest = comparison.cells()
    norm = f"{comparison.norm_error:.2e}" if comparison.samples else "-"
    return f"lowest cosine {cosine}, norm off by {norm}, relative error {relative}, largest {largest}"


def parity(
    model: nn.Module,
    batches: Iterable[Any],
    reference: nn.Module | None = None,
    *,
    forward: Forward | None = None,
    output: Output | None = None,
    images: Images | None = None,
    task: str | None = "auto",
    compiled: bool = False,
) -> ParityReport:
    """Compares a swapped model with the original on `batches` (see `forwardpass.common.batches`), at its output and in every
    layer.

    Args:
        model: a swapped model. It runs in eval mode, uncompiled; its flags are put back.
        reference: the original model, where the swap did not keep it (keep=False, a loaded checkpoint). None: the
            originals that the swap kept, put in the layers' places for a second pass over each batch; where they wait
            on another device they visit one layer at a time, so that no second model is ever in memory.
        forward, output: forward(model, batch) and output(result), where the defaults do not fit.
        images: of a model that makes pictures: images(model, batch) draws with this model, from noise of a seed of its own, and
            returns a tensor [N, C, H, W], an array [N, H, W, C], or a list of pictures, in 0..1 or uint8. `batches` are then what
            it draws from, such as seeds or prompts. Pictures are the output that is compared, in PSNR and SSIM too (scikit-image),
            and in LPIPS where lpips and its weights are installed. The original draws the first batch twice: it must repeat.
        task: what the error means: "causal_lm" (perplexity, agreement of the next token; labels or input_ids), "embedding"
            (cosine and order of the samples), "classification" (agreement of the class; accuracy where there are labels),
            None; "auto": by the name of the model's class, as transformers calls them.
        compiled: compares the output of `torch.compile(model)` too, with the same originals.

    Raises:
        ValueError: there is no batch, nothing to compare with, or an output that is none of the task; images= with forward=,
            output=, task= or compiled=, without scikit-image, or that draws other pictures of the same batch.
        TypeError: `batches` is one batch and no iterable of them; a batch or a result is of a type that nothing is known about.

    Example:
        >>> report = fp.swap(model, precision="int8")
        >>> result = fp.parity(model, batches)
        >>> result.output.cosine_min > 0.999
        True
    """
    model = plain_module("parity", model)
    if images is not None:
        if compiled or task not in ("auto", None):
            name = "compiled" if compiled else "task"
            raise ValueError(
                f"parity compares pictures with images=, and {name}= is for outputs of a forward: drop {name}="
            )
        (forward, output), task = drawing(images, forward, output), None
    layers = quantised_layers(model)
    if not layers:
        raise ValueError(
            "parity compares a swapped model with its original, and this one is not swapped: call fp.swap first"
        )
    pairs = _originals(model, layers, reference)
    parities = {fqn: LayerParity(fqn, str(vars(m).get("precision", type(m).__name__))) for fqn, m in layers.items()}
    result = ParityReport(Comparison(), list(parities.values()), 0, str(device_of(next(iter(layers.values())))))
    select = output or main_output
    result.task = task_of(model, task)
    agreement = None if result.task is None else TASKS[result.task]()
    compiled_model: Any = torch.compile(model) if compiled else None
    result.compiled = Comparison() if compiled else None
    result.images = None if images is None else PictureComparison()
    original = model if reference is None else plain_module("parity", reference)
    for batch in several("batches", batches):
        with evaluating(model), _compared(layers, pairs, parities, batch):
            actual = select(run(model, batch, forward))
        with evaluating(original), nullcontext() if reference is not None else _originals_in_place(model):
            expected = select(run(original, batch, forward))
            if result.images is not None and not result.batches:
                refuse_others(expected, select(run(original, batch, forward)))
        if actual.shape != expected.shape:
            raise ValueError(f"the outputs have different shapes, {tuple(actual.shape)} and {tuple(expected.shape)}: pass "
                             f"output=fn(result) that gives tensors to compare")  # fmt: skip
        mask = padding_mask(batch, expected.shape[:-1])
        expected = expected.to(actual.device)
        result.output.add(samples(actual, mask), samples(expected, mask))
        if result.images is not None:
            result.images.add(actual, expected, result.batches)
        if agreement is not None:
            try:
                agreement.add(actual, expected, batch)
            except ValueError:
                if task != "auto":
                    raise
                result.task = agreement = None  # its class is called like that, its output is something else
        if compiled_model is not None and result.compiled is not None:
            with eval_mode(model), torch.inference_mode():
                actual = select(run(compiled_model, batch, forward))
            result.compiled.add(samples(actual, mask), samples(expected, mask))
        result.batches += 1
    if agreement is not None:
        result.agreement = agreement.values()
    return result


def _originals(model: nn.Module, layers: Mapping[str, nn.Module], reference: nn.Module | None) -> dict[str, nn.Module]:
    """The original of every swapped layer."""
    if reference is not None:
        reference = plain_module("parity", reference)
        if quantised_layers(reference):
            raise ValueError("the reference is itself swapped: pass the original model")
        names = dict(reference.named_modules())
        if missing := [fqn for fqn in layers if fqn not in names]:
            raise ValueError(
                f"the reference has no layer {missing[0]}: pass the model that was swapped, as it was before"
            )
        return {fqn: names[fqn] for fqn in layers}
    swapped = originals.find(model)
    if swapped is None or not all(s.restorable for s in swapped.all()):
        why = "was loaded or copied" if swapped is None else "was swapped with keep=False"
        raise ValueError(f"this model {why} and has no originals to compare with: pass reference=, the original model")
    by_fqn = {x.fqn: x.original for s in swapped.all() for x in s.layers}
    if missing := [fqn for fqn in layers if fqn not in by_fqn]:
        raise ValueError(
            f"{missing[0]} was not put there by fp.swap and has no original: pass reference=, the original model"
        )
    return by_fqn


@contextmanager
def _compared(
    layers: Mapping[str, QuantizedModule], pairs: Mapping[str, nn.Module], parities: dict[str, LayerParity], batch: Any
) -> Iterator[None]:
    """Within it every call of a swapped layer is compared with its original, on the same input."""

    def compare(fqn: str, module: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> None:
        assert isinstance(module, QuantizedModule)
        with _on_device(pairs[fqn], y.device):
            expected = module.activated(pairs[fqn](*inputs))
        parities[fqn].add(module, inputs, y, expected, padding_mask(batch, module.as_rows(y).shape[:-1], fqn))

    with hooked(layers.items(), after=compare, every=True):
        yield


def _rows(t: Tensor, mask: Tensor | None) -> Tensor:
    return (t if mask is None else t[mask.to(t.device)]).reshape(-1, t.shape[-1])


@contextmanager
def _on_device(original: nn.Module, device: torch.device) -> Iterator[None]:
    moved = originals.Moved([original], device)
    try:
        yield
    finally:
        moved.undo()


@contextmanager
def _originals_in_place(model: nn.Module) -> Iterator[None]:
    """Within it the model computes with its originals; one that is kept elsewhere is on the device only while it is
    called.
    """
    swapped = originals.find(model)
    assert swapped is not None
    elsewhere = [
        (originals.Moved((), device), device, layer.original)
        for layer in (x for s in swapped.all() for x in s.layers)
        if device_of(layer.original) != (device := device_of(layer.replacement))
    ]
    with ExitStack() as stack:
        for moved, _, _ in elsewhere:
            stack.callback(moved.undo)  # where a forward fails half-way
        stack.enter_context(
            hooked(
                (((moved, device), module) for moved, device, module in elsewhere),
                before=lambda place, module, _: place[0].add(module, place[1]),
                after=lambda place, *_: place[0].undo(),
            )
        )
        for s in swapped.all():
            s.undo(model)
            stack.callback(s.put, model)
        yield
