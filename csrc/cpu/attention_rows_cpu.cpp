// Flash attention in fp32: key blocks against tiles of rows, scores in a buffer for one tile, online softmax.
//
// What binds are the fused multiply-adds of both GEMMs, two per cycle, and the exponentials: with AVX-512 256 and about
// 160 cycles per row with 128 keys and 32 columns. So a tile keeps 16 accumulators in registers, twice what the latency
// of two multiply-adds per cycle needs; with AVX2, which has 16 registers, 12. k, transposed, and v are copied into
// panels as wide as a tile, which are then read sequentially: rows that are several heads apart would share few sets of
// the L1 cache.
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

#include "cpu/activation.h"
#include "cpu/attention_rows.h"
#include "cpu/memory.h"
#include "cpu/transpose.h"
#include "torch/check.h"

namespace forwardpass {
namespace cpu {
namespace {

template <class V>
constexpr int kPanelColumns = 2 * kLanes<V>;  // columns of a tile and of a panel
template <class V>
constexpr int kTileRows = kLanes<V> == 16 ? 8 : 6;
constexpr int kMostTileRows = 8;
constexpr int64_t kColumnStep = 16;
// With more columns torch is as fast, and more exact than a sequential sum of that many products.
constexpr int64_t kMaxColumns = 64;
constexpr int64_t kKeys = 256;   // keys of a block: at 64 columns k and v are 128 KB, part of L2
constexpr int64_t kChunk = 512;  // rows that share the copies of k and v, which take a fortieth of the time

// A broadcast that is one load, where splat also adds zero. It must not replace splat: in the loops of the quantising
// kernels g++ then built constants lane by lane, which took twice as long.
template <class V>
INLINE V broadcast(const float* p) {
  const float v = *p;
  if constexpr (kLanes<V> == 16) {
    return V{v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v};
  } else {
    return V{v, v, v, v, v, v, v, v};
  }
}

// c [R, N] = or += a [R, depth] b [depth, N], N being the columns of a panel.
template <class V, int R, bool kAdd>
INLINE void multiply(const float* a, int64_t a_stride, const float* b, float* c, int64_t c_stride, int64_t depth,
                     int64_t columns = kPanelColumns<V>) {
  V sums[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = V{};
  for (int64_t d = 0; d < depth; ++d) {
    const float* row = b + d * kPanelColumns<V>;
    const V low = load<V, Dtype::f32>(row, 0), high = load<V, Dtype::f32>(row, kLanes<V>);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V x = broadcast<V>(a + r * a_stride + d);
      sums[r][0] = fma(x, low, sums[r][0]);
      sums[r][1] = fma(x, high, sums[r][1]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      float* to = c + r * c_stride + kLanes<V> * v;
      if (kLanes<V> * v >= columns) break;
      store<Dtype::f32>(kAdd ? load<V, Dtype::f32>(to, 0) + sums[r][v] : sums[r][v], to, 0);
    }
}

// A key block of one head.
struct Block {
  int64_t first, keys;  // the first key, the number of keys
  float *k, *v;         // panels of keys [columns][kPanelColumns]; of columns [kKeys][kPanelColumns]
  float* scores;        // of one tile, rows `stride` apart: a constant stride made g++ load 16 lanes to broadcast one
  int64_t stride;
};

// Turns a row's scores, in units of log2(e), into exponentials of their distance to the running maximum; updates the
// row's maximum, sum and output.
template <class V>
INLINE void exponentials(const AttentionRows& p, const Block& block, float* scores, const float* mask, int64_t position,
                         float& maximum, float& sum, float* out) {
  const int low = static_cast<int>(std::max<int64_t>(position - p.left - block.first, 0)),
            high = static_cast<int>(std::min(position + p.right - block.first, block.keys - 1));
  const Ints<V> lanes = lane_numbers<V>();
  const float factor = p.scale * kLog2e;
  V largest = splat<V>(-INFINITY);
  for (int c = 0; c < block.keys; c += kLanes<V>) {
    V s = load<V, Dtype::f32>(scores, c) * factor;
    if (mask)
      s += load<V, Dtype::f32>(mask, c, static_cast<int>(std::min<int64_t>(kLanes<V>, block.keys - c))) * kLog2e;
    if (c < low || c + kLanes<V> - 1 > high) s = (lanes + c >= low) & (lanes + c <= high) ? s : splat<V>(-INFINITY);
    store<Dtype::f32>(s, scores, c);
    largest = max(s, largest);
  }
  const float old_maximum = maximum;
  maximum = std::max(old_maximum, cpu::largest(largest));
  // While no key counts yet the maximum is -inf, and the difference to it would be NaN.
  const float subtrahend = maximum == -INFINITY ? 0 : maximum;
  V sums{};
  for (int c = 0; c < block.keys; c += kLanes<V>) {
    const V e = exp2_negative(load<V, Dtype::f32>(scores, c) - subtrahend);
    store<Dtype::f32>(e, scores, c);
    sums += e;
  }
  // There is no output to rescale before the first key. If all keys are in one block this saves a twelfth of the time.
  const float rescale =
      old_maximum == maximum || old_maximum == -INFINITY ? 1 : exp2_negative(splat<V>(old_maximum - subtrahend))[0];
  sum = sum * rescale + cpu::sum(sums);
  if (rescale == 1) return;
  for (int64_t c = 0; c < p.columns; c += kLanes<V>) store<Dtype::f32>(load<V, Dtype::f32>(out, c) * rescale, out, c);
}

// The state of a chunk's rows between key blocks.
struct Rows {
  const float *q, *mask;
  float* out;
  int64_t first_position;
  float maximum[kChunk], sum[kChunk];
};

// R rows of a chunk, from row i on, against a key block.
template <class V, int R>
INLINE void tile(const AttentionRows& p, Block block, Rows& rows, int64_t i) {
  const int64_t first = rows.first_position + i, last = first + R - 1;
  if (last + p.right < block.first || first - p.left >= block.first + block.keys) return;
  block.keys = std::min(block.keys, last + p.right + 1 - block.first);
  constexpr int64_t kPanel = kPanelColumns<V>;
  block.stride = (block.keys + kPanel - 1) / kPanel * kPanel;
  for (int64_t j = 0; j < block.keys; j += kPanel)
    multiply<V, R, false>(rows.q + i * p.q.row, p.q.row, block.k + j * p.columns, block.scores + j, block.stride,
                          p.columns);
  float* out = rows.out + i * p.out.row;
  for (int r = 0; r < R; ++r) {
    const float* mask = rows.mask ? rows.mask + (i + r) * p.keys + block.first : nullptr;
    exponentials<V>(p, block, block.scores + r * block.stride, mask, first + r, rows.maximum[i + r], rows.sum[i + r],
                    out + r * p.out.row);
  }
  for (int64_t c = 0; c < p.columns; c += kPanel)
    multiply<V, R, true>(block.scores, block.stride, block.v + c * kKeys, out + c, p.out.row, block.keys,
                         p.columns - c);
}

// Copies k, transposed, and v. The scores of a last panel's unused columns are never read.
template <class V>
INLINE void copy(const AttentionRows& p, const float* k, const float* v, Block& block) {
  constexpr int64_t kPanel = kPanelColumns<V>;
  for (int64_t j = 0; j < block.keys; j += 16) {
    const int n = static_cast<int>(std::min<int64_t>(block.keys - j, 16));
    for (int64_t d = 0; d < p.columns; d += 16)
      transpose<V>(k + (block.first + j) * p.k.row + d, 4 * p.k.row, n,
                   block.k + j / kPanel * kPanel * p.columns + d * kPanel + j % kPanel, 4 * kPanel);
  }
  for (int64_t j = 0; j < block.keys; ++j)
    for (int64_t d = 0; d < p.columns; d += kLanes<V>)
      store<Dtype::f32>(load<V, Dtype::f32>(v + (block.first + j) * p.v.row, d),
                        block.v + d / kPanel * kPanel * kKeys + j * kPanel, d % kPanel);
}

template <class V>
INLINE void chunk(const AttentionRows& p, int64_t batch, int64_t head, int64_t first, int64_t count, Block block) {
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
  constexpr int kRows = kTileRows<V>;
  // Prefetches rows of the next head: the hardware does not predict these pieces of 128 bytes. It saves 5 % of the
  // time.
  auto prefetch = [&](const AttentionTensor& t, const float* head_data, int64_t i) __attribute__((always_inline)) {
    for (int r = 0; r < kRows; ++r)
      for (int64_t c = 0; c < p.columns; c += 16) __builtin_prefetch(head_data + (i + r) * t.row + t.head + c);
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
    copy<V>(p, k, v, block);
    int64_t i = 0;
    for (; i + kRows <= count; i += kRows) {
      if (block.first + kKeys >= end)  // once, in the last block
        prefetch(p.q, rows.q, i), prefetch(p.k, k, i), prefetch(p.v, v, i), prefetch(p.out, rows.out, i);
      tile<V, kRows>(p, block, rows, i);
    }
    if (count - i >= 4) tile<V, 4>(p, block, rows, i), i += 4;
    for (; i < count; ++i) tile<V, 1>(p, block, rows, i);
  }
  float* lse = p.lse ? p.lse + batch * p.lse_batch + head * p.lse_head + first : nullptr;
  for (int64_t i = 0; i < count; ++i) {
    const float sum = rows.sum[i], factor = sum == 0 ? 0 : 1 / sum;
    float* out = rows.out + i * p.out.row;
    for (int64_t c = 0; c < p.columns; c += kLanes<V>) store<Dtype::f32>(load<V, Dtype::f32>(out, c) * factor, out, c);
    if (lse) lse[i] = sum == 0 ? -INFINITY : rows.maximum[i] / kLog2e + std::log(sum);
  }
}

}  // namespace
}  // namespace cpu

bool takes_attention_rows(int64_t columns) {
  return cpu::tier() >= cpu::Tier::avx2 && columns % cpu::kColumnStep == 0 && columns <= cpu::kMaxColumns;
}

void attention_rows(const AttentionRows& p) {
  using namespace cpu;
  // With few heads the chunks are shorter, so that threads share a head.
  const int64_t chunk_rows = p.batch * p.heads * ((p.rows + kChunk - 1) / kChunk) < 16 ? kChunk / 8 : kChunk,
                chunks = (p.rows + chunk_rows - 1) / chunk_rows, items = p.batch * p.heads * chunks;
  const int64_t work = 2 * std::min(chunk_rows, p.rows) * p.keys * p.columns;
  torch::stable::parallel_for(0, items, (1 << 18) / work + 1, [&](int64_t begin, int64_t end) {
    const int64_t panel = round_up(p.columns, 32) * kKeys;
    const CacheLines memory = allocate((2 * panel + kMostTileRows * kKeys) * 4);
    auto floats = reinterpret_cast<float*>(memory[0].bytes);
    with_vectors(VECTOR_CODE {
      if constexpr (kLanes<V> >= 8)
        for (int64_t i = begin; i < end; ++i) {
          const int64_t first = i % chunks * chunk_rows, batch_head = i / chunks;
          chunk<V>(p, batch_head / p.heads, batch_head % p.heads, first, std::min(chunk_rows, p.rows - first),
                   {0, 0, floats, floats + panel, floats + 2 * panel, 0});
        }
    });
  });
}

}  // namespace forwardpass
