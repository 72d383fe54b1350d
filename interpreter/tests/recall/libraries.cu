// Needs: sm_80
#include <mma.h>

#include "twins.cuh"

// Thread 0 adds up what all wrote, while the others write the next row's.
KERNEL cuml_6578(const float* x, float* y) {  // x[4, 64]; y[4] = sums of rows
  __shared__ float products[64];
  for (int row = 0; row < 4; ++row) {
    products[threadIdx.x] = x[row * 64 + threadIdx.x];  // HAZARD
    __syncthreads();
    if (threadIdx.x == 0) {
      float sum = 0;
      for (int i = 0; i < 64; ++i) sum += products[i];  // HAZARD
      y[row] = sum;
    }
    if (!broken) __syncthreads();
  }
}
TWINS(cuml_6578);

// Thread 0 tells the grid that its block is done, while other warps still add to the grid's histogram.
__device__ int grid_histogram[16];
__device__ unsigned blocks_done;
KERNEL cccl_10627(const float* x, float* y) {  // x[4, 128]: digits; y[16] = how often each; it leaves both at zero
  __shared__ bool last;
  atomicAdd(&grid_histogram[static_cast<int>(x[blockIdx.x * 128 + threadIdx.x])], 1);  // HAZARD
  if (!broken) __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(&blocks_done, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (last && threadIdx.x < 16) {
    y[threadIdx.x] = static_cast<float>(grid_histogram[threadIdx.x]);  // HAZARD
    grid_histogram[threadIdx.x] = 0;                                   // HAZARD
  }
}
TWINS(cccl_10627);

// Two reductions, one after the other, in the same shared memory, without a barrier between.
KERNEL pytorch_162995(const float* x, float* y) {  // x[4, 32]; y[32] = sums over the four, less the sum of all
  __shared__ float scratch[128];
  const int row = threadIdx.x / 32, column = threadIdx.x % 32;
  scratch[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < 4; ++i) sum += scratch[i * 32 + column];  // HAZARD
  if (!broken) __syncthreads();
  const float all = warp_sum(sum);
  if (column == 0) scratch[row] = all;  // HAZARD
  __syncthreads();
  if (row == 0) y[column] = sum - scratch[3];
}
TWINS(pytorch_162995);

// A prefix sum of a warp stores 32 values into an array of 16.
KERNEL pytorch_192300(const float* x, float* y) {  // y[16] = exclusive prefix sums of x[16]
  __shared__ float offsets[16];
  const int lane = threadIdx.x;
  float sum = lane < 16 ? x[lane] : 0;
  const float own = sum;
  for (int step = 1; step < 32; step *= 2) {
    const float before = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += before;
  }
  if (broken || lane < 16) offsets[lane] = sum - own;  // HAZARD
  __syncwarp();
  if (lane < 16) y[lane] = offsets[15 - lane];
}
TWINS(pytorch_192300);

// A row's offset in 32 bits, in a table of more than 2^31 elements.
KERNEL onnxruntime_28108(const float* x, float* y) {  // y[128] = x[255999, 0:128] of rows of 8960
  const int row = 2000 * blockDim.x - 1, columns = 70 * blockDim.x;
  const int wrapped = row * columns + threadIdx.x;  // HAZARD
  const int64_t right = static_cast<int64_t>(row) * columns + threadIdx.x;
  y[threadIdx.x] = x[broken ? wrapped : right];  // HAZARD
}
TWINS(onnxruntime_28108);

// A block publishes its sum by a flag, and nothing orders the two for other blocks.
__device__ volatile int published;
__device__ volatile float published_sum;
KERNEL kokkos_2681(const float* x, float* y) {  // x[2, 32]; y[2] = running sums; it leaves the flag at zero
  float sum = warp_sum(x[blockIdx.x * 32 + threadIdx.x]);
  if (threadIdx.x) return;
  if (blockIdx.x == 0) {
    y[0] = sum;  // HAZARD
    if (!broken) __threadfence();
    published = 1;
  } else {
    while (!published) {
    }
    if (!broken) __threadfence();
    y[1] = y[0] + sum;  // HAZARD
    published = 0;
  }
}
TWINS(kokkos_2681);

// A warp stores a matrix of tensor cores, and its lanes read each other's elements without waiting.
KERNEL colibri_1099(const float* x, float* y) {  // y[16, 16] = 1 everywhere
  using namespace nvcuda;
  __shared__ alignas(32) float tile[256];
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
  wmma::fill_fragment(sum, x[0]);
  wmma::store_matrix_sync(tile, sum, 16, wmma::mem_row_major);  // HAZARD
  if (!broken) __syncwarp();
  for (int i = threadIdx.x; i < 256; i += 32) y[i] = tile[i];  // HAZARD
}
TWINS(colibri_1099);
