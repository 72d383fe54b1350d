"""Triton's own binding of cuBLASLt (`triton._C.libtriton.nvidia.cublas.CublasLt`), which tests and benchmarks compare with.

On the interpreted GPU its products are torch's: in float32, rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: the values of e2m1, by their four bits
_E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
_E2M1 += [-v for v in _E2M1]


class CublasLt:
    """What Triton's class of this name has, with its signatures. B is transposed: its rows are the product's columns."""

    def __init__(self, workspace: Tensor):
        if not workspace.is_cuda:
            raise ValueError(f"cuBLAS needs a workspace on the GPU, not on {workspace.device}")

    def matmul(self, a: Tensor, b: Tensor, c: Tensor) -> None:
        """c = a b^T, for a (m, k), b (n, k) and c (m, n) of one dtype."""
        self.gemm(a, b, c, c, 1.0, 0.0)

    def gemm(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor, alpha: float, beta: float) -> None:
        """d = alpha a b^T + beta c; of c nothing is read where beta is 0."""
        _check(a, b, d)
        if not a.dtype == b.dtype == c.dtype == d.dtype:
            raise RuntimeError(f"cuBLAS: the dtypes must be the same, not {a.dtype}, {b.dtype}, {c.dtype}, {d.dtype}")
        product = alpha * (a.float() @ b.float().T)
        d.copy_(product + beta * c.float() if beta else product)

    def block_scaled_matmul_mxfp8(self, a: Tensor, b: Tensor, c: Tensor, a_scales: Tensor, b_scales: Tensor) -> None:
        """c (float16) of a (m, k) and b (n, k) in e4m3, with a scale in e8m0 for 32 columns, in tiles of 128 rows."""
        _check(a, b, c)
        values = [t.view(torch.float8_e4m3fn).float() for t in (a, b)]
        self._block_scaled(values, [t.view(torch.float8_e8m0fnu) for t in (a_scales, b_scales)], 32, c)

    def block_scaled_matmul_nvfp4(self, a: Tensor, b: Tensor, c: Tensor, a_scales: Tensor, b_scales: Tensor) -> None:
        """The same of e2m1, two in a byte (m, k / 2), the first in the low bits, with a scale in e4m3 for 16 columns."""
        _check(a, b, c)
        table = torch.tensor(_E2M1, device=a.device)
        values = [table[torch.stack([t & 15, t >> 4], -1).flatten(1).int()] for t in (a, b)]
        self._block_scaled(values, [t.view(torch.float8_e4m3fn) for t in (a_scales, b_scales)], 16, c)

    @staticmethod
    def _block_scaled(values: list[Tensor], scales: list[Tensor], columns: int, c: Tensor) -> None:
        scaled = []
        for v, s in zip(values, scales):
            rows, k = v.shape
            if rows % 128 or k % (4 * columns) or s.numel() != rows * k // columns:
                raise RuntimeError(
                    f"cuBLAS: scales come in tiles of 128 rows and {4 * columns} columns, of which {rows} x {k} with "
                    f"{s.numel()} scales is not made up"
                )
            # by tile of rows, tile of columns, row modulo 32, row / 32, column
            tiles = s.float().reshape(rows // 128, k // columns // 4, 32, 4, 4)
            scaled.append(v * tiles.permute(0, 3, 2, 1, 4).reshape(rows, -1).repeat_interleave(columns, 1))
        c.copy_(scaled[0] @ scaled[1].T)


def _check(a: Tensor, b: Tensor, c: Tensor) -> None:
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or c.shape != (a.shape[0], b.shape[0]):
        shapes = ", ".join(str(tuple(t.shape)) for t in (a, b, c))
        raise RuntimeError(f"cuBLAS: needs (m, k), (n, k) and (m, n), not {shapes}")
    if not all(t.is_cuda and t.is_contiguous() for t in (a, b, c)):
        raise RuntimeError("cuBLAS: needs contiguous tensors on the GPU")


def install() -> None:
    from triton._C.libtriton import nvidia

    nvidia.cublas.CublasLt = CublasLt
