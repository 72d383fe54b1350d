"""A kernel of Numba: blocks add up their parts in shared memory. usage: numba_script.py [race]"""

import sys

import numpy as np
from numba import cuda, float32

RACES = "race" in sys.argv


@cuda.jit
def sums(x, result):
    part = cuda.shared.array(128, float32)
    i = cuda.threadIdx.x
    part[i] = x[cuda.grid(1)]
    cuda.syncthreads()
    step = 64
    while step:
        if i < step:
            part[i] += part[i + step]
        if not RACES:
            cuda.syncthreads()
        step //= 2
    if i == 0:
        result[cuda.blockIdx.x] = part[0]


x = np.arange(1024, dtype=np.float32)
result = cuda.device_array(8, np.float32)
sums[8, 128](cuda.to_device(x), result)
if not RACES:
    assert np.array_equal(result.copy_to_host(), x.reshape(8, 128).sum(1))
    print("PASS")
