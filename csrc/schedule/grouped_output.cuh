#pragma once
// Where a grouped GEMM stores: each expert's rows with its own scales and bias, zeros in the rows that none has, and
// NaN in those of which that is unknown.
#include "device/epilogue/output.cuh"
#include "schedule/expert_list.cuh"

namespace forwardpass {

// That of the tile that has begun.
struct GroupOutput : GemmOutput {
  const GemmOutput& all;

  __device__ explicit GroupOutput(const GemmOutput& all) : GemmOutput(all), all(all) {
    epilogue.residual = nullptr, partial = nullptr;  // there are none, and the compiler knows
  }
  __device__ void take(int expert, const ExpertList& list) {
    rows = list.rows_end(expert);
    take_expert(epilogue, all.epilogue, expert * columns);
  }
};

// By each of `warps` warps, of all blocks.
__device__ inline void fill_unowned_rows(const ExpertList& list, const GemmOutput& o, int warp, int warps) {
  const Epilogue& e = o.epilogue;
  const int size = e.out_dtype == Dtype::f32                                 ? 4
                   : e.out_dtype == Dtype::f16 || e.out_dtype == Dtype::bf16 ? 2
                                                                             : 1,
            lane = threadIdx.x % 32, rows = static_cast<int>(o.rows);
  const int64_t bytes = o.columns / (is_gated(e.activation) ? 2 : 1) * size, whole = o.access.out ? bytes / 16 : 0;
#pragma unroll 1
  for (int row = list.first_unowned() + warp; row < rows; row += warps) {
    if (!list.unowned(row)) continue;
    const uint32_t word = list.unknown(row) ? nan_word(e.out_dtype) : 0;
    auto* p = static_cast<uint8_t*>(e.out) + row * e.out_stride * size;
#pragma unroll 1
    for (int64_t i = lane; i < whole; i += 32) reinterpret_cast<uint4*>(p)[i] = {word, word, word, word};
#pragma unroll 1
    for (int64_t i = whole * 16 + lane; i < bytes; i += 32) p[i] = static_cast<uint8_t>(word >> i % 4 * 8);
  }
}

}  // namespace forwardpass
