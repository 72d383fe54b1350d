#pragma once
#include "cpu/vector.h"

namespace forwardpass::cpu {

// Transposes 16 x 16 elements of 32 bits. The source has n rows, `stride` bytes apart; missing rows are zero. The
// result's rows are `to_stride` bytes apart.
INLINE void transpose(const void* from, int64_t stride, int n, void* to, int64_t to_stride) {
  u32x16 x[kLanes], y[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    x[i] = u32x16{};
    if (i < n) std::memcpy(&x[i], static_cast<const char*>(from) + i * stride, sizeof(x[i]));
  }
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; i += 2) {
    y[i] = __builtin_shufflevector(x[i], x[i + 1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
    y[i + 1] = __builtin_shufflevector(x[i], x[i + 1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  }
#pragma GCC unroll 8
  for (int k = 0; k < kLanes / 2; ++k) {
    const int i = k / 2 * 4 + k % 2;
    x[i] = __builtin_shufflevector(y[i], y[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    x[i + 2] = __builtin_shufflevector(y[i], y[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
#pragma GCC unroll 8
  for (int k = 0; k < kLanes / 2; ++k) {
    const int i = k / 4 * 8 + k % 4;
    y[i] = __builtin_shufflevector(x[i], x[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
    y[i + 4] = __builtin_shufflevector(x[i], x[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kLanes / 2; ++i) {
    x[i] = __builtin_shufflevector(y[i], y[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    x[i + 8] = __builtin_shufflevector(y[i], y[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) std::memcpy(static_cast<char*>(to) + i * to_stride, &x[i], sizeof(x[i]));
}

}  // namespace forwardpass::cpu
