#pragma once
// The products of attention_8bit on wgmma, and what a consumer makes of their sums. int8_values.cuh has the integers
// and e4m3, which are those of the kernel on mma.sync too. Beside the Config, in int8_wgmma.cuh, is what that takes.
#include "device/pipeline.cuh"
#include "device/softmax.cuh"
#include "device/vec.cuh"
#include "device/wgmma_8bit.cuh"
#include "kernels/attention/int8_operands.h"
#include "kernels/attention/int8_values.cuh"
#include "kernels/attention/wgmma_consumer.cuh"

namespace forwardpass {

struct Int8WgmmaArguments {
  AttentionParams p;
  unsigned tiles;
  int64_t blocks;  // both as in AttentionArguments
  Int8Operands x;
  CUtensorMap q, k, v;         // matrices of bytes; rows of k and v are those of all blocks of keys
  CUtensorMap scales;          // a row a block of keys
  CUtensorMap q_scale, shift;  // one row each

  // m, n: rows of q in a tile, and keys of a block.
  cudaError_t encode(int m, int n) {
    const int64_t rows = int64_t{p.heads} * p.rows * (p.cu_seqlens_q ? 1 : p.batch), all = x.blocks * p.kv_heads;
    const int row_bytes = std::min(x.head_dim, 128);
    if (std::max({rows, all * kInt8Keys, all * x.value_dim}) > INT32_MAX) return cudaErrorInvalidConfiguration;
    const auto bytes = [&](CUtensorMap& to, const void* data, int64_t rows, int columns, int box_rows, int box) {
      return encode_boxes(to, CU_TENSOR_MAP_DATA_TYPE_UINT8, data, rows, columns, columns, box_rows, box,
                          box == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B);
    };
    if (auto e = bytes(q, x.q, rows, x.head_dim, m, row_bytes)) return e;
    if (auto e = bytes(k, x.k, all * kInt8Keys, x.head_dim, n, row_bytes)) return e;
    if (auto e = bytes(v, x.v, all * x.value_dim, kInt8Keys, x.value_dim, kInt8Keys)) return e;
    const auto floats = [&](CUtensorMap& to, const float* data, int64_t rows, int columns, int box_rows, int box) {
      return encode_boxes(to, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, data, rows, columns, (columns + 3) / 4 * int64_t{16},
                          box_rows, box, CU_TENSOR_MAP_SWIZZLE_NONE);
    };
    if (auto e = floats(q_scale, x.q_scale, 1, static_cast<int>(rows), 1, m)) return e;
    if (auto e = floats(shift, x.shift, 1, static_cast<int>(rows), 1, m)) return e;
    return floats(scales, x.scales, all, kInt8Scales, 1, x.grouped ? kInt8Scales : kInt8GroupScales);
  }
};

// How the producer loads q, k and v: one lane loads whole blocks of keys.
template <class Config>
struct Int8Boxes {
  // Which of all heads' blocks of 64 keys is loaded first, for k and then for v; and how many of them the sequence has.
  struct Shared {
    int block[Config::kStages], units[Config::kStages];
  };

  template <class Storage>
  __device__ static void look_up(const Int8WgmmaArguments&, Storage&, const AttentionTile&, int) {}
  template <class Storage>
  __device__ static void find(const Int8WgmmaArguments& a, Storage& s, const AttentionTile& t, int block, bool,
                              int stage) {
    if (lane() > 0) return;
    const int64_t first = t.kv_head(a.p) * a.x.blocks + Int8Operands::first_block(a.p, t.batch, t.first_key);
    s.source.block[stage] = static_cast<int>(first + block * kUnits);
    s.source.units[stage] = Int8Operands::blocks_of(t.keys) - block * kUnits;
  }
  template <class Query>
  __device__ static void load_q(const Int8WgmmaArguments& a, Query& to, const AttentionTile& t, uint32_t barrier) {
    const int row = static_cast<int>(t.lse(a.p, t.row));
    load(to.panel, a.q, row, barrier);
    ptx::tma_load(ptx::shared_address(to.scale), a.q_scale, row, 0, barrier);
    ptx::tma_load(ptx::shared_address(to.shift), a.shift, row, 0, barrier);
  }
  // Of k's and v's scales, and of v, there are zeros beyond the sequence's units, which lie behind the columns: a scale
  // that lies there, or a byte of e4m3, may be a NaN, which a probability of 0 does not take away.
  template <class Storage>
  __device__ static void load_k(const Int8WgmmaArguments& a, Storage& s, int stage, uint32_t barrier) {
    if (lane() > 0) return;
    const int block = s.source.block[stage];
    load(s.k[stage].panel, a.k, block * kInt8Keys, barrier);
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit)
      ptx::tma_load(ptx::shared_address(s.scales[stage][unit].value), a.scales,
                    unit < s.source.units[stage] ? 0 : kInt8Scales, block + unit, barrier);
  }
  template <class Storage>
  __device__ static void load_v(const Int8WgmmaArguments& a, Storage& s, int stage, uint32_t barrier) {
    if (lane() > 0) return;
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit)
      ptx::tma_load(ptx::shared_address(s.v[stage].row[unit * Config::kValueDim]), a.v,
                    unit < s.source.units[stage] ? 0 : kInt8Keys, (s.source.block[stage] + unit) * Config::kValueDim,
                    barrier);
  }

 private:
  static constexpr int kUnits = Config::kN / kInt8Keys;
  __device__ static int lane() { return static_cast<int>(threadIdx.x % 32); }
  template <int kPanels, int kRows, int kBytes>
  __device__ static void load(const uint8_t (&to)[kPanels][kRows][kBytes], const CUtensorMap& map, int row,
                              uint32_t barrier) {
#pragma unroll
    for (int i = 0; i < kPanels; ++i) ptx::tma_load(ptx::shared_address(to[i]), map, i * kBytes, row, barrier);
  }
};

// d += p v, or d = p v, of 32 keys; v: low half of a descriptor.
template <int kRowBytes, int kTiles>
__device__ inline void multiply_values(int32_t (&d)[kTiles][4], const uint32_t (&p)[4], uint32_t v, bool accumulate) {
  ptx::wgmma_u8<kRowBytes>(d, p, v, accumulate);
}
template <int kRowBytes, int kTiles>
__device__ inline void multiply_values(float (&d)[kTiles][4], const uint32_t (&p)[4], uint32_t v, bool accumulate) {
  ptx::wgmma_e4m3<kRowBytes>(d, p, v, accumulate);
}

template <class Config>
struct Int8Products {
  using Values = typename Config::Values;
  static constexpr int kStep = 32 / ptx::kDescriptorUnit;  // 32 columns
  static constexpr int kRowBytes = Config::kRowBytes;
  static constexpr float kBelow = -Values::kLog2Unit;  // what the exponential of a unit's largest score is below 1
  // A unit: 64 keys, which have a maximum of their own. A step: p v of a unit and kPart columns.
  static constexpr int kUnits = Config::kN / kInt8Keys, kParts = Config::kValueDim / Config::kPart,
                       kSteps = kUnits * kParts;
  static constexpr int kTiles = kInt8Keys / 8;  // of a unit
  // A thread's scores of a unit are of kGroups groups of keys, in the order of their scales, unless modifiers need the
  // keys in their own order.
  static constexpr bool kGrouped = !Config::kModified;
  static constexpr int kGroups = kGrouped ? 2 : 1, kGroupTiles = kTiles / kGroups;
  using Scores = typename Config::Scores;
  using Output = typename Config::Output;
  struct Sums {
    int32_t tile[Config::kN / 8][4];
    Scores scores;
  };

  const AttentionParams& p;
  uint32_t q_rows, k_rows, v_rows;  // low halves of the wgmma descriptors: of this warpgroup's rows; in the first stage
  RowValues<1> scale;               // of a row's scores: with modifiers q's alone; without, of the softmax too
  RowValues<1> shift;               // what all scores of a row lack
  RowValues<kUnits> weight;         // of the units whose p v comes next, times their scales of v
  float v_scale[kUnits];            // of the units whose scores there are
  RowValues<1> factors[kUnits][kGroups];  // of these scores, to units of log2(e), where keys are grouped
  RowValues<kUnits> most;                 // the largest of this thread's, in these units
  RowValues<1> total;                     // of unsigned v: sums of this thread's p as whole numbers, in units of o
  uint32_t packed[Config::kN / 32][4];    // p of the block of keys whose p v comes next: an mma's first operand
  typename Values::Sum values[Config::kPart / 8][4];  // p v of a step

  __device__ Int8Products(const Int8WgmmaArguments& a, const typename Config::SharedStorage& s, int warpgroup)
      : p(a.p) {
    q_rows = uniform(ptx::descriptor(ptx::shared_address(s.q[0].panel[0][warpgroup * ptx::kWgmmaRows])));
    k_rows = uniform(ptx::descriptor(ptx::shared_address(s.k[0].panel)));
    v_rows = uniform(ptx::descriptor(ptx::shared_address(s.v[0].row)));
  }

  // first_row: this warp's, in the tile.
  __device__ void begin_tile(const typename Config::Query& q, int first_row, OnlineSoftmax<1>& sums) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + Scores::row(0, 2 * half);
      shift[0][half] = q.shift[row];
      scale[0][half] = Config::kModified ? q.scale[row] : q.scale[row] * p.scale * kLog2e;
      total[0][half] = 0;
      sums.max[0][half] = kNoKeys;
    }
  }
  // Issues q k^T.
  __device__ void qk(Sums& sums, int q_stage, int k_stage) const {
    const uint32_t q = q_rows + q_stage * (sizeof(typename Config::Query) / ptx::kDescriptorUnit),
                   rows = k_rows + k_stage * (sizeof(typename Config::Key) / ptx::kDescriptorUnit);
#pragma unroll
    for (int i = 0; i < Config::kHeadDim / 32; ++i) {
      constexpr int kSteps = kRowBytes / 32, kRow = kRowBytes / ptx::kDescriptorUnit;
      const int column = i % kSteps * kStep, panel = i / kSteps * kRow;
      ptx::wgmma_s8<kRowBytes>(sums.tile, q + panel * Config::kM + column, rows + panel * Config::kN + column, i > 0);
    }
  }
  // Once it has completed, while the stage is there: with modifiers times the scales of the keys and of the rows; else
  // as it is.
  __device__ Scores& scores(Sums& sums, const typename Config::SharedStorage& s, int k_stage) {
    ptx::wgmma_keep(sums.tile);
    const auto& scales = s.scales[k_stage];
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit)
      v_scale[unit] = Values::kBlockScales ? scales[unit].value[kInt8BlockScales] : 1;
    if constexpr (kGrouped) {
      bool uneven = false;
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) uneven |= scales[unit].value[kInt8Uneven] != 0;
      load_factors(scales);
      each_group([&](int unit, int g, int half) {
        const int first = unit * kTiles + g * kGroupTiles;
        int32_t largest = max(sums.tile[first][half * 2], sums.tile[first][half * 2 + 1]);
#pragma unroll
        for (int j = first + 1; j < first + kGroupTiles; ++j)
          largest = __vimax3_s32(largest, sums.tile[j][half * 2], sums.tile[j][half * 2 + 1]);
        add_most(static_cast<float>(largest), unit, g, half);
      });
#pragma unroll
      for (int j = 0; j < Scores::kTilesN; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums.scores[0][j][e] = static_cast<float>(sums.tile[j][e]);
      if (uneven) {
        each_key(scales, [&](int j, int e, float of_k) { sums.scores[0][j][e] *= of_k; });
        find_most(sums.scores);
      }
    } else {
      each_key(scales, [&](int j, int e, float of_k) {
        const float score = static_cast<float>(sums.tile[j][e]) * of_k;
        sums.scores[0][j][e] = fmaf(score, scale[0][e / 2], p.softcap > 0 ? shift[0][e / 2] : 0);
      });
    }
    return sums.scores;
  }
  // -inf for the keys that rows do not attend to, where they are not in their order. volatile: places that are loaded
  // before they are needed spill.
  template <class Bounds>
  __device__ void mask_keys(const Bounds& bounds, Scores& scores, const typename Config::SharedStorage& s, int k_stage,
                            int first_key) {
    bounds(scores, first_key, [&](int j, int e) {
      const auto order = reinterpret_cast<const volatile uint8_t*>(s.scales[k_stage][j / kTiles].value + kInt8Order);
      return j / kTiles * kInt8Keys + order[j % kTiles * 8 + accumulator_column(e)];
    });
    find_most(scores);
  }
  static constexpr bool kWaitsInSoftmax = !Config::kModified;
  // Issues p v: its first step.
  __device__ void pv(Output&, int v_stage) { issue(v_stage, 0); }
  // Waits for it, and adds it to o.
  __device__ void wait_pv(Output& o, int v_stage) { end_steps<true>(o, v_stage, 0, kSteps); }
  // As OnlineSoftmax::update, of probabilities that are relative to the largest of their block of keys. The maximum is
  // that plus kBelow. kPending: p v of the block before is waited for, and added to o: its steps are between the parts
  // of the softmax, so that each has ended when it is waited for.
  template <bool kPending, class Turn>
  __device__ bool update(OnlineSoftmax<1>& sums, Scores& s, RowValues<1>& factor, Output& o, int v_stage, Turn turn) {
    RowValues<kUnits> top, below, add;
    bool grown = false, far = false;
    if (!kGrouped) find_most(s);
    end_steps<kPending>(o, v_stage, 0, kSteps / 4);
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Rounded up: no probability is more than 255 of 255.
        top[unit][half] = __fadd_ru(over_group(most[unit][half], fmaxf), kBelow);
        grown |= top[unit][half] - sums.max[0][half] > kMostGrowth;
        far |= fabsf(top[unit][half]) > kFar;
        below[unit][half] = -fmaxf(top[unit][half], kNoKeys);
      }
    end_steps<kPending>(o, v_stage, kSteps / 4, kSteps / 2);
    grown = __any_sync(0xffffffff, grown);
    if (grown) grow(sums, top, factor);
    if (__any_sync(0xffffffff, far)) bring_near(s, top, below);
    end_steps<kPending>(o, v_stage, kSteps / 2, kSteps - 1);
    turn(true);
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) exponentials(s, unit, below, add);
    turn(false);
    end_steps<kPending>(o, v_stage, kSteps - 1, kSteps);
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float w = ptx::ex2(top[unit][half] - sums.max[0][half]);
        sums.sum[0][half] = fmaf(add[unit][half], w, sums.sum[0][half]);
        weight[unit][half] = w * v_scale[unit];
        const float bytes = __uint_as_float(pack_unit(s, unit, half));
        if (Values::kUnsigned) total[0][half] = fmaf(bytes, weight[unit][half], total[0][half]);
      }
    return grown;
  }
  __device__ static void rescale(Output& o, const RowValues<1>& factor) { forwardpass::rescale(o, factor); }
  __device__ static void pack(const Scores&) {}
  __device__ float shift_of(int half) const { return p.softcap == 0 ? shift[0][half] * (p.scale * kLog2e) : 0; }
  // 0; NaN for a row of q with a NaN that has a sink, as the reference has it.
  __device__ static float without_keys(const Int8WgmmaArguments& a, const AttentionTile& tile, int first_row,
                                       int half) {
    if (!a.p.sinks || a.p.softcap > 0) return 0;
    return a.x.shift[tile.lse(a.p, min(first_row + Scores::row(0, 2 * half), tile.rows - 1))] * 0;
  }
  // What all scores of a row lack, in units of log2(e).
  __device__ float sink_shift(int half) const { return p.sinks ? shift_of(half) : 0; }
  __device__ void add_shift(OnlineSoftmax<1>& sums) const {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (sums.sum[0][half] != 0) sums.max[0][half] += shift_of(half);
  }
  // After all keys: takes off what the 128 of v have added.
  __device__ void end_tile(Output& o) {
    if constexpr (Values::kUnsigned) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        total[0][half] = sum_of_group(total[0][half]);
      }
      o.for_each([&](float& v, int, int, int e) { v = fmaf(total[0][e / 2], -128, v); });
    }
  }

 private:
  // A finite maximum of no keys, below all scores: differences from it are no NaN.
  static constexpr float kNoKeys = -0x1.fffffep127f;
  // Beyond this kBelow is no longer exact enough as a part of the maximum, beyond 2^27 it is lost.
  static constexpr float kFar = Values::kFar;
  __device__ float factor_of(int unit, int g, int half) const { return kGrouped ? factors[unit][g][0][half] : 1; }
  template <class F>
  __device__ static void each_group(F f) {
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit)
#pragma unroll
      for (int g = 0; g < kGroups; ++g)
#pragma unroll
        for (int half = 0; half < 2; ++half) f(unit, g, half);
  }
  template <class Scales>
  __device__ void load_factors(const Scales& scales) {
    each_group([&](int unit, int g, int half) {
      const float of_k = scales[unit].value[kInt8GroupScales + g * 4 + thread_in_group()];
      factors[unit][g][0][half] = score_factor(of_k, scale[0][half]);
    });
  }
  // f(j, e, of_k): of each score, with the number that its key has.
  template <class Scales, class F>
  __device__ static void each_key(const Scales& scales, F f) {
#pragma unroll
    for (int j = 0; j < Scores::kTilesN; ++j) {
      const float* const of_k = scales[j / kTiles].value + j % kTiles * 8 + accumulator_column(0);
      const auto k = *reinterpret_cast<const float2*>(of_k);
#pragma unroll
      for (int e = 0; e < 4; ++e) f(j, e, e % 2 ? k.y : k.x);
    }
  }
  // Takes the largest score of a group into `most`; rounded up, so that no score is more.
  __device__ void add_most(float score, int unit, int g, int half) {
    const float x = kGrouped ? __fmul_ru(score, factor_of(unit, g, half)) : score;
    most[unit][half] = g == 0 ? x : fmaxf(most[unit][half], x);
  }
  __device__ void find_most(const Scores& s) {
    each_group([&](int unit, int g, int half) {
      const auto& tiles = s[0];
      const int first = unit * kTiles + g * kGroupTiles, e = half * 2;
      float largest = fmaxf(tiles[first][e], tiles[first][e + 1]);
#pragma unroll
      for (int j = first + 1; j < first + kGroupTiles; ++j)
        largest = fmaxf(largest, fmaxf(tiles[j][e], tiles[j][e + 1]));
      add_most(largest, unit, g, half);
    });
  }
  // A maximum that is exceeded by more than kMostGrowth gives way.
  __device__ void grow(OnlineSoftmax<1>& sums, const RowValues<kUnits>& top, RowValues<1>& factor) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& max = sums.max[0][half];
      const float before = max, now = fmaxf(top[0][half], top[kUnits - 1][half]);
      if (now - before > kMostGrowth) max = now;
      factor[0][half] = ptx::ex2(before - max);
      sums.sum[0][half] *= factor[0][half];
      total[0][half] *= factor[0][half];
    }
  }
  // Makes scores relative to the largest of their units, which keeps 255 of 255: of a row that is masked whole by -1e9
  // all are alike.
  __device__ void bring_near(Scores& s, const RowValues<kUnits>& top, RowValues<kUnits>& below) {
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Of other rows of the warp nothing changes: a row's bits do not depend on them.
        const bool is_far = fabsf(top[unit][half]) > kFar;
        float largest = kNoKeys;
        const auto each_score = [&](auto f) {
#pragma unroll
          for (int j = 0; j < kTiles; ++j)
#pragma unroll
            for (int e = half * 2; e < half * 2 + 2; ++e) f(s[0][unit * kTiles + j][e], j / kGroupTiles);
        };
        each_score([&](float& v, int g) {
          v *= is_far ? factor_of(unit, g, half) : 1;
          largest = fmaxf(largest, v);
        });
        largest = over_group(largest, fmaxf);
        const float less = is_far ? largest : 0;
        each_score([&](float& v, int) { v -= less; });
#pragma unroll
        for (int g = 0; g < kGroups; ++g)
          if (is_far && kGrouped) factors[unit][g][0][half] = 1;
        if (is_far) below[unit][half] = -kBelow;
      }
  }
  // A unit's scores become p; and their sums.
  __device__ void exponentials(Scores& s, int unit, const RowValues<kUnits>& below, RowValues<kUnits>& sums) const {
#pragma unroll
    for (int j = unit * kTiles; j < (unit + 1) * kTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int half = e / 2;
        float& sum = sums[unit][half];
        s[0][j][e] =
            ptx::ex2(fmaf(s[0][j][e], factor_of(unit, (j - unit * kTiles) / kGroupTiles, half), below[unit][half]));
        sum = j == unit * kTiles && e % 2 == 0 ? s[0][j][e] : sum + s[0][j][e];
      }
  }
  // Of a row's p of a unit. Four tiles, a byte each, are the first operand of an mma. Returns the sum of whole numbers.
  __device__ uint32_t pack_unit(const Scores& s, int unit, int half) {
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kTiles / 2; ++i) {
      const int j = unit * kTiles + 2 * i;
      uint32_t& word = packed[j / 4][i % 2 * 2 + half];
      word = Values::pack(s[0][j], s[0][j + 1], half * 2);
      if (Values::kUnsigned) sum = __dp4a(word, 0x01010101u, sum);
    }
    return sum;
  }
  __device__ void issue(int v_stage, int step) {
    constexpr int kUnitBytes = Config::kValueDim * kInt8Keys, kPartBytes = Config::kPart * kInt8Keys;
    const uint32_t rows = v_rows + v_stage * (sizeof(typename Config::Value) / ptx::kDescriptorUnit) +
                          (step / kParts * kUnitBytes + step % kParts * kPartBytes) / ptx::kDescriptorUnit;
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 2; ++k)
      multiply_values<kInt8Keys>(values, packed[step / kParts * 2 + k], rows + k * kStep, k > 0);
    ptx::wgmma_commit();
  }
  // Waits for steps from `first` to `end`, adds them to o, and issues the next one each time.
  template <bool kPending>
  __device__ void end_steps(Output& o, int v_stage, int first, int end) {
    if constexpr (kPending) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i)
        if (i >= first && i < end) end_step(o, v_stage, i);
    }
  }
  __device__ void end_step(Output& o, int v_stage, int i) {
    ptx::wgmma_wait<0>();
    ptx::wgmma_keep(values);
#pragma unroll
    for (int j = 0; j < Config::kPart / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& to = o[0][i % kParts * (Config::kPart / 8) + j][e];
        to = fmaf(Values::value(values[j][e]), weight[i / kParts][e / 2], to);
      }
    if (i + 1 < kSteps) issue(v_stage, i + 1);
  }
};

template <class Config>
struct Int8WgmmaEpilogue : WgmmaAttentionEpilogue<Config> {
  using Output = typename Config::Output;

  __device__ void operator()(const AttentionTile& tile, int first_row, Output& o, const RowValues<1>& factor) const {
    if (tile.known())
      scale_values(tile, o, factor);
    else
      rescale(o, factor);  // to NaN
    if (this->p.dtype == Dtype::f16)
      this->template store_rows<Dtype::f16>(o, tile, first_row);
    else
      this->template store_rows<Dtype::bf16>(o, tile, first_row);
    __syncwarp();
  }

 private:
  // Values are in units of their channels' scales. Rows without keys are 0 whatever these are.
  __device__ void scale_values(const AttentionTile& tile, Output& o, const RowValues<1>& factor) const {
    const float* const of_v = this->a.x.v_scale +
                              (int64_t{tile.batch} * this->p.kv_heads + tile.kv_head(this->p)) * Config::kValueDim +
                              accumulator_column(0);
#pragma unroll
    for (int j = 0; j < Output::kTilesN; ++j) {
      const auto v = *reinterpret_cast<const float2*>(of_v + j * 8);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float f = factor[0][e / 2] * Config::Values::kOfOutput;
        o[0][j][e] = f == 0 ? 0 : o[0][j][e] * f * (e % 2 ? v.y : v.x);
      }
    }
  }
};

}  // namespace forwardpass
