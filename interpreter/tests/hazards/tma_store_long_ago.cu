// A thread waits for its TMA store and tells nobody. Others overwrite what was stored, and have waited for many loads
// since.
// Reports: race or in_flight
// Needs: sm_90a
#include "hazard.cuh"

extern "C" __global__ void tma_store_long_ago(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap y,
                                              int later) {  // y = 1 [8, 32]
  __shared__ alignas(128) float s[256], others[256];
  __shared__ uint64_t filled;
  for (int i = threadIdx.x; i < 256; i += 64) s[i] = 1;
  if (threadIdx.x == 32) mbarrier_init(&filled, 1);
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_store(y, 0, 0, s);  // HAZARD: where the other warp came first
    bulk_commit();
    bulk_wait<0>();
  }
  if (threadIdx.x >= 32) {
    for (int n = 0; n < later; ++n) {
      if (threadIdx.x == 32) {
        mbarrier_arrive_expect_tx(&filled, 1024);
        tma_load(others, x, 0, 0, &filled);
      }
      mbarrier_wait(&filled, n & 1);
      __syncwarp();
    }
  }
  if (!BROKEN) __syncthreads();
  if (threadIdx.x >= 32) s[threadIdx.x] = 0;  // HAZARD
}
