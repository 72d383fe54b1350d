"""What benchmarks.attention --sweep measures on a GPU: head dims, masks and lengths, torch's fused kernels, and the bars."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import on_gpu
from benchmarks.on_gpu import H200, HOPPER, TFLOPS, Bar
from forwardpass.ops.attention import ATTENTION
from forwardpass.ops.attention.cases import Case, real

#: 16384 rows, or one sequence where it is longer, and a width of 2048, as FlashAttention's figures have
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
HEAD_DIMS = (64, 128, 256)
ROWS, WIDTH = 16384, 2048
#: variant -> what its case takes besides length and head dim
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "causal window 1024": {"causal": True, "window": (1023, None)},
    "padding": {"mask": "bool bj"},
    "GQA full": {"heads": (64, 8), "dtype": torch.bfloat16},
    "GQA causal": {"heads": (64, 8), "dtype": torch.bfloat16, "causal": True},
}

#: torch's fused kernels
SDPA_KERNELS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}

FA3 = "FlashAttention-3 on an H100, its fp16 forward chart at 0251105"
CUDNN = "cuDNN 9.19 on an H200, cudnn-frontend at 3929da2"
BARS = [
    *(
        Bar("attention", variant, HOPPER, (16384, d), least, TFLOPS, FA3)
        for d, full, causal in ((64, 497, 473), (128, 648, 616), (256, 756, 642))
        for variant, least in (("full", full), ("causal", causal))
    ),
    Bar("attention", "GQA full", H200, (16384, 128), 702, TFLOPS, CUDNN),
    Bar("attention", "GQA causal", H200, (32768, 128), 688, TFLOPS, CUDNN),
]


def make_case(length: int, head_dim: int, variant: str) -> Case:
    options = {"heads": (WIDTH // head_dim, WIDTH // head_dim), "dtype": torch.float16, **VARIANTS[variant]}
    batch = max(1, ROWS // length) if "GQA" not in variant else 1
    return real((length, length), head_dim, batch, **options)


def peers(sdpa: Callable[..., Any], call: tuple[Any, ...]) -> dict[str, Callable[[], Any]]:
    named = dict(zip(ATTENTION.parameters, call))

    def by(kernel: SDPBackend) -> Any:
        with sdpa_kernel([kernel]):
            return sdpa(**named)

    return {name: functools.partial(by, kernel) for name, kernel in SDPA_KERNELS.items()}


def measure(
    length: int, head_dim: int, variant: str, device: str, rounds: int, sdpa: Callable[..., Any]
) -> dict[str, Any]:
    """sdpa: torch's, of the operation's arguments by name."""
    case, shape = make_case(length, head_dim, variant), (length, head_dim)
    make_peers = functools.partial(peers, sdpa)
    return on_gpu.measure(ATTENTION, variant, case, shape, device, rounds, make_peers, BARS, same_work=SDPA_KERNELS)


def measure_all(rounds: int, sdpa: Callable[..., Any]) -> list[dict[str, Any]]:
    """GQA, and sequences of 32768, at a head dim of 128 alone, as the bars have them."""
    results = []
    for head_dim in HEAD_DIMS:
        for variant in VARIANTS:
            if "GQA" in variant and head_dim != 128:
                continue
            for length in LENGTHS:
                if length > ROWS and "GQA" not in variant:
                    continue
                row = measure(length, head_dim, variant, "cuda", rounds, sdpa)
                results.append(row)
                print(on_gpu.lines(row), flush=True)
    return results
