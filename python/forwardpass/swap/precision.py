"""The precisions that a swap offers: fixed presets with a version, so that a report, plan or checkpoint reproduces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from ..common.patterns import Pattern, patterns
from ..formats.loaded import TakenOver
from ..nn import Bf16Linear, Experts, Fp8Linear, Int8Conv2d, Int8Linear, QuantizedLinear, QuantizedModule, W8A16Linear
from ..nn.experts import experts_operation

if TYPE_CHECKING:
    from ..proofs.walker import Leaf


@dataclass(frozen=True)
class Precision:
    """What a Linear-like layer becomes. A change of meaning is a new version beside the old one."""

    name: str
    version: int
    module: type[QuantizedLinear]
    options: Mapping[str, Any] = field(default_factory=dict)  #: arguments of `module.from_torch`
    takes_calibration: bool = False  #: whether calibration batches change the result of a Linear-like layer
    experts: str | None = None  #: the `kind` of `fp.nn.Experts` that modules of experts become; None: they stay
    convolution: type[Int8Conv2d] | None = None  #: what an nn.Conv2d becomes; None: it stays

    def operation(self, leaf: Leaf | None = None) -> str | None:
        """What its module of a layer, by default of a Linear, calls for its products; None: torch's own."""
        if leaf is not None and leaf.is_experts and self.experts:
            return experts_operation(self.experts)
        if leaf is not None and leaf.is_convolution and self.convolution:
            return self.convolution.operation
        return self.module.operation


@dataclass(frozen=True)
class LayerPrecision:
    """A precision as one layer gets it: with calibration or without."""

    precision: Precision
    calibrated: bool = False


#: Where a layer holds what it became while its model was loaded.
EARLY = "_quantised_early"


@dataclass
class Early:
    """What a layer became while its model was loaded (see `while_loading`): it is only to be put in its place."""

    precision: LayerPrecision
    module: (
        QuantizedModule | None
    )  #: None once a swap has taken it, which frees it where it becomes part of another one
    float_bytes: int  #: that the layer had

    @staticmethod
    def of(layer: nn.Module) -> Early | None:
        early: Early | None = vars(layer).get(EARLY)
        return early

    def take(self) -> QuantizedModule:
        module, self.module = self.module, None
        assert module is not None
        return module


#: The newest version of a name comes last.
PRECISIONS = [
    # W8A8, activations asymmetric and dynamic per token, weights symmetric per channel; with calibration batches also
    # smoothing, error-compensated rounding of the weights. Convolutions symmetric, dynamic per sample; with calibration batches one
    # scale for all samples.
    Precision(
        "int8", 1, Int8Linear, {"symmetric": False}, takes_calibration=True, experts="int8", convolution=Int8Conv2d
    ),
    # The same of weights and activations that a Hadamard matrix multiplies, up to 256 columns at a time: for outliers.
    Precision("int8_rotated", 1, Int8Linear, {"symmetric": False, "rotate": 256}, experts="int8"),
    # e4m3 weights per channel, e4m3 activations dynamic per token.
    Precision("fp8", 1, Fp8Linear, {"scales": "row"}, experts="fp8"),
    # int8 weights per channel, activations as they are.
    Precision("w8a16", 1, W8A16Linear, experts="w8a16"),
    # weights and activations bfloat16, sums fp32: for layers of a float32 model that 8 bits are too coarse for.
    Precision("bf16", 1, Bf16Linear),
]
#: What a layer of another library holds in 8 bits already, as it is. No choice for a model of floats.
STORED = Precision("stored", 1, TakenOver)


#: By name; by pattern of layers' names, of which the first that matches decides; or as a function of a layer's name and module.
ByHand = str | Mapping[str, str] | Callable[[str, nn.Module], str | None]


class Presets:
    """Which precision each layer gets, of what a user gives for `precision`."""

    def __init__(self, precision: ByHand) -> None:
        self.patterns: tuple[Pattern, ...] = ()  #: those that say it
        self._of: Callable[[str, nn.Module], str | None]
        self.is_function = not isinstance(precision, str | Mapping)
        if isinstance(precision, str):
            find_precision(precision)
            self._of = lambda fqn, module: precision
        elif isinstance(precision, Mapping):
            self.patterns = patterns("precision", precision)
            names = [find_precision(name).name for name in precision.values()]
            pairs = [*zip(self.patterns, names)]
            self._of = lambda fqn, module: next((name for p, name in pairs if p.matches(fqn)), None)
        elif callable(precision):
            self._of = precision
        else:
            raise TypeError(f"precision is a name, a dict of patterns and names, or a function, not {precision!r}")

    def names(self, fqn: str) -> bool:
        """Whether it says this of the layer, and not of all that nothing else is said of."""
        first = next((p for p in self.patterns if p.matches(fqn)), None)
        return self.is_function or (first is not None and first.text not in ("*", "**"))

    def find(self, fqn: str, module: nn.Module) -> Precision | None:
        """None for a layer that stays as it is. ValueError where there is none of that name."""
        name = self._of(fqn, module)
        return None if name is None else find_precision(name)


def register_precision(precision: Precision) -> None:
    """Makes a precision of your own known to `fp.swap(model, precision.name)`, `fp.plan(candidates=)`, plans and checkpoints.

    Its module derives from `fp.nn.QuantizedLinear`, and has `from_torch(linear, *, activation=None, **options)`, which takes
    the activation behind the layer where there is one. What a call applies is what the attribute `activation` names then: where a
    run disproves that the activation is the layer's alone, fp.swap sets it to None. A process that reads a plan or a checkpoint
    with it registers it first.

    Raises:
        TypeError: the module does not derive from `fp.nn.QuantizedLinear`.
        ValueError: there is a precision of this name and version, or a module of this class name, already; `experts` is no kind.

    Example:
        >>> fp.register_precision(fp.Precision("fp8_block", 1, fp.nn.Fp8Linear, {"scales": "block"}, experts="fp8_block"))
        >>> report = fp.swap(model, "fp8_block")
    """
    module = precision.module
    if not (isinstance(module, type) and issubclass(module, QuantizedLinear) and hasattr(module, "from_torch")):
        raise TypeError(
            f"a precision's module derives from fp.nn.QuantizedLinear and has from_torch, unlike {module!r}"
        )
    if precision.experts not in (None, *Experts.kinds):
        raise ValueError(
            f"there is no kind {precision.experts!r} of fp.nn.Experts: use one of {', '.join(Experts.kinds)}, or None"
        )
    if any((p.name, p.version) == (precision.name, precision.version) for p in (*PRECISIONS, STORED)):
        raise ValueError(f"there is a precision {precision.name!r} of version {precision.version} already: use another name, or "
                         "a higher version")  # fmt: skip
    if modules().get(module.__name__, module) is not module:
        raise ValueError(f"there is another module class {module.__name__} already: use another name")
    PRECISIONS.append(precision)


def modules() -> dict[str, type[QuantizedModule]]:
    """The module classes of all precisions, by the name that a checkpoint has."""
    classes: list[type[QuantizedModule]] = [p.module for p in PRECISIONS]
    return {c.__name__: c for c in (*classes, Experts, *(p.convolution for p in PRECISIONS if p.convolution))}


def find_precision(name: str, version: int | None = None) -> Precision:
    """The preset of this name, its newest version where none is given; ValueError in one sentence where there is
    none.
    """
    matches = [p for p in (*PRECISIONS, STORED) if p.name == name and version in (None, p.version)]
    if not matches:
        label = repr(name) if version is None else f"{name!r} version {version}"
        have = ", ".join(f"{p.name!r} (version {p.version})" for p in PRECISIONS)
        raise ValueError(f"there is no precision {label}: use one of {have}")
    return matches[-1]
