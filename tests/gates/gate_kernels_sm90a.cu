// for test_gates.py: a wgmma main loop that waits for an mbarrier.
#include <cstdint>

__device__ inline void wait(uint32_t barrier, int phase) {
  uint32_t ready;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(ready)
                 : "r"(barrier), "r"(phase)
                 : "memory");
  } while (!ready);
}

__device__ inline void wgmma(float (&d)[4], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, p, 1, 1, 0, 0;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "l"(a), "l"(b));
}

__global__ void __launch_bounds__(128) attention_kernel(float4* out, uint64_t a, uint64_t b, int k) {
  __shared__ uint64_t full[2];
  const auto barrier = static_cast<uint32_t>(__cvta_generic_to_shared(full));
  float d[4] = {};
#pragma unroll 1
  for (int i = 0; i < k; ++i) {
    wait(barrier + i % 2 * 8, i / 2 % 2);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int j = 0; j < 4; ++j) wgmma(d, a + i * 4 + j, b + i * 4 + j);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#ifdef SERIALISED
    d[0] *= 2;  // between two wgmmas of a group that is not waited for: C7514
    wgmma(d, a, b);
    d[1] *= 2;
    wgmma(d, a, b);
#endif
  }
  out[threadIdx.x] = make_float4(d[0], d[1], d[2], d[3]);
}
