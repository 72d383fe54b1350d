"""What the modelled machines take, beside what they can do (rates.py), each figure with its source: for `Device.timeline`.

Cycles of a multiprocessor where the unit says so. The figures of papers are quoted as remembered from their tables and were not
checked against them again. "Assumed" is a figure that no public microbenchmark was at hand for; all of the B200's are, as on
the H100, and all of the RTX PRO 6000's, as on the L40S, but for TMA's, as on the H100.
"""

from .core import ARCHITECTURES
from .rates import rates

_LUO = (
    "Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU Architecture (2024), memory latencies; the RTX 4090's for "
    "the L40S"
)
_ABDELKHALIK = "Abdelkhalik et al., Demystifying the Nvidia Ampere Architecture through Microbenchmarking (2022)"
_HUERTA = "Huerta et al., Dissecting and Modeling the Architecture of Modern GPU Cores (MICRO 2025), table 1"
_SUN = "Sun et al., Dissecting Tensor Cores via Microbenchmarks (2022)"

#: quantity, unit, of each of ARCHITECTURES, source
LATENCIES: list[tuple[str, str, tuple[float, float, float, float, float], str]] = [
    ("integer latency", "cycles", (4, 4, 4, 4, 4), f"{_ABDELKHALIK}: a dependent add; assumed of the others"),
    ("float latency", "cycles", (4, 4, 4, 4, 4), f"{_ABDELKHALIK}: a dependent add; assumed of the others"),
    ("half latency", "cycles", (4, 4, 4, 4, 4), "assumed, as float"),
    ("float64 latency", "cycles", (8, 48, 8, 8, 48), "assumed"),
    ("special function latency", "cycles", (18, 18, 18, 18, 18), "assumed"),
    ("conversion latency", "cycles", (6, 6, 6, 6, 6), "assumed"),
    ("shuffle and vote latency", "cycles", (22, 22, 22, 22, 22), "assumed, as on the V100: Jia et al., Dissecting the NVIDIA "
     "Volta GPU Architecture via Microbenchmarking (2018)"),
    ("shared latency", "cycles", (29, 30, 29, 29, 30), _LUO),
    ("L1 latency", "cycles", (38, 43, 41, 41, 43), _LUO),
    ("L2 latency", "cycles", (262, 273, 263, 263, 273), _LUO),
    ("DRAM latency", "cycles", (466, 542, 479, 479, 542), _LUO),
    ("mma latency", "cycles, and what follows", (17, 17, 19, 19, 17),
     f"{_SUN}: 25 of m16n8k8 and 33 of m16n8k16 in f16 on the A100; {_LUO.partition(',')[0]}: 32 of m16n8k16 on the H100; "
     "L40S: assumed"),
    ("mma latency, intervals", "of the instruction on its tensor core", (2, 1, 2, 2, 1), "as mma latency"),
    ("wgmma latency", "cycles after the product", (0, 0, 32, 32, 0), "assumed"),
    ("L2 of a multiprocessor", "bytes", (64, 64, 64, 64, 64), "assumed: the most that one can take"),
    ("DRAM efficiency", "of its bandwidth", (0.92, 0.92, 0.92, 0.92, 0.92),
     "assumed; Azure's AI benchmarking guide has 0.95 of reads and 0.87 of copies on the H100"),
    ("memory queue", "instructions of a scheduler", (5, 5, 5, 5, 5),
     f"{_HUERTA}: loads and stores that a scheduler of an Ampere GPU issues before it waits for the first to leave; assumed of "
     "the others"),
    ("TMA latency", "cycles more than L2 or DRAM", (0, 0, 170, 170, 170), "assumed"),
    ("TMA interval", "cycles", (1, 1, 8, 8, 8), "assumed: an instruction"),
    ("mbarrier latency", "cycles", (20, 20, 20, 20, 20), "assumed: until an arrival counts, and of a test"),
    ("barrier latency", "cycles", (20, 20, 20, 20, 20), "assumed: after the last arrival"),
    ("cluster latency", "cycles", (180, 180, 180, 180, 180), "Luo et al.: between two multiprocessors; RTX PRO 6000: assumed"),
    ("shared memory of a cluster", "bytes", (11, 11, 11, 11, 11),
     "Luo et al.: what a multiprocessor of the H100 takes from others, 2.65 TB/s of all in clusters of four"),
    ("fence latency", "cycles", (20, 20, 20, 20, 20), "assumed: within a CTA; beyond, as L2"),
    ("branch latency", "cycles", (8, 8, 8, 8, 8), "assumed: taken"),
    ("block latency", "cycles", (300, 300, 300, 300, 300), "assumed: until a CTA's first instruction"),
    ("launch", "us", (1.5, 1.5, 1.5, 1.5, 1.5), "assumed: of a kernel that does nothing"),
]  # fmt: skip


def machine(arch: str, clock: float | None = None) -> dict[str, float]:
    """Every rate and latency of a GPU; `clock` in MHz in place of its own."""
    column = list(ARCHITECTURES).index(arch)
    every = rates(arch) | {name: values[column] for name, _, values, _ in LATENCIES}
    return every if clock is None else every | {"clock": clock}


def as_text(figures: dict[str, float]) -> str:
    """As gpuless_timeline_json takes them (csrc/profile.h)."""
    return "".join(f"{name}\t{value}\n" for name, value in figures.items())
