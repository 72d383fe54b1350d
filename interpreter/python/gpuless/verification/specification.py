"""The reference file: what a candidate has to compute, and from what. Whoever asks for the kernel writes it."""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: kinds of inputs that WITHOUT may leave out (inputs.py)
FAMILIES = ("random", "again", "zeros", "negative", "shifted", "outliers", "denormals", "nan", "infinity", "strided", "offset",
            "overlap")  # fmt: skip
#: of sizes that are chosen from a range, the largest power of two that is tried
LARGEST_POWER = 1 << 10


@dataclass(frozen=True)
class Specification:
    """What a reference file says.

    Attributes:
        reference: plain torch. It gets the inputs on the CPU, in their own dtype and in float64.
        inputs: from sizes to the arguments: tensors on the CPU, and numbers.
        sizes: what `inputs` is called with, one after the other; the first is that of hostile inputs.
        without: family of inputs -> why the kernel need not take them.
        precision: the unit roundoff of the arithmetic that is allowed, None for the inputs' own.
        allowed: operations of torch that the candidate may leave to torch, beside those that move data.
    """

    path: pathlib.Path
    reference: Callable[..., Any]
    inputs: Callable[..., Any]
    sizes: Sequence[Mapping[str, int]]
    without: Mapping[str, str] = field(default_factory=dict)
    precision: float | None = None
    allowed: Sequence[str] = ()


#: a name for PRECISION -> the unit roundoff
PRECISIONS = {"tf32": 2.0**-11, "float16": 2.0**-11, "bfloat16": 2.0**-8, "approximate": 2.0**-11}


def trusted(path: pathlib.Path, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls what the reference file defines: its mistakes are told in a sentence, and are none of the candidate's."""
    try:
        return function(*args, **kwargs)
    except Exception as e:
        raise ValueError(f"{path} fails with {type(e).__name__}: {e}") from e


def read_specification(path: pathlib.Path) -> Specification:
    """Runs the file, which is trusted as any test is."""
    spec = importlib.util.spec_from_file_location(f"_reference_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"there is no reference {path}")
    module = importlib.util.module_from_spec(spec)
    trusted(path, spec.loader.exec_module, module)
    for name in ("reference", "inputs"):
        if not callable(getattr(module, name, None)):
            raise ValueError(f"{path} needs a function {name}: reference(*inputs) in plain torch, and inputs(**sizes)")
    without = dict(getattr(module, "WITHOUT", {}))
    if unknown := without.keys() - set(FAMILIES):
        raise ValueError(f"{path}: WITHOUT names {', '.join(sorted(unknown))}, and there are {', '.join(FAMILIES)}")
    if not all(isinstance(why, str) and why for why in without.values()):
        raise ValueError(f"{path}: WITHOUT gives a reason for each kind of inputs that it leaves out")
    precision = getattr(module, "PRECISION", None)
    if isinstance(precision, str):
        if precision not in PRECISIONS:
            raise ValueError(f"{path}: PRECISION is a number, or one of {', '.join(PRECISIONS)}, not {precision!r}")
        precision = PRECISIONS[precision]
    return Specification(
        path, module.reference, module.inputs, chosen_sizes(getattr(module, "SIZES", [{}])), without, precision,
        tuple(getattr(module, "ALLOWED", ())),
    )  # fmt: skip


def chosen_sizes(sizes: Mapping[str, Any] | Sequence[Mapping[str, int]]) -> list[dict[str, int]]:
    """Those of a list, or some from ranges: {"rows": (1, 64)} is from 1 to 64. Powers of two come first, then primes, then the
    smallest, then one size small and the others large."""
    if not isinstance(sizes, Mapping):
        return [dict(s) for s in sizes] or [{}]
    ranges = {name: (r, r) if isinstance(r, int) else (int(r[0]), int(r[1])) for name, r in sizes.items()}
    if wrong := [name for name, (low, high) in ranges.items() if not 0 <= low <= high]:
        raise ValueError(f"SIZES: {', '.join(wrong)} is a range (from, to)")
    powers = {name: max(low, _power(min(high, LARGEST_POWER))) for name, (low, high) in ranges.items()}
    primes = {name: _prime(low, high, skip) for skip, (name, (low, high)) in enumerate(ranges.items())}
    smallest = {name: low for name, (low, _) in ranges.items()}
    choices = [powers, primes, smallest]
    for k, name in enumerate(ranges):
        one_small = {n: (low if n == name else max(low, high - k)) for n, (low, high) in ranges.items()}
        choices.append(one_small)
    return [s for k, s in enumerate(choices) if s not in choices[:k]]


def _power(n: int) -> int:
    """The largest power of two that is no larger."""
    return 1 << max(0, n.bit_length() - 1)


def _prime(low: int, high: int, skip: int) -> int:
    """A large prime of the range, another one for each size; the largest number where the range has none."""
    primes = [n for n in range(high, max(low, 2) - 1, -1) if all(n % d for d in range(2, int(n**0.5) + 1))][: skip + 1]
    return primes[-1] if primes else high
