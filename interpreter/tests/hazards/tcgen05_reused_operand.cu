// An operand in shared memory is overwritten while the tensor cores read it.
// Reports: race or in_flight
// Needs: sm_100a
#include "hazard.cuh"

extern "C" __global__ void tcgen05_reused_operand(const uint16_t* a, const uint16_t* b,
                                                  float* y) {  // y[128, 4]: four columns of the sum of a · bᵀ of 2 b
  __shared__ alignas(128) uint16_t sa[128 * 16], sb[16 * 16];
  __shared__ uint64_t barriers[2];
  __shared__ uint32_t address;
  load_operand(sa, a, 128);
  if (threadIdx.x < 32) tensor_alloc(&address);
  if (threadIdx.x == 0)
    for (uint64_t& barrier : barriers) mbarrier_init(&barrier, 1);
  fence_proxy_async();
  __syncthreads();
  for (int tile = 0; tile < 2; ++tile) {
    for (int i = threadIdx.x; i < 256; i += 128) sb[core_matrix_index(i / 16, i % 16)] = b[tile * 256 + i];  // HAZARD
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
      tensor_product(address, sa, sb, tile);  // HAZARD: where it is read after that
      tensor_commit(&barriers[tile]);
    }
    if (!BROKEN) mbarrier_wait(&barriers[tile], 0);
  }
  mbarrier_wait(&barriers[1], 0);
  float d[4];
  tensor_load(d, address);
  tensor_load_wait();
  for (int i = 0; i < 4; ++i) y[threadIdx.x * 4 + i] = d[i];
  __syncthreads();
  if (threadIdx.x < 32) tensor_free(address);
}
