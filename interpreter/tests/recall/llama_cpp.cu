// Needs: sm_80
#include "twins.cuh"

// Steps of a scan share B and C in shared memory; the next step's are written before all have read this step's.
KERNEL llama_cpp_24360(const float* x, float* y) {  // x: 3 steps of B[16], C[16]; y[3, 128]
  __shared__ float b[16], c[16];
  float state[16] = {};
  for (int step = 0; step < 3; ++step) {
    if (threadIdx.x < 16) {
      b[threadIdx.x] = x[step * 32 + threadIdx.x];       // HAZARD
      c[threadIdx.x] = x[step * 32 + 16 + threadIdx.x];  // HAZARD
    }
    __syncthreads();
    float sum = 0;
    for (int n = 0; n < 16; ++n) {
      state[n] += b[n];        // HAZARD
      sum += state[n] * c[n];  // HAZARD
    }
    y[step * 128 + threadIdx.x] = sum;
    if (!broken) __syncthreads();
  }
}
TWINS(llama_cpp_24360);

// All warps look at a mask in shared memory whether they may skip this part of the keys. The first to skip writes the
// next part's mask, and others then decide by that.
KERNEL llama_cpp_13742(const float* x, float* y) {  // x[4, 64]: masks; y[64] = the sum of parts that have a 1
  __shared__ float mask[64];
  float sum = 0;
  for (int part = 0; part < 4; ++part) {
    mask[threadIdx.x] = x[part * 64 + threadIdx.x];  // HAZARD
    __syncthreads();
    const int lane = threadIdx.x % 32;
    if (__all_sync(~0u, mask[lane] == 0 && mask[lane + 32] == 0)) {  // HAZARD
      if (!broken) __syncthreads();
      continue;  // HAZARD: where the barrier of another part is met
    }
    sum += mask[63 - threadIdx.x];  // HAZARD
    __syncthreads();                // HAZARD
  }
  y[threadIdx.x] = sum;
}
TWINS(llama_cpp_13742);

// A barrier that only the warps of one branch meet: from then on warps wait for each other at different places.
KERNEL llama_cpp_13469(const float* x, float* y) {  // y[128] = the sums of pairs of warps, reversed
  __shared__ float first[64];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float value = x[threadIdx.x];
  if (warp % 2 == 0) {
    first[warp * 16 + lane] = value;  // HAZARD
    if (broken) __syncthreads();      // HAZARD
  }
  if (!broken) __syncthreads();
  const float sum = first[warp / 2 * 32 + lane] + value;  // HAZARD
  __syncthreads();
  y[127 - threadIdx.x] = sum;
}
TWINS(llama_cpp_13469);

// 32 lanes write 16 values, and zeros over the scales behind them, which two other lanes write too.
KERNEL llama_cpp_28358(const float* x, float* y) {  // y[18] = x[16], and the sums of its halves
  __shared__ float values[16 + 16];
  float* scales = values + 16;
  const int lane = threadIdx.x;
  const float value = lane < 16 ? x[lane] : 0;
  float sum = value;
  for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (broken || lane < 16) values[lane] = value;           // HAZARD
  if (lane % 8 == 0 && lane < 16) scales[lane / 8] = sum;  // HAZARD
  __syncwarp();
  if (lane < 18) y[lane] = values[lane];
}
TWINS(llama_cpp_28358);

// Three passes over a row of global memory, by threads that do not wait for each other's part.
KERNEL ik_llama_cpp_2139(const float* x,
                         float* y) {              // x: mask[256], then 8 indices; y[256] = mask, -1000 where unselected
  if (threadIdx.x < 256) y[threadIdx.x] = -1000;  // HAZARD
  if (!broken) __syncthreads();
  if (threadIdx.x < 8) y[static_cast<int>(x[256 + threadIdx.x])] = 0;  // HAZARD
  if (!broken) __syncthreads();
  y[threadIdx.x] += x[threadIdx.x];  // HAZARD
}
TWINS(ik_llama_cpp_2139);
