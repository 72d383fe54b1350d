#pragma once
// What a warp of attention_8bit does: the copies that it shares with the others, the products of its own rows in 8
// bits, their softmax and output. Sums of int8 products are exact. An accumulator of q k^T begins with the bits of
// kInt8Magic, so that as a float it is kInt8Magic plus the sum: no conversion, which would go through the pipe of the
// exponentials.
#include "device/mma_u8.cuh"
#include "device/softmax.cuh"
#include "device/vec.cuh"
#include "kernels/attention/int8_operands.h"
#include "kernels/attention/int8_values.cuh"
#include "kernels/attention/mma_consumer.cuh"

namespace forwardpass {

struct Int8AttentionArguments {
  AttentionParams p;
  unsigned tiles;  // of a head
  Int8Operands x;
  float scale;  // of the softmax, in units of log2(e)
};

// p v of a block of keys: d = c + p v.
__device__ inline void multiply_values(int32_t (&d)[4], const uint32_t (&p)[4], const uint32_t* v,
                                       const int32_t (&c)[4]) {
  ptx::mma_m16n8k32_u8(d, p, v, c);
}
__device__ inline void multiply_values(float (&d)[4], const uint32_t (&p)[4], const uint32_t* v, const float (&c)[4]) {
#if __CUDA_ARCH__ >= 890
  ptx::mma_m16n8k32(d, p, v, c);
#endif
}

// Online softmax whose probabilities are relative to the largest of their block of keys. Values of a block are
// multiplied by `weight` before they are added up. Until finish(), max is kMostGrowth more than the largest score that
// last took its place, so that the comparison needs no addition; sum is times 2^(kLog2Unit - max). A row that has seen
// no key has the lowest float as its max, which no score is below: with -inf, whose differences are NaN, each row takes
// four instructions more.
//
// kGrouped: scores are sums of products, kInt8Magic more, and a thread's are of kGroups groups of keys, each of which
// has a factor to units of log2(e). Else they are in these units.
template <int kTilesM, class Values, bool kGrouped>
struct BlockSoftmax : OnlineSoftmax<kTilesM> {
  using Row = RowValues<kTilesM>;
  static constexpr int kGroups = kGrouped ? 2 : 1;
  using Factors = Row[kGroups];
  static constexpr float kLowest = -0x1.fffffep127f;
  // Of a larger factor kInt8Magic times it, which the offset of an exponent has, is rounded too coarsely.
  static constexpr float kMostFactor = 0x1p-9f;
  Row bytes;  // of unsigned v: sums of this thread's p as whole numbers, in units of the output

  __device__ BlockSoftmax() {
    each_row([&](int i, int half) { this->max[i][half] = kLowest, bytes[i][half] = 0; });
  }
  template <class F>
  __device__ static void each_row(F f) {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) f(i, half);
  }
  // Turns scores s into rounded probabilities. Multiplies what has been added up so far, which o has too, where a
  // maximum has grown. Rounded up and down so that no probability is more than 1.
  template <int kTilesN, class Output>
  __device__ void update(Fragments<float, kTilesM, kTilesN>& s, Factors& factors, Row& weight, Output& o) {
    bool rare = false, far = false;
    Row largest, unit;
    each_row([&](int i, int half) {
      largest[i][half] = fmaxf(
          largest_of_row(s[i], half,
                         [&](float v, int g) { return kGrouped ? __fmul_ru(v - kInt8Magic, factors[g][i][half]) : v; }),
          kLowest);
      rare |= largest[i][half] > this->max[i][half];
      far |= is_far(largest, factors, i, half);
    });
    if (__any_sync(0xffffffff, rare)) grow(largest, o);
    each_row([&](int i, int half) {
      weight[i][half] = ptx::ex2(largest[i][half] - this->max[i][half]);
      unit[i][half] = __fsub_ru(largest[i][half], Values::kLog2Unit);
    });
    if (__any_sync(0xffffffff, far)) bring_near(s, largest, factors, unit);
    Factors offset;
    each_row([&](int i, int half) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g)
        offset[g][i][half] = kGrouped ? __fmaf_rd(-kInt8Magic, factors[g][i][half], -unit[i][half]) : -unit[i][half];
    });
    each_row([&](int i, int half) {
      float add;
#pragma unroll
      for (int j = 0; j < kTilesN; ++j)
#pragma unroll
        for (int e = half * 2; e < half * 2 + 2; ++e) {
          const int g = j / (kTilesN / kGroups);
          s[i][j][e] = ptx::ex2(kGrouped ? fmaf(s[i][j][e], factors[g][i][half], offset[g][i][half])
                                         : s[i][j][e] + offset[g][i][half]);
          add = j == 0 && e == half * 2 ? s[i][j][e] : add + s[i][j][e];
        }
      this->sum[i][half] = fmaf(add, weight[i][half], this->sum[i][half]);
    });
  }
  // Unsigned v is 128 more, so each row of the output is too large by 128 times the sum of its bytes of p. Adds up
  // those of a block.
  template <int kSteps>
  __device__ void add_bytes(const uint32_t (&packed)[kSteps][kTilesM][4], const Row& weight) {
    each_row([&](int i, int half) {
      uint32_t sum = 0;
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int r = half; r < 4; r += 2) sum = __dp4a(packed[step][i][r], 0x01010101u, sum);
      bytes[i][half] = fmaf(__uint_as_float(sum), weight[i][half], bytes[i][half]);
    });
  }
  // After all keys: takes 128 times the sum off the output.
  template <class Output>
  __device__ void take_off_bytes(Output& o) {
    each_row([&](int i, int half) { bytes[i][half] = sum_of_group(bytes[i][half]); });
    o.for_each([&](float& v, int i, int, int e) { v = fmaf(bytes[i][e / 2], -128, v); });
  }
  template <class F>
  __device__ void finish(F sink_of, Row& factor) {
    each_row([&](int i, int half) { this->max[i][half] -= Values::kLog2Unit; });
    OnlineSoftmax<kTilesM>::finish(sink_of, factor);
  }

 private:
  // The largest of a row's scores; in_units(v, g) of the largest of a group.
  template <int kTilesN, class F>
  __device__ static float largest_of_row(const float (&tiles)[kTilesN][4], int half, F in_units) {
    constexpr int kEach = kTilesN / kGroups;
    float all;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      float most = fmaxf(tiles[g * kEach][half * 2], tiles[g * kEach][half * 2 + 1]);
#pragma unroll
      for (int j = g * kEach + 1; j < (g + 1) * kEach; ++j)
        most = fmaxf(most, fmaxf(tiles[j][half * 2], tiles[j][half * 2 + 1]));
      most = in_units(most, g);
      all = g == 0 ? most : fmaxf(all, most);
    }
    return over_group(all, fmaxf);
  }
  // Of this thread's scores of a row.
  __device__ static bool is_far(const Row& largest, const Factors& factors, int i, int half) {
    if (kGrouped) return fmaxf(factors[0][i][half], factors[kGroups - 1][i][half]) > kMostFactor;
    return fabsf(largest[i][half]) > Values::kFar;
  }
  template <class Output>
  __device__ void grow(const Row& largest, Output& o) {
    Row factor;
    each_row([&](int i, int half) {
      float& max = this->max[i][half];
      const float before = max;
      if (largest[i][half] > before) max = largest[i][half] + kMostGrowth;
      factor[i][half] = ptx::ex2(before - max);
      this->sum[i][half] *= factor[i][half];
      bytes[i][half] *= factor[i][half];
    });
    rescale(o, factor);
  }
  // Makes far scores relative to the largest of their row, which is then 1 exactly. Rows of the warp that are not far
  // stay as they are: a row's bits do not depend on them.
  template <int kTilesN>
  __device__ static void bring_near(Fragments<float, kTilesM, kTilesN>& s, const Row& largest, Factors& factors,
                                    Row& unit) {
    constexpr float kFactor = kGrouped ? 0x1p-20f : 1, kOffset = kGrouped ? kInt8Magic * kFactor : 0;
    each_row([&](int i, int half) {
      const bool far = over_group<float>(is_far(largest, factors, i, half), fmaxf) > 0;
      // At 128 columns 8 bytes are spilled without this branch in int8, and 16 with it in e4m3.
      if (Values::kUnsigned && !__any_sync(0xffffffff, far)) return;
      const auto each_score = [&](auto f) {
#pragma unroll
        for (int j = 0; j < kTilesN; ++j)
#pragma unroll
          for (int e = half * 2; e < half * 2 + 2; ++e) f(s[i][j][e], j / (kTilesN / kGroups));
      };
      each_score([&](float& v, int g) { v = kGrouped && far ? (v - kInt8Magic) * factors[g][i][half] : v; });
      const float most = fmaxf(largest_of_row(s[i], half, [](float v, int) { return v; }), kLowest),
                  less = far ? most : 0, times = far ? 1 / kFactor : 1;
      each_score([&](float& v, int) { v = (v - less) * times; });
#pragma unroll
      for (int g = 0; g < kGroups; ++g) factors[g][i][half] = far ? kFactor : factors[g][i][half];
      unit[i][half] = far ? -Values::kLog2Unit - kOffset : unit[i][half];
    });
  }
};

// Copies keys, values and scales of blocks of keys. All are whole, as the quantising pass has filled the last one of a
// sequence.
template <class Config>
struct Int8Source {
  // Of a tile, the first block of its sequence and kv head.
  __device__ static int64_t first(const Int8AttentionArguments& a, const AttentionTile& tile) {
    return tile.kv_head(a.p) * a.x.blocks + Int8Operands::first_block(a.p, tile.batch, tile.first_key);
  }
  // block: of all heads'. All addresses follow from it, as pointers that are kept take registers.
  __device__ static void copy(typename Config::Stage& to, const Int8Operands& x, int64_t block) {
    CopyK k({.data = x.k, .row = Config::kHeadDim / 2}, block * (Config::kN * Config::kHeadDim / 2));
    CopyV v({.data = x.v, .row = kInt8Keys / 2}, block * (Config::kValueDim * kInt8Keys / 2));
    if (threadIdx.x < Config::kScales / 4)
      ptx::cp_async_16(ptx::shared_address(to.scales + threadIdx.x * 4),
                       x.k_scale(block, static_cast<int>(threadIdx.x) * 4));
    k.template copy<true>(to.k, kStepK, Config::kN, Config::kHeadDim / 2);
    v.template copy<true>(to.v, kStepV, Config::kValueDim, kInt8Keys / 2);
  }

 private:
  using CopyK = RowCopy<Config::kN, Config::kHeadDim / 2, Config::kThreads>;
  using CopyV = RowCopy<Config::kValueDim, kInt8Keys / 2, Config::kThreads>;
  static constexpr int64_t kStepK = CopyK::Share::kStep * Config::kHeadDim, kStepV = CopyV::Share::kStep * kInt8Keys;
};

// A Config with out's dtype, which is a branch of the launch: the products are the same.
template <class Config, Dtype D>
struct WithOutput : Config {
  static constexpr Dtype kDtype = D;
};

// A tile. Two buffers of keys and values: while a block of keys is computed, the next one arrives.
template <class Config>
struct Int8AttentionConsumer {
  static constexpr bool kModified = Config::kModified;
  static constexpr int kTilesM = Config::kTilesM;
  using Scores = typename Config::Scores;
  using Output = typename Config::Output;
  using Modifiers = ScoreModifiers<Scores>;
  using MaskWords = typename Modifiers::MaskWords;
  using Row = RowValues<kTilesM>;
  using Values = typename Config::Values;

  const Int8AttentionArguments& a;
  const AttentionParams& p;
  typename Config::SharedStorage& s;
  const AttentionTile& tile;
  const KeyBlocks& blocks;
  const int warp_row;  // this warp's first row in the tile
  typename Config::Softmax& sums;
  Output& o;
  const uint32_t q_at, k_at, v_at;  // this lane's, for ldmatrix, where kOnce: address of q, offsets of k and v
  Row scale, shift;      // of a row's scores before modifiers, of these the shift; without, the scale of the softmax
  bool vectors = false;  // the mask's rows are read 16 bytes at a time

  __device__ Int8AttentionConsumer(const Int8AttentionArguments& a, typename Config::SharedStorage& s,
                                   const AttentionTile& tile, const KeyBlocks& blocks, typename Config::Softmax& sums,
                                   Output& o)
      : a(a),
        p(a.p),
        s(s),
        tile(tile),
        blocks(blocks),
        warp_row(threadIdx.x / 32 * Config::kWarpM),
        sums(sums),
        o(o),
        q_at(shuffled<kOnce>(PanelsK::template matrices<Config::kM, true>(s.q8, warp_row, 0))),
        k_at(shuffled<kOnce>(offset<PanelsK>())),
        v_at(shuffled<kOnceQV>(offset<PanelsV>())) {}

  __device__ void operator()() {
    o.clear();
    if (blocks.end > blocks.begin) {
      begin();
      all_blocks();
    }
    finish();
  }

 private:
  using PanelsK = Panels<Config::kHeadDim / 2>;
  using PanelsV = Panels<kInt8Keys / 2>;
  // ptxas computes addresses that depend on the lane anew in each block of keys, unless a shuffle returns them.
  // Modelled, that makes 64 columns up to 4 % slower, and v's addresses in int8 at 128 columns up to 19 %.
  static constexpr bool kOnce = Config::kHeadDim > 64, kOnceQV = kOnce && !Values::kUnsigned;
  // x of this lane.
  template <bool kShuffled>
  __device__ static uint32_t shuffled(uint32_t x) {
    return kShuffled ? __shfl_sync(0xffffffff, x, threadIdx.x % 32) : x;
  }
  template <class P>
  __device__ uint32_t offset() const {
    return P::template matrices<Config::kN, false>(s.q8, 0, 0) - ptx::shared_address(s.q8);
  }
  // Panels::matrices() by `lane`, this lane's at row 0 and column 0. Rows begin at multiples of kRowBytes, so columns
  // change no bits but the swizzled ones.
  template <class P, int kRows>
  __device__ static uint32_t matrices(uint32_t lane, int row, int column) {
    return (lane ^ column % P::kPanel * 2) + (column / P::kPanel * kRows + row) * P::kRowBytes;
  }
  __device__ uint32_t matrices_q(int row, int column) const {
    return kOnce ? matrices<PanelsK, Config::kM>(q_at, row, column)
                 : PanelsK::template matrices<Config::kM, true>(s.q8, warp_row + row, column);
  }
  template <class P, int kRows>
  __device__ static uint32_t matrices(const uint16_t* shared, uint32_t lane, int row, int column) {
    return kOnce ? ptx::shared_address(shared) + matrices<P, kRows>(lane, row, column)
                 : P::template matrices<kRows, false>(shared, row, column);
  }
  __device__ int first_row() const { return tile.row + warp_row; }  // this warp's, in the sequence
  template <class F>
  __device__ static void each_row(F f) {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) f(i, half);
  }
  // Of one of q's scales or shifts, this thread's rows.
  __device__ float of_row(const float* values, int i, int half) const {
    return values[tile.lse(p, min(first_row() + Scores::row(i, 2 * half), tile.rows - 1))];
  }
  __device__ void begin() {
    constexpr int kRow = Config::kHeadDim / 2;
    using Copy = RowCopy<Config::kM, kRow, Config::kThreads>;
    Copy copy_q({.data = a.x.q, .row = kRow}, tile.lse(p, tile.row) * kRow);
    copy_q.template copy<false>(s.q8, Copy::Share::kStep * Config::kHeadDim, tile.rows - tile.row, kRow);
    if (threadIdx.x < 4) s.magic[threadIdx.x] = kInt8MagicBits;
    if (threadIdx.x == 0) s.first_block = Config::Source::first(a, tile);
    __syncthreads();
    copy(blocks.end - 1);
    each_row([&](int i, int half) {
      const float of_q = of_row(a.x.q_scale, i, half);
      if (kModified) {
        scale[i][half] = of_q;
        shift[i][half] = p.softcap > 0 ? of_row(a.x.shift, i, half) : 0;
      } else {
        scale[i][half] = of_q * a.scale;
      }
    });
  }
  __device__ void copy(int block) { Config::Source::copy(s.stages[block % 2], a.x, s.first_block + block); }
  // From the last block to the first. A branch around RowBounds: a loop of its own for blocks without a mask is a
  // second copy of everything, and its counter spills.
  __device__ void all_blocks() {
    if (kModified) vectors = Modifiers::in_vectors(p, tile);
#pragma unroll 1
    for (int block = blocks.end - 1; block >= blocks.begin; --block)
      next_block(block, block >= blocks.unmasked_end || block < blocks.unmasked_begin);
  }
  __device__ void next_block(int block, bool masked) {
    auto& stage = s.stages[block % 2];
    ptx::cp_async_wait<0>();
    __syncthreads();  // the block has arrived for all warps, and all have read the one before
    if (block > blocks.begin) copy(block - 1);
    const int key = block * Config::kN + accumulator_column(0);
    MaskWords mask;
    if (kModified) Modifiers{p, tile, first_row(), vectors}.load(mask, key);
    Scores scores;
    qk(scores, stage);
    typename Config::Softmax::Factors factors;
    if constexpr (kModified) {
      scores.for_each([&](float& v, int i, int, int e) { v = fmaf(v, scale[i][e / 2], shift[i][e / 2]); });
      Modifiers{p, tile, first_row(), vectors}(scores, mask, key);
      if (masked) RowBounds<Scores>(p, tile, first_row())(scores, key);
    } else {
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        const float of_k = stage.scales[kInt8GroupScales + g * 4 + thread_in_group()];
        each_row([&](int i, int half) { factors[g][i][half] = score_factor(of_k, scale[i][half]); });
      }
      if (masked) mask_keys(scores, stage, block);
    }
    Row weight;
    sums.update(scores, factors, weight, o);
    if (Values::kBlockScales) each_row([&](int i, int half) { weight[i][half] *= stage.scales[kInt8BlockScales]; });
    uint32_t packed[Config::kN / 32][kTilesM][4];
    pack_bytes(packed, scores);
    if (Values::kUnsigned) sums.add_bytes(packed, weight);
    pv(packed, stage, weight);
  }
  // -inf for all keys that a row does not attend to. They are in the order of their scales.
  __device__ void mask_keys(Scores& scores, const typename Config::Stage& stage, int block) const {
    const auto order = reinterpret_cast<const uint8_t*>(stage.scales + kInt8Order) + accumulator_column(0);
    uint16_t places[Scores::kTilesN];  // of two keys each
#pragma unroll
    for (int j = 0; j < Scores::kTilesN; ++j) places[j] = *reinterpret_cast<const uint16_t*>(order + j * 8);
    RowBounds<Scores>(p, tile, first_row())(scores, block * Config::kN,
                                            [&](int j, int e) { return places[j] >> 8 * e & 255; });
  }
  // scores = q k^T: with modifiers times the scales of the keys; else kInt8Magic more, in units of their groups. What
  // accumulators begin with comes from shared memory, as of constants there are four MOVs for each mma; and anew for
  // each block, as registers that keep it would spill.
  __device__ void qk(Scores& scores, const typename Config::Stage& stage) const {
    int32_t magic[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) magic[e] = s.magic[e];
    Fragments<int32_t, kTilesM, Scores::kTilesN> sums;
#pragma unroll
    for (int step = 0; step < Config::kHeadDim / 32; ++step) {
      uint32_t q[kTilesM][4];
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) ptx::ldmatrix_x4(q[i], matrices_q(i * 16, step * 16));
#pragma unroll
      for (int j = 0; j < Scores::kTilesN; j += 2) {
        uint32_t k[4];
        ptx::ldmatrix_x4(k, matrices<PanelsK, Config::kN>(stage.k, k_at, j * 8, step * 16));
#pragma unroll
        for (int next = 0; next < 2; ++next)
#pragma unroll
          for (int i = 0; i < kTilesM; ++i)
            ptx::mma_m16n8k32(sums[i][j + next], q[i], k + next * 2, step == 0 ? magic : sums[i][j + next]);
      }
    }
    sums.for_each([&](int32_t sum, int i, int j, int e) { scores[i][j][e] = __int_as_float(sum); });
    if (!kModified && stage.scales[kInt8Uneven] == 0) return;
#pragma unroll
    for (int j = 0; j < Scores::kTilesN; ++j) {
      const auto k = *reinterpret_cast<const float2*>(stage.scales + j * 8 + accumulator_column(0));
#pragma unroll
      for (int i = 0; i < kTilesM; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float of_k = e % 2 ? k.y : k.x;
          float& score = scores[i][j][e];
          // A scale of 22 bits times kInt8Magic is exact.
          score = kModified ? fmaf(score, of_k, -kInt8Magic * of_k) : fmaf(score - kInt8Magic, of_k, kInt8Magic);
        }
    }
  }
  // Four tiles of p, a byte each, are the first operand of an mma.
  __device__ static void pack_bytes(uint32_t (&packed)[Config::kN / 32][kTilesM][4], const Scores& p) {
#pragma unroll
    for (int step = 0; step < Config::kN / 32; ++step)
#pragma unroll
      for (int i = 0; i < kTilesM; ++i)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int j = step * 4 + r / 2 * 2;
          packed[step][i][r] = Values::pack(p[i][j], p[i][j + 1], r % 2 * 2);
        }
  }
  // o += p v, times the block's weights, of the columns that there are: the branches also keep ptxas
  // from loading more of v at a time than the registers hold.
  __device__ void pv(const uint32_t (&packed)[Config::kN / 32][kTilesM][4], const typename Config::Stage& stage,
                     const Row& weight) {
    constexpr int kPanel = 64;
#pragma unroll
    for (int column = 0; column < Config::kValueDim; column += kPanel)
      if (column == 0 || column < p.value_dim)
#pragma unroll
        for (int j = column / 8; j < (column + kPanel) / 8; j += 2) pv(j, packed, stage, weight);
  }
  // Sixteen columns, as their sums take registers.
  __device__ void pv(int j, const uint32_t (&packed)[Config::kN / 32][kTilesM][4], const typename Config::Stage& stage,
                     const Row& weight) {
    Fragments<typename Values::Sum, kTilesM, 2> sums;
    sums.clear();
#pragma unroll
    for (int step = 0; step < Config::kN / 32; ++step) {
      uint32_t v[4];
      ptx::ldmatrix_x4(v, matrices<PanelsV, Config::kValueDim>(stage.v, v_at, j * 8, step * 16));
#pragma unroll
      for (int next = 0; next < 2; ++next)
#pragma unroll
        for (int i = 0; i < kTilesM; ++i) multiply_values(sums[i][next], packed[step][i], v + next * 2, sums[i][next]);
    }
    sums.for_each([&](typename Values::Sum sum, int i, int next, int e) {
      float& to = o[i][j + next][e];
      to = fmaf(Values::value(sum), weight[i][e / 2], to);
    });
  }
  // After all keys: the rows of out and their lse.
  __device__ void finish() {
    if (Values::kUnsigned) sums.take_off_bytes(o);
    const bool shifted = p.softcap == 0 && tile.known();
    const float sink = tile.known() ? sink_of(p, tile.head) : NAN, unit = p.scale * kLog2e;
    Row factor;
    sums.finish([&](int i, int half) { return p.sinks && shifted ? sink - of_row(a.x.shift, i, half) * unit : sink; },
                factor);
    if (p.lse && shifted)
      each_row([&](int i, int half) {
        if (sums.sum[i][half] != 0) sums.max[i][half] += of_row(a.x.shift, i, half) * unit;
      });
    store_lse<Output>(sums, p, tile, first_row());
    if (tile.known())
      scale_values(factor);
    else
      rescale(o, factor);  // to NaN
    __syncthreads();       // all have read keys and values, where the rows of out go
    if (p.dtype == Dtype::f16)
      MmaAttentionEpilogue<WithOutput<Config, Dtype::f16>>{p, s, warp_row}(o, tile);
    else
      MmaAttentionEpilogue<WithOutput<Config, Dtype::bf16>>{p, s, warp_row}(o, tile);
  }
  // Values are in units of their channels' scales. Rows without keys are 0 whatever these are.
  __device__ void scale_values(const Row& factor) {
    const float* const of_v =
        a.x.v_scale + (int64_t{tile.batch} * p.kv_heads + tile.kv_head(p)) * Config::kValueDim + accumulator_column(0);
#pragma unroll
    for (int j = 0; j < Output::kTilesN; ++j) {
      const auto v = *reinterpret_cast<const float2*>(of_v + j * 8);
#pragma unroll
      for (int i = 0; i < kTilesM; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float f = factor[i][e / 2];
          o[i][j][e] = f == 0 ? 0 : o[i][j][e] * f * ((e % 2 ? v.y : v.x) * Values::kOfOutput);
        }
    }
  }
};

}  // namespace forwardpass
