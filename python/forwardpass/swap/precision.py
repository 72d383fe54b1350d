"""The precisions that a swap offers: fixed presets with a version, so that a report, plan or checkpoint reproduces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from ..common.models.patterns import Pattern, patterns
from ..formats.loaded import TakenOver
from ..nn import Bf16Linear, Experts, Fp8Linear, Int8Conv2d, Int8Linear, QuantizedLinear, QuantizedModule, W8A16Linear
from ..nn.quantized_experts import experts_operation
from ..ops.common.rotation import SIZES

if TYPE_CHECKING:
    from ..proofs.walker import Leaf


@dataclass(frozen=True)
class Precision:
    """What a Linear-like layer becomes. A change of meaning is a new version beside the old one.

    With `rotate`, 64, 128 or 256, and a preset's name alone: that preset with inputs and weights rotated, up to so many columns
    at a time. "int8" has such a form, "int8_rotated" (256), "int8_rotated_128" and "int8_rotated_64".

    Raises:
        ValueError: there is no rotated form of that preset, or of that size; more than a name is given beside rotate.

    Example:
        >>> fp.Precision("int8", rotate=64).name
        'int8_rotated_64'
        >>> report = fp.swap(model, fp.Precision("int8", rotate=256))
    """

    name: str
    version: int = 1
    module: type[QuantizedLinear] = QuantizedLinear
    options: Mapping[str, Any] = field(default_factory=dict)  #: arguments of `module.from_torch`
    takes_calibration: bool = False  #: whether calibration batches change the result of a Linear-like layer
    experts: str | None = None  #: the `kind` of `fp.nn.Experts` that modules of experts become; None: they stay
    convolution: type[Int8Conv2d] | None = None  #: what an nn.Conv2d becomes; None: it stays
    rotate: InitVar[int | None] = None

    def __post_init__(self, rotate: int | None) -> None:
        if rotate is None:
            return
        others = self.version, self.module, self.options, self.takes_calibration, self.experts, self.convolution
        if others != (1, QuantizedLinear, {}, False, None, None):
            raise ValueError(f"rotate={rotate!r} goes with the name of a preset alone: give a precision of your own "
                             f'options={{"rotate": {rotate!r}}}')  # fmt: skip
        preset = _rotated(self.name, rotate)
        for x in fields(preset):
            object.__setattr__(self, x.name, getattr(preset, x.name))

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

    @property
    def rotate(self) -> int | None:
        """The most columns that are rotated together."""
        return self.precision.options.get("rotate")

    def calibration_of(self, arguments: Mapping[int | None, Mapping[str, Any]] | None) -> Mapping[str, Any]:
        """The arguments of `from_torch`, from a layer's `calibration_arguments` by rotation; none where it is not calibrated."""
        return arguments[self.rotate] if self.calibrated and arguments else {}


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
    Precision(
        "int8_rotated", 1, Int8Linear, {"symmetric": False, "rotate": 256}, takes_calibration=True, experts="int8"
    ),
    # e4m3 weights per channel, e4m3 activations dynamic per token.
    Precision("fp8", 1, Fp8Linear, {"scales": "row"}, experts="fp8"),
    # int8 weights per channel, activations as they are.
    Precision("w8a16", 1, W8A16Linear, experts="w8a16"),
    # weights and activations bfloat16, sums fp32: for layers of a float32 model that 8 bits are too coarse for.
    Precision("bf16", 1, Bf16Linear),
]
#: What a layer of another library holds in 8 bits already, as it is. No choice for a model of floats.
STORED = Precision("stored", 1, TakenOver)


#: One preset; by pattern of layers' names, of which the first that matches decides; or as a function of a layer's name and module.
Preset = str | Precision
ByHand = Preset | Mapping[str, Preset] | Callable[[str, nn.Module], Preset | None]


class Presets:
    """Which precision each layer gets, of what a user gives for `precision`."""

    def __init__(self, precision: ByHand) -> None:
        self.patterns: tuple[Pattern, ...] = ()  #: those that say it
        self._of: Callable[[str, nn.Module], Preset | None]
        self.is_function = not isinstance(precision, Preset | Mapping)
        if isinstance(precision, Preset):
            preset = known(precision)
            self._of = lambda fqn, module: preset
        elif isinstance(precision, Mapping):
            self.patterns = patterns("precision", precision)
            pairs = [*zip(self.patterns, map(known, precision.values()))]
            self._of = lambda fqn, module: next((preset for p, preset in pairs if p.matches(fqn)), None)
        elif callable(precision):
            self._of = precision
        else:
            raise TypeError(
                f"precision is a name, a preset, a dict of patterns and these, or a function, not {precision!r}"
            )

    def names(self, fqn: str) -> bool:
        """Whether it says this of the layer, and not of all that nothing else is said of."""
        first = next((p for p in self.patterns if p.matches(fqn)), None)
        return self.is_function or (first is not None and first.text not in ("*", "**"))

    def find(self, fqn: str, module: nn.Module) -> Precision | None:
        """None for a layer that stays as it is. ValueError where there is none of that name."""
        preset = self._of(fqn, module)
        return None if preset is None else known(preset)


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
    forms = (form for p in (*PRECISIONS, STORED) for form in (p, *_smaller(p)))
    matches = [p for p in forms if p.name == name and version in (None, p.version)]
    if not matches:
        label = repr(name) if version is None else f"{name!r} version {version}"
        have = ", ".join(f"{p.name!r} (version {p.version})" for p in PRECISIONS)
        raise ValueError(f"there is no precision {label}: use one of {have}")
    return matches[-1]


def _smaller(preset: Precision) -> list[Precision]:
    """The same of fewer columns that are rotated together."""
    most = preset.options.get("rotate") or 0
    sizes = (size for size in SIZES if size < most)
    return [replace(preset, name=f"{preset.name}_{n}", options={**preset.options, "rotate": n}) for n in sizes]


def _rotated(name: str, size: int) -> Precision:
    """The rotated form of a preset."""
    for form in (f"{name}_rotated", f"{name}_rotated_{size}"):
        try:
            preset = find_precision(form)
        except ValueError:
            continue
        if preset.options.get("rotate") == size:
            return preset
    raise ValueError(f"there is no precision {name!r} with rotate={size!r}: use "
                     f'"int8" with one of {", ".join(map(str, SIZES))}, or register one whose options have rotate')  # fmt: skip


def known(preset: Preset) -> Precision:
    """A preset by its name, or itself; ValueError where plans and checkpoints could not tell it by its name."""
    if not isinstance(preset, Precision):
        return find_precision(preset)
    try:
        registered = find_precision(preset.name, preset.version) == preset
    except ValueError:
        registered = False
    if not registered:
        raise ValueError(f"the precision {preset.name!r} (version {preset.version}) is not registered: call "
                         "fp.register_precision with it first")  # fmt: skip
    return preset
