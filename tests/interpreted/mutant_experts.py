"""The kernels for experts in the mutation suite: permute_quantize's and unpermute's, which are one for all types, and instances of
int8_grouped_gemm's."""

import dataclasses
import functools
import itertools

import torch
from mutant_instances import Instance

from forwardpass.ops.common.quantized_rows import E4M3
from forwardpass.ops.dequant_activation.cases import EpilogueCase
from forwardpass.ops.int8_grouped_gemm.cases import Case as Grouped
from forwardpass.ops.int8_grouped_gemm.cases import assert_matches as assert_matches  # of Falling, too
from forwardpass.ops.permute_quantize.cases import Case as Permute
from forwardpass.ops.unpermute.cases import Case as Unpermute
from forwardpass.ops.w8a16_grouped_gemm.cases import Case as W8

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
#: columns beside which a thread has none, and those that it has in registers, where a row has the most threads
VECTOR, THREADS = 8, 512
IN_REGISTERS = 4 * VECTOR * THREADS
LONG = IN_REGISTERS + VECTOR


class Largest(Permute):
    """Groups that are read twice, whose largest values are in each element of each of a thread's vectors once, and of the vector
    behind those that fit the registers."""

    __module__ = Permute.__module__  # whose operation and comparison are taken

    def arguments(self, device="cpu", seed=0):
        x, *others = super().arguments(device, seed)
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        groups = x.unflatten(1, (-1, LONG))
        for n, (token, group) in enumerate(itertools.product(range(groups.shape[0]), range(groups.shape[1]))):
            i = n % (5 * VECTOR)
            groups[token, group, i // VECTOR * VECTOR * THREADS + i % VECTOR] = 40
        return x, *others


#: One kernel for its three launches: one thread block of choices and several, tokens without any place, rows of a thread, of a warp
#: and of several; and of each type, rows that end within each of a thread's vectors, and those that are read twice.
PERMUTE = (
    Permute(9, 3, 90, 33, routing="sentinels"),
    Permute(70, 2, 8, 40, F16, E4M3, torch.int32, channel_scale=True),
    Permute(3, 5, 300, 2100, F32, routing="sentinels"),
    Permute(12, 2, 8, 40, routing="none"),
    Permute(300, 8, 512, 16, routing="sentinels", layout="aligned"),
    # 15 thread blocks of choices, whose counts are added up eight at a time, then seven; and two rounds of each block
    Permute(3600, 8, 60, 8, F32, layout="contiguous"),
    Permute(2**15 + 1, 8, 60, 1, F32),
    Permute(20, 2, 8, 264, F16, layout="aligned"),
    Permute(20, 2, 8, 1035, layout="aligned"),
    Permute(60, 1, 8, 2100, F16),
    Permute(60, 1, 8, 4104, F32, layout="aligned"),
    Permute(60, 1, 8, 4104, BF16, E4M3, channel_scale=True, layout="aligned"),
    # of each warp the largest value
    *(Permute(3, 1, 8, 3 * (4096 + 256 * warp + 100), F32, layout="aligned") for warp in range(16)),
    *(
        Largest(3, 1, 8, 16 * LONG, dtype, group_size=LONG, layout=layout)
        for dtype in (F32, F16, BF16)
        for layout in ("apart", "aligned")
    ),
    *(
        Permute(2, 2, 8, columns, dtype, layout="shifted")
        for dtype in (F32, F16, BF16)
        for columns in (16, IN_REGISTERS + VECTOR)
    ),
    *(
        Permute(2, 6, 8, before + vector * apart + n, dtype, q, channel_scale=before > 0 and n == 7, layout="aligned")
        for dtype, q in ((F32, torch.int8), (F16, E4M3), (BF16, torch.int8))
        for before, apart in ((0, VECTOR), (IN_REGISTERS, VECTOR * THREADS))
        for vector in range(4)
        for n in (3, 7, 8)
    ),
    # groups: of a thread's part, of a warp's and of a block's threads, that begin where no vector may, rows of none
    *(
        Permute(9, 3, 8, columns, dtype, E4M3, routing=routing, group_size=group, layout=layout)
        for columns, group in ((300, 50), (560, 128), (700, 256), (2500, 1100))
        for dtype, routing, layout in (
            (BF16, "sentinels", "aligned"),
            (F32, "even", "aligned"),
            (F16, "none", "shifted"),
        )
    ),
)
UNPERMUTE = (
    Unpermute(5, 3, 33, left_out=0.3),
    Unpermute(3, 6, 264, F16, F16, layout="contiguous"),
    Unpermute(4, 8, 40, F32, left_out=0.3, layout="aligned"),
    Unpermute(4, 3, 36, F32, layout="contiguous"),  # the last row's last vector ends where the storage does
    Unpermute(20, 2, 72, F32, layout="shifted"),
    Unpermute(4, 4, 24),
    Unpermute(4, 12, 24, F16),
    Unpermute(4, 12, 24, F32),
    Unpermute(4, 4, 24, F16),
    Unpermute(9, 5, 64, weights_dtype=BF16, groups=7),
)

HALF = EpilogueCase(bias=F16, activation="relu", out_dtype=BF16)
GATED = EpilogueCase(activation="silu_mul", out_dtype=BF16)
ZERO_POINT = EpilogueCase(zero_point="row", b_scale="column")
#: whose lines are mutated in the grouped instances; the others' are in those of one product
FILES = (
    "csrc/kernels/gemm/mma.cuh",
    "csrc/kernels/gemm/mma_mainloop.cuh",
    "csrc/kernels/gemm/operand_copy.cuh",
    "csrc/kernels/gemm/wgmma.cuh",
    "csrc/kernels/gemm/wgmma_mainloops.cuh",
    "csrc/params/gemm.h",
    "csrc/schedule/cluster_tiles.cuh",
    "csrc/schedule/expert_list.cuh",
    "csrc/schedule/grouped_output.cuh",
    "csrc/schedule/grouped_tile.cuh",
    "csrc/schedule/persistent.cuh",
)


@dataclasses.dataclass(frozen=True)
class Falling(Grouped):
    """The end of an expert is below the one before it: of the one in the middle and of the last, or of `at` and of all behind."""

    at: int | None = None
    op = "int8_grouped_gemm"

    def arguments(self, device="cpu", seed=0):
        args = super().arguments(device, seed)
        ends, at = args[4], len(self.counts) // 2 if self.at is None else self.at
        ends[at] = ends[at - 1] - 3
        ends[-1 if self.at is None else at + 1 :] = 0
        return args


class Beyond(Grouped):
    """The last end is behind all rows; of experts with room, one count is above it and others are below 0."""

    op = "int8_grouped_gemm"

    def arguments(self, device="cpu", seed=0):
        args = super().arguments(device, seed)
        ends = args[4]
        ends[-1] = len(args[0]) + 1 if self.room is None else self.room + 1
        if self.room is not None:
            ends[1:-1:3] = -1
        return args


def many(experts):
    """Rows of experts of which a lane has several, beside each other: none, some, the last of a lane none."""
    return tuple((5 * e) % 4 * (e % 3) for e in range(experts))


def of_a_lane(experts):
    """Those that the list's thirteenth lane has, where they are many: each is in another place of a loop that is unrolled."""
    share = -(-experts // 32)
    return range(13 * share, 14 * share) if share > 3 else ()


def grouped(m, *lists):
    """Of tiles of m rows, whose launches have as many for an expert on average as choose them: in both layouts, experts that lanes
    have none of, one and several (`lists`: how many experts), ends inside a tile and between two, tile after tile, rows of none."""
    mean = m // 2 + 8

    def case(counts, n, k, epilogue, of=Grouped):
        return of(counts, n, k, epilogue, beyond=mean * len(counts) - sum(counts))

    return (
        case((m, 0, 1, m + 1, 2 * m, m - 1) + (0,) * (m // 4), 300, 260, HALF),
        case((m, 0, m // 2), 40, 1540, ZERO_POINT),
        case((m // 2, 0, 1), 33, 70, HALF),
        case((m // 2, 0, 1), 33, 70, HALF, Falling),  # rows of no expert, whose last bytes are not 16
        case((m // 2, 0, 1), 96, 16, HALF),
        case((0,) * 60, 144, 64, HALF),
        Grouped((0, m, 0, m // 2, m - 1), 48, 700, GATED, room=m),
        Grouped((m, m - 1), 33, 70, EpilogueCase(out_dtype=torch.int8), room=m),
        Grouped((m // 2, m - 1, 0), 273, 70, EpilogueCase(), room=m),
        *(case(many(experts), 16, 64, HALF, of) for experts in lists for of in (Grouped, Falling, Beyond)),
        *(
            case(many(experts), 16, 64, HALF, functools.partial(Falling, at=at))
            for experts in lists
            for at in of_a_lane(experts)
        ),
        *(of(many(experts), 16, 64, HALF, room=mean) for experts in lists for of in (Grouped, Beyond)),
    )


#: The same lists, of each type of x and of the weight; depths short of the stages and beyond them, ragged.
UPCONVERTED = tuple(
    W8(counts, n, k, x, w, activation=activation, room=room)
    for x in (F16, BF16)
    for w in (torch.int8, E4M3)
    for counts, n, k, activation, room in (
        ((16, 0, 1, 17, 32, 15, 0, 0, 0), 300, 260, "relu", None),
        ((0, 16, 0, 7, 15), 48, 1100, "silu_mul", 16),
        ((9, 0, 1), 33, 30, None, None),
    )
)
#: of a tile of many outputs on mma.sync a list has 144 experts
LISTS_MMA, LISTS_ALL = (32, 33, 75, 130), (32, 33, 75, 130, 300)


def mma(m, cases):
    return Instance(("sm_80",), f"Int8, MmaTile{{m={m}, n=128,", cases, multiprocessors=2, files=FILES)


def wgmma(m, cases):
    return Instance(("sm_90a",), f"Int8, WgmmaTile{{m={m}, n=128,", cases, multiprocessors=2, files=FILES)


INSTANCES = {
    "grouped_w8a16_16x128": Instance(
        ("sm_80",),
        "W8a16, MmaTile{m=16,",
        UPCONVERTED,
        multiprocessors=2,
        files=(
            "csrc/kernels/gemm/mma_upconverting.cuh",
            "csrc/kernels/gemm/operand_copy.cuh",
            "csrc/kernels/gemm/mma.cuh",
        ),
    ),
    "permute_quantize": Instance(("sm_80",), "permute_quantize_kernel", PERMUTE),
    "unpermute": Instance(("sm_80",), "unpermute_kernel", UNPERMUTE),
    "grouped_mma_128x128": mma(128, grouped(128, *LISTS_MMA)),
    "grouped_mma_16x128": mma(16, grouped(16, *LISTS_ALL)),
    "grouped_wgmma_128x128": wgmma(128, (*grouped(128, *LISTS_ALL), Grouped((2100, 1, 4300), 16, 16, HALF))),
    "grouped_wgmma_16x128": wgmma(16, grouped(16, *LISTS_ALL)),
}
