// A block hands a value to another one: a release of scope .cta orders nothing between blocks.
// Reports: race
// Needs: sm_80
#include "hazard.cuh"

INLINE void release(unsigned* flag) {
#if BROKEN
  asm volatile("st.release.cta.global.u32 [%0], 1;" ::"l"(flag) : "memory");
#else
  asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory");
#endif
}
INLINE void acquire(const unsigned* flag) {
  unsigned set;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(set) : "l"(flag) : "memory");
  } while (!set);
}

extern "C" __global__ void release_of_cta_scope(const float* x, float* y, float* between, unsigned* flag) {
  const int i = threadIdx.x;
  if (blockIdx.x == 0) {
    between[i] = x[i];
    __syncthreads();
    if (i == 0) release(flag);
  } else {
    if (i == 0) acquire(flag);
    __syncthreads();
    y[i] = between[i];  // HAZARD
  }
}
