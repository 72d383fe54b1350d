// A product adds to what tcgen05.st is still writing, though all threads have met.
// Reports: in_flight
// Needs: sm_100a
#include "hazard.cuh"

extern "C" __global__ void tcgen05_st_missing_wait(const uint16_t* a, const uint16_t* b,
                                                   float* y) {  // y[128, 4]: four columns of 1 + a · bᵀ
  __shared__ alignas(128) uint16_t sa[128 * 16], sb[16 * 16];
  __shared__ uint64_t barrier;
  __shared__ uint32_t address;
  load_operand(sa, a, 128);
  load_operand(sb, b, 16);
  if (threadIdx.x < 32) tensor_alloc(&address);
  if (threadIdx.x == 0) mbarrier_init(&barrier, 1);
  fence_proxy_async();
  __syncthreads();
  for (int c = 0; c < 16; c += 4) tensor_store(address + c, 1);
  if (!BROKEN) tensor_store_wait();
  __syncthreads();
  if (threadIdx.x == 0) {
    tensor_product(address, sa, sb, true);  // HAZARD
    tensor_commit(&barrier);
  }
  mbarrier_wait(&barrier, 0);
  float d[4];
  tensor_load(d, address);
  tensor_load_wait();
  for (int i = 0; i < 4; ++i) y[threadIdx.x * 4 + i] = d[i];
  __syncthreads();
  if (threadIdx.x < 32) tensor_free(address);
}
