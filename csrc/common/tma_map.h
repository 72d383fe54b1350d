#pragma once
// Tensor maps of matrices, made on the host by the driver: cudart is linked, the driver is asked for through it.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace forwardpass {

// boxes of `box_rows` x `box_columns` of a matrix [rows, columns], rows row_bytes apart; base and row_bytes are
// multiples of 16. Returns a cudaError_t.
inline int encode_boxes(CUtensorMap& map, CUtensorMapDataType type, const void* data, int64_t rows, int64_t columns,
                        int64_t row_bytes, int box_rows, int box_columns, CUtensorMapSwizzle swizzle) {
  static void* encode = nullptr;  // a race writes the same value twice
  if (!encode) {
    cudaDriverEntryPointQueryResult found;
    // as of CUDA 12.0, where it appeared
    if (auto e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found))
      return e;
    if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  }
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(row_bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
      &map, type, 2, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace forwardpass
