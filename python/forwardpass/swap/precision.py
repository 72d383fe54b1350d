"""The precisions that a swap offers: fixed presets with a version, so that a report, plan or checkpoint reproduces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..nn import Bf16Linear, Fp8Linear, Int8Linear, QuantizedLinear, W8A16Linear


@dataclass(frozen=True)
class Precision:
    """What a Linear-like layer becomes. A change of meaning is a new version beside the old one."""

    name: str
    version: int
    module: type[QuantizedLinear]
    options: Mapping[str, Any] = field(default_factory=dict)  #: arguments of `module.from_torch`
    takes_calibration: bool = False  #: whether calibration batches change the result


@dataclass(frozen=True)
class LayerPrecision:
    """A precision as one layer gets it: with calibration or without."""

    precision: Precision
    calibrated: bool = False


#: Newest version of a name last.
PRECISIONS = (
    # W8A8, activations asymmetric and dynamic per token, weights symmetric per channel; with calibration batches also
    # smoothing, error-compensated rounding of the weights.
    Precision("int8", 1, Int8Linear, {"symmetric": False}, takes_calibration=True),
    # e4m3 weights per channel, e4m3 activations dynamic per token.
    Precision("fp8", 1, Fp8Linear, {"scales": "row"}),
    # int8 weights per channel, activations as they are.
    Precision("w8a16", 1, W8A16Linear),
    # weights and activations bfloat16, sums fp32: for layers of a float32 model that 8 bits are too coarse for.
    Precision("bf16", 1, Bf16Linear),
)
MODULES = {p.module.__name__: p.module for p in PRECISIONS}


def find_precision(name: str, version: int | None = None) -> Precision:
    """The preset of this name, its newest version where none is given; ValueError in one sentence where there is
    none.
    """
    known = [p for p in PRECISIONS if p.name == name and version in (None, p.version)]
    if not known:
        wanted = repr(name) if version is None else f"{name!r} version {version}"
        have = ", ".join(f"{p.name!r} (version {p.version})" for p in PRECISIONS)
        raise ValueError(f"there is no precision {wanted}: use one of {have}")
    return known[-1]
