#pragma once
// Tensor maps, made on the host by the driver: cudart is linked, the driver is asked for through it.
#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace forwardpass {

// boxes of a tensor of `Rank` dimensions, innermost first: their sizes, the bytes between two elements of each but the
// first, sizes of a box; what a box has beyond the tensor. The base and the strides are multiples of 16.
template <int Rank>
cudaError_t encode_boxes(CUtensorMap& map, CUtensorMapDataType type, const void* data, const int64_t (&sizes)[Rank],
                         const int64_t (&strides)[Rank - 1], const int (&box)[Rank], CUtensorMapSwizzle swizzle,
                         CUtensorMapFloatOOBfill beyond = CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) {
  static std::atomic<void*> known{nullptr};
  void* encode = known.load(std::memory_order_acquire);
  if (!encode) {
    cudaDriverEntryPointQueryResult status;
    // as of CUDA 12.0, where it appeared
    if (auto e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &status))
      return e;
    if (status != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
    known = encode;
  }
  cuuint64_t sizes64[Rank], strides64[Rank];
  cuuint32_t boxes[Rank], steps[Rank];
  for (int d = 0; d < Rank; ++d) {
    sizes64[d] = sizes[d], boxes[d] = box[d], steps[d] = 1;
    if (d + 1 < Rank) strides64[d] = strides[d];
  }
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
      &map, type, Rank, const_cast<void*>(data), sizes64, strides64, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, beyond);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// of a matrix [rows, columns], rows row_bytes apart
inline cudaError_t encode_boxes(CUtensorMap& map, CUtensorMapDataType type, const void* data, int64_t rows,
                                int64_t columns, int64_t row_bytes, int box_rows, int box_columns,
                                CUtensorMapSwizzle swizzle) {
  return encode_boxes<2>(map, type, data, {columns, rows}, {row_bytes}, {box_columns, box_rows}, swizzle);
}

}  // namespace forwardpass
