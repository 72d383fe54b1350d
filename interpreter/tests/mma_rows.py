"""A launch of one mma.sync."""

import tensor_cores as tc
from rows import run


def mma(op, a, b, c, **options):
    """The bits of D for warps of matrices of bits: a [warps][m][k] and so on."""
    return tc.mma_matrices(op, "c", run(*tc.mma_operands(op, a, b, c), **options).values())
