#pragma once
// One PTX instruction a function, with its section in the PTX ISA. sm_80 and later.
#include <cuda_runtime.h>

#include <cstdint>

namespace forwardpass::ptx {

// 9.7.3 max, min (.NaN): the result is NaN where either input is
__device__ inline float max_nan(float a, float b) {
  float d;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}
__device__ inline float min_nan(float a, float b) {
  float d;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}

#if __CUDA_ARCH__ >= 890
// 9.7.9 cvt: low byte from the second operand; saturates to 448, NaN stays NaN
__device__ inline uint16_t cvt_e4m3x2(float high, float low) {
  uint16_t d;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(d) : "f"(high), "f"(low));
  return d;
}
#endif

}  // namespace forwardpass::ptx
