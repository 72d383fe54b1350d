"""TMA that gathers and scatters four rows of a matrix, against numpy, and what is reported when it is misused."""

import shutil
import subprocess

import numpy as np
import pytest
import torch
from ptx import MBARRIER, WAIT, assert_refused, copied, finding, integers, run
from rows import row, spellings
from tensor_maps import in_shared_memory, noise, raw

import gpuless

pytestmark = pytest.mark.interpreted

BYTES = "mbarrier::complete_tx::bytes"
GATHERS = (
    f"cp.async.bulk.tensor.2d.shared::cluster|shared::cta.global.tile::gather4.{BYTES}.L2::cache_hint?",
    f"cp.async.bulk.tensor.2d.tile::gather4.shared::cluster|shared::cta.global.{BYTES}.L2::cache_hint?",
    f"cp.async.bulk.tensor.2d.shared::cluster.global.tile::gather4.{BYTES}.multicast::cluster."
    "cta_group::1|cta_group::2?.L2::cache_hint?",
    f"cp.async.bulk.tensor.2d.shared::cluster|shared::cta.global.tile::gather4.{BYTES}.cta_group::1|cta_group::2."
    "L2::cache_hint?",
)
SCATTERS = (
    "cp.async.bulk.tensor.2d.global.shared::cta.tile::scatter4.bulk_group.L2::cache_hint?",
    "cp.async.bulk.tensor.2d.tile::scatter4.global.shared::cta.bulk_group.L2::cache_hint?",
)
PREFETCH = "cp.async.bulk.prefetch.tensor.2d.L2.global.tile::gather4.L2::cache_hint?"
CTA = [op for op in spellings(GATHERS[0]) if "shared::cta" in op]
SCATTER, ENOUGH = spellings(SCATTERS[0])[-1], WAIT.format(0)


def operands(op, place, shared, barrier="%s"):
    more = ", %h1" * ("multicast" in op) + ", %rd9" * ("cache_hint" in op)
    place = "{" + ", ".join(str(c) for c in place) + "}"
    if "scatter4" in op:
        return f"{op} [%a1, {place}], [{shared}]{more};"
    if "prefetch" in op:
        return f"{op} [%a0, {place}]{more};"
    return f"{op} [{shared}], [%a0, {place}], [{barrier}]{more};"


def gather(place, size, base=1024, op=CTA[0], wait=ENOUGH, after=""):
    return f"""{MBARRIER}
    mov.b64 %rd9, 0; mov.b16 %h1, 1;
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%s], {size};
    @%p0 {operands(op, place, f"%s+{base}")}
    {wait}
    {copied(f"%s+{base}", "%a1", size // 4, "out")}
    {after}"""


def scatter(place, size, base=1024, op=SCATTER, fence="fence.proxy.async;", wait="", after=""):
    return f"""{copied("%a0", f"%s+{base}", size // 4, "in")}
    {fence}
    bar.sync 0;
    mov.b64 %rd9, 0;
    setp.eq.u32 %p0, %t, 0;
    @%p0 {operands(op, place, f"%s+{base}")}
    @%p0 cp.async.bulk.commit_group;
    @%p0 cp.async.bulk.wait_group{wait} 0;
    {after}"""


CASES = [
    # columns of the matrix, dtype, columns of a box, swizzle, first column, rows (of 20)
    (64, torch.float16, 64, 128, 0, (3, 19, 0, 7)),
    (64, torch.float16, 64, 128, 5, (3, 3, 20, -1)),
    (40, torch.bfloat16, 32, 64, -3, (2147483647, 4, -2147483648, 5)),
    (33, torch.int8, 32, 32, 7, (19, 18, 17, 16)),
    (16, torch.float32, 8, 0, 12, (0, 1, 2, 3)),
    (24, torch.int32, 32, 128, 0, (9, 8, 20, 10)),
]


def rows_of(x, width, column, rows):
    """Zeros where the matrix has no such element."""
    box = np.zeros((4, width), x.dtype)
    for k, r in enumerate(rows):
        for n in range(width):
            if 0 <= r < x.shape[0] and 0 <= column + n < x.shape[1]:
                box[k, n] = x[r, column + n]
    return box


@row(*GATHERS, PREFETCH)
@pytest.mark.parametrize(("columns", "dtype", "width", "swizzle", "column", "rows"), CASES)
@pytest.mark.parametrize("arch", ["sm_100a", "sm_120"])
def test_gather(columns, dtype, width, swizzle, column, rows, arch):
    x = noise((20, columns), dtype)
    expected = rows_of(raw(x), width, column, rows)
    y = torch.zeros(expected.nbytes // 4, dtype=torch.int32)
    boxes = gpuless.tensor_map(x, (1, width), swizzle)
    for seed in range(4):
        for op in (*CTA, *(op for p in (*GATHERS[1:2],) for op in spellings(p) if arch == "sm_100a" or "cta" in op)):
            for base in (128, 1024):
                run(gather((column, *rows), expected.nbytes, base, op), boxes, y.zero_(), arch=arch, seed=seed)
                assert np.array_equal(y.numpy().view(np.uint8), in_shared_memory(expected, base, swizzle))


@pytest.mark.parametrize("op", [op for p in GATHERS for op in spellings(p)])
def test_gather_spellings(op):
    x, y = noise((20, 64), torch.float16), torch.zeros(128, dtype=torch.int32)
    prefetch = operands(spellings(PREFETCH)[-1], (0, 1, 2, 3, 99), "")
    if "cta_group::2" in op:  # which needs a cluster of two to run
        gpuless.Module(text([operands(op, (0, 1, 2, 3, 4), "%s+1024")]), arch="sm_100a")["k0"].launch(1, 32, [])
        return
    run(prefetch + gather((0, 1, 5, 3, 99), 512, op=op), gpuless.tensor_map(x, (1, 64), 0), y, arch="sm_100a")
    assert np.array_equal(y.numpy().view(np.int16).reshape(4, 64), rows_of(raw(x), 64, 0, (1, 5, 3, 99)))


@row(*SCATTERS)
@pytest.mark.parametrize(("columns", "dtype", "width", "swizzle", "column", "rows"), CASES)
def test_scatter(columns, dtype, width, swizzle, column, rows):
    if len(set(rows)) < 4:
        rows = (3, 4, *rows[2:])
    source, y = noise((4, width), dtype), noise((20, columns), dtype)
    expected = raw(y).copy()
    for k, r in enumerate(rows):
        for n in range(width):
            if 0 <= r < 20 and 0 <= column + n < columns:
                expected[r, column + n] = raw(source)[k, n]
    before, boxes = y.clone(), gpuless.tensor_map(y, (1, width), swizzle)
    bytes_in = torch.from_numpy(in_shared_memory(raw(source), 1024, swizzle)).view(torch.int32)
    for seed, op in enumerate(op for p in SCATTERS for op in spellings(p)):
        y.copy_(before)
        run(scatter((column, *rows), source.nbytes, op=op), bytes_in, boxes, arch="sm_100a", seed=seed)
        assert np.array_equal(raw(y), expected)


@pytest.mark.parametrize("seed", range(5))
def test_hazards(seed):
    """What other bulk copies are reported for: each beside its right twin, which the tests above are."""
    x, y = noise((20, 64), torch.float16), torch.zeros(256, dtype=torch.int32)
    boxes, how = gpuless.tensor_map(x, (1, 64), 128), dict(arch="sm_100a", seed=seed)
    place = (0, 1, 2, 3, 4)
    assert finding(gather(place, 512, wait=""), boxes, y, **how).kind in ("in_flight", "race")
    assert finding(gather(place, 508), boxes, y, **how).kind in ("mbarrier", "deadlock")
    f = finding(scatter(place, 512, fence=""), y, boxes, **how)
    assert f.kind == "race" and "fence.proxy.async" in f.message
    again = "bar.sync 0;\n@%p0 st.shared.b32 [%s+{}], 1;"
    run(scatter(place, 512, wait=".read", after=again.format(1024 + 508)), y, boxes, **how)
    late = scatter(place, 512, after=again.format(1024 + 508)).replace("@%p0 cp.async.bulk.wait_group 0;", "")
    assert finding(late, y, boxes, **how).kind in ("race", "in_flight")
    assert finding(gather(place, 512, base=4096 - 256), boxes, y, **how).kind == "out_of_bounds"
    assert finding(gather(place, 512, base=1024 + 64), boxes, y, **how).kind == "misaligned"


def test_misuse():
    x, y = noise((20, 64), torch.float16), torch.zeros(256, dtype=torch.int32)
    f = finding(gather((0, 1, 2, 3, 4), 512), gpuless.tensor_map(x, (4, 64), 0), y, arch="sm_100a")
    assert f.kind == "illegal" and "boxDim[1] of the tensor map must be 1, and it is 4" in f.message
    f = finding(gather((0, 1, 2, 3, 4), 512), gpuless.tensor_map(noise((9, 20, 64), torch.int8), (1, 1, 64), 0), y,
                arch="sm_100a")  # fmt: skip
    assert f.kind == "illegal"


@pytest.mark.parametrize(("arch", "op", "why"), [
    ("sm_90a", CTA[0], "needs sm_100 or higher"), ("sm_120", spellings(GATHERS[0])[0], "needs sm_100a"),
    ("sm_120", SCATTER, "needs sm_100a"), ("sm_120", spellings(PREFETCH)[-1], "needs sm_100a"),
])  # fmt: skip
def test_targets(arch, op, why):
    assert why in assert_refused(operands(op, (0, 1, 2, 3, 4), "%s"), integers(64), integers(64), arch=arch)
    too_few = assert_refused(operands(op, (0, 1, 2), "%s"), integers(64), integers(64), arch=arch)
    assert "expected 5 coordinates" in too_few


def text(statements):
    registers = ".reg .b32 %s; .reg .b64 %a<2>, %rd<10>; .reg .b16 %h<2>;"
    kernels = [f".visible .entry k{i}() {{ {registers} ret;\n{s}\nret;\n}}" for i, s in enumerate(statements)]
    return "\n".join([".version 8.7", ".target sm_100a", ".address_size 64", *kernels])


@pytest.mark.skipif(not shutil.which("ptxas"), reason="needs ptxas")
def test_ptxas_takes_them(tmp_path):
    opcodes = [op for p in (*GATHERS, *SCATTERS, PREFETCH) for op in spellings(p)]
    (tmp_path / "all.ptx").write_text(text([operands(op, ["%s"] * 5, "%s") for op in opcodes]))
    made = subprocess.run(
        ["ptxas", "-O0", "-arch=sm_100a", "-o", "/dev/null", tmp_path / "all.ptx"], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr[-3000:]
