// Flash attention: key blocks against tiles of rows, scores in a buffer for one tile, online softmax.
//
// What binds are the fused multiply-adds of both GEMMs, two per cycle, and the exponentials: with AVX-512 256 and about
// 160 cycles per row with 128 keys and 32 columns. So a tile keeps 16 accumulators in registers, twice what the latency
// of two multiply-adds per cycle needs; with AVX2, which has 16 registers, 12. k, transposed, and v are copied into
// panels as wide as a tile, which are then read sequentially: rows that are several heads apart would share few sets of
// the L1 cache. 16-bit operands become floats in those copies; or bfloat16 stays, in pairs, with AVX-512 BF16, whose
// instruction does twice the work of a multiply-add in the same time.
//
// Torch's time divided by this kernel's, all keys and causal, measured in turn on one thread of an EPYC (Zen 4):
//
//   batch x heads   rows x keys   columns   float32     bfloat16    float16     with AVX2: float32   bfloat16
//   8 x 12          128 x 128     32        1.5   1.7   2.7   3.3   3.9   4.9              1.3 1.9    1.7 2.8
//   32 x 12         64 x 64       32        1.4   1.5   2.9   2.7   3.7   3.8              1.2 1.5    1.9 2.9
//   2 x 12          512 x 512     64        1.2   2.1   2.2   3.7   2.9   4.6              1.2 2.1    1.3 2.2
//   2 x 8           512 x 512     128       1.2   2.2   2.3   3.7   2.5   4.3              1.1        1.3 2.3
//   1 x 32          1 x 1024      128                   7.7         5.0                               5.7
#include <algorithm>

#include "cpu/activation.h"
#include "cpu/attention_rows.h"
#include "cpu/memory.h"
#include "cpu/transpose.h"
#include "cpu/words.h"
#include "torch/check.h"

namespace forwardpass {
namespace cpu {
namespace {

template <class V>
constexpr int kPanelColumns = 2 * kLanes<V>;  // words of a row of a tile and of a panel
template <class V>
constexpr int kTileRows = kLanes<V> == 16 ? 8 : 6;
constexpr int kMostTileRows = 8;
constexpr int64_t kColumnStep = 16;
// A sum of 256 products of float32 rounds more often than its bound allows; two of 128 each, tried for it, made g++
// compile all of the kernel to a tenth more time.
constexpr int64_t kMaxColumns = 128, kMaxColumns16 = 256;
constexpr int64_t kKeys = 256;   // keys of a block: at 64 columns k and v are 128 KB, part of L2
constexpr int64_t kChunk = 512;  // rows that share the copies of k and v, which take a fortieth of the time

template <class V>
INLINE V bits_of_both(V a, V b) {
  return bits<V>(bits<Uints<V>>(a) & bits<Uints<V>>(b));
}

// c [R, N] = or += a [R, depth] b [depth, N], N being the columns of a panel and depth that of the words. With `bits`,
// [depth], the bits of b's words that count; the others are read as zeros. `largest`, [R] or null,
// are the maxima of each row's lanes so far; those of the sums join them.
template <class A, int R, bool kAdd, bool kBits = false, class V = typename A::V>
INLINE void multiply(const float* a, int64_t a_stride, const float* b, float* c, int64_t c_stride, int64_t depth,
                     int64_t columns = kPanelColumns<V>, const float* bits = nullptr, V* largest = nullptr) {
  V sums[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = V{};
  for (int64_t d = 0; d < depth; ++d) {
    const float* row = b + d * kPanelColumns<V>;
    V low = load<V, Dtype::f32>(row, 0), high = load<V, Dtype::f32>(row, kLanes<V>);
    if constexpr (kBits) {
      const V counts = A::broadcast(bits + d);
      low = bits_of_both(low, counts), high = bits_of_both(high, counts);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V x = A::broadcast(a + r * a_stride + d);
      sums[r][0] = A::multiply_add(x, low, sums[r][0]);
      sums[r][1] = A::multiply_add(x, high, sums[r][1]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    if (largest) largest[r] = max(sums[r][0], max(sums[r][1], largest[r]));
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      float* to = c + r * c_stride + kLanes<V> * v;
      if (kLanes<V> * v >= columns) break;
      store<Dtype::f32>(kAdd ? load<V, Dtype::f32>(to, 0) + sums[r][v] : sums[r][v], to, 0);
    }
  }
}

// A key block of one head.
struct Block {
  int64_t first, keys;  // the first key, the number of keys
  float *k, *v;         // words: panels of keys [columns][kPanelColumns]; of columns [kKeys][kPanelColumns]
  float* scores;        // of one tile, rows `stride` apart: a constant stride made g++ load 16 lanes to broadcast one
  int64_t stride;
  bool finite;  // whether all of v is
};

// The keys of a block that the mask's band lets a row see, as numbers of the block's.
struct Band {
  int low, high;

  Band(const AttentionRows& p, const Block& block, int64_t position)
      : low(static_cast<int>(std::max<int64_t>(position - p.left - block.first, 0))),
        high(static_cast<int>(std::min(position + p.right - block.first, block.keys - 1))) {}
};

// Multiplies a row's scores by `factor`, adds its mask, makes those that it does not see -infinity, and returns the
// largest.
template <class V>
INLINE V masked_scores(const Block& block, Band band, float factor, const float* mask, float* scores) {
  const auto [low, high] = band;
  const Ints<V> lanes = lane_numbers<V>();
  V largest = splat<V>(-INFINITY);
  for (int c = 0; c < block.keys; c += kLanes<V>) {
    V s = load<V, Dtype::f32>(scores, c) * factor;
    if (mask) {
      const V m = load<V, Dtype::f32>(mask, c, static_cast<int>(std::min<int64_t>(kLanes<V>, block.keys - c)));
      s = m == splat<V>(-INFINITY) ? m : s + m * kLog2e;  // not the NaN of an infinite score and -infinity
    }
    if (c < low || c + kLanes<V> - 1 > high) s = between(lanes + c, low, high, s, -INFINITY);
    store<Dtype::f32>(s, scores, c);
    largest = max(s, largest);
  }
  return largest;
}

// Turns a row's scores into exponentials of their distance to the running maximum, in units of log2(e); updates the
// row's maximum, sum and output. `largest` are the maxima of all the block's panels: where the row sees all of them,
// its scores need not be read for their maximum, which took a Zen 3 some 7 % of the time. Exponentials of a tile's
// rows in turn, a vector of each, were no faster there.
template <class A, class V = typename A::V>
INLINE void exponentials(const AttentionRows& p, const Block& block, float* scores, V largest, const float* mask,
                         int64_t position, float& maximum, float& sum, float* out) {
  float factor = p.scale * kLog2e;
  const Band band(p, block, position);
  if (!mask && band.low == 0 && band.high == block.keys - 1 && block.keys % kPanelColumns<V> == 0) {
    largest *= factor;  // positive, so that the order stays
  } else {
    largest = masked_scores<V>(block, band, factor, mask, scores);
    factor = 1;
  }
  const float old_maximum = maximum;
  maximum = std::max(old_maximum, cpu::largest(largest));
  // While no key counts yet the maximum is -inf, and the difference to it would be NaN.
  const float subtrahend = maximum == -INFINITY ? 0 : maximum;
  V sums{};
  for (int c = 0; c < block.keys; c += kLanes<V>) {
    const V e = exp2_negative(load<V, Dtype::f32>(scores, c) * factor - subtrahend);
    A::store_probabilities(e, scores, c);
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
  const char* q;
  const float* mask;
  float* out;  // fp32, rows out_stride apart: the output itself or, of 16 bits, a buffer
  int64_t out_stride, first_position;
  float* tile_q;  // words of 16-bit rows: of one tile
  float maximum[kChunk], sum[kChunk];
};

template <Dtype D>
constexpr int64_t kSize = size_of(D);

// A row's elements of 16 bits as words.
template <class A, class V = typename A::V>
INLINE void copy_words(const char* row, int64_t columns, float* words) {
  if constexpr (A::kElements == 2) {
    std::memcpy(words, row, columns * kSize<A::kDtype>);
  } else {
    for (int64_t c = 0; c < columns; c += kLanes<V>) store<Dtype::f32>(load<V, A::kDtype>(row, c), words, c);
  }
}

// Adds a row's probabilities times v, with v read as zero where the row does not see the key: 0 * NaN is NaN.
template <class A, class V = typename A::V>
INLINE void add_seen(const AttentionRows& p, const Block& block, const float* probabilities, const float* mask,
                     int64_t position, int64_t depth, float* out) {
  constexpr int64_t kBytes = 4 / A::kElements;
  const auto [low, high] = Band(p, block, position);
  alignas(64) float bits[kKeys]{};
  for (int j = low; j <= high; ++j)
    if (!mask || mask[j] != -INFINITY) std::memset(reinterpret_cast<char*>(bits) + j * kBytes, 0xff, kBytes);
  for (int64_t c = 0; c < p.columns; c += kPanelColumns<V>)
    multiply<A, 1, true, true>(probabilities, 0, block.v + c * kKeys, out + c, 0, depth, p.columns - c, bits);
}

// R rows of a chunk, from row i on, whose words are q, q_stride apart, against a key block. Compiled once for all
// dtypes whose words are A's.
template <class A, int R, class V = typename A::V>
INLINE void tile_of_words(const AttentionRows& p, const Block& block, Rows& rows, int64_t i, const float* q,
                          int64_t q_stride) {
  apart<V>(APART_CODE {
    constexpr int64_t kPanel = kPanelColumns<V>;
    const int64_t words = p.columns / A::kElements;
    V largest[R];
    std::fill_n(largest, R, splat<V>(-INFINITY));
    for (int64_t j = 0; j < block.keys; j += kPanel)
      multiply<A, R, false>(q, q_stride, block.k + j * words, block.scores + j, block.stride, words, kPanel, nullptr,
                            largest);
    float* out = rows.out + i * rows.out_stride;
    const int64_t depth = (block.keys + A::kElements - 1) / A::kElements;
    for (int r = 0; r < R; ++r) {
      const float* mask = rows.mask ? rows.mask + (i + r) * p.mask_row + block.first : nullptr;
      float *scores = block.scores + r * block.stride, *out_row = out + r * rows.out_stride;
      const int64_t position = rows.first_position + i + r;
      exponentials<A>(p, block, scores, largest[r], mask, position, rows.maximum[i + r], rows.sum[i + r], out_row);
      if (!block.finite) add_seen<A>(p, block, scores, mask, position, depth, out_row);
    }
    if (!block.finite) return;
    for (int64_t c = 0; c < p.columns; c += kPanel)
      multiply<A, R, true>(block.scores, block.stride, block.v + c * kKeys, out + c, rows.out_stride, depth,
                           p.columns - c);
  });
}

// R rows of a chunk, from row i on, against a key block.
template <class A, int R>
INLINE void tile(const AttentionRows& p, Block block, Rows& rows, int64_t i) {
  const int64_t first = rows.first_position + i, last = first + R - 1;
  if (last + p.right < block.first || first - p.left >= block.first + block.keys) return;
  block.keys = std::min(block.keys, last + p.right + 1 - block.first);
  block.stride = round_up(block.keys, kPanelColumns<typename A::V>);
  const int64_t words = p.columns / A::kElements;
  const float* q = reinterpret_cast<const float*>(rows.q) + i * p.q.row;
  int64_t q_stride = p.q.row;
  if constexpr (A::kDtype != Dtype::f32) {
    q = rows.tile_q, q_stride = words;
    for (int r = 0; r < R; ++r)
      copy_words<A>(rows.q + (i + r) * p.q.row * kSize<A::kDtype>, p.columns, rows.tile_q + r * words);
  }
  tile_of_words<typename A::Words, R>(p, block, rows, i, q, q_stride);
}

// Copies k, transposed, and v. The scores of a last panel's unused columns are never read; the probability of a key
// behind the last one is zero, and so is its v. Finds out whether v is finite.
template <class A, class V = typename A::V>
INLINE void copy(const AttentionRows& p, const char* k, const char* v, Block& block) {
  constexpr int64_t kPanel = kPanelColumns<V>, kBytes = kSize<A::kDtype>;
  const int64_t words = p.columns / A::kElements;
  k += block.first * p.k.row * kBytes, v += block.first * p.v.row * kBytes;
  for (int64_t j = 0; j < block.keys; j += 16, k += 16 * p.k.row * kBytes) {
    const int n = static_cast<int>(std::min<int64_t>(block.keys - j, 16));
    for (int64_t d = 0; d < words; d += 16) {
      float* to = block.k + j / kPanel * kPanel * words + d * kPanel + j % kPanel;
      if constexpr (A::kDtype == Dtype::f32 || A::kElements == 2) {
        transpose<V>(k + 4 * d, p.k.row * kBytes, n, to, 4 * kPanel);
      } else {
        alignas(64) float square[16][16];
        for (int r = 0; r < n; ++r) copy_words<A>(k + r * p.k.row * kBytes + d * kBytes, 16, square[r]);
        transpose<V>(square, sizeof(square[0]), n, to, 4 * kPanel);
      }
    }
  }
  Ints<V> largest{};  // of v's magnitudes: as integers, of which those of infinities and NaNs are the largest
  for (int64_t j = 0; j < block.keys; j += A::kElements, v += A::kElements * p.v.row * kBytes)
    for (int64_t d = 0; d < p.columns; d += kLanes<V>) {
      float* to = block.v + d / kPanel * kPanel * kKeys + j / A::kElements * kPanel;
      if constexpr (A::kElements == 1) {
        const V values = load<V, A::kDtype>(v, d);
        largest = max(bits<Ints<V>>(abs(values)), largest);
        store<Dtype::f32>(values, to, d % kPanel);
      } else {
        const auto keys = [&](int64_t row) __attribute__((always_inline)) {
          return __builtin_convertvector(
              load_bits<Halves<V>>(reinterpret_cast<const uint16_t*>(v) + row * p.v.row + d, kLanes<V>), Uints<V>);
        };
        const Uints<V> first = keys(0), second = j + 1 < block.keys ? keys(1) : Uints<V>{};
        largest = max(bits<Ints<V>>(first << 16 & 0x7fffffff), largest);
        largest = max(bits<Ints<V>>(second << 16 & 0x7fffffff), largest);
        store<Dtype::f32>(bits<V>(first | second << 16), to, d % kPanel);
      }
    }
  block.finite = cpu::largest(largest) < bits<int32_t>(INFINITY);
}

template <class A, class V = typename A::V>
INLINE void chunk(const AttentionRows& p, int64_t batch, int64_t head, int64_t first, int64_t count, Block block,
                  float* buffer) {
  constexpr Dtype kDtype = A::kDtype;
  auto data = [&](const AttentionTensor& t, int64_t t_head) {
    return static_cast<const char*>(t.data) + (batch * t.batch + t_head * t.head) * kSize<kDtype>;
  };
  const int64_t kv_head = head / (p.heads / p.kv_heads);
  const char *k = data(p.k, kv_head), *v = data(p.v, kv_head);
  char* out = const_cast<char*>(data(p.out, head)) + first * p.out.row * kSize<kDtype>;
  Rows rows;
  rows.q = data(p.q, head) + first * p.q.row * kSize<kDtype>;
  rows.mask = p.mask ? p.mask + batch * p.mask_batch + head * p.mask_head + first * p.mask_row : nullptr;
  rows.first_position = p.first_position + first;
  if constexpr (kDtype == Dtype::f32) {
    rows.out = reinterpret_cast<float*>(out), rows.out_stride = p.out.row;
  } else {
    rows.tile_q = buffer, rows.out = buffer + kMostTileRows * p.columns, rows.out_stride = p.columns;
  }
  constexpr int kRows = kTileRows<V>;
  // Prefetches rows of the next head: the hardware does not predict these pieces of 128 bytes. It saves 5 % of the
  // time.
  auto prefetch = [&](const AttentionTensor& t, const char* head_data, int64_t i) __attribute__((always_inline)) {
    for (int r = 0; r < kRows; ++r)
      for (int64_t c = 0; c < p.columns * kSize<kDtype>; c += 64)
        __builtin_prefetch(head_data + ((i + r) * t.row + t.head) * kSize<kDtype> + c);
  };
  const float sink =
      p.sinks ? p.sinks[head] * kLog2e : -INFINITY;  // acts as one more key, with this score and a value of 0
  for (int64_t i = 0; i < count; ++i) {
    rows.maximum[i] = sink, rows.sum[i] = sink == -INFINITY ? 0 : 1;
    std::fill_n(rows.out + i * rows.out_stride, p.columns, 0.0f);
  }
  const int64_t end = std::min(p.keys, rows.first_position + count + p.right);
  for (block.first = std::max<int64_t>(0, rows.first_position - p.left) / kKeys * kKeys; block.first < end;
       block.first += kKeys) {
    block.keys = std::min(kKeys, end - block.first);
    copy<A>(p, k, v, block);
    int64_t i = 0;
    for (; i + kRows <= count; i += kRows) {
      if (block.first + kKeys >= end)  // once, in the last block
        prefetch(p.q, rows.q, i), prefetch(p.k, k, i), prefetch(p.v, v, i), prefetch(p.out, out, i);
      tile<A, kRows>(p, block, rows, i);
    }
    if (count - i >= 4) tile<A, 4>(p, block, rows, i), i += 4;
    for (; i < count; ++i) tile<A, 1>(p, block, rows, i);
  }
  float* lse = p.lse ? p.lse + batch * p.lse_batch + head * p.lse_head + first : nullptr;
  for (int64_t i = 0; i < count; ++i) {
    const float sum = rows.sum[i], factor = sum == 0 ? 0 : 1 / sum;
    const float* from = rows.out + i * rows.out_stride;
    for (int64_t c = 0; c < p.columns; c += kLanes<V>)
      store<kDtype>(load<V, Dtype::f32>(from, c) * factor, out + i * p.out.row * kSize<kDtype>, c);
    if (lse) lse[i] = sum == 0 ? -INFINITY : rows.maximum[i] / kLog2e + std::log(sum);
  }
}

}  // namespace
}  // namespace cpu

bool has_attention_rows(Dtype dtype, int64_t columns) {
  using namespace cpu;
  return tier() >= Tier::avx2 && columns % kColumnStep == 0 &&
         columns <= (dtype == Dtype::f32 ? kMaxColumns : kMaxColumns16);
}

bool takes_attention_rows(Dtype dtype, int64_t columns, int64_t rows) {
  using namespace cpu;
  if (!has_attention_rows(dtype, columns)) return false;
  // The copies of k and v do not pay for fewer rows of float32: against torch one row took 1.0 to 1.3 times as long.
  if (dtype == Dtype::f32) return rows >= 4;
  return tier() < Tier::amx;  // torch uses its tiles
}

namespace cpu {
namespace {

// Items from `begin` to `end`: a head of a batch and `chunk_rows` of its rows each.
void items(const AttentionRows& p, int64_t chunk_rows, int64_t begin, int64_t end) {
  const int64_t chunks = (p.rows + chunk_rows - 1) / chunk_rows;
  [[maybe_unused]] const bool pairs = p.dtype == Dtype::bf16 && has_avx512_bf16() && p.columns % (2 * kColumnStep) == 0;
  const int64_t panel = round_up(p.columns, 32) * kKeys, scores = kMostTileRows * kKeys,
                buffer = p.dtype == Dtype::f32 ? 0 : (kMostTileRows + std::min(chunk_rows, p.rows)) * p.columns;
  const CacheLines memory = allocate((2 * panel + scores + buffer) * 4);
  auto floats = reinterpret_cast<float*>(memory[0].bytes);
  with_vectors(VECTOR_CODE {
    const auto run = [&]<class A>(A) __attribute__((always_inline)) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % chunks * chunk_rows, batch_head = i / chunks;
        chunk<A>(p, batch_head / p.heads, batch_head % p.heads, first, std::min(chunk_rows, p.rows - first),
                 {0, 0, floats, floats + panel, floats + 2 * panel, 0, true}, floats + 2 * panel + scores);
      }
    };
#if defined(__x86_64__)
    if constexpr (kLanes<V> == 16)
      if (pairs) return run(BfloatPairs{});
#endif
    if constexpr (kLanes<V> >= 8)
      with_float_dtype(p.dtype,
                       [&](auto dtype) __attribute__((always_inline)) { run(Floats<V, decltype(dtype)::value>{}); });
  });
}

}  // namespace
}  // namespace cpu

void attention_rows(const AttentionRows& p) {
  using namespace cpu;
  // With few heads the chunks are shorter, so that threads share a head.
  const int64_t chunk_rows = p.batch * p.heads * ((p.rows + kChunk - 1) / kChunk) < 16 ? kChunk / 8 : kChunk,
                chunks = (p.rows + chunk_rows - 1) / chunk_rows;
  const int64_t work = 2 * std::min(chunk_rows, p.rows) * p.keys * p.columns;
  torch::stable::parallel_for(0, p.batch * p.heads * chunks, (1 << 18) / work + 1,
                              [&](int64_t begin, int64_t end) { items(p, chunk_rows, begin, end); });
}

void attention_rows_here(const AttentionRows& p) {
  const int64_t chunks = (p.rows + cpu::kChunk - 1) / cpu::kChunk;
  cpu::items(p, cpu::kChunk, 0, p.batch * p.heads * chunks);
}

}  // namespace forwardpass
