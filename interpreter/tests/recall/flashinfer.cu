// Needs: sm_80
#include "twins.cuh"

// A reduction's scratch memory is written for the next part of the vocabulary while slower warps still read it.
KERNEL flashinfer_3624(const float* x, float* y) {  // y[4] = the largest of each 128
  __shared__ float of_warps[4];
  for (int part = 0; part < 4; ++part) {
    const float largest = warp_max(x[part * 128 + threadIdx.x]);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = largest;  // HAZARD
    __syncthreads();
    float of_all = of_warps[0];                                                   // HAZARD
    for (int warp = 1; warp < 4; ++warp) of_all = fmaxf(of_all, of_warps[warp]);  // HAZARD
    if (threadIdx.x == 0) y[part] = of_all;
    if (!broken) __syncthreads();
  }
}
TWINS(flashinfer_3624);

// Each round of a radix selection clears the histogram that others still read for the round before.
KERNEL flashinfer_3529(const float* x, float* y) {  // y[128] = 1000 less how many keys have the digit 3, of 3 digits
  __shared__ int histogram[16];
  const unsigned key = static_cast<unsigned>(x[threadIdx.x]);
  int left = 1000;
  for (int round = 0; round < 3; ++round) {
    if (threadIdx.x < 16) histogram[threadIdx.x] = 0;  // HAZARD
    __syncthreads();
    atomicAdd(&histogram[key >> 4 * round & 15], 1);
    __syncthreads();
    left -= histogram[3];  // HAZARD
    if (!broken) __syncthreads();
  }
  y[threadIdx.x] = static_cast<float>(left);
}
TWINS(flashinfer_3529);

// A barrier under a condition that each thread decides for itself, from its own sum.
KERNEL flashinfer_769(const float* x, float* y) {  // y[128] = the first prefix of its warp above 20, else 0
  __shared__ float prefix[128];
  __shared__ int above;
  float sum = x[threadIdx.x];
  for (int step = 1; step < 32; step *= 2) {
    const float before = __shfl_up_sync(~0u, sum, step);
    if (threadIdx.x % 32 >= step) sum += before;
  }
  prefix[threadIdx.x] = sum;
  if (threadIdx.x == 0) above = 0;
  __syncthreads();
  if (sum > 20) atomicOr(&above, 1);
  if (!broken) __syncthreads();
  float first = 0;
  if (broken ? sum > 20 : above) {
    __syncthreads();  // HAZARD
    for (int lane = 31; lane >= 0; --lane) {
      const float of_lane = prefix[threadIdx.x / 32 * 32 + lane];
      if (of_lane > 20) first = of_lane;
    }
    __syncthreads();  // HAZARD
  }
  __syncthreads();  // HAZARD
  y[threadIdx.x] = first;
}
TWINS(flashinfer_769);
