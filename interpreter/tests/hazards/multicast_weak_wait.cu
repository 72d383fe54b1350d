// Each of two CTAs loads half a tile for both; one that expects the bytes of its own half alone reads too early.
// Reports: in_flight or uninitialised or race
// Needs: sm_90a
#include "hazard.cuh"

extern "C" __global__ void multicast_weak_wait(const float* x, float* y) {  // y[0] = y[1] = x, of 256 each, by 2 CTAs
  __shared__ alignas(128) float s[256];
  __shared__ uint64_t full;
  const uint32_t rank = cluster_rank();
  if (threadIdx.x == 0) {
    mbarrier_init(&full, 1);
    fence_mbarrier_init();
  }
  cluster_sync();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(&full, BROKEN ? sizeof(s) / 2 : sizeof(s));
    bulk_multicast(s + rank * 128, x + rank * 128, sizeof(s) / 2, &full, 3);  // HAZARD: where the other CTA came first
  }
  mbarrier_wait(&full, 0);
  y[rank * 256 + threadIdx.x] = s[threadIdx.x];              // HAZARD
  y[rank * 256 + 128 + threadIdx.x] = s[128 + threadIdx.x];  // HAZARD
  cluster_sync();
}
