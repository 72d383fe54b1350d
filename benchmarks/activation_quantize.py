"""activation_quantize beside plain torch."""

from typing import Any

import torch
from torch import Tensor

from benchmarks import bench, eager
from forwardpass.ops.activation_quantize import OPERATION


def baseline(
    x: Tensor, activation: str, dtype: torch.dtype, layout: str, symmetric: bool, channel_scale: Tensor | None,
    **options: Any,
) -> Any:  # fmt: skip
    v = eager.activate(x, activation, layout).float()
    return eager.quantize_rows(v if channel_scale is None else v * channel_scale, dtype, symmetric)


BASELINES = {OPERATION: baseline}

if __name__ == "__main__":
    bench.main(BASELINES, __doc__)
