#pragma once
// The product of unsigned bytes. Of its own, as only attention_8bit has it, and what is in ptx_sm80.cuh is
// compiled into every kernel.
#include "device/ptx_sm80.cuh"

namespace forwardpass::ptx {

// 9.7.14 mma: d [16, 8] = c + a [16, 32] b [32, 8], of unsigned bytes; exact below 2^31
__device__ inline void mma_m16n8k32_u8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t* b,
                                       const int32_t (&c)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

}  // namespace forwardpass::ptx
