// pad_rows: reads and writes every byte once. A warp's lanes read neighbouring bytes, one each, so whole sectors
// whatever the alignment; the cache coalesces them.
#include <cuda_runtime.h>

#include "params/pad_rows.h"

namespace forwardpass {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) pad_rows_kernel(const uint8_t* from, int64_t from_stride, uint8_t* to,
                                                            int64_t to_stride, int64_t bytes, int64_t blocks) {
  const int64_t row = blockIdx.x / blocks, byte = blockIdx.x % blocks * kThreads + threadIdx.x;
  if (byte < bytes) to[row * to_stride + byte] = from[row * from_stride + byte];
}

}  // namespace forwardpass

int forwardpass_pad_rows(const forwardpass::PadRowsParams* p, void* stream) {
  using namespace forwardpass;
  const int64_t size = size_of(p->from.dtype), bytes = p->from.columns * size,
                blocks = (bytes + kThreads - 1) / kThreads;
  pad_rows_kernel<<<static_cast<unsigned>(p->from.rows * blocks), kThreads, 0, cudaStream_t(stream)>>>(
      static_cast<const uint8_t*>(p->from.data), p->from.stride * size, static_cast<uint8_t*>(p->to),
      p->to_stride * size, bytes, blocks);
  return cudaGetLastError();
}
