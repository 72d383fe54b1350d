// dequant_activation: 2 or 4 bytes per element in, 1 to 4 out. A thread makes eight consecutive outputs; per-column
// values come from L1 or L2 (at most 12 bytes per element beside 6 from memory, and L1 has eight times the memory's
// bandwidth).
#include "device/dependent_launch.cuh"
#include "device/dispatch.h"
#include "device/epilogue/vector8.cuh"
#include "device/ptx_sm80.cuh"
#include "kernels/dequant_activation/dequant_activation.h"
#include "params/gemm.h"

namespace forwardpass {

constexpr int kThreads = 256;  // at most

// Adds the partial sums of a split-K product in their order: the same bits each time.
template <class Acc>
__device__ Vec<Acc> load_sum(const Acc* p, int n, bool aligned, int64_t splits, int64_t split_stride) {
  Vec<Acc> sum = load_vec(p, n, aligned);
  for (int64_t s = 1; s < splits; ++s) {
    const Vec<Acc> part = load_vec(p + s * split_stride, n, aligned);
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum.e[i] += part.e[i];
  }
  return sum;
}

template <Dtype D>
__global__ void __launch_bounds__(kThreads)
    dequant_activation_kernel(DequantActivationParams p, int64_t splits, int64_t split_stride, int64_t vectors,
                              EpilogueAccess access, bool aligned) {
  ptx::wait_for_earlier_kernels();
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, row = index / vectors,
                out_column = index % vectors * kVec;
  if (row >= p.acc.rows) return;
  const bool gated = is_gated(p.epilogue.activation);
  const int64_t column = gated ? 2 * out_column : out_column;  // gated: 8 of gate, then 8 of up
  const int n = static_cast<int>(min(int64_t{kVec}, p.acc.columns - column));

  auto acc = static_cast<const cuda_t<D>*>(p.acc.data) + row * p.acc.stride + column;
  const auto first = load_sum(acc, n, aligned, splits, split_stride);
  auto up = first;
  if (gated) up = load_sum(acc + kVec, n, aligned, splits, split_stride);
  float y[kVec];
  const auto columns = [&] { return EpilogueColumns<cuda_t<D>>(p.epilogue, access, column, n); };
  epilogue_values(y, p.epilogue, access, columns, row, column, n, first, up);
  store_output<false>(y, p.epilogue, access, row, out_column, n);
}

cudaError_t launch_dequant_activation(const DequantActivationParams& p, int64_t splits, int64_t split_stride,
                                      cudaStream_t stream, int arch) {
  const int64_t vectors = (p.acc.columns / (is_gated(p.epilogue.activation) ? 2 : 1) + kVec - 1) / kVec;
  // Few outputs, as split-K products have, are spread over as many multiprocessors as possible. modelled on an H100: 16
  // x 1024 with four parts takes 0.10 us in blocks of 64 threads and 0.39 us in blocks of 256
  const int64_t all = p.acc.rows * vectors, threads = all < 256 * kThreads ? 64 : kThreads;
  const Launch launch{
      .grid = ceil_div(all, threads), .block = static_cast<int>(threads), .dependent = waits_for_earlier_kernels(arch)};
  const int64_t word = 16 / size_of(p.acc.dtype);
  const bool aligned = is_aligned(p.acc.data) && p.acc.stride % word == 0 && split_stride % word == 0;
  return dispatch<Dtype::i32, Dtype::f32, Dtype::f16, Dtype::bf16>(p.acc.dtype, [&](auto D) {
    return launch_kernel(dequant_activation_kernel<D()>, launch, stream, p, splits, split_stride, vectors,
                         EpilogueAccess(p.epilogue), aligned);
  });
}

}  // namespace forwardpass

int forwardpass_dequant_activation(const forwardpass::DequantActivationParams* p, void* stream) {
  return forwardpass::launch_dequant_activation(*p, 1, 0, static_cast<cudaStream_t>(stream));
}
