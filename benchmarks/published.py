"""Our GPU kernels' modelled times at shapes whose times others have published, without a GPU.

python -m benchmarks.published [--only NAME ...] [--json FILE]

Modelled by the interpreter's timeline (docs/interpreter.md), at the clock of the data sheet, which a GPU under a power limit does
not hold: 1830 MHz on an H100, where published times of GEMMs fit 1600. So the last column says at which clock our kernel would
be as fast as what was published; what is below the clock that the others had is ahead of them.

8-bit attention is timed after quantising, as the others published it. The column "quantising" is the share of all our launches'
time in which q, k and v are quantised.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from typing import Any

import torch

from benchmarks import bench
from benchmarks.interpreted import number
from forwardpass import dispatch, interpret, use_backend
from forwardpass.ops.attention.cases import real
from forwardpass.ops.attention_8bit.cases import of_attention
from forwardpass.ops.dequant_activation.cases import EpilogueCase
from forwardpass.ops.fp8_gemm import cases as fp8_gemm
from forwardpass.ops.int8_gemm import cases as int8_gemm
from gpuless import core
from gpuless.timing.timeline import ERROR

#: Kinds of attention, and the dtype of their products where it is not that of q, k and v.
ATTENTION = {"attention": None, "attention int8": "int8", "attention fp8": "fp8"}
_EPILOGUE = EpilogueCase(bias=None, out_dtype=torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Row:
    """One published figure: of `who`, on `gpu`, in TFLOP/s of 16 bits or 8."""

    kind: str
    shape: tuple[int, ...]  # of a GEMM M, N, K; of attention batch, rows, heads, head dim
    who: str
    gpu: str
    published: float | None  # None if this project knows of no figure
    source: str
    arch: str = "sm_90a"
    causal: bool = False
    share: float = 1.0  # of the multiprocessors of the modelled GPU, those that `gpu` has

    def __str__(self) -> str:
        return f"{self.kind} {' x '.join(map(str, self.shape))}{' causal' if self.causal else ''}"

    @property
    def case(self) -> Any:
        if self.kind in ATTENTION:
            batch, rows, heads, dim = self.shape
            case = dataclasses.replace(
                real((rows, rows), dim, batch, (heads, heads), torch.float16), causal=self.causal
            )
            products = ATTENTION[self.kind]
            return of_attention(case, rotates=True, products=products) if products else case
        if self.kind == "int8":
            return int8_gemm.Case(*self.shape, _EPILOGUE)  # type: ignore[call-arg]  # its length is not known
        return fp8_gemm.Case(  # type: ignore[call-arg]
            *self.shape, _EPILOGUE, blocks=self.kind == "fp8 block", layouts=("contiguous", "contiguous")
        )

    @property
    def flops(self) -> float:
        """As they are published: of causal attention half."""
        if self.kind in ATTENTION:
            batch, rows, heads, dim = self.shape
            return 4 * batch * rows**2 * heads * dim / (2 if self.causal else 1)
        m, n, k = self.shape
        return 2 * m * n * k


def attention(
    rows: int, dim: int, published: float, causal: bool, who: str = "FlashAttention-3", columns: int = 2048, **more: Any
) -> Row:
    """16384 tokens and 2048 columns of q, as FlashAttention's benchmarks have them."""
    source = "Dao-AILab/flash-attention, assets/flash3_fp16_fwd.png, read off the chart"
    shape = (16384 // rows, rows, columns // dim, dim)
    return Row(
        "attention",
        shape,
        **{"who": who, "gpu": "H100", "published": published, "source": source, "causal": causal} | more,
    )


def eight_bits(
    kind: str, rows: int, heads: int, dim: int, *others: tuple[str, str, float | None, str], **more: Any
) -> list[Row]:
    """A row for each of `others`: who, GPU, figure, source. Theirs have more heads; ours as many as fill the multiprocessors."""
    return [Row(f"attention {kind}", (1, rows, heads, dim), *other, **more) for other in others]


_DEEPGEMM = "deepseek-ai/DeepGEMM, README at a9967bc"
_SAGE = "thu-ml/SageAttention, assets, read off the chart; 4 x 32 heads there"
_SAGE_A100 = {"gpu": "A100", "arch": "sm_80", "source": _SAGE}
_FA3_PAPER = "FlashAttention-3's paper, its fp8 forward figure at 16k"
_CUDNN = "NVIDIA/cudnn-frontend at 3929da2, benchmark/sdpa_benchmark_training/results, 64 heads and 8 of k and v at 16k"
_RTX_4090 = {"arch": "sm_89", "share": 128 / 142}
ROWS = (
    *(Row("fp8 block", (4096, n, k), "DeepGEMM", "H800", published, _DEEPGEMM)
      for n, k, published in ((7168, 16384, 1520), (4096, 7168, 1410), (24576, 1536, 1212), (7168, 2048, 1168),
                              (2112, 7168, 1127), (32768, 512, 775))),
    *(Row("fp8 block", (m, 7168, 16384), "DeepGEMM", "H800", published, _DEEPGEMM) for m, published in ((64, 336), (128, 645))),
    Row("fp8 rowwise", (4096, 4096, 4096), "cuBLAS", "H100", 1216, "tritonbench PR 1149"),
    Row("int8", (1024, 8192, 21760), "sgl-kernel (CUTLASS)", "H100", 1357, "sglang PR 3035"),
    Row("int8", (128, 8192, 21760), "sgl-kernel (CUTLASS)", "H100", 593, "sglang PR 3035"),
    Row("int8", (1024, 8192, 21760), "sgl-kernel (CUTLASS)", "A100", 508, "sglang PR 2752", "sm_80"),
    *(attention(1024 * 2**i, 128, published, causal)
      for causal, figures in ((False, (565, 625, 638, 646, 648)), (True, (423, 521, 579, 602, 616)))
      for i, published in enumerate(figures)),
    *(attention(16384, 256, published, causal) for causal, published in ((False, 756), (True, 642))),
    # nine heads of the 32 that were there: of more the timeline keeps too few instructions
    *(attention(16384, 64, published, causal, columns=576) for causal, published in ((False, 497), (True, 473))),
    *(attention(4096, 128, published, causal, "FlashAttention-2", **_SAGE_A100)
      for causal, published in ((False, 204), (True, 193))),
    *eight_bits("fp8", 16384, 1, 64, ("FlashAttention-3", "H100", 613, _FA3_PAPER), ("cuDNN 9.1", "H100", 438, _FA3_PAPER)),
    *eight_bits("fp8", 16384, 1, 128, ("FlashAttention-3", "H100", 1008, _FA3_PAPER), ("cuDNN 9.1", "H100", 1003, _FA3_PAPER),
                ("cuDNN 9.19", "H200", 1055, _CUDNN)),
    *eight_bits("int8", 16384, 1, 64, ("SageAttention2", "H100", 606, _SAGE)),
    *eight_bits("int8", 16384, 1, 128, ("SageAttention2", "H100", 871, _SAGE)),
    *(row for kind in ("int8", "fp8") for dim, published in ((64, 387), (128, 493))
      for row in eight_bits(kind, 4096, 17, dim, ("SageAttention2++", "RTX 4090", published, _SAGE), **_RTX_4090)),
    *eight_bits("int8", 4096, 13, 64, ("nobody", "A100", None, ""), arch="sm_80"),
    *eight_bits("int8", 4096, 13, 128, ("SageAttention, fp16 p v", "A100", 278, _SAGE), arch="sm_80"),
)  # fmt: skip


@functools.cache
def modelled(case: Any, kind: str, arch: str) -> dict[str, Any]:
    """Raises RuntimeError where this build has no kernel for it."""
    call = bench.as_a_layer_has_them(case.arguments())
    op = dispatch.operations[getattr(case, "op", f"{kind}_gemm")]
    started = time.monotonic()
    with torch.inference_mode(), interpret(arch, timeline=True, checks=False) as device, use_backend("cuda"):
        op(*call)
    kernels = device.timeline().kernels
    seconds = [k.cycles / (k.clock * 1e6) for k in kernels]  # as kernels are timed: without their launches
    total = sum(seconds)
    quantising = sum(x for x, k in zip(seconds, kernels) if "qkv" in k.kernel)
    return {
        "seconds": total - quantising,
        "quantising": quantising / total,
        "clock": kernels[0].clock,
        "tensor_cores": max(k.busy.get("tensor cores", 0.0) for k in kernels),
        "interpreted_in": time.monotonic() - started,
    }


def row_of(row: Row) -> dict[str, Any]:
    """Raises RuntimeError where this build has no kernel for it."""
    result = modelled(row.case, row.kind, row.arch)
    speed = row.flops * row.share / result["seconds"] / 1e12
    return {
        **dataclasses.asdict(row),
        **result,
        "modelled": speed,
        "even_at": row.published and result["clock"] * row.published / speed,
    }


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument(
        "--only", nargs="+", default=[""], metavar="NAME", help="what its rows begin with: attention, int8, fp8 block"
    )
    p.add_argument("--json", metavar="FILE", help="also write the result to this file")
    args = p.parse_args()
    if reason := core.why_not():
        p.exit(1, f"{reason}\n")
    print(f"TFLOP/s, modelled at the data sheet's clock: no GPU was timed. {ERROR}", flush=True)
    print(f"{'':40}{'published':>10}{'modelled':>10}{'tensor cores':>14}{'quantising':>12}{'even at':>10}")
    results = []
    for row in ROWS:
        if not str(row).startswith(tuple(args.only)):
            continue
        r = row_of(row)
        results.append(r)
        print(
            f"{row!s:40}{number(row.published, '.0f'):>10}{r['modelled']:10.0f}{r['tensor_cores']:14.0%}{r['quantising']:12.0%}"
            f"{number(r['even_at'], '.0f'):>6} MHz  {row.who}, {row.gpu}",
            flush=True,
        )
    bench.write(bench.header("published", "cpu", []) | {"modelled": ["results"], "results": results}, args.json)


if __name__ == "__main__":
    main()
