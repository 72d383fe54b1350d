"""Every row of every table of GEMM kernels (csrc/kernels/gemm) at its limits, one less and one more.

Limits that take too much memory are asked of the row itself. Each row runs at the size of its tile, and with as many experts as
its list has room for.
"""

import dataclasses
import importlib
import itertools

import numpy
import pytest
import torch
from gemm_tables import INVALID_VALUE, KINDS, LIBRARY, SUCCESS, is_within, rows, select
from rotation import in_parts

import forwardpass as fp
from forwardpass import dispatch
from forwardpass.ops.dequant_activation.cases import EpilogueCase

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(not LIBRARY.exists(), reason="built without CUDA kernels, or without the interpreter"),
]

MULTIPROCESSORS = 2
#: where the kernels of an architecture run
DEVICES = {80: "sm_80", 89: "sm_89", 90: "sm_90a"}
K = 48
CHANNELS = 64  # of a convolution, the fewest that wgmma takes
#: outputs that are made in every layout of the epilogue, with a residual and without one
OUTPUTS = (
    (torch.bfloat16, "contiguous"),
    (torch.float32, None),
    (torch.float16, "aligned"),
    (torch.float32, "apart"),
    (torch.bfloat16, None),
)


@dataclasses.dataclass(frozen=True)
class Row:
    number: int
    kind: str
    arch: int
    tile: tuple[int, int]
    experts: int

    def __str__(self):
        experts = f", {self.experts} experts" if self.experts else ""
        return f"{self.kind} {DEVICES[self.arch]} {self.tile[0]}x{self.tile[1]}{experts}"


def table():
    if not LIBRARY.exists():
        return []
    return [Row(i, KINDS[k.kind], k.arch, (k.tile_m, k.tile_n), k.limits.experts) for i, k in enumerate(rows())]


def limits_of(row):
    return list(rows())[row.number].limits


def test_there_are_rows_of_every_kind():
    kinds = {(r.kind, r.arch, r.experts > 0) for r in table()}
    assert {(kind, 90, experts) for kind in ("int8", "fp8") for experts in (False, True)} <= kinds
    assert {("int8", 80, True), ("fp8", 89, True), ("w8a16", 80, True), ("w8a16", 90, False)} <= kinds
    assert len(set(table())) == len(table())  # no two of a kind have the same tile


def test_a_row_computes_what_is_within_its_limits_and_nothing_beyond():
    for row in table():
        limits, (tile_m, tile_n) = limits_of(row), row.tile
        one = {"m": 1, "n": 1, "k": 1, "experts": 1 if row.experts else 0}
        assert is_within(row.number, **one), row
        assert not is_within(row.number, **{**one, "experts": 0 if row.experts else 1}), row
        at = {"m": limits.rows, "n": limits.columns, "k": limits.k}
        if row.experts:
            at["experts"] = row.experts
        for name, value in at.items():
            assert is_within(row.number, **{**one, name: value - 1}), (row, name)
            assert is_within(row.number, **{**one, name: value}), (row, name)
            assert not is_within(row.number, **{**one, name: value + 1}), (row, name)
        if limits.rows < 2**16 * tile_m:
            continue
        tile_rows = 2**12 - (1 if row.experts else 0)  # an expert's last tile may be ragged
        for more, right in ((-1, True), (0, False)):  # 2^31 tiles
            assert is_within(row.number, **{**one, "m": (tile_rows + more) * tile_m, "n": 2**19 * tile_n}) == right, row


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize(("kind", "arch"), [("int8", 80), ("fp8", 89), ("w8a16", 80), ("int8", 90), ("fp8", 90)])
def test_a_shape_beyond_every_row_is_refused(kind, arch, experts):
    device, rows, products = (MULTIPROCESSORS, arch), 2**31 - 1, max(experts, 1)
    for m, n, k in (
        (16, 16, 2**30),
        (rows // products + 1, 16, 16),
        (16, rows // products + 1, 16),
        (2**28, 2**20, 16),
    ):
        assert select(kind, device, m, n, k, experts=experts)[0] == INVALID_VALUE, (m, n, k)
    assert select(kind, device, 16, 16, 2**30 - 1, experts=experts)[0] == SUCCESS
    if experts:
        assert select(kind, device, 1, 16, 16, experts=512)[0] == SUCCESS
        assert select(kind, device, 1, 16, 16, experts=513)[0] == INVALID_VALUE


def test_the_refusal_is_a_sentence():
    x, w = (
        torch.from_numpy(numpy.zeros((1, 2**30), t)) for t in ("int16", "int8")
    )  # which nothing touches, torch neither
    x = x.view(torch.bfloat16)
    with (
        fp.interpret("sm_80"),
        pytest.raises(RuntimeError, match=r"fewer than 2\^31 rows and 2\^30 columns.*split them"),
    ):
        torch.ops.forwardpass.w8a16_gemm_cuda(x, w, torch.ones(1), None, None)


def run(row, case):
    """Whether the row's kernel ran, and right."""
    cases = importlib.import_module(type(case).__module__)
    args = case.arguments()
    with (
        fp.interpret(DEVICES[row.arch], multiprocessors=MULTIPROCESSORS, counters=True) as device,
        fp.use_backend("cuda"),
    ):
        got = dispatch.operations[operation(row)](*args)
    assert device.findings == []
    cases.assert_matches(got, args)
    names = [k.kernel for k in device.kernels()]
    tiles = [f"TileELi{a}ELi{b}E" for a, b in (row.tile, row.tile[::-1])]  # swap-AB
    return any(("gemv_kernel" if row.tile[0] == 4 else tile) in name for name in names for tile in tiles)


def operation(row):
    return row.kind if row.kind == "int8_conv2d" else f"{row.kind}{'_grouped' if row.experts else ''}_gemm"


def chooses(row, m, n, experts=0):
    k = CHANNELS if row.kind == "int8_conv2d" else K
    error, choice = select(row.kind, (MULTIPROCESSORS, row.arch), m, n, k, experts=experts)
    kernel = choice.kernel.contents if error == SUCCESS else None
    return kernel is not None and (kernel.arch, (kernel.tile_m, kernel.tile_n)) == (row.arch, row.tile)


def cases_of(row):
    """Those of a tile's size, one row or column more and less; of as many experts as there may be, and one less, whose mean is a
    tile's rows as most rows are no expert's."""
    case = importlib.import_module(f"forwardpass.ops.{operation(row)}.cases").Case
    tile_m, tile_n = row.tile
    if not row.experts:
        rows = (
            (tile_m, 2 * tile_m) if tile_m >= 128 else (tile_m,)
        )  # of two tiles below each other, wide ones take fewer rounds
        sizes = [(m + more, tile_n) for m in rows for more in (-1, 0, 1)]
        sizes += [(m, tile_n + more) for m in rows for more in (-1, 1)]
        outputs = itertools.cycle(OUTPUTS)
        return [one_product(row, case, m, n, *next(outputs)) for m, n in sizes if chooses(row, m, n)]
    found, mean, n = [], tile_m // 2 + 1, 16 if tile_n <= 128 else tile_n
    for experts in (row.experts - 1, row.experts):
        counts = tuple(e % 3 for e in range(experts))
        if chooses(row, mean, n, experts):
            found.append(case(counts, n, K, beyond=mean * experts - sum(counts)))
    return found


def one_product(row, case, m, n, out_dtype, residual):
    if row.kind == "w8a16":
        return case((m,), n, K, residual=residual)
    if row.kind == "int8_conv2d":
        epilogue = EpilogueCase(out_dtype=out_dtype, residual=residual)
        return case((1, 1, 2 * m - 1), CHANNELS, n, (1, 1), (1, 2), (0, 0), epilogue=epilogue)
    return case(m, n, K, EpilogueCase(out_dtype=out_dtype, residual=residual))


@pytest.mark.every(3)
@pytest.mark.parametrize("row", in_parts(table(), 6))
def test_every_row_is_right_at_its_limits(row):
    tried = cases_of(row)
    assert len(tried) >= 2, "too few of the shapes take this row"
    assert all(run(row, case) for case in tried)
