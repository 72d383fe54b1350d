#pragma once
// Fragments: how the lanes of a warp share the matrices of the tensor cores.
#include <cuda_runtime.h>

namespace forwardpass {

// PTX ISA 9.7.14.5: a warp is eight groups of four lanes. Called groupID and threadID_in_group there.
__device__ inline int group_id() { return threadIdx.x % 32 / 4; }
__device__ inline int thread_in_group() { return threadIdx.x % 4; }

// f of the values that the four lanes of a group have: of a row's maximum, or its sum.
template <class T, class F>
__device__ inline T over_group(T v, F f) {
  v = f(v, __shfl_xor_sync(0xffffffff, v, 1));
  return f(v, __shfl_xor_sync(0xffffffff, v, 2));
}
template <class T>
__device__ inline T sum_of_group(T v) {
  return over_group(v, [](T a, T b) { return a + b; });
}

// Row and column of this thread's element e in an accumulator tile of 16 x 8: two neighbouring columns of two rows that
// are eight apart.
__device__ inline int accumulator_row(int e) { return group_id() + e / 2 * 8; }
__device__ inline int accumulator_column(int e) { return thread_in_group() * 2 + e % 2; }

// Transposes 4 x 4 words that the four lanes of a group have: word i of lane t is then what word t of lane i was.
template <int kCount>
__device__ inline void transpose_in_group(uint32_t (&x)[kCount][4]) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
    for (int k = 0; k < kCount; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i & bit) continue;
        const bool upper = threadIdx.x & bit;
        uint32_t &low = x[k][i], &high = x[k][i + bit];
        const uint32_t received = __shfl_xor_sync(0xffffffff, upper ? low : high, bit);
        (upper ? low : high) = received;
      }
}

// A warp's accumulators: kTilesM by kTilesN tiles of an mma m16n8, kStepM rows from one to the next below. Of a wgmma
// m64nN each warp of the warpgroup has sixteen rows in the same layout; kStepM is 64 there.
template <class T, int kTilesM_, int kTilesN_, int kStepM = 16>
struct Fragments {
  static constexpr int kTilesM = kTilesM_, kTilesN = kTilesN_, kStep = kStepM;
  using Element = T;
  using Row = T[kTilesN][4];  // of tiles
  T tile[kTilesM][kTilesN][4];

  __device__ Row& operator[](int i) { return tile[i]; }
  __device__ const Row& operator[](int i) const { return tile[i]; }
  // Of this thread's element e of tile (i, j), in the warp's matrix.
  __device__ static int row(int i, int e) { return i * kStepM + accumulator_row(e); }
  __device__ static int column(int j, int e) { return j * 8 + accumulator_column(e); }

  // f(element, i, j, e) for each element of this thread.
  template <class F>
  __device__ void for_each(F f) {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i)
#pragma unroll
      for (int j = 0; j < kTilesN; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) f(tile[i][j][e], i, j, e);
  }
  __device__ void clear() {
    for_each([](T& element, int, int, int) { element = 0; });
  }
};

}  // namespace forwardpass
