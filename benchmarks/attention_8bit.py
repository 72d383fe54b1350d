"""attention_8bit beside torch's scaled_dot_product_attention; where it takes no sinks or gives no lse, beside eager attention.

python -m benchmarks.attention_8bit [--device cpu] [--rounds N] [--json FILE]
"""

from typing import Any

from torch import Tensor

from benchmarks import bench
from benchmarks.attention import eager, sdpa
from forwardpass.ops.attention_8bit import ATTENTION_8BIT, ATTENTION_8BIT_WITH_LSE


def sdpa_of_16_bits(*, dtype: str, rotates: bool, **args: Any) -> Tensor:
    return sdpa(**args)


def eager_of_16_bits(*, dtype: str, rotates: bool, **args: Any) -> tuple[Tensor, Tensor]:
    return eager(**args)


BASELINES = {ATTENTION_8BIT: sdpa_of_16_bits, ATTENTION_8BIT_WITH_LSE: eager_of_16_bits}


if __name__ == "__main__":
    bench.main(BASELINES, __doc__)
