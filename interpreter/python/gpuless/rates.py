"""What the modelled machines can do at best, each figure with its source.

Per multiprocessor and clock where the unit says so. A100: SXM4 80 GB. L40S. H100: SXM5 80 GB. B200. RTX PRO 6000
Blackwell Workstation Edition; a GeForce multiplies 16 bits, and e4m3, at half of its rate where sums are fp32.
"""

from .core import ARCHITECTURES

_A100 = "NVIDIA A100 Tensor Core GPU Architecture (2020)"
_ADA = "NVIDIA Ada GPU Architecture (2022), AD102"
_H100 = "NVIDIA H100 Tensor Core GPU Architecture (2022), SXM5"
_B200 = "NVIDIA HGX B200 datasheet, per GPU and dense"
_GB202 = "NVIDIA RTX Blackwell GPU Architecture (2025), GB202, as remembered"
_GUIDE = "CUDA C++ Programming Guide, throughput of native arithmetic instructions"
_TUNING = "NVIDIA Ampere, Ada and Hopper tuning guides: four schedulers, each one warp instruction a clock"
_SHARED = "CUDA C++ Programming Guide, shared memory of compute capability 5.x and later: 32 banks of 4 bytes a clock"

#: quantity, unit, of each of ARCHITECTURES, source
RATES: list[tuple[str, str, tuple[float, float, float, float, float], str]] = [
    ("clock", "MHz", (1410, 2520, 1830, 1856, 2617),
     f"{_A100}: boost; L40S datasheet: boost; {_H100}: what its 989.4 TFLOPS of f16 come to; "
     f"{_B200}: what its 2250 come to; RTX PRO 6000 datasheet: boost"),
    ("issue", "warp instructions", (4, 4, 4, 4, 4), _TUNING),
    ("float", "lanes", (64, 128, 128, 128, 128), _GUIDE),
    ("float64", "lanes", (32, 2, 64, 64, 2), _GUIDE),
    ("half", "lanes, of pairs", (128, 64, 128, 128, 64), f"{_GUIDE}: 256, 128 and 256 results"),
    ("integer", "lanes", (64, 64, 64, 64, 128),
     f"{_GUIDE}: add, compare, multiply, shift and logic alike; {_GB202}: as many as float"),
    ("special function", "lanes", (16, 16, 16, 16, 16), _GUIDE),
    ("conversion", "lanes", (64, 64, 64, 64, 64),
     f"{_GUIDE}: 8 and 16-bit integers; others are slower by up to four, so this is a lower bound"),
    ("shuffle and vote", "lanes", (32, 32, 32, 32, 32), f"{_GUIDE}: shuffles"),
    ("mma f16", "MAC", (1024, 512, 2048, 4096, 512),
     f"{_A100}: 312 TFLOPS; {_ADA}: 330.3 of 128 SMs; {_H100}: 989.4; {_B200}: 2250; {_GB202}: 503.8"),
    ("mma bf16", "MAC", (1024, 512, 2048, 4096, 512), "as f16"),
    ("mma tf32", "MAC", (512, 256, 1024, 2048, 256), "half of f16, in all of them"),
    ("mma e4m3", "MAC", (0, 1024, 4096, 8192, 1024),
     f"{_ADA} and {_H100}: twice f16; the A100 has none; {_B200}: 4500 TFLOPS; {_GB202}: 1007.6"),
    ("mma e5m2", "MAC", (0, 1024, 4096, 8192, 1024), "as e4m3"),
    ("mma s8", "MAC", (2048, 1024, 4096, 8192, 1024), "twice f16, in all of them"),
    ("mma u8", "MAC", (2048, 1024, 4096, 8192, 1024), "as s8"),
    ("mma e2m1", "MAC", (0, 0, 0, 16384, 2048),
     f"{_B200}: 9000 TFLOPS of FP4; RTX PRO 6000 datasheet: 4000 TOPS, which are sparse; the others have none"),
    ("mma f64", "MAC", (64, 2, 128, 64, 2),
     f"{_A100}: 19.5 TFLOPS; {_ADA} and later RTX: no better than float64; {_H100}: 66.9 at 1980 MHz; {_B200}: 37 at 1965 MHz"),
    ("mma share", "of wgmma's rate", (1, 1, 0.629, 0.315, 1),
     "Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU Architecture (2024): 62.9% of the peak by mma; "
     "B200: assumed, as much as an H100 does"),
    ("shared memory", "bytes", (128, 128, 128, 128, 128), f"{_SHARED}; the L1 cache is the same memory"),
    ("L2", "bytes, of the device", (5120, 2048, 6144, 6144, 2048),
     f"{_A100}: read bandwidth, 64 bytes of each of 80 slices; not published for the others. H100: assumed, 96 slices, as "
     "ThunderKittens's GEMM needs 5600 at least; B200: as on the H100; L40S: 5.2 TB/s; RTX PRO 6000: as on the L40S"),
    ("DRAM", "GB/s, of the device", (2039, 864, 3352, 7672, 1792),
     f"{_A100}; L40S datasheet; {_H100}; {_B200}: 7.7 TB/s; RTX PRO 6000 datasheet"),
]  # fmt: skip


def rates(arch: str) -> dict[str, float]:
    column = list(ARCHITECTURES).index(arch)
    return {name: values[column] for name, _, values, _ in RATES}
