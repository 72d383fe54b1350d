"""The grouped GEMMs at their documented limits, and one beyond: every kernel of every table, with as many rows as there may be.

K and N are the least, so that rows of tiles are many and cheap. Of a few small integers the products are exact in every type.
Products of all rows take a core up to a minute: slow tests. The list of experts alone, in which a kernel finds its tiles, takes
less than a second.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import subprocess

import pytest
import torch

import forwardpass as fp
from forwardpass import dispatch
from forwardpass.ops.common.experts import MOST_EXPERTS, MOST_ROWS, row_ranges
from forwardpass.ops.common.quantized_rows import E4M3

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("poisoned")]

K, N = 16, 8
#: Rows of as many tiles of 16 rows as 16 bits cannot count.
BEYOND_16_BITS = 65536 * 16


@dataclasses.dataclass(frozen=True)
class Limit:
    op: str
    arch: str
    experts: int
    rows: int
    tile: str  # in the kernel's name; of a Triton kernel any
    n: int = N
    implementation: str = "cuda"
    room: bool = False


def arguments(op, experts, rows, n, room=False):
    g = torch.Generator().manual_seed(experts)
    a, b = (torch.randint(-4, 5, shape, generator=g, dtype=torch.int8) for shape in ((rows, K), (experts, n, K)))
    ends = (torch.arange(1, experts + 1) * rows // experts).int()
    if room:
        assert rows % experts == 0
        a, ends = a.view(experts, -1, K), torch.full((experts,), rows // experts, dtype=torch.int32)
        ends[::3] -= 1
    scale = torch.ones(experts, n)
    if op == "int8_grouped_gemm":
        return a, b, torch.ones(1), scale, ends, None, None, torch.bfloat16, None, None, None
    if op == "fp8_grouped_gemm":
        return a.to(E4M3), b.to(E4M3), torch.ones(1), scale, ends, None, None, torch.bfloat16, None
    return a.to(torch.bfloat16), b, scale, ends, None, None


def expected(args, ends):
    """bfloat16 holds these sums: at most 16 times 16. In float32 the largest of all were 4 GB, and the test took 14."""
    a, b = args[0].float(), args[1].float()
    if a.dim() == 2:
        parts, begin = [], 0
        for e, end in enumerate(ends.tolist()):
            parts.append((a[begin:end] @ b[e].T).bfloat16())
            begin = end
        return torch.cat(parts)
    out = a @ b.mT
    out[torch.arange(a.shape[1]) >= ends[:, None]] = 0
    return out


INT8, FP8, W8A16 = "int8_grouped_gemm", "fp8_grouped_gemm", "w8a16_grouped_gemm"
LIMITS = [
    # more tiles than 16 bits count, in tiles of 16 rows (there was none of 64 on Ada)
    Limit(FP8, "sm_89", 256, BEYOND_16_BITS + 1024, "MmaTileELi64ELi128E"),
    Limit(W8A16, "sm_80", MOST_EXPERTS, BEYOND_16_BITS + 512, "MmaTileELi16ELi128E"),
    Limit(W8A16, "sm_80", MOST_EXPERTS, BEYOND_16_BITS + 512, "MmaTileELi16ELi128E", room=True),
    # as many rows as there may be, of every tile that they can have
    *(
        Limit(op, arch, experts, MOST_ROWS, tile, n)
        for op, arch, experts, tile, n in (
            (INT8, "sm_80", 144, "MmaTileELi128ELi128E", N),
            (INT8, "sm_80", MOST_EXPERTS, "MmaTileELi64ELi128E", N),
            (INT8, "sm_90a", MOST_EXPERTS, "WgmmaTileELi128ELi128E", N),
            (INT8, "sm_90a", 384, "WgmmaTileELi128ELi256E", 240),
            (FP8, "sm_89", 144, "MmaTileELi128ELi128E", N),
            (FP8, "sm_89", MOST_EXPERTS, "MmaTileELi64ELi128E", N),
            (FP8, "sm_120", MOST_EXPERTS, "MmaTileELi64ELi128E", N),
            (FP8, "sm_90a", MOST_EXPERTS, "WgmmaTileELi128ELi128E", N),
            (W8A16, "sm_80", 480, "MmaTileELi64ELi128E", N),
            (W8A16, "sm_80", MOST_EXPERTS, "MmaTileELi16ELi128E", N),
        )
    ),
    *(
        Limit(op, "sm_90a", MOST_EXPERTS, MOST_ROWS, "gemm_kernel", implementation="triton")
        for op in (INT8, FP8, W8A16)
    ),
]


@pytest.mark.every(3)
@pytest.mark.parametrize(
    "limit", [pytest.param(x, marks=[pytest.mark.slow] * (i > 0)) for i, x in enumerate(LIMITS)], ids=str
)
def test_every_row_is_right(limit):
    operation, args = dispatch.operations[limit.op], arguments(limit.op, limit.experts, limit.rows, limit.n, limit.room)
    with fp.interpret(limit.arch, counters=True, checks=False) as device, fp.use_backend(limit.implementation):
        if reason := fp.dispatch.interpreter().why_not(limit.implementation):
            pytest.skip(str(reason))
        got = operation(*args)
    assert [limit.tile in k.kernel for k in device.kernels()] == [True]
    wrong = (got != expected(args, args[3 if limit.op == W8A16 else 4])).flatten(0, -2).any(1)
    assert not wrong.any(), f"{int(wrong.sum())} of {limit.rows} rows are wrong, the first is {int(wrong.nonzero()[0])}"


@pytest.fixture(scope="module")
def write_list(tmp_path_factory):
    """The kernel of expert_list.cu."""
    nvcc = shutil.which(f"{os.environ['CUDA_HOME']}/bin/nvcc" if "CUDA_HOME" in os.environ else "nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc")
    here, ptx = pathlib.Path(__file__).parent, tmp_path_factory.mktemp("list") / "expert_list.ptx"
    command = [nvcc, "-ptx", "-lineinfo", "-std=c++20", "-arch=sm_80", f"-I{here.parents[1] / 'csrc'}"]
    subprocess.run([*command, str(here / "expert_list.cu"), "-o", str(ptx)], check=True)
    return pytest.importorskip("gpuless").Module(ptx.read_text(), arch="sm_80")["write_list"]


def ends_of(experts, rows, room):
    """The last tile of almost every expert has one row, and some have none; the same with a wrong one near the end."""
    if room:
        right = torch.full((experts,), rows // experts - 255)
        right[::50] = 0
        wrong = right.clone()
        wrong[-2], wrong[-1] = rows // experts + 1, -1
    else:
        right = torch.randint(0, rows // 256 - 4, (experts,), generator=torch.Generator().manual_seed(0)).sort().values
        right = right * 256 + torch.arange(1, experts + 1)
        right[::50], right[-1] = right[1::50], rows - 5
        wrong = right.clone()
        wrong[-2] = rows + 1
    right, wrong = right.int(), wrong.int()
    return right, wrong


@pytest.mark.every(2)
@pytest.mark.parametrize("room", [False, True])
@pytest.mark.parametrize(("height", "share_bits"), [(16, 0), (64, 0), (128, 0), (128, 1)])
def test_a_list_counts_any_number_of_tiles(write_list, height, share_bits, room):
    """Of the most rows and experts, in tiles of every height, of one block and of pairs below each other."""
    experts, rows, tall, step = MOST_EXPERTS, MOST_ROWS, height << share_bits, 61
    a = torch.empty((experts, rows // experts, 0) if room else (rows, 0))
    for ends in ends_of(experts, rows, room):
        count, tiles = torch.zeros(1, dtype=torch.int32), torch.full((rows // tall + experts, 3), -1, dtype=torch.int32)
        kinds = torch.full((rows,), 255, dtype=torch.uint8)
        with fp.interpret("sm_80") as device:
            write_list.launch(1, 1024, [ends, experts, int(not room), rows // experts if room else 0, rows,
                                        height.bit_length() - 1, share_bits, step, count, tiles, kinds])  # fmt: skip
        assert device.findings == []
        ranges, unknown = row_ranges(a, ends)
        begin, end = torch.tensor(ranges).T
        of_each = (end - begin + tall - 1) // tall
        expert = torch.arange(experts).repeat_interleave(of_each)
        assert count == len(expert)
        assert count - (end - begin).sum() // tall > 256  # more than eight bits of the list would hold
        first = torch.arange(len(expert)) - (of_each.cumsum(0) - of_each)[expert]
        expected = torch.stack([expert, begin[expert] + first * tall, end[expert]], 1)
        assert torch.equal(tiles[: len(expected[::step])].long(), expected[::step])
        owned = torch.zeros(rows + 1, dtype=torch.int32).index_add_(0, begin, torch.ones_like(begin).int())
        owned = owned.index_add_(0, end, -torch.ones_like(end).int()).cumsum(0)[:rows] > 0
        expected = torch.where(unknown, 2, torch.where(owned, 0, 1)).to(torch.uint8)[::step]
        assert torch.equal(kinds[: len(expected)], expected)


@pytest.mark.every(2)
@pytest.mark.parametrize("op", [INT8, FP8, W8A16])
@pytest.mark.parametrize("room", [False, True])
def test_one_row_or_expert_more_is_refused(op, room):
    """On every backend, in one sentence, in Python and in the library alike."""
    operation = dispatch.operations[op]
    experts = 5  # that divide 2^22 + 1
    rows, many = (
        arguments(op, experts, MOST_ROWS + 1, N, room),
        arguments(op, MOST_EXPERTS + 1, 4 * (MOST_EXPERTS + 1), N, room),
    )
    name = "x" if op == W8A16 else "a"
    for backend in ("cuda", "triton", "cpu", "reference"):
        if backend == "cpu" and op == FP8:
            continue
        on_gpu = backend in ("cuda", "triton")
        with fp.interpret("sm_90a") if on_gpu else contextlib.nullcontext() as device, fp.use_backend(backend):
            if device and fp.dispatch.interpreter().why_not(backend):
                continue
            with pytest.raises(ValueError, match=rf"{name} must have at most {MOST_ROWS} rows.*split them"):
                operation(*rows)
            with pytest.raises(
                ValueError, match=f"1 to {MOST_EXPERTS} experts, and has {MOST_EXPERTS + 1}: split them"
            ):
                operation(*many)
    for args, words in ((rows, f"at most {MOST_ROWS} rows"), (many, f"1 to {MOST_EXPERTS} experts")):
        with fp.interpret("sm_90a"), pytest.raises(RuntimeError, match=words):
            getattr(torch.ops.forwardpass, f"{op}_cuda")(*args)
