"""What the gates ask of the attention kernels: instructions a score in the main loop, and what a Config's name claims.

A score is what one row and one key make. Instructions a score: those of a trip of the main loop, which is the unmasked one,
divided by the scores that a thread of it has a part in: rows times keys of a block, divided by the threads that multiply. The
trip is the shortest that multiplies all: no row's maximum grows, so that the output is not rescaled. FlashAttention-3, which
rescales in every trip, issues about 7 for fp16 at head dim 128.
"""

import dataclasses

from gemm_gates import broken_claims, macs, without_bytes
from kernel_names import values

#: of kernels without mask, ALiBi and softcap, on 9.0 from 128 keys a block on, by the dtype of q k
MOST = {
    ("sm_80", "i8", 64, 64): 9.5,
    ("sm_80", "i8", 128, 128): 11.7,
    ("sm_80", "i8", 256, 256): 18.4,
    ("sm_89", "i8", 64, 64): 9.5,
    ("sm_89", "i8", 128, 128): 11.8,
    ("sm_89", "e4m3", 64, 64): 8.9,
    ("sm_89", "e4m3", 128, 128): 11.3,
    ("sm_89", "e4m3", 256, 256): 17.6,
    ("sm_90a", "f16", 128, 128): 6.5,
    ("sm_90a", "bf16", 128, 128): 6.5,
    ("sm_90a", "i8", 64, 64): 9.1,
    ("sm_90a", "i8", 128, 128): 10.5,
    ("sm_90a", "e4m3", 64, 64): 8.5,
    ("sm_90a", "e4m3", 128, 128): 10.0,
}


@dataclasses.dataclass
class Claims:
    """What a Config's name says of a kernel: M rows of D columns, V of v, by N keys."""

    d: int
    v: int
    general: bool
    m: int
    n: int
    multiplying: int  # threads
    threads: int
    blocks: int  # on a multiprocessor at once

    @property
    def scores(self) -> float:
        """Of a trip, for each multiplying thread."""
        return self.m * self.n / self.multiplying


def claims(name: str) -> Claims | None:
    if "AttentionInstance{" not in name:
        return None
    of = values(name)
    d, v, n = int(of["head_dim"]), int(of["value_dim"]), int(of["n"])
    general = of["modified"] == "true"
    if "WgmmaAttentionTile{" in name:
        multiplying = 128 * int(of["consumers"])
        return Claims(d, v, general, multiplying // 2, n, multiplying, multiplying + 128, 1)
    threads = 32 * int(of["warps"])
    return Claims(d, v, general, int(of["m"]), n, threads, threads, int(of["blocks_per_sm"]))


def bar(k) -> float | None:
    c = claims(k.name)
    return MOST.get((k.arch, values(k.name)["dtype"], c.d, c.v)) if c and not c.general else None


def counted(k) -> float | None:
    """Instructions a score."""
    loop = k.code.main_loop
    return len(k.code.shortest_trip(loop)) / c.scores if (c := claims(k.name)) and loop and loop.mma else None


def rescaling(k) -> float:
    """Those of all its branches, the rescaling one among them."""
    return len(k.code.main_loop.instructions) / claims(k.name).scores


def failures(k) -> list[str]:
    """Sentences, without the kernel's name."""
    if not (c := claims(k.name)):
        return []
    sentences = []
    issued, most, loop = counted(k), bar(k), k.code.main_loop
    if issued and most and issued > most:
        sentences.append(f"{issued:.2f} instructions a score in the main loop, the bar is {most}")
    if loop and loop.mma:
        work = sum(n * macs(opcode) for opcode, n in loop.mma.items())
        expected = c.m * c.n * (c.d + c.v) * 32 // c.multiplying
        if work != expected:
            sentences.append(
                f"{work} multiply-accumulates of a warp in the main loop, its Config's block has {expected}"
            )
    return sentences + broken_claims(k, c.threads, c.blocks)


def table(kernels: list) -> str:
    """Of every attention kernel's main loop, beside its bar."""
    lines = [
        "main loops of attention: instructions a score, where no maximum grows and of all branches, mma among them",
        f"{'':8}{'a score':>8}{'all':>8}{'mma':>6}{'bar':>6}",
    ]
    for k in sorted(kernels, key=lambda k: (k.name, k.arch)):
        if issued := counted(k):
            mma = k.code.main_loop.mma.total() / claims(k.name).scores
            lines.append(
                f"{k.arch:<8}{issued:8.2f}{rescaling(k):8.2f}{mma:6.2f}{bar(k) or '-':>6}  {without_bytes(k.name)}"
            )
    return "\n".join(lines)
