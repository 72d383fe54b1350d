// Two products that take A from registers, in turns. EARLY: A of the next one is made before the wait for this one, in
// registers that PTX calls others and ptxas gives the same place. UNWAITED: the sums are read without a wait, which
// ptxas puts in.
#include <cstdint>

__device__ __forceinline__ void multiply(float (&d)[8], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n16k8.f32.tf32.tf32 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, "
      "p, "
      "1, 1;\n}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void wait() { asm volatile("wgmma.wait_group.sync.aligned 0;\n" ::: "memory"); }

extern "C" __global__ __launch_bounds__(128) void products(const uint32_t* x, float* y, int n, uint64_t b) {
  __shared__ uint32_t tile[4096];
  for (int i = threadIdx.x; i < 4096; i += 128) tile[i] = x[i];
  __syncthreads();
  float d[8] = {};
#pragma unroll 1
  for (int k = 0; k < n; ++k) {
    uint32_t a[4];
    for (int i = 0; i < 4; ++i) a[i] = tile[(k * 512 + i * 128 + threadIdx.x) & 4095] & 0xffffe000;  // A
#if EARLY
    wait();
#endif
    asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
    multiply(d, a, b);  // PRODUCT
    asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
#if !EARLY && !UNWAITED
    wait();
#endif
  }
#if !UNWAITED
  wait();
#endif
  for (int i = 0; i < 8; ++i) y[threadIdx.x * 8 + i] = d[i];
}
