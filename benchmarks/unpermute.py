"""unpermute beside plain torch: rows gathered, weighed and added up, as transformers' experts do it."""

from torch import Tensor

from benchmarks import bench
from forwardpass.ops.unpermute import OPERATION


def baseline(y: Tensor, position: Tensor, weights: Tensor) -> Tensor:
    """Where each choice has a row."""
    rows = y[position.flatten()].view(*position.shape, y.shape[-1])
    return (rows * weights.unsqueeze(-1)).sum(1).to(y.dtype)


BASELINES = {OPERATION: baseline}

if __name__ == "__main__":
    bench.main(BASELINES, __doc__)
