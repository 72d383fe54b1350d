// A block of a cluster hands a value to its peer: a release of scope .cta orders nothing there either.
// Reports: race
// Needs: sm_90a
#include "hazard.cuh"

INLINE void release(unsigned* flag) {
#if BROKEN
  asm volatile("st.release.cta.global.u32 [%0], 1;" ::"l"(flag) : "memory");
#else
  asm volatile("st.release.cluster.global.u32 [%0], 1;" ::"l"(flag) : "memory");
#endif
}
INLINE void acquire(const unsigned* flag) {
  unsigned set;
  do {
    asm volatile("ld.acquire.cluster.global.u32 %0, [%1];" : "=r"(set) : "l"(flag) : "memory");
  } while (!set);
}

extern "C" __global__ void cluster_release_of_cta_scope(const float* x, float* y, unsigned* flag) {
  __shared__ float s[64];
  const int i = threadIdx.x;
  cluster_sync();
  if (cluster_rank() == 0) {
    s[i] = x[i];
    __syncthreads();
    if (i == 0) release(flag);
  } else {
    if (i == 0) acquire(flag);
    __syncthreads();
    y[i] = load_of_cta(&s[i], 0);  // HAZARD
  }
  cluster_sync();
}
