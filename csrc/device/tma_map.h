#pragma once
// Tensor maps, made on the host by the driver: cudart is linked, the driver is asked for through it.
#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace forwardpass {

// A function of the driver, by its name; known: where it is kept.
inline cudaError_t driver_function(const char* name, std::atomic<void*>& known, void*& function) {
  function = known.load(std::memory_order_acquire);
  if (function) return cudaSuccess;
  cudaDriverEntryPointQueryResult status;
  // as of CUDA 12.0, where they appeared
  if (auto e = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &status)) return e;
  if (status != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  known = function;
  return cudaSuccess;
}

// boxes of a tensor of `Rank` dimensions, innermost first: their sizes, the bytes between two elements of each but the
// first, sizes of a box; what a box has beyond the tensor. The base and the strides are multiples of 16.
template <int Rank>
cudaError_t encode_boxes(CUtensorMap& map, CUtensorMapDataType type, const void* data, const int64_t (&sizes)[Rank],
                         const int64_t (&strides)[Rank - 1], const int (&box)[Rank], CUtensorMapSwizzle swizzle,
                         CUtensorMapFloatOOBfill beyond = CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) {
  static std::atomic<void*> known{nullptr};
  void* encode;
  if (auto e = driver_function("cuTensorMapEncodeTiled", known, encode)) return e;
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

// Columns of `pixels` pixels by `channels` bytes of images of bytes [images, height, width, channels], in im2col mode:
// from a pixel on through a bounding box of each image, whose corners are relative to the image's, by steps. The base
// and the strides are multiples of 16. The arrays are of width and height, in this order.
inline cudaError_t encode_columns(CUtensorMap& map, const void* data, const int64_t (&sizes)[4],
                                  const int64_t (&strides)[3], const int (&lower)[2], const int (&upper)[2],
                                  const int (&steps)[2], int pixels, int channels, CUtensorMapSwizzle swizzle) {
  static std::atomic<void*> known{nullptr};
  void* encode;
  if (auto e = driver_function("cuTensorMapEncodeIm2col", known, encode)) return e;
  cuuint64_t sizes64[4], strides64[3];
  for (int d = 0; d < 4; ++d) sizes64[d] = sizes[d];
  for (int d = 0; d < 3; ++d) strides64[d] = strides[d];
  const cuuint32_t all_steps[4] = {1, static_cast<cuuint32_t>(steps[0]), static_cast<cuuint32_t>(steps[1]), 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeIm2col)>(encode)(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 4, const_cast<void*>(data), sizes64, strides64, lower, upper, channels,
      pixels, all_steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace forwardpass
