// The product in tensor memory is read before anybody has waited for the commit's mbarrier.
// Reports: in_flight or race or uninitialised
// Needs: sm_100a
#include "hazard.cuh"

extern "C" __global__ void tcgen05_missing_wait(const uint16_t* a, const uint16_t* b,
                                                float* y) {  // y[128, 4]: four columns of a · bᵀ
  __shared__ alignas(128) uint16_t sa[128 * 16], sb[16 * 16];
  __shared__ uint64_t barrier;
  __shared__ uint32_t address;
  load_operand(sa, a, 128);
  load_operand(sb, b, 16);
  if (threadIdx.x < 32) tensor_alloc(&address);
  if (threadIdx.x == 0) mbarrier_init(&barrier, 1);
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    tensor_product(address, sa, sb, false);  // HAZARD: where it is done after that
    tensor_commit(&barrier);
  }
  if (!BROKEN) mbarrier_wait(&barrier, 0);
  float d[4];
  tensor_load(d, address);  // HAZARD
  tensor_load_wait();
  for (int i = 0; i < 4; ++i) y[threadIdx.x * 4 + i] = d[i];
  __syncthreads();
  if (threadIdx.x < 32) tensor_free(address);
}
