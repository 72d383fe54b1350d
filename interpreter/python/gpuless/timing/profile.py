"""What kernels did, as csrc/counters.h counts it: by kernel and shape of launch, and by source line."""

from __future__ import annotations

import dataclasses
import linecache
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Counts:
    """Sums over warps, CTAs and launches. Instructions are PTX's, not the machine's.

    Attributes:
        instructions: class -> times that a warp issued one, with whatever lanes.
        waits: class -> times that a warp found itself blocked, or a test that failed; these depend on the schedule.
        macs: "mma f16", "wgmma e4m3"... -> multiply-accumulates of the tensor cores, by the type of A; where the opcode has a
            kind, "f16" is kind::f16, "e4m3" f8f6f4 and mxf8f6f4, "e2m1" mxf4 and mxf4nvf4.
        lanes: of all instructions; 32 for each where every lane takes part.
        requests, sectors: of global memory: warp instructions, and the distinct 32-byte sectors of each.
        wavefronts, ideal_wavefronts: of loads, stores, ldmatrix, stmatrix and cp.async in shared memory.
        global_read, global_written, shared_read, shared_written, local_read, local_written: bytes that lanes asked for.
        bulk_read, bulk_written, bulk_shared: bytes of bulk copies and TMA in global memory, and in shared memory.
        matrix_shared: bytes of operands that wgmma and tcgen05.mma read from shared memory.
    """

    instructions: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    macs: Counter[str] = field(default_factory=Counter)
    lanes: int = 0
    requests: int = 0
    sectors: int = 0
    wavefronts: int = 0
    ideal_wavefronts: int = 0
    global_read: int = 0
    global_written: int = 0
    shared_read: int = 0
    shared_written: int = 0
    local_read: int = 0
    local_written: int = 0
    bulk_read: int = 0
    bulk_written: int = 0
    bulk_shared: int = 0
    matrix_shared: int = 0

    def __iadd__(self, other: Counts) -> Counts:
        for f in dataclasses.fields(Counts):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))
        return self

    @classmethod
    def read(cls, instruction: dict[str, Any]) -> Counts:
        """The counts of one instruction, as the core writes it; what is zero is not there."""
        name = instruction["class"]
        counts = cls(**{k: instruction.get(k, 0) for k in _NUMBERS})
        for to, key, n in (
            (counts.instructions, name, "issued"),
            (counts.waits, name, "waits"),
            (counts.macs, f"{name} {instruction.get('matrix')}", "macs"),
        ):
            if instruction.get(n):
                to[key] = instruction[n]
        return counts

    @property
    def issued(self) -> int:
        return self.instructions.total()

    @property
    def sectors_per_request(self) -> float | None:
        """None where there is no request; 4 is perfect for 4 bytes a lane, 16 for 16."""
        return self.sectors / self.requests if self.requests else None

    @property
    def conflict_ratio(self) -> float | None:
        """Wavefronts over ideal ones: 1 is without bank conflicts. None where there are none."""
        return self.wavefronts / self.ideal_wavefronts if self.ideal_wavefronts else None


_NUMBERS = [f.name for f in dataclasses.fields(Counts) if f.name not in ("instructions", "waits", "macs")]


@dataclass
class LineProfile:
    """The counts of a source line; where a kernel was compiled without line information, file is "" and line that of the PTX."""

    kernel: str
    file: str
    line: int
    counts: Counts
    text: str  # of the source where the file is there, else the PTX opcodes


@dataclass
class KernelProfile:
    """The counts of all launches of one kernel in one shape.

    Attributes:
        footprint_read, footprint_written: bytes of the distinct sectors of global memory that each launch touched,
            added over launches.
        resident: CTAs that a multiprocessor holds, registers assumed.
        instructions: as the core writes them.
    """

    kernel: str
    arch: str
    multiprocessors: int
    resident: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    shared_bytes: int
    launches: int
    footprint_read: int
    footprint_written: int
    instructions: list[dict[str, Any]]

    @classmethod
    def read(cls, record: dict[str, Any]) -> KernelProfile:
        shape: dict[str, Any] = {name: tuple(record[name]) for name in ("grid", "block", "cluster")}
        return cls(**{**record, **shape})

    @property
    def counts(self) -> Counts:
        total = Counts()
        for i in self.instructions:
            total += Counts.read(i)
        return total


def by_line(kernels: Iterable[KernelProfile], inlined: bool = False) -> list[LineProfile]:
    """`inlined`: by the lines of what was inlined, instead of the kernel's own lines that it was inlined into."""
    counts: dict[tuple[str, str, int], Counts] = {}
    opcodes: dict[tuple[str, str, int], dict[str, None]] = {}
    prefix = "inner_" if inlined else ""
    for k in kernels:
        for i in k.instructions:
            file = i[f"{prefix}file"]
            place = k.kernel, file, i[f"{prefix}line"] if file else i["ptx_line"]
            counts.setdefault(place, Counts())
            counts[place] += Counts.read(i)
            opcodes.setdefault(place, {})[i["opcode"]] = None
    return [
        LineProfile(*place, counts[place], linecache.getline(*place[1:]).strip() or ", ".join(opcodes[place]))
        for place in sorted(counts)
    ]
