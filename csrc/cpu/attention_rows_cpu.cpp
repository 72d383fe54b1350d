// Flash attention in fp32: key blocks against tiles of rows, scores in a buffer for one tile, online softmax.
//
// What binds are the fused multiply-adds of both GEMMs, two per cycle, and the exponentials: 256 and about 160 cycles
// per row with 128 keys and 32 columns. So a tile keeps 16 accumulators in registers, twice what the latency of two
// multiply-adds per cycle needs. k, transposed, and v are copied into panels as wide as a tile, which are then read
// sequentially: rows that are several heads apart would share few sets of the L1 cache.
//
// Torch's time divided by this kernel's, measured in turn on one thread of a Xeon with AMX:
//
//   batch x heads   rows x keys   columns   all keys   causal
//   8 x 12          128 x 128     32        1.28       1.54
//   32 x 12         64 x 64       32        1.40       1.30
//   2 x 12          512 x 512     64        1.19       1.98
//
// With 128 columns it was 1.0.
#include <algorithm>
#include <memory>

#include "cpu/activation.h"
#include "cpu/attention_rows.h"
#include "cpu/capability.h"
#include "cpu/transpose.h"
#include "torch/check.h"

namespace forwardpass {
namespace cpu {
namespace {

constexpr int kPanelColumns = 2 * kLanes;  // columns of a tile and of a panel
// With more columns torch is as fast, and more exact than a sequential sum of that many products.
constexpr int64_t kMaxColumns = 64;
constexpr int64_t kKeys = 256;   // keys of a block: at 64 columns k and v are 128 KB, part of L2
constexpr int64_t kChunk = 512;  // rows that share the copies of k and v, which take a fortieth of the time

// A broadcast that is one load, where splat also adds zero. It must not replace splat: in the loops of the quantising
// kernels g++ then built constants lane by lane, which took twice as long.
INLINE f32x16 broadcast(const float* p) {
  const float v = *p;
  return f32x16{v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v};
}

// c [R, 16 V] = or += a [R, depth] b [depth, 16 V]; b has the columns of a panel.
template <int R, int V, bool kAdd>
INLINE void multiply(const float* a, int64_t a_stride, const float* b, float* c, int64_t c_stride, int64_t depth) {
  f32x16 sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sums[r][v] = f32x16{};
  for (int64_t d = 0; d < depth; ++d) {
    f32x16 columns[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) columns[v] = load<Dtype::f32>(b + d * kPanelColumns, kLanes * v);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const f32x16 x = broadcast(a + r * a_stride + d);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[r][v] = fma(x, columns[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* to = c + r * c_stride + kLanes * v;
      store<Dtype::f32>(kAdd ? load<Dtype::f32>(to, 0) + sums[r][v] : sums[r][v], to, 0);
    }
}

// Reduces all 16 lanes by f, in a tree.
template <class F>
INLINE float reduce(f32x16 x, F f) {
  x = f(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  x = f(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3));
  x = f(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1));
  return f(x, __builtin_shufflevector(x, x, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0))[0];
}

// A key block of one head.
struct Block {
  int64_t first, keys;  // the first key, the number of keys
  float *k, *v;         // panels of 32 keys [columns][32]; of 32 columns [kKeys][32]
  float* scores;        // of one tile, rows `stride` apart: a constant stride made g++ load 16 lanes to broadcast one
  int64_t stride;
};

// Turns a row's scores, in units of log2(e), into exponentials of their distance to the running maximum; updates the
// row's maximum, sum and output.
INLINE void exponentials(const AttentionRows& p, const Block& block, float* scores, const float* mask, int64_t position,
                         float& maximum, float& sum, float* out) {
  const int low = static_cast<int>(std::max<int64_t>(position - p.left - block.first, 0)),
            high = static_cast<int>(std::min(position + p.right - block.first, block.keys - 1));
  constexpr i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const float factor = p.scale * kLog2e;
  f32x16 largest = splat(-INFINITY);
  for (int c = 0; c < block.keys; c += kLanes) {
    f32x16 s = load<Dtype::f32>(scores, c) * factor;
    if (mask) s += load<Dtype::f32>(mask, c, static_cast<int>(std::min<int64_t>(kLanes, block.keys - c))) * kLog2e;
    if (c < low || c + kLanes - 1 > high) s = (lanes + c >= low) & (lanes + c <= high) ? s : splat(-INFINITY);
    store<Dtype::f32>(s, scores, c);
    largest = max(s, largest);
  }
  const float old_maximum = maximum;
  maximum = std::max(old_maximum,
                     reduce(largest, [](f32x16 a, f32x16 b) __attribute__((always_inline)) { return max(a, b); }));
  // While no key counts yet the maximum is -inf, and the difference to it would be NaN.
  const float subtrahend = maximum == -INFINITY ? 0 : maximum;
  f32x16 sums{};
  for (int c = 0; c < block.keys; c += kLanes) {
    const f32x16 e = exp2_negative(load<Dtype::f32>(scores, c) - subtrahend);
    store<Dtype::f32>(e, scores, c);
    sums += e;
  }
  // There is no output to rescale before the first key. If all keys are in one block this saves a twelfth of the time.
  const float rescale =
      old_maximum == maximum || old_maximum == -INFINITY ? 1 : exp2_negative(splat(old_maximum - subtrahend))[0];
  sum = sum * rescale + reduce(sums, [](f32x16 a, f32x16 b) __attribute__((always_inline)) { return a + b; });
  if (rescale == 1) return;
  for (int64_t c = 0; c < p.columns; c += kLanes) store<Dtype::f32>(load<Dtype::f32>(out, c) * rescale, out, c);
}

// The state of a chunk's rows between key blocks.
struct Rows {
  const float *q, *mask;
  float* out;
  int64_t first_position;
  float maximum[kChunk], sum[kChunk];
};

// R rows of a chunk, from row i on, against a key block.
template <int R>
INLINE void tile(const AttentionRows& p, Block block, Rows& rows, int64_t i) {
  const int64_t first = rows.first_position + i, last = first + R - 1;
  if (last + p.right < block.first || first - p.left >= block.first + block.keys) return;
  block.keys = std::min(block.keys, last + p.right + 1 - block.first);
  block.stride = (block.keys + kPanelColumns - 1) / kPanelColumns * kPanelColumns;
  for (int64_t j = 0; j < block.keys; j += kPanelColumns)
    multiply<R, 2, false>(rows.q + i * p.q.row, p.q.row, block.k + j * p.columns, block.scores + j, block.stride,
                          p.columns);
  float* out = rows.out + i * p.out.row;
  for (int r = 0; r < R; ++r) {
    const float* mask = rows.mask ? rows.mask + (i + r) * p.keys + block.first : nullptr;
    exponentials(p, block, block.scores + r * block.stride, mask, first + r, rows.maximum[i + r], rows.sum[i + r],
                 out + r * p.out.row);
  }
  int64_t c = 0;
  for (; c + kPanelColumns <= p.columns; c += kPanelColumns)
    multiply<R, 2, true>(block.scores, block.stride, block.v + c * kKeys, out + c, p.out.row, block.keys);
  if (c < p.columns)
    multiply<R, 1, true>(block.scores, block.stride, block.v + c * kKeys, out + c, p.out.row, block.keys);
}

// Copies k, transposed, and v. The scores of a last panel's unused columns are never read.
INLINE void copy(const AttentionRows& p, const float* k, const float* v, Block& block) {
  for (int64_t j = 0; j < block.keys; j += kLanes) {
    const int n = static_cast<int>(std::min<int64_t>(block.keys - j, kLanes));
    for (int64_t d = 0; d < p.columns; d += kLanes)
      transpose(k + (block.first + j) * p.k.row + d, 4 * p.k.row, n,
                block.k + j / kPanelColumns * kPanelColumns * p.columns + d * kPanelColumns + j % kPanelColumns,
                4 * kPanelColumns);
  }
  for (int64_t j = 0; j < block.keys; ++j)
    for (int64_t d = 0; d < p.columns; d += kLanes)
      store<Dtype::f32>(load<Dtype::f32>(v + (block.first + j) * p.v.row, d),
                        block.v + d / kPanelColumns * kPanelColumns * kKeys + j * kPanelColumns, d % kPanelColumns);
}

#if defined(__x86_64__)
__attribute__((target("arch=x86-64-v4")))
#endif
void chunk(const AttentionRows& p, int64_t batch, int64_t head, int64_t first, int64_t count, Block block) {
  auto data = [&](const AttentionTensor& t, int64_t t_head) {
    return static_cast<const float*>(t.data) + batch * t.batch + t_head * t.head;
  };
  const int64_t kv_head = head / (p.heads / p.kv_heads);
  const float *k = data(p.k, kv_head), *v = data(p.v, kv_head);
  Rows rows;
  rows.q = data(p.q, head) + first * p.q.row;
  rows.mask = p.mask ? p.mask + batch * p.mask_batch + head * p.mask_head + first * p.keys : nullptr;
  rows.out = const_cast<float*>(data(p.out, head)) + first * p.out.row;
  rows.first_position = p.first_position + first;
  // Prefetches rows of the next head: the hardware does not predict these pieces of 128 bytes. It saves 5 % of the
  // time.
  auto prefetch = [&](const AttentionTensor& t, const float* head_data, int64_t i) __attribute__((always_inline)) {
    for (int r = 0; r < 8; ++r)
      for (int64_t c = 0; c < p.columns; c += kLanes) __builtin_prefetch(head_data + (i + r) * t.row + t.head + c);
  };
  const float sink =
      p.sinks ? p.sinks[head] * kLog2e : -INFINITY;  // acts as one more key, with this score and a value of 0
  for (int64_t i = 0; i < count; ++i) {
    rows.maximum[i] = sink, rows.sum[i] = sink == -INFINITY ? 0 : 1;
    std::fill_n(rows.out + i * p.out.row, p.columns, 0.0f);
  }
  const int64_t end = std::min(p.keys, rows.first_position + count + p.right);
  for (block.first = std::max<int64_t>(0, rows.first_position - p.left) / kKeys * kKeys; block.first < end;
       block.first += kKeys) {
    block.keys = std::min(kKeys, end - block.first);
    copy(p, k, v, block);
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
      if (block.first + kKeys >= end)  // once, in the last block
        prefetch(p.q, rows.q, i), prefetch(p.k, k, i), prefetch(p.v, v, i), prefetch(p.out, rows.out, i);
      tile<8>(p, block, rows, i);
    }
    if (count - i >= 4) tile<4>(p, block, rows, i), i += 4;
    for (; i < count; ++i) tile<1>(p, block, rows, i);
  }
  float* lse = p.lse ? p.lse + batch * p.lse_batch + head * p.lse_head + first : nullptr;
  for (int64_t i = 0; i < count; ++i) {
    const float sum = rows.sum[i], factor = sum == 0 ? 0 : 1 / sum;
    float* out = rows.out + i * p.out.row;
    for (int64_t c = 0; c < p.columns; c += kLanes) store<Dtype::f32>(load<Dtype::f32>(out, c) * factor, out, c);
    if (lse) lse[i] = sum == 0 ? -INFINITY : rows.maximum[i] / kLog2e + std::log(sum);
  }
}

}  // namespace
}  // namespace cpu

bool takes_attention_rows([[maybe_unused]] int64_t columns) {
#if defined(__x86_64__)
  static const bool wide = __builtin_cpu_supports("x86-64-v4") && cpu::avx512_is_allowed();
  return wide && columns % cpu::kLanes == 0 && columns <= cpu::kMaxColumns;
#else
  return false;
#endif
}

void attention_rows(const AttentionRows& p) {
  using namespace cpu;
  // With few heads the chunks are shorter, so that threads share a head.
  const int64_t chunk_rows = p.batch * p.heads * ((p.rows + kChunk - 1) / kChunk) < 16 ? kChunk / 8 : kChunk,
                chunks = (p.rows + chunk_rows - 1) / chunk_rows, items = p.batch * p.heads * chunks;
  const int64_t work = 2 * std::min(chunk_rows, p.rows) * p.keys * p.columns;
  torch::stable::parallel_for(0, items, (1 << 18) / work + 1, [&](int64_t begin, int64_t end) {
    const int64_t panel = (p.columns + kPanelColumns - 1) / kPanelColumns * kPanelColumns * kKeys;
    const std::unique_ptr<f32x16[]> memory(new f32x16[(2 * panel + 8 * kKeys) / kLanes]);
    auto floats = reinterpret_cast<float*>(memory.get());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % chunks * chunk_rows, batch_head = i / chunks;
      chunk(p, batch_head / p.heads, batch_head % p.heads, first, std::min(chunk_rows, p.rows - first),
            {0, 0, floats, floats + panel, floats + 2 * panel, 0});
    }
  });
}

}  // namespace forwardpass
