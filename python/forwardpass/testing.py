"""What tests and benchmarks share: cases, awkward data, poisoned memory, and comparisons that say where they failed."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .dispatch import Operation

#: [..., K] shapes that break kernels: single elements, single columns, non-multiples of every vector, block and tile.
AWKWARD_SHAPES = ((1,), (1, 1), (239, 1), (799, 3), (113, 203), (2, 5, 130), (3, 1999), (3, 4097), (2, 16391))
EMPTY_SHAPES = ((0, 7), (2, 0, 16))
#: [M, K] x [N, K]: single elements, both sides of every tile and vector, the depths at which an accumulator is promoted.
GEMM_FACTORS: dict[str, tuple[Any, ...]] = {
    "m": (1, 2, 3, 16, 17, 64, 65, 128, 200, 257),
    "n": (1, 16, 33, 130, 256, 272),
    "k": (1, 7, 64, 130, 256, 515, 4100),
}
#: of `laid_out`
LAYOUTS = ("aligned", "apart", "contiguous", "shifted")
#: Multiply-accumulates of an interpreted case: about a second of it on one core.
MOST_MACS = 2**26


#: For `pairwise`: what Triton compiles its GEMM for, and its quantisation of rows, of the values of these factors.
GEMM_KERNEL: dict[str, Callable[[Any], Any]] = {
    "m": lambda m: (m > 16) + (m > 64),
    "k": lambda k: k > 2048,  # split
    "activation": lambda name: name is not None and name.endswith("_mul"),  # gated
}
QUANTIZE_KERNEL: dict[str, Callable[[Any], Any]] = {
    "k": lambda k: (max(4, (k - 1).bit_length()), k == 1, k % 16 == 0),
    **dict.fromkeys(("x_dtype", "static", "symmetric", "channel_scale"), str),
}


Constants = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def compiled_for(*kernels: Mapping[str, Callable[[Any], Any]]) -> list[Constants]:
    """The `kernels` of `pairwise`, where each constant is of one factor."""

    def constants(rules: Mapping[str, Callable[[Any], Any]]) -> Constants:
        return lambda row: {name: rules[name](value) for name, value in row.items() if name in rules}

    return [constants(rules) for rules in kernels]


def few_macs(row: Mapping[str, Any]) -> bool:
    """For `pairwise`: whether sizes taken from GEMM_FACTORS, perhaps not all of them yet, stay below MOST_MACS."""
    return row.get("m", 1) * row.get("n", 1) * row.get("k", 1) <= MOST_MACS


def pairwise(
    factors: Mapping[str, Sequence[Any]],
    allowed: Callable[[Mapping[str, Any]], bool] = lambda row: True,
    kernels: Sequence[Constants] = (),
) -> list[dict[str, Any]]:
    """A small list of combinations in which every pair of values of two factors occurs: greedy and deterministic.

    `allowed` is asked about every row as it grows, and must let each pair and what is chosen last pass. With `kernels` the list
    is up to a half longer, of few kernels: for each that a case launches, what a row, whole or not, tells of its constants.
    """
    names = list(factors)
    position = {name: i for i, name in enumerate(names)}
    uncovered = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    compiled: list[list[Mapping[str, Any]]] = [[] for _ in kernels]  # for each kernel, the constants of the rows

    def values(row: dict[str, int]) -> dict[str, Any]:
        return {n: factors[n][i] for n, i in row.items()}

    def gain(row: dict[str, int], name: str, value: int) -> int:
        """How many uncovered pairs `value` makes with what the row has; a kernel that is new costs as much as three."""
        here, pairs = position[name], 0
        for m, w in row.items():
            pairs += ((name, value, m, w) if here < position[m] else (m, w, name, value)) in uncovered
        if not kernels:
            return pairs
        whole = values({**row, name: value})
        constants = [kernel(whole).items() for kernel in kernels]
        return pairs - 3 * sum(not any(k.items() >= c for k in known) for known, c in zip(compiled, constants))

    rows = []
    for pair in sorted(uncovered):
        if pair not in uncovered:
            continue
        a, i, b, j = pair
        row = {a: i, b: j}
        for n in names:
            if n not in row:
                choices = [v for v in range(len(factors[n])) if allowed(values({**row, n: v}))]
                row[n] = max((gain(row, n, v), -v) for v in choices)[1] * -1
        uncovered -= {(a, row[a], b, row[b]) for a, b in itertools.combinations(names, 2)}
        rows.append(values({n: row[n] for n in names}))
        for kernel, known in zip(kernels, compiled):
            if (constants := kernel(rows[-1])) not in known:
                known.append(constants)
    return rows


def leads(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of `pairwise` with a `lead` [...] in place of their `m`: two dimensions where m is 200, and empty ones besides."""
    for row in rows:
        m = row.pop("m")
        yield {"lead": (2, 100) if m == 200 else (m,), **row}
    for lead in ((), (0,), (2, 0)):
        yield {**row, "lead": lead}


def laid_out(x: Tensor, layout: str, device: str | torch.device = "cpu") -> Tensor:
    """x [..., K] in one of the layouts that a GEMM meets, with what is not its own poisoned as in `apart`: rows at multiples
    of 16 bytes ("aligned"), anywhere ("apart"), without a gap ("contiguous"), or aligned but for where they begin
    ("shifted")."""
    k, step = x.shape[-1], 16 // x.element_size()
    if layout == "shifted":
        wide = torch.cat([x[..., :1], x], -1)
        return apart(wide, device, step + -(k + 1) % step)[..., 1:]
    return apart(x, device, {"aligned": step + -k % step, "apart": 5, "contiguous": 0}[layout])


def awkward(shape: Sequence[int], dtype: torch.dtype, seed: int = 0, device: str | torch.device = "cpu") -> Tensor:
    """Random values [..., K] with what breaks quantisation: an outlier column, a biased one, rows of zeros, of denormals, of
    extremes. Its rows stand apart in memory, and every byte between them is NaN: whoever reads beyond a row shows it."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tuple(shape), generator=g)
    rows = x.reshape(-1, shape[-1]) if x.numel() else x
    if x.numel():
        rows[:, rows.shape[1] // 3] *= 37.0
        rows[:, rows.shape[1] // 2] += 5.0
        for row, value in ((1, 0.0), (2, 3e-7), (3, 6e4)):
            if rows.shape[0] > row + 1:
                rows[row] = rows[row].clamp(-1, 1) * value
    return apart(x.to(dtype), device)


def apart(x: Tensor, device: str | torch.device = "cpu", padding: int = 5) -> Tensor:
    """A copy of x [..., K] whose rows stand `padding` elements apart, with NaN (or the largest integer) between them; as it is
    with padding = 0."""
    if x.dim() < 2 or padding == 0:
        return x.to(device)
    filler = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max
    flat = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(max(1, x[..., :1].numel()), x.shape[-1])
    wide = torch.full(
        (flat.shape[0], flat.shape[1] + padding), filler, dtype=torch.float32 if x.is_floating_point() else x.dtype
    )
    wide = wide.to(x.dtype)
    wide[:, : flat.shape[1]].view(x.dtype).copy_(flat)
    wide = wide.to(device)
    strides = [1] * x.dim()
    step = wide.shape[1]
    for d in range(x.dim() - 2, -1, -1):
        strides[d] = step
        step *= max(1, x.shape[d])
    return wide.as_strided(x.shape, strides)


def benchmark_cases(op: Operation) -> list[Any]:
    """An operation's BENCHMARK_CASES; where a package has several operations, a case's `op` names its own."""
    cases = importlib.import_module(f"{op.package}.cases").BENCHMARK_CASES
    return [c for c in cases if getattr(c, "op", op.name) == op.name]


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Within it the compiled ops fill their outputs with NaN or -1 before the kernel runs: what nobody wrote shows."""
    torch.ops.forwardpass._set_poison(True)
    try:
        yield
    finally:
        torch.ops.forwardpass._set_poison(False)


def _report(label: str, actual: Tensor, expected: Tensor, wrong: Tensor) -> None:
    if not bool(wrong.any()):
        return
    index = tuple(wrong.nonzero()[0].tolist())
    raise AssertionError(f"{label}: {int(wrong.sum())} of {wrong.numel()} differ, first at {index}: "
                         f"got {actual[index].item()}, expected {expected[index].item()}")  # fmt: skip


def assert_equal(actual: Tensor, expected: Tensor, label: str = "result") -> None:
    """Same shape, strides, dtype and values; NaN equals NaN."""
    for name, a, b in (("shape", tuple(actual.shape), tuple(expected.shape)), ("dtype", actual.dtype, expected.dtype),
                       ("strides", actual.stride(), expected.stride())):  # fmt: skip
        if a != b and not (name == "strides" and actual.numel() == 0):
            raise AssertionError(f"{label}: {name} {a}, expected {b}")
    g, e = (t.cpu().double() if t.dtype.is_floating_point else t.cpu() for t in (actual, expected))
    _report(label, g, e, (g != e) & ~((g != g) & (e != e)))


def assert_close(actual: Tensor, expected: Tensor, bound: Tensor, label: str = "result") -> None:
    """|actual - expected| <= bound element by element, expected and bound in fp64; NaN only where expected has one, and infinity
    where expected is, or is beyond what actual's dtype holds."""
    if actual.shape != expected.shape:
        raise AssertionError(f"{label}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    g, e, b = actual.cpu().double(), expected.cpu().double(), bound.cpu().double()
    largest = torch.finfo(actual.dtype).max if actual.dtype.is_floating_point else torch.inf
    overflow = g.isinf() & (g.sign() == e.sign()) & (e.abs() + b >= largest)
    ok = ((g - e).abs() <= b) | (g == e) | ((g != g) & (e != e)) | overflow
    _report(label, g, e, ~ok)


def assert_quantized_close(
    actual: Tensor, values: Tensor, bound: Tensor, scale: Tensor, label: str = "q", zero_point: Tensor | None = None
) -> None:
    """actual quantises `values` (fp64, broadcast against scale) by the scale that came with it: each element is the nearest step
    of the value or of one within `bound` of it, so it differs by one step only where the value is that close to a tie."""
    s = scale.cpu().double()
    shift = zero_point.cpu().double() if zero_point is not None else torch.zeros((), dtype=torch.float64)
    g, v = actual.cpu().double(), values.cpu().double()
    if actual.dtype == torch.int8:
        least = -127.0 if zero_point is None else -128.0
        steps = [((v + d) / s).round() + shift for d in (-bound.cpu().double(), bound.cpu().double())]
        low, high = (t.clamp(least, 127.0) for t in steps)
        wrong = (g < low) | (g > high)
    else:
        ends = [
            ((v + d) / s).clamp(-448, 448).float().to(actual.dtype).double()
            for d in (-bound.cpu().double(), bound.cpu().double())
        ]
        wrong = (g < ends[0]) | (g > ends[1])
    _report(label, g, v / s + shift, wrong)
