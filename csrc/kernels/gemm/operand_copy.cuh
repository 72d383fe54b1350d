#pragma once
// How the threads of a block copy an operand's rows to shared memory by cp.async.
#include "device/ptx_sm80.cuh"
#include "device/swizzled_rows.cuh"

namespace forwardpass {

// Copies kRows rows of an operand, slice after slice of kSliceK bytes. Rows outside the matrix read its last row again,
// as their outputs are not stored; columns outside it are zero.
template <int kSliceK, int kRows, int kThreads>
struct OperandCopy {
  using Share = CopyShare<kSliceK, kRows, kThreads>;
  const uint8_t* row[Share::kCount];
  int bytes_left;  // from this thread's chunk to the end of K, which is below 2^30
  uint32_t to;

  __device__ OperandCopy(const Matrix& m, int64_t first_row, int64_t k, int64_t k_end, uint8_t* stage) {
    bytes_left = static_cast<int>(k_end - k) - Share::chunk() * 16;
    to = ptx::shared_address(stage) + Share::offset();
#pragma unroll
    for (int i = 0; i < Share::kCount; ++i) {
      const int64_t r = min(first_row + Share::row() + i * Share::kStep, m.rows - 1);
      row[i] = static_cast<const uint8_t*>(m.data) + r * m.stride + k + Share::chunk() * 16;
    }
  }
  // Copies the slice that is `ahead` slices further, all of whose columns exist.
  __device__ void whole(int stage, int ahead) const {
#pragma unroll
    for (int i = 0; i < Share::kCount; ++i) ptx::cp_async_16(address(stage, i), row[i] + ahead * kSliceK);
  }
  // The same of a slice of which some or all columns may be outside.
  __device__ void masked(int stage, int ahead) const {
    const int size = min(max(bytes_left - ahead * kSliceK, 0), 16);
#pragma unroll
    for (int i = 0; i < Share::kCount; ++i) ptx::cp_async_16(address(stage, i), row[i] + ahead * kSliceK, size);
  }
  __device__ void advance(int slices) {
#pragma unroll
    for (int i = 0; i < Share::kCount; ++i) row[i] += slices * kSliceK;
    bytes_left -= slices * kSliceK;
  }

 private:
  __device__ uint32_t address(int stage, int i) const {
    return to + stage * kRows * kSliceK + i * Share::kStep * kSliceK;
  }
};

}  // namespace forwardpass
