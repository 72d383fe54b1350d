"""The reference file: what a candidate has to compute, and from what. Whoever asks for the kernel writes it."""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from .models import ModelFile, is_model_file

#: kinds of inputs that WITHOUT may leave out (inputs.py)
FAMILIES = ("random", "again", "zeros", "negative", "shifted", "outliers", "denormals", "nan", "infinity", "strided", "offset",
            "overlap")  # fmt: skip
#: the WITHOUT of KernelBench's format, whose get_inputs() says how the inputs lie in memory
LAYOUTS_OF_MODELS = dict.fromkeys(FAMILIES[-3:], "get_inputs() makes contiguous tensors of their own")
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
        models: of a file in KernelBench's format: its Model and constants, None in other files.
        not_covered: what the choice of sizes leaves out.
    """

    path: pathlib.Path
    reference: Callable[..., Any]
    inputs: Callable[..., Any]
    sizes: Sequence[Mapping[str, int]]
    without: Mapping[str, str] = field(default_factory=dict)
    precision: float | None = None
    allowed: Sequence[str] = ()
    models: ModelFile | None = None
    not_covered: Sequence[str] = ()

    def at(self, sizes: Mapping[str, int]) -> Specification:
        """For inputs of these sizes: the reference is a Model that was made for them."""
        return self if self.models is None else replace(self, reference=partial(self.models.reference, sizes))


@dataclass(frozen=True)
class Additions:
    """What the command's options say beside the file, which stays as it is.

    Attributes:
        sizes: in place of the file's: from and to.
        allowed, without: beside the file's.
        precision: in place of the file's.
    """

    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    allowed: Sequence[str] = ()
    without: Mapping[str, str] = field(default_factory=dict)
    precision: float | str | None = None


#: a name for PRECISION -> the unit roundoff
PRECISIONS = {"tf32": 2.0**-11, "float16": 2.0**-11, "bfloat16": 2.0**-8, "approximate": 2.0**-11}


def trusted(path: pathlib.Path, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls what the reference file defines: its mistakes are told in a sentence, and are none of the candidate's."""
    try:
        return function(*args, **kwargs)
    except Exception as e:
        raise ValueError(f"{path} fails with {type(e).__name__}: {e}") from e


def read_specification(path: pathlib.Path, additions: Additions | None = None) -> Specification:
    """Runs the file, which is trusted as any test is."""
    more = additions or Additions()
    spec = importlib.util.spec_from_file_location(f"_reference_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"there is no reference {path}")
    module = importlib.util.module_from_spec(spec)
    trusted(path, spec.loader.exec_module, module)
    models = ModelFile(path) if is_model_file(module) else None
    without = {**getattr(module, "WITHOUT", LAYOUTS_OF_MODELS if models else {}), **more.without}
    if unknown := without.keys() - set(FAMILIES):
        raise ValueError(f"{path}: WITHOUT names {', '.join(sorted(unknown))}, and there are {', '.join(FAMILIES)}")
    if not all(isinstance(why, str) and why for why in without.values()):
        raise ValueError(f"{path}: WITHOUT gives a reason for each kind of inputs that it leaves out")
    precision = more.precision if more.precision is not None else getattr(module, "PRECISION", None)
    if isinstance(precision, str):
        if precision not in PRECISIONS:
            raise ValueError(f"{path}: PRECISION is a number, or one of {', '.join(PRECISIONS)}, not {precision!r}")
        precision = PRECISIONS[precision]
    allowed = (*getattr(module, "ALLOWED", ()), *more.allowed)
    if models:
        sizes, not_covered = _sizes_of_models(path, models, more.sizes)
        return Specification(
            path, models.reference, models.inputs, sizes, without, precision, allowed, models, not_covered
        )
    for name in ("reference", "inputs"):
        if not callable(getattr(module, name, None)):
            raise ValueError(
                f"{path} needs a function {name}: reference(*inputs) in plain torch, and inputs(**sizes); or a class Model, "
                "get_inputs() and get_init_inputs()"
            )
    ranges = getattr(module, "SIZES", [{}])
    if more.sizes:
        named = ranges if isinstance(ranges, Mapping) else {}
        _known(path, more.sizes, named)
        ranges = {**named, **more.sizes}
    return Specification(path, module.reference, module.inputs, chosen_sizes(ranges), without, precision, allowed)


def _known(path: pathlib.Path, names: Iterable[str], sizes: Collection[str]) -> None:
    if unknown := [name for name in names if name not in sizes]:
        raise ValueError(
            f"--size: {path} has no {', '.join(unknown)}; it has {', '.join(sizes) or 'no sizes with names'}"
        )


def _sizes_of_models(
    path: pathlib.Path, models: ModelFile, asked: Mapping[str, tuple[int, int]]
) -> tuple[list[dict[str, int]], list[str]]:
    """Ranges as they are in other files; the file's constants elsewhere, halved until a CPU can execute the kernel."""
    _known(path, asked, models.constants)
    halved = dict(models.constants)
    if left := [name for name in halved if name not in asked]:
        start = _runs(path, models, chosen_sizes({**halved, **asked}))
        halved |= {name: n for name, n in models.halved(start, [*asked]).items() if name in left}
    changed = [f"{name}={n}" for name, n in models.constants.items() if halved[name] != n]
    not_covered = [f"the file's own {', '.join(changed)}, which were halved for a CPU (--size)"] if changed else []
    sizes, refused = [], []
    for choice in chosen_sizes({**halved, **asked}):
        if why := models.why_not(choice):
            refused.append(f"{', '.join(f'{k}={n}' for k, n in choice.items())}: {why}")
        else:
            sizes.append(choice)
    if not sizes:
        raise ValueError(f"{path} cannot be verified at {'; '.join(refused)}")
    return sizes, not_covered + refused


def _runs(path: pathlib.Path, models: ModelFile, choices: list[dict[str, int]]) -> dict[str, int]:
    """The first sizes that the model takes."""
    errors = []
    for sizes in choices:
        try:
            models.cost(sizes)
            return sizes
        except Exception as e:
            errors.append(f"{type(e).__name__}: {e}")
    raise ValueError(
        f"{path} fails on tensors without values, which say how large its sizes may be (give each of them by --size): {errors[0]}"
    )


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
