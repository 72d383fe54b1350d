#pragma once
// Split-KV's second half: results of parts of a row's keys become one, in their order. What writes them, and what
// becomes of the sum, is the kernels' own.
#include "device/softmax.cuh"
#include "device/vec.cuh"

namespace forwardpass {

// The result of a part of some rows' keys, in the workspace: for each row the largest score in units of log2(e), the
// sum of 2^(score - largest), and the values times those. The rows are an even number, so that o is at a multiple of 16
// bytes.
struct PartialResult {
  float *max, *sum, *o;  // [rows], [rows], [rows][columns]

  __device__ PartialResult(float* workspace, int64_t slot, int rows, int columns)
      : max(workspace + slot * floats(rows, columns)), sum(max + rows), o(sum + rows) {}
  HOST_DEVICE static int64_t floats(int rows, int columns) { return int64_t{rows} * (2 + columns); }
};

// A row's result so far: the largest score, the sum, and four of the columns.
struct CombinedResult {
  float max = -INFINITY, sum = 0;
  float4 o = {0, 0, 0, 0};

  template <int kCount>
  __device__ void add(const CombinedResult (&more)[kCount]) {
    float most = max;
#pragma unroll
    for (int i = 0; i < kCount; ++i) most = fmaxf(most, more[i].max);
    const float base = most == -INFINITY ? 0 : most, f = ptx::ex2(max - base);
    max = most, sum *= f, o = {o.x * f, o.y * f, o.z * f, o.w * f};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float g = ptx::ex2(more[i].max - base);
      const float4& m = more[i].o;
      sum = fmaf(more[i].sum, g, sum);
      o = {fmaf(m.x, g, o.x), fmaf(m.y, g, o.y), fmaf(m.z, g, o.z), fmaf(m.w, g, o.w)};
    }
  }
};

// A row and kCombineColumns of its columns are a warp's, four columns a lane.
constexpr int kCombineWarps = 8, kCombineColumns = 128, kCombineAtOnce = 8;

// Adds parts of a row: `first`, first + step, and so on below `parts`, of which part n is partial(n). A lane loads
// several at once.
template <class F>
__device__ inline void add_parts(CombinedResult& result, int first, int parts, int step, int row, int column,
                                 int columns, F partial) {
#pragma unroll 1
  for (int from = first; from < parts; from += step * kCombineAtOnce) {
    CombinedResult more[kCombineAtOnce];
#pragma unroll
    for (int i = 0; i < kCombineAtOnce; ++i) {
      const int n = from + i * step;
      if (n >= parts) continue;
      const PartialResult part = partial(n);
      more[i].max = part.max[row], more[i].sum = part.sum[row];
      if (column < columns) more[i].o = reinterpret_cast<const float4&>(part.o[row * columns + column]);
    }
    result.add(more);
  }
}

}  // namespace forwardpass
