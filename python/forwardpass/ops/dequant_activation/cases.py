"""Shapes and options of the epilogue, for tests and benchmarks; the GEMMs' cases use them too."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...testing import apart, assert_close, assert_equal, assert_quantized_close, laid_out, pairwise
from ..common.activations import EXACT, GATED, PLAIN, element_bound, is_gated, separate_gate_up
from ..common.epilogue import of_samples
from ..common.quantized_rows import E4M3, FLOATS
from . import reference

ULP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclass(frozen=True)
class EpilogueCase:
    """Options of an epilogue, without the accumulators."""

    a_scale: str | None = "row"  # or "tensor"
    b_scale: str | None = "column"  # or "tensor"
    bias: torch.dtype | None = torch.float32
    activation: str | None = None
    out_dtype: torch.dtype = torch.float32
    out_scale: str = "tensor"  # or "column"; with 8-bit outputs
    zero_point: str | None = None  # None, "row" or "tensor"
    residual: str | None = None  # or a layout of `laid_out`; of float outputs alone
    ada_gate: bool = False  # with a residual

    def arguments(
        self, lead: tuple[int, ...], columns: int, step: float, device: str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        """Everything but the accumulators and b_sum; `step` is about what one accumulator unit is worth: outputs are then O(1)."""
        g = torch.Generator().manual_seed(seed + 2)

        def positive(*shape: int) -> Tensor:
            return (torch.rand(shape, generator=g) + 0.5).to(device)

        def scale(name: str | None, shape: tuple[int, ...], step: float) -> Tensor | None:
            return None if name is None else positive(*((1,) if name == "tensor" else shape)) * step

        outputs = columns // 2 if is_gated(self.activation) else columns
        zero_shape = {None: None, "row": lead, "tensor": (1,)}[self.zero_point]
        return {
            "a_scale": scale(self.a_scale, lead, step),
            "b_scale": scale(self.b_scale, (columns,), 1.0),
            "bias": None if self.bias is None else torch.randn(columns, generator=g).to(device, self.bias),
            "activation": self.activation,
            "out_dtype": self.out_dtype,
            "out_scale": None
            if self.out_dtype in FLOATS
            else positive(*((outputs,) if self.out_scale == "column" else (1,))) / 40,
            "a_zero_point": None
            if zero_shape is None
            else torch.randint(-128, 128, zero_shape, generator=g, dtype=torch.int32).to(device),
        }

    def residual_of(self, lead: tuple[int, ...], columns: int, device: str = "cpu", seed: int = 0) -> Tensor | None:
        """That of accumulators [*lead, columns]."""
        if self.residual is None or self.out_dtype not in FLOATS:
            return None
        outputs = columns // 2 if is_gated(self.activation) else columns
        return residual((*lead, outputs), self.out_dtype, self.residual, device, seed)

    def added_of(
        self, lead: tuple[int, ...], columns: int, device: str = "cpu", seed: int = 0
    ) -> tuple[Tensor | None, ...]:
        """Its residual and, if there is one, the gate of the samples of accumulators [*lead, columns]."""
        added = self.residual_of(lead, columns, device, seed)
        if added is None or not self.ada_gate:
            return (added,)
        return added, ada_gate(added)


def residual(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str | None, device: str = "cpu", seed: int = 0
) -> Tensor | None:
    """As a residual stream is: with an outlier column, beside which sums lose bits, and a row of negative zeros."""
    if layout is None:
        return None
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 3))
    rows = x.reshape(-1, shape[-1])
    if x.numel():
        rows[:, shape[-1] // 3] *= 60.0
        rows[len(rows) // 2] = -0.0
    return laid_out(x.to(dtype), layout, device)


def ada_gate(added: Tensor, seed: int = 0) -> Tensor:
    """A gate for each sample of a residual [B, ..., N], as models have them: columns of one tensor, here between NaN."""
    samples, columns = added.shape[0], added.shape[-1]
    pad = 16 // added.element_size() if added.data_ptr() % 16 == 0 else 1
    wide = torch.full((samples, pad + columns + 3 * pad), torch.nan, dtype=added.dtype, device=added.device)
    gate = torch.randn((samples, columns), generator=torch.Generator().manual_seed(seed + 4))
    wide[:, pad : pad + columns] = gate.to(added.device, added.dtype)
    return wide[:, pad : pad + columns]


#: None, and layouts of `laid_out`: rows of the output's stride, of another one, and at no multiple of 16 bytes
RESIDUALS = (None, "contiguous", "aligned", "apart")
#: of `compiled_for`
RESIDUAL_KERNEL: dict[str, Callable[[Any], Any]] = {"residual": lambda layout: layout is not None}


def epilogue_factors(zero_points: tuple[str | None, ...] = (None, "row", "tensor")) -> dict[str, tuple[Any, ...]]:
    """But for the residual, which not every product takes."""
    return {
        "a_scale": ("row", "tensor"),
        "b_scale": ("column", "tensor"),
        "bias": (None, torch.float32, torch.float16, torch.bfloat16),
        "activation": (None, *PLAIN, *GATED),
        "out_dtype": (*FLOATS, torch.int8, E4M3),
        "out_scale": ("tensor", "column"),
        "zero_point": zero_points,
    }


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    acc_dtype: torch.dtype = torch.int32
    epilogue: EpilogueCase = EpilogueCase()

    def arguments(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """In the schema's order. Accumulators up to 2^24 and beyond: some are not exact in fp32. In 16 bits up to 2^15."""
        g = torch.Generator().manual_seed(seed)
        acc = torch.randint(-(2**15), 2**15, self.shape, generator=g, dtype=torch.int32)
        if acc.numel():
            acc.view(-1)[::7] *= 2**11
        narrow = self.acc_dtype.itemsize == 2
        if self.acc_dtype != torch.int32:
            acc = (acc / 2.0**11 if narrow else acc + 0.37).to(self.acc_dtype)
        lead, n = self.shape[:-1], self.shape[-1]
        e = self.epilogue.arguments(lead, n, 2.0**-3 if narrow else 2.0**-14, device, seed)
        b_sum = None
        if e["a_zero_point"] is not None:
            b_sum = torch.randint(-9000, 9000, (n,), generator=g, dtype=torch.int32).to(device)
        return (apart(acc, device), e["a_scale"], e["b_scale"], e["bias"], e["activation"], e["out_dtype"], e["out_scale"],
                e["a_zero_point"], b_sum, self.epilogue.residual_of(lead, n, device, seed))  # fmt: skip

    def bytes(self) -> int:
        """Accumulators once, outputs once."""
        n = 1
        for d in self.shape:
            n *= d
        return self.acc_dtype.itemsize * n + n * self.epilogue.out_dtype.itemsize // (
            2 if is_gated(self.epilogue.activation) else 1
        )


def assert_epilogue_matches(actual: Tensor, specification: Callable[..., Tensor], args: tuple[Any, ...]) -> None:
    """Bit for bit without an activation and behind an exact one; behind another one within that one's bound and a rounding."""
    args = tuple(a.cpu() if isinstance(a, Tensor) else a for a in args)
    expected = specification(*args)
    named = dict(zip(inspect.signature(specification).parameters, args))
    activation, out_dtype = named["activation"], named["out_dtype"]
    if activation in EXACT:
        return assert_equal(actual, expected)
    assert actual.stride() == expected.stride()
    # the fp32 values before the activation are equal bit for bit, so only the activation and what follows it is off
    first = named.get("residual_first", False)  # the residual is in those values
    without = ("out_scale",) if first else ("out_scale", "residual", "ada_gate")
    plain = named | {"activation": None, "out_dtype": torch.float32} | {name: None for name in without if name in named}
    y = specification(*plain.values())
    gate, up = separate_gate_up(y, -1) if is_gated(activation) else (y, None)
    exact = specification(*(plain | {"activation": activation, "out_dtype": torch.float64}).values())
    bound = element_bound(activation, gate, up)
    if (gates := named.get("ada_gate")) is not None:
        gates = of_samples(gates, exact).double()
        exact, bound = exact * gates, (bound + ULP[torch.float32] * exact.abs()) * gates.abs()
    if (added := named.get("residual")) is not None and not first:
        bound = bound + ULP[torch.float32] * exact.abs()  # which the sum may cancel
        exact = exact + added.double()
        bound = bound + ULP[torch.float32] * exact.abs()
    if out_dtype in ULP:
        least = {torch.float16: 2.0**-25}.get(out_dtype, 0.0)
        return assert_close(actual, exact, bound * (1 + ULP[out_dtype]) + ULP[out_dtype] * exact.abs() + least)
    assert_quantized_close(actual, exact, bound + 2.0**-23 * exact.abs(), named["out_scale"])


def assert_matches(actual: Tensor, args: tuple[Any, ...]) -> None:
    """actual is what every backend returns for args."""
    assert_epilogue_matches(actual, reference.dequant_activation, args)


def cases() -> Iterator[Case]:
    """Every pair of options at some awkward shape; gated ones at the nearest that the contract takes."""
    factors = {
        "shape": ((1,), (1, 1), (239, 1), (799, 3), (113, 203), (2, 5, 130), (3, 1040), (0, 7), (2, 0, 16)),
        "acc_dtype": (torch.int32, *FLOATS),
        **epilogue_factors(),
        "a_scale": ("row", "tensor", None),
        "b_scale": ("column", "tensor", None),
        "residual": RESIDUALS,
    }
    for row in pairwise(factors):
        shape, acc_dtype = row.pop("shape"), row.pop("acc_dtype")
        if is_gated(row["activation"]):
            shape = (*shape[:-1], -(-shape[-1] // 16) * 16)
        if acc_dtype != torch.int32:
            row["zero_point"] = None
        yield Case(shape, acc_dtype, EpilogueCase(**row))


BENCHMARK_CASES = tuple(
    Case(shape, epilogue=EpilogueCase(activation=activation, out_dtype=dtype, zero_point="row"))
    for shape in ((1024, 384), (1024, 1536), (4096, 4096))
    for activation, dtype in ((None, torch.float32), ("gelu", torch.bfloat16))
)
