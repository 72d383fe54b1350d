// Needs: sm_80
#include "twins.cuh"

// Counts in shared memory are set to zero by their owners, and added to by others, who may be there first.
KERNEL vllm_13140(const float* x, float* y) {  // x[128]: experts of tokens; y[64] = tokens of each
  __shared__ int tokens[64];
  if (threadIdx.x < 64) tokens[threadIdx.x] = 0;  // HAZARD
  if (!broken) __syncthreads();
  atomicAdd(&tokens[static_cast<int>(x[threadIdx.x])], 1);  // HAZARD
  __syncthreads();
  if (threadIdx.x < 64) y[threadIdx.x] = static_cast<float>(tokens[threadIdx.x]);
}
TWINS(vllm_13140);

// Each thread puts a sum into an array in which all search, without a barrier between.
KERNEL sglang_37663(const float* x, float* y) {  // x[64]: ascending; y[128] = how many are at most the thread's number
  __shared__ float prefix[64];
  if (threadIdx.x < 64) prefix[threadIdx.x] = x[threadIdx.x];  // HAZARD
  if (!broken) __syncthreads();
  int low = 0, high = 64;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (prefix[middle] <= threadIdx.x) {  // HAZARD
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  y[threadIdx.x] = static_cast<float>(low);
}
TWINS(sglang_37663);

// The wait for asynchronous copies is chosen by a number that is negative for the last, partial chunk: none is chosen.
KERNEL hadacore_53167(const float* x,
                      float* y) {  // y[128] = x[128]; one chunk of 32 lanes of 16 bytes, where two would fit
  __shared__ alignas(16) float chunks[2][128];
  constexpr int kPlanned = 2;
  const int real = 1;
  for (int chunk = 0; chunk < real; ++chunk) {
    cp_async(&chunks[chunk][threadIdx.x * 4], x + chunk * 128 + threadIdx.x * 4);  // HAZARD
    cp_async_commit();
  }
  const int missing = broken ? real - kPlanned : kPlanned - real;
  for (int chunk = 0; chunk < real; ++chunk) {
    switch (chunk + missing) {
      case 0:
        cp_async_wait<1>();
        break;
      case 1:
        cp_async_wait<0>();
        break;
    }
    for (int i = 0; i < 4; ++i) y[chunk * 128 + threadIdx.x * 4 + i] = chunks[chunk][threadIdx.x * 4 + i];  // HAZARD
  }
}
TWINS(hadacore_53167);

// A sequence's first block is added to the index of a table of blocks, beyond its end.
KERNEL vllm_28760(const float* x, float* y) {  // x: a table of 8 blocks; y[128] = those from the fifth on, else -1
  const int first = 5, block = threadIdx.x / 16;
  const bool has = broken || first + block < 8;
  y[threadIdx.x] = has ? x[first + block] : -1;  // HAZARD
}
TWINS(vllm_28760);

// A thread waits for its own asynchronous copies, and reads those of others.
KERNEL ninfer_43(const float* x, float* y) {  // y[256] = x[256] reversed
  __shared__ alignas(16) float tile[256];
  cp_async(&tile[threadIdx.x * 4], x + threadIdx.x * 4);  // HAZARD
  cp_async_commit();
  cp_async_wait<0>();
  if (!broken) __syncthreads();
  for (int i = threadIdx.x; i < 256; i += 64) y[i] = tile[255 - i];  // HAZARD
}
TWINS(ninfer_43);
