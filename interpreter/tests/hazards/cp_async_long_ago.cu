// Copies that an mbarrier is told of are read without a wait there. Many others have been waited for since.
// Reports: race or in_flight or uninitialised
// Needs: sm_80
#include "hazard.cuh"

INLINE void cp_async_arrive(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

extern "C" __global__ void cp_async_long_ago(const float4* x, float4* y, int later) {  // y = x [32, 4], by warp 1
  __shared__ float4 s[32], others[32];
  __shared__ uint64_t filled, again;
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    mbarrier_init(&filled, 32);
    mbarrier_init(&again, 32);
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    cp_async(&s[lane], &x[lane]);  // HAZARD: where the other warp came first
    cp_async_arrive(&filled);
    return;
  }
  for (int n = 0; n < later; ++n) {
    cp_async(&others[lane], &x[lane]);
    cp_async_arrive(&again);
    mbarrier_wait(&again, n & 1);
  }
  if (!BROKEN) mbarrier_wait(&filled, 0);
  y[lane] = s[lane];  // HAZARD
}
