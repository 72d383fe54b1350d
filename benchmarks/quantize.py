"""quantize beside plain torch."""

from typing import Any

import torch
from torch import Tensor

from benchmarks import bench, eager
from forwardpass.ops.quantize import OPERATION


def baseline(x: Tensor, dtype: torch.dtype, symmetric: bool, channel_scale: Tensor | None, **options: Any) -> Any:
    v = x.float() if channel_scale is None else x.float() * channel_scale
    return eager.quantize_rows(v, dtype, symmetric)


BASELINES = {OPERATION: baseline}

if __name__ == "__main__":
    bench.main(BASELINES, __doc__)
