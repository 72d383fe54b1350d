"""How far one tensor is from another."""

from __future__ import annotations

from torch import Tensor


def squared_relative_error(actual: Tensor, expected: Tensor) -> Tensor:
    """Squared L2 norm of the error over that of `expected`, as a 0-dim float64 tensor: 0 where there is no error at all (0 / 0
    too), infinite beside an `expected` of zeros, NaN where either has one."""
    actual, expected = actual.double(), expected.double()
    error = (actual - expected).square().sum()
    return error / expected.square().sum() if error != 0 else error


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """L2 norm of the error over that of `expected`, in float64."""
    return squared_relative_error(actual, expected).sqrt().item()


def finite_relative_error(actual: Tensor, expected: Tensor) -> float:
    """The same where both may have values that are not finite: NaN counts as 0, an infinity as the largest float64."""
    return relative_error(actual.double().nan_to_num(), expected.double().nan_to_num())
