// An operand in shared memory is overwritten while wgmma reads it.
// Reports: race or in_flight
// Needs: sm_90a
#include "hazard.cuh"

extern "C" __global__ void wgmma_reused_operand(const uint16_t* a, const uint16_t* b,
                                                float* y) {  // y[64, 8] = sum of a · bᵀ of 2 b
  __shared__ alignas(128) uint16_t sa[64 * 16], sb[8 * 16];
  load_operand(sa, a, 64);
  float d[4] = {};
  for (int tile = 0; tile < 2; ++tile) {
    sb[core_matrix_index(threadIdx.x / 16, threadIdx.x % 16)] = b[tile * 128 + threadIdx.x];  // HAZARD
    fence_proxy_async();
    __syncthreads();
    wgmma_fence();
    wgmma_m64n8k16(d, descriptor(sa), descriptor(sb));  // HAZARD: where it was read after that
    wgmma_commit();
    wgmma_wait<BROKEN>();
    __syncthreads();
  }
  wgmma_wait<0>();
  store_m64n8(y, d);
}
