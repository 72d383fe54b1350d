// Needs: sm_90a
#include "twins.cuh"

// Four warps reduce a maximum by a named barrier, and the next reduction writes the scratch memory that some still
// read.
KERNEL cutlass_3597(const float* x, float* y) {  // x[2, 128]; y[2] = maxima of rows
  __shared__ float scratch[4];
  for (int row = 0; row < 2; ++row) {
    const float largest = warp_max(x[row * 128 + threadIdx.x]);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = largest;  // HAZARD
    bar_sync(1, 128);
    const float all = fmaxf(fmaxf(scratch[0], scratch[1]), fmaxf(scratch[2], scratch[3]));  // HAZARD
    if (threadIdx.x == 0) y[row] = all;
    if (!broken) bar_sync(1, 128);
  }
}
TWINS(cutlass_3597);

// A block sets its mailbox to zero when others of its cluster may already have put something there.
KERNEL cutlass_3598(const float* x, float* y) {  // clusters of two blocks of 32; y[64] = x[64], the two exchanged
  __shared__ float mailbox[32];
  const uint32_t rank = cluster_rank(), peer = rank ^ 1;
  if (!broken) mailbox[threadIdx.x] = 0;
  cluster_sync();
  if (broken) mailbox[threadIdx.x] = 0;  // HAZARD
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "st.shared::cluster.f32 [there], %2;\n"
      "}" ::"r"(shared_address(&mailbox[threadIdx.x])),
      "r"(peer), "f"(x[rank * 32 + threadIdx.x])
      : "memory");  // HAZARD
  cluster_sync();
  y[rank * 32 + threadIdx.x] = mailbox[threadIdx.x];
}
TWINS(cutlass_3598);

// The epilogue's threads read what others put into shared memory, with nothing between.
KERNEL flash_attention_1344(const float* x, float* y) {  // y[128] = x[128] reversed
  __shared__ float tile[128];
  tile[threadIdx.x] = x[threadIdx.x];  // HAZARD
  if (!broken) __syncthreads();
  y[threadIdx.x] = tile[127 - threadIdx.x];  // HAZARD
}
TWINS(flash_attention_1344);

// Started by programmatic dependent launch, a kernel reads what the one before it may still write.
extern "C" __global__ void upstream(const float* x, float* y) {  // y[256] = 2 x
  griddepcontrol_launch_dependents();
  y[blockIdx.x * 128 + threadIdx.x] = 2 * x[blockIdx.x * 128 + threadIdx.x];
}
KERNEL flash_attention_2481(const float* x, float* y) {  // y[256] = x[256] + 1
  if (!broken) griddepcontrol_wait();
  y[blockIdx.x * 128 + threadIdx.x] = x[blockIdx.x * 128 + threadIdx.x] + 1;  // HAZARD
}
TWINS(flash_attention_2481);
