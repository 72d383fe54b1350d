"""dequant_activation beside plain torch."""

from benchmarks import bench, eager
from forwardpass.dequant_activation import OPERATION

if __name__ == "__main__":
    bench.main({OPERATION: eager.dequantize}, __doc__)
