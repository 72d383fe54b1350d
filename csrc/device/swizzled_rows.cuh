#pragma once
// Rows of 32, 64 or 128 bytes in shared memory, and how the threads of a block copy them by cp.async.
#include <cuda_runtime.h>

namespace forwardpass {

// Chunks of 16 bytes, swizzled so that the eight rows of a column of chunks, which an ldmatrix reads, fall into
// different banks; so do the 128 bytes that a quarter of a warp copies at a time. Of rows of 128 bytes this is the
// layout that TMA and wgmma call the 128-byte swizzle.
template <int kRowBytes>
struct SwizzledRows {
  static constexpr int kChunks = kRowBytes / 16;
  static_assert(kChunks == 2 || kChunks == 4 || kChunks == 8);
  __device__ static int swizzle(int row) { return row / (8 / kChunks) % kChunks; }
  __device__ static int offset(int row, int chunk) { return row * kRowBytes + (chunk ^ swizzle(row)) * 16; }
};

// A thread's share in copying kRows such rows: chunk() of every kStep-th row, from row() on.
template <int kRowBytes, int kRows, int kThreads>
struct CopyShare {
  using Layout = SwizzledRows<kRowBytes>;
  static constexpr int kStep = kThreads / Layout::kChunks, kCount = kRows / kStep;
  static_assert(kRows % kStep == 0 && kStep % 8 == 0, "the swizzle is the same in all of a thread's rows");
  __device__ static int row() { return threadIdx.x / Layout::kChunks; }
  __device__ static int chunk() { return threadIdx.x % Layout::kChunks; }
  // Byte offset of its first chunk; the next ones are kStep rows further each.
  __device__ static int offset() { return Layout::offset(row(), chunk()); }
};

}  // namespace forwardpass
