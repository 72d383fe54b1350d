#pragma once
#include "cpu/vector.h"

namespace forwardpass::cpu {

// Transposes as many rows of 32-bit elements as a row has.
INLINE void transpose_registers(Vectors<16>::u32 (&x)[16]) {
  Vectors<16>::u32 y[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = __builtin_shufflevector(x[i], x[i + 1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
    y[i + 1] = __builtin_shufflevector(x[i], x[i + 1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  }
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) {
    const int i = k / 2 * 4 + k % 2;
    x[i] = __builtin_shufflevector(y[i], y[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    x[i + 2] = __builtin_shufflevector(y[i], y[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) {
    const int i = k / 4 * 8 + k % 4;
    y[i] = __builtin_shufflevector(x[i], x[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
    y[i + 4] = __builtin_shufflevector(x[i], x[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    x[i] = __builtin_shufflevector(y[i], y[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    x[i + 8] = __builtin_shufflevector(y[i], y[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
}
INLINE void transpose_registers(Vectors<8>::u32 (&x)[8]) {
  Vectors<8>::u32 y[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    y[i] = __builtin_shufflevector(x[i], x[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    y[i + 1] = __builtin_shufflevector(x[i], x[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const int i = k / 2 * 4 + k % 2;
    x[i] = __builtin_shufflevector(y[i], y[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    x[i + 2] = __builtin_shufflevector(y[i], y[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vectors<8>::u32 low = x[i], high = x[i + 4];
    x[i] = __builtin_shufflevector(low, high, 0, 1, 2, 3, 8, 9, 10, 11);
    x[i + 4] = __builtin_shufflevector(low, high, 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// Transposes 16 x 16 elements of 32 bits, by 8 or 16 lanes. The source has n rows, `stride` bytes apart; missing rows
// are zero. The result's rows are `to_stride` bytes apart.
template <class V>
INLINE void transpose(const void* from, int64_t stride, int n, void* to, int64_t to_stride) {
  constexpr int kSide = kLanes<V>;
#pragma GCC unroll 2
  for (int row = 0; row < 16; row += kSide)
#pragma GCC unroll 2
    for (int column = 0; column < 16; column += kSide) {
      Uints<V> x[kSide];
#pragma GCC unroll 16
      for (int i = 0; i < kSide; ++i) {
        x[i] = Uints<V>{};
        if (row + i < n)
          std::memcpy(&x[i], static_cast<const char*>(from) + (row + i) * stride + 4 * column, sizeof(x[i]));
      }
      transpose_registers(x);
#pragma GCC unroll 16
      for (int i = 0; i < kSide; ++i)
        std::memcpy(static_cast<char*>(to) + (column + i) * to_stride + 4 * row, &x[i], sizeof(x[i]));
    }
}

}  // namespace forwardpass::cpu
