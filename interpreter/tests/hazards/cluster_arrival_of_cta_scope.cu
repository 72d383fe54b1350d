// A block of a cluster tells its peer by the peer's mbarrier that a value is there, with an arrival of scope .cta.
// Reports: race
// Needs: sm_90a
#include "hazard.cuh"

INLINE void arrive(uint64_t* barrier, uint32_t rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(barrier)), "r"(rank));
#if BROKEN
  asm volatile("mbarrier.arrive.release.cta.shared::cluster.b64 _, [%0];" ::"r"(there) : "memory");
#else
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(there) : "memory");
#endif
}

extern "C" __global__ void cluster_arrival_of_cta_scope(const float* x, float* y) {
  __shared__ float s[64];
  __shared__ uint64_t written;
  const int i = threadIdx.x;
  if (i == 0) mbarrier_init(&written, 64);
  cluster_sync();
  if (cluster_rank() == 0) {
    s[i] = x[i];
    arrive(&written, 1);
  } else {
    mbarrier_wait(&written, 0);
    y[i] = load_of_cta(&s[i], 0);  // HAZARD
  }
  cluster_sync();
}
