"""dequant_activation beside plain torch."""

from benchmarks import bench, eager
from forwardpass.ops.dequant_activation import OPERATION

BASELINES = {OPERATION: eager.dequantize}

if __name__ == "__main__":
    bench.main(BASELINES, __doc__)
