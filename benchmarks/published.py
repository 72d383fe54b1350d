"""Our GPU kernels' modelled times at shapes whose times others have published, without a GPU.

python -m benchmarks.published [--only NAME] [--json FILE]

Modelled by the interpreter's timeline (docs/interpreter.md), at the clock of the data sheet, which a GPU under a power limit does
not hold: 1830 MHz on an H100, where published times of GEMMs fit 1600. So the last column says at which clock our kernel would
be as fast as what was published; what is below the clock that the others had is ahead of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

import torch

from benchmarks import bench
from forwardpass import dispatch, interpret, use_backend
from forwardpass.ops.attention.cases import real
from forwardpass.ops.dequant_activation.cases import EpilogueCase
from forwardpass.ops.fp8_gemm import cases as fp8_gemm
from forwardpass.ops.int8_gemm import cases as int8_gemm
from gpuless import core
from gpuless.timing.timeline import ERROR

_EPILOGUE = EpilogueCase(bias=None, out_dtype=torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Row:
    """One published figure: of `who`, on `gpu`, in TFLOP/s of 16 bits or 8."""

    kind: str
    shape: tuple[int, ...]  # of a GEMM M, N, K; of attention batch, rows, heads, head dim
    who: str
    gpu: str
    published: float
    source: str
    arch: str = "sm_90a"
    causal: bool = False

    def __str__(self) -> str:
        return f"{self.kind} {' x '.join(map(str, self.shape))}{' causal' if self.causal else ''}"

    @property
    def case(self) -> Any:
        if self.kind == "attention":
            batch, rows, heads, dim = self.shape
            return dataclasses.replace(
                real((rows, rows), dim, batch, (heads, heads), torch.float16), causal=self.causal
            )
        if self.kind == "int8":
            return int8_gemm.Case(*self.shape, _EPILOGUE)  # type: ignore[call-arg]  # its length is not known
        return fp8_gemm.Case(  # type: ignore[call-arg]
            *self.shape, _EPILOGUE, blocks=self.kind == "fp8 block", layouts=("contiguous", "contiguous")
        )

    @property
    def flops(self) -> float:
        """As they are published: of causal attention half."""
        if self.kind == "attention":
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


_DEEPGEMM = "deepseek-ai/DeepGEMM, README at a9967bc"
_SAGE_A100 = {
    "gpu": "A100",
    "arch": "sm_80",
    "source": "thu-ml/SageAttention, assets, read off the chart; 4 x 32 heads there",
}
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
)  # fmt: skip


def row_of(row: Row) -> dict[str, Any]:
    """Raises RuntimeError where this build has no kernel for it."""
    case = row.case
    call = bench.as_a_layer_has_them(case.arguments())
    op = dispatch.operations[getattr(case, "op", f"{row.kind}_gemm")]
    started = time.monotonic()
    with torch.inference_mode(), interpret(row.arch, timeline=True, checks=False) as device, use_backend("cuda"):
        op(*call)
    timeline = device.timeline()
    seconds = sum(k.cycles / (k.clock * 1e6) for k in timeline.kernels)  # as kernels are timed: without their launches
    clock = timeline.kernels[0].clock
    modelled = row.flops / seconds / 1e12
    return {
        **dataclasses.asdict(row),
        "modelled": modelled,
        "clock": clock,
        "even_at": clock * row.published / modelled,
        "tensor_cores": max(k.busy.get("tensor cores", 0.0) for k in timeline.kernels),
        "interpreted_in": time.monotonic() - started,
    }


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--only", default="", metavar="NAME", help="what its rows begin with: attention, int8, fp8 block")
    p.add_argument("--json", metavar="FILE", help="also write the result to this file")
    args = p.parse_args()
    if reason := core.why_not():
        p.exit(1, f"{reason}\n")
    print(f"TFLOP/s, modelled at the data sheet's clock: no GPU was timed. {ERROR}", flush=True)
    print(f"{'':40}{'published':>10}{'modelled':>10}{'tensor cores':>14}{'even at':>10}")
    results = []
    for row in ROWS:
        if not str(row).startswith(args.only):
            continue
        r = row_of(row)
        results.append(r)
        print(
            f"{row!s:40}{row.published:10.0f}{r['modelled']:10.0f}{r['tensor_cores']:14.0%}{r['even_at']:6.0f} MHz"
            f"  {row.who}, {row.gpu}",
            flush=True,
        )
    bench.write(bench.header("published", "cpu", []) | {"modelled": ["results"], "results": results}, args.json)


if __name__ == "__main__":
    main()
