"""What the gates ask of the GEMMs: what their main loops issue, beside bars and CUTLASS's, and what a Config's name claims.

Issued instructions are those that the multiplying warps issue for 2^20 multiply-accumulates: all of a trip of the main loop,
divided by the trip's multiply-accumulates, which its MMA instructions state. CUTLASS's figures: the same disassembly of the
kernels in vLLM 0.33.0's wheel.
"""

import collections
import dataclasses
import re

from kernel_names import values

MI = 2**20


@dataclasses.dataclass
class Cutlass:
    kernel: str
    issued: int  # for 2^20 multiply-accumulates
    other: float  # instructions that are no MMA, for each MMA; gated where `same`
    same: bool  # it has this tile, or nobody recorded its tile


COOPERATIVE = Cutlass("256x128x128, cooperative", 116, 6.25, False)
PING_PONG = Cutlass("128x128x128, ping-pong", 184, 10.5, True)
BLOCKS = Cutlass("128x128x128, scales of blocks", 544, 33, True)
BLOCKS_WIDE = dataclasses.replace(BLOCKS, same=False)
SM80, SM89 = Cutlass("sm_80 int8", 1192, 3.66, True), Cutlass("sm_89 int8", 1064, 3.16, True)


@dataclasses.dataclass
class Loop:
    """The first that matches a kernel's name and architecture counts."""

    names: str
    arches: str
    most: float | None  # issued instructions for 2^20 multiply-accumulates; None: printed alone
    cutlass: Cutlass | None


# The bars are of the tiles that large products take; smaller ones have less to reuse.
LOOPS = [
    # windows: a slice's predicates and a test of the tap's end, beside what a GEMM's 391 are
    Loop(r"gemm_mma_kernel<MmaConfig<Int8, MmaTile\{m=128, n=128\b.*\bWindowMainloop\b", r"", 410, SM80),
    Loop(r"gemm_wgmma_kernel<WgmmaConfig<Int8, WgmmaTile\{m=128, n=64\b.*\bWindowMainloop\b", r"", None, None),
    Loop(r"gemm_mma_kernel<MmaConfig<Int8, MmaTile\{m=128, n=128\b", r"sm_80$", 450, SM80),
    Loop(r"gemm_mma_kernel<MmaConfig<Int8, MmaTile\{m=128, n=128\b", r"sm_89$", 450, SM89),
    Loop(r"gemm_mma_kernel<MmaConfig<Int8, MmaTile\{m=128, n=128\b", r"", 450, None),
    Loop(r"gemm_mma_kernel<MmaConfig<E4m3, MmaTile\{m=128, n=128\b", r"", 700, None),
    Loop(r"gemm_mma_kernel<MmaConfig<Int8\b", r"sm_80$", None, SM80),
    Loop(r"gemm_mma_kernel<MmaConfig<Int8\b", r"sm_89$", None, SM89),
    Loop(r"gemm_wgmma_kernel<WgmmaConfig<Int8, WgmmaTile\{m=128, n=256\b", r"", 120, COOPERATIVE),
    Loop(r"gemm_wgmma_kernel<WgmmaConfig<Int8, WgmmaTile\{m=128, n=128\b", r"", None, PING_PONG),
    Loop(r"gemm_wgmma_kernel<WgmmaConfig<E4m3OptionalBlocks, WgmmaTile\{m=128, n=256\b", r"", 420, BLOCKS_WIDE),
    Loop(r"gemm_wgmma_kernel<WgmmaConfig<E4m3OptionalBlocks, WgmmaTile\{m=128, n=128\b", r"", None, BLOCKS),
    Loop(r"gemm_wgmma_kernel<WgmmaConfig<Upconverted<f16, false>, WgmmaTile\{m=128, n=256\b", r"", 350, None),
    Loop(r"gemm_wgmma_kernel<WgmmaConfig<Upconverted<f16, true>, WgmmaTile\{m=128, n=256\b", r"", 950, None),
    Loop(r"gemm_wgmma_kernel<WgmmaConfig<Upconverted<f16, true>, WgmmaTile\{m=128, n=128\b", r"", 800, None),
    Loop(r"gemm_(mma|wgmma)_kernel|gemv_kernel", r"", None, None),
]


def macs(opcode: str) -> int:
    """Multiply-accumulates of one warp's MMA instruction; a wgmma is of four warps."""
    if shape := re.match(r"[A-Z]GMMA\.(\d+)x(\d+)x(\d+)\.", opcode):
        m, n, k = map(int, shape.groups())
        return m * n * k // 4
    if shape := re.match(r"[A-Z]MMA\.16(8)(\d+)(?=\.|$)", opcode):
        return 16 * 8 * int(shape[2])
    raise ValueError(f"{opcode}: nothing says how much it multiplies; add its shape to gemm_gates.py")


def counted(k) -> tuple[float, float] | None:
    """Of a GEMM's main loop: issued instructions for 2^20 multiply-accumulates, and others for each MMA."""
    loop = k.code.main_loop
    if not (rule(k) and loop and loop.mma):
        return None
    work = sum(n * macs(opcode) for opcode, n in loop.mma.items())
    # of a convolution's windows in a trip in which no tap ends, which one does once in C / 64 slices
    trip = k.code.shortest_trip(loop) if "WindowMainloop" in k.name else loop.instructions
    issued, mma = len(trip), loop.mma.total()
    return issued * MI / work, (issued - mma) / mma


def rule(k) -> Loop | None:
    return next((r for r in LOOPS if re.match(r.names, k.name) and re.match(r.arches, k.arch)), None)


@dataclasses.dataclass
class Claims:
    """What a Config's name says of a kernel."""

    threads: int
    stages: int
    stage_bytes: int
    blocks: int  # on a multiprocessor at once


def claims(name: str) -> Claims | None:
    tile = {field: int(value) for field, value in values(name).items() if value.isdecimal()}
    if "WgmmaTile{" in name:
        b_size = 2 if "Upconverted<" in name else 1
        threads = 3 * 128 if tile["m"] >= 128 else 4 * 128  # few rows leave registers to another kernel
        return Claims(threads, tile["stages"], (tile["m"] + tile["n"] * b_size) * tile["stage_k"], 1)
    if "MmaTile{" in name:
        threads, a_size = 32 * tile["warps_m"] * tile["warps_n"], 2 if "<W8a16," in name else 1
        stage = (tile["m"] * a_size + tile["n"]) * tile["stage_k"]
        return Claims(threads, tile["stages"], stage, tile["blocks_per_sm"])
    return None


def broken_claims(k, threads: int, blocks: int) -> list[str]:
    """What a launch of k does not have of its Config's numbers; blocks: on a multiprocessor."""
    sentences = []
    if k.threads != threads:
        sentences.append(f"{k.threads} threads, its Config says {threads}")
    if k.blocks_per_sm is not None and k.blocks_per_sm < blocks:
        sentences.append(f"{k.blocks_per_sm} blocks fit a multiprocessor, its Config says {blocks}")
    return sentences


def failures(k) -> list[str]:
    """Sentences, without the kernel's name."""
    sentences = []
    if figures := counted(k):
        issued, other = figures
        gate = rule(k)
        if gate.most and issued > gate.most:
            sentences.append(
                f"{issued:.0f} instructions for 2^20 multiply-accumulates in the main loop, the bar is {gate.most:g}"
            )
        if gate.cutlass and gate.cutlass.same and other > gate.cutlass.other:
            sentences.append(
                f"{other:.2f} instructions beside each MMA, CUTLASS has {gate.cutlass.other:g} ({gate.cutlass.kernel})"
            )
    if claimed := claims(k.name):
        sentences += broken_claims(k, claimed.threads, claimed.blocks)
        if (k.dynamic_shared or 0) < claimed.stages * claimed.stage_bytes:
            sentences.append(f"{k.dynamic_shared} bytes of dynamic shared memory, its Config's {claimed.stages} stages are "
                             f"{claimed.stages * claimed.stage_bytes}")  # fmt: skip
    if k.name.startswith("gemm_wgmma_kernel"):
        loads = collections.Counter(i.opcode for loop in k.code.loops for i in loop.instructions if i.name == "UTMALDG")
        if not loads:
            sentences.append("no loop loads by TMA (UTMALDG)")
    return sentences


def table(kernels: list) -> str:
    """Of every GEMM's main loop, beside its bar and CUTLASS."""
    lines = [
        "main loops: instructions issued for 2^20 multiply-accumulates, NOPs among them; others for each MMA",
        f"{'':8}{'issued':>8}{'NOPs':>6}{'bar':>6}{'others':>8}  {'CUTLASS':<48}",
    ]
    for k in sorted(kernels, key=lambda k: (k.name, k.arch)):
        if figures := counted(k):
            (issued, other), loop, gate = figures, k.code.main_loop, rule(k)
            nops, cutlass = issued * loop.nops / len(loop.instructions), gate.cutlass
            peer = f"{cutlass.issued}, {cutlass.other:g} ({cutlass.kernel})" if cutlass else ""
            numbers = f"{issued:8.0f}{nops:6.0f}{gate.most or '-':>6}{other:8.2f}"
            lines.append(f"{k.arch:<8}{numbers}  {peer:<48}{without_bytes(k.name)}")
    return "\n".join(lines)


def without_bytes(name: str) -> str:
    return re.sub(r", SharedBytes<.*", ">", name)
