#pragma once
// How attention_decode's results of parts of a head's keys become out.
#include "device/dependent_launch.cuh"
#include "device/softmax.cuh"
#include "device/vec.cuh"
#include "kernels/attention/scores.cuh"
#include "kernels/attention/split.cuh"
#include "params/attention_decode.h"

namespace forwardpass {

// The result of a part of a head's keys, in the workspace: for each row the largest score in units of log2(e), the sum
// of 2^(score - largest), and the values times those.
struct PartialResult {
  float *max, *sum, *o;  // [rows], [rows], [rows][head_dim]

  __device__ PartialResult(const AttentionDecodeParams& p, int64_t slot)
      : max(p.workspace + slot * floats(p)), sum(max + rows(p)), o(sum + rows(p)) {}
  HOST_DEVICE static int64_t floats(const AttentionDecodeParams& p) {
    return int64_t{rows(p)} * (2 + p.cache.head_dim);
  }

 private:
  // An even number, so that o is at a multiple of 16 bytes.
  HOST_DEVICE static int rows(const AttentionDecodeParams& p) {
    return decode_rows(p) < kDecodeRows ? (decode_rows(p) + 1) / 2 * 2 : kDecodeRows;
  }
};

// From a part's or a head's sums to out.
struct DecodeOutput : PackedRows {
  using PackedRows::PackedRows;
  // What o has to be multiplied by.
  __device__ float factor(int r, float max, float sum) const {
    const Denominator d(max, sum, sink_of(p, q_head(r)));
    const CacheScale& v = p.cache.v_scale;
    const float scale = v.data && !v.per_token ? v.data[kv_head * v.head] : 1;
    return d.factor * scale;
  }
  __device__ void store(int r, int column, float low, float high) const {
    if (!has(r) || column >= p.cache.head_dim) return;
    const int64_t out = ((int64_t{batch} * p.rows + row(r)) * p.heads + q_head(r)) * p.cache.head_dim + column;
    *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.out) + out) =
        p.dtype == Dtype::f16 ? pack<Dtype::f16>(low, high) : pack<Dtype::bf16>(low, high);
  }
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

// Combines the parts of each head, if there are several; a head without keys is 0, or NaN if its sequence is not in
// range. A row and 128 of its columns are of one warp where heads are many and have few parts each, else of all warps
// of a block: those have parts in turn, and then are combined in order. A lane loads several parts at once.
constexpr int kCombineWarps = 8, kCombineColumns = 128, kCombineAtOnce = 8;

struct CombineShape {
  int warps;     // of a row
  int rows;      // of a block
  int per_head;  // blocks for a head of the list
  int panels;    // of columns

  HOST_DEVICE explicit CombineShape(const AttentionDecodeParams& p) {
    const int of_head = decode_rows(p) < kDecodeRows ? decode_rows(p) : kDecodeRows;
    panels = (p.cache.head_dim + kCombineColumns - 1) / kCombineColumns;
    // the order of a sum is not for the batch to change where that is promised
    const bool many =
        !p.batch_invariant && int64_t{p.cache.batch} * decode_heads(p) * of_head * panels > 2 * p.device.sms;
    warps = many ? 1 : kCombineWarps;
    rows = many ? (of_head < kCombineWarps ? of_head : kCombineWarps) : 1;
    per_head = (of_head + rows - 1) / rows * panels;
  }
};

__global__ void __launch_bounds__(32 * kCombineWarps)
    combine_decode_kernel(const __grid_constant__ AttentionDecodeParams p, int blocks) {
  __shared__ float4 outputs[kCombineWarps][32];
  __shared__ float2 sums[kCombineWarps];  // the largest score, and the sum
  ptx::wait_for_earlier_kernels();
  ptx::launch_dependents();
  const CombineShape shape(p);
  const int of_list = blockIdx.x / shape.per_head, heads = decode_heads(p), batch = of_list / heads,
            head = of_list % heads;
  const DecodeKeys keys(p, batch);
  // Slots of the parts: the first, those from `next` on.
  int64_t first = 0, next = 0, step = 1;
  int parts = 0;
  if (p.batch_invariant) {
    const int part_blocks = keys.invariant_blocks(p);
    first = of_list * invariant_parts(p), next = first + 1;
    parts = (keys.count + part_blocks - 1) / part_blocks;
  } else if (keys.count) {
    const DecodeList list(p);
    const int64_t shares = list.shares(blocks), begin = list.begin_of_batch(batch) + int64_t{head} * keys.count;
    const int64_t of_first = list.share_of(begin, shares), of_last = list.share_of(begin + keys.count - 1, shares);
    first = 2 * of_first + 1, next = 2 * of_first + 2, step = 2, parts = static_cast<int>(of_last - of_first) + 1;
  }
  const DecodeOutput output(p, batch, head);
  const int warp = threadIdx.x / 32 % shape.warps, lane = threadIdx.x % 32, in_head = blockIdx.x % shape.per_head,
            r = in_head / shape.panels * shape.rows + threadIdx.x / 32 / shape.warps,
            column = in_head % shape.panels * kCombineColumns + lane * 4;
  if (parts == 1 || !output.has(r)) return;  // of a single part the result is in out already
  CombinedResult result;
  if (!keys.in_range) result.sum = NAN;
#pragma unroll 1
  for (int from = warp; from < parts; from += shape.warps * kCombineAtOnce) {
    CombinedResult more[kCombineAtOnce];
#pragma unroll
    for (int i = 0; i < kCombineAtOnce; ++i) {
      const int n = from + i * shape.warps;
      if (n >= parts) continue;
      const PartialResult partial(p, n == 0 ? first : next + (n - 1) * step);
      more[i].max = partial.max[r], more[i].sum = partial.sum[r];
      if (column < p.cache.head_dim)
        more[i].o = reinterpret_cast<const float4&>(partial.o[r * p.cache.head_dim + column]);
    }
    result.add(more);
  }
  if (shape.warps > 1) {
    if (lane == 0) sums[warp] = {result.max, result.sum};
    outputs[warp][lane] = result.o;
    __syncthreads();
    if (warp) return;
    CombinedResult of_warps[kCombineWarps];
#pragma unroll
    for (int w = 0; w < kCombineWarps; ++w) of_warps[w] = {sums[w].x, sums[w].y, outputs[w][lane]};
    result = {};
    result.add(of_warps);
  }
  const float f = output.factor(r, result.max, result.sum);
  output.store(r, column, result.o.x * f, result.o.y * f);
  output.store(r, column + 2, result.o.z * f, result.o.w * f);
}

}  // namespace forwardpass
