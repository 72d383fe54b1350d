#pragma once
// attention_decode on mma.sync m16n8k16: a few rows of q against the keys of a cache, contiguous or paged. Rows of all
// query heads that share a kv head (GQA) are one tile of sixteen, so that each key is read once.
//
// Memory binds: 2 head_dim bytes of keys and as many of values, in 16 bits, take a multiprocessor of an H100 (14 bytes
// a clock of its share) 37 clocks a key at head dim 128; a warp issues 39 instructions for it (PTX; 41 where it is
// int8), ten clocks of four schedulers. So what counts is the bytes in flight. Each warp has keys, stages and softmax
// of its own: sixteen of each block of 64 keys, by cp.async, with nothing to wait for but its own copies; the warps are
// combined where a part of a head ends.
//
// 8-bit elements stay as they are in shared memory. What ldmatrix gives a lane of them is four neighbours of a row of
// k, where the mma wants two pairs eight apart: which elements of a row meet is free as long as q has the same order.
// Of v it gives two neighbours of two rows; they become two tiles, of even and of odd columns. They are multiplied in
// fp16 whatever q's dtype, which holds them exactly and takes fewer conversions: a row of q is divided by a power of
// two that makes its largest element 1 to 2, so that what fp16 has no room for is 2^-24 of it.
#include "device/dependent_launch.cuh"
#include "device/dispatch.h"
#include "device/shared_bytes.cuh"
#include "device/softmax.cuh"
#include "device/swizzled_rows.cuh"
#include "device/vec.cuh"
#include "kernels/attention/combine.cuh"
#include "kernels/attention/scores.cuh"
#include "kernels/attention/split.cuh"
#include "params/attention_decode.h"

namespace forwardpass {

// A part's result, of an even number of rows.
HOST_DEVICE inline int decode_partial_rows(const AttentionDecodeParams& p) {
  return decode_rows(p) < kDecodeRows ? (decode_rows(p) + 1) / 2 * 2 : kDecodeRows;
}
__device__ inline PartialResult decode_partial(const AttentionDecodeParams& p, int64_t slot) {
  return PartialResult(p.workspace, slot, decode_partial_rows(p), p.cache.value_dim);
}

// From a part's or a head's sums to out and the lse.
struct DecodeOutput : PackedRows {
  using PackedRows::PackedRows;
  // What o has to be multiplied by. The thread that has the row's first column stores the lse.
  __device__ float finish(int r, int column, float max, float sum) const {
    const Denominator d(max, sum, sink_of(p, q_head(r)));
    if (p.lse && column == 0)
      p.lse[(int64_t{batch} * p.heads + q_head(r)) * p.rows + row(r)] = log_of_sum(d.base, d.sum);
    const CacheScale& v = p.cache.v_scale;
    const float scale = v.data && !v.per_token ? v.data[kv_head * v.head] : 1;
    return d.factor * scale;
  }
  __device__ void store(int r, int column, float low, float high) const {
    if (column >= p.cache.value_dim) return;
    const int64_t out = ((int64_t{batch} * p.rows + row(r)) * p.heads + q_head(r)) * p.cache.value_dim + column;
    *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.out) + out) =
        p.dtype == Dtype::f16 ? pack<Dtype::f16>(low, high) : pack<Dtype::bf16>(low, high);
  }
};

// A slice: the sixteen keys of a block that are a warp's.
template <Dtype Cache_, int kHeadDim_>
struct DecodeConfig {
  static constexpr Dtype Cache = Cache_, X = size_of(Cache) == 1 ? Dtype::f16 : Cache;  // X: as it is multiplied
  static constexpr int kHeadDim = kHeadDim_, kSlice = 16;
  static constexpr bool k8Bit = size_of(Cache) == 1;
  static constexpr int kRowBytes = kHeadDim * size_of(Cache), kSliceBytes = kSlice * kRowBytes;
  // A warp's accumulators are sixteen rows of a head dim: of 256 two warps fill the registers of four.
  static constexpr int kWarps = kHeadDim == 256 ? 2 : 4, kThreads = 32 * kWarps, kBlocksPerSm = 3;
  // 64 KB of keys and values, of which an H100 holds three, an A100 two, an L40S one: 32 KB or more are in flight, of
  // the 18 KB that an H100's 3.35 TB/s times 0.7 us come to for a multiprocessor.
  static constexpr int kStages = 64 * 1024 / (kWarps * 2 * kSliceBytes);

  struct Stage {
    alignas(128) uint8_t k[kSliceBytes], v[kSliceBytes];
  };
  // As PartialResult, of a warp.
  struct Partial {
    float max[kDecodeRows], sum[kDecodeRows], o[kDecodeRows][kHeadDim];
  };
  struct SharedStorage {
    union {
      Stage stage[kWarps][kStages];
      Partial partial[kWarps];
    };
    float k_scale[kWarps][kStages][kSlice], v_scale[kWarps][kStages][kSlice];  // per token
    float q_largest[kWarps][kDecodeRows];
    uint32_t there[kWarps][kStages];  // a bit for each key that the cache has
    uint4 q[kHeadDim / 16][32];       // as fragments, a lane's four registers
  };
  // Thread blocks of a multiprocessor.
  static int blocks_per_sm(const Device& d) {
    const int fit = d.shared_kib * 1024 / static_cast<int>(sizeof(SharedStorage) + 1024);
    return fit < kBlocksPerSm ? fit : kBlocksPerSm;
  }
};

// The rows of a slice in shared memory, in panels of up to 128 bytes.
template <int kRowBytes>
struct SliceRows {
  static constexpr int kPanelBytes = kRowBytes < 128 ? kRowBytes : 128, kChunks = kRowBytes / 16;
  using Rows = SwizzledRows<kPanelBytes>;
  __device__ static int offset(int row, int chunk) {
    return chunk / Rows::kChunks * 16 * kPanelBytes + Rows::offset(row, chunk % Rows::kChunks);
  }
  // A lane's address for an ldmatrix of sixteen rows of two chunks: kLowerSecond as Panels of attention/mma.cuh.
  template <bool kLowerSecond>
  __device__ static int matrices(int chunk) {
    const int lane = threadIdx.x % 32, i = lane / 8, lower = kLowerSecond ? i % 2 : i / 2;
    return offset(lower * 8 + lane % 8, chunk + (kLowerSecond ? i / 2 : i % 2));
  }
};

// Copies slices to a warp's stages. A lane finds the row of one key, one slice ahead of the copy, as a table has to be
// read for it.
template <class Config>
struct SliceCopy {
  using Rows = SliceRows<Config::kRowBytes>;
  static constexpr int kElementBytes = size_of(Config::Cache), kElements = 16 / kElementBytes;  // of a chunk
  static constexpr int kAtOnce = 32 / Rows::kChunks;                                            // rows
  const AttentionDecodeParams& p;
  const int batch, head, length;  // keys of the sequence
  int64_t first;                  // page of this lane's key, -1: none
  int row;                        // and the row in it

  // key: the slice's first
  __device__ void find(int key) {
    key += threadIdx.x % Config::kSlice;
    row = key, first = key < length ? batch : -1;
    if (p.cache.block_table && first >= 0) first = p.cache.first_of(batch, key), row = key % p.cache.page;
  }
  // The slice that was found.
  __device__ void copy(typename Config::SharedStorage& s, int warp, int index) const {
    auto& stage = s.stage[warp][index];
    const uint32_t there = __ballot_sync(0xffffffff, first >= 0);
    if (threadIdx.x % 32 == 0) s.there[warp][index] = there;
    copy_rows(stage.k, p.cache.k, p.cache.head_dim), copy_rows(stage.v, p.cache.v, p.cache.value_dim);
    const int lane = threadIdx.x % 32;
    const CacheScale& scale = lane < Config::kSlice ? p.cache.k_scale : p.cache.v_scale;
    if (Config::k8Bit && scale.per_token)
      ptx::cp_async_4(
          ptx::shared_address((lane < Config::kSlice ? s.k_scale : s.v_scale)[warp][index] + lane % Config::kSlice),
          scale.data + (first < 0 ? 0 : first * scale.first + row * scale.row + head * scale.head), first < 0 ? 0 : 4);
  }

 private:
  __device__ void copy_rows(uint8_t* to, const CacheTensor& t, int columns) const {
    const int lane = threadIdx.x % 32;
    const int64_t begin = first < 0 ? -1 : first * t.first + row * t.row + head * t.head;
    const auto data = static_cast<const uint8_t*>(t.data);
#pragma unroll
    for (int r = 0; r < Config::kSlice; r += kAtOnce) {
      const int in_slice = r + lane / Rows::kChunks;
      const int64_t offset = __shfl_sync(0xffffffff, begin, in_slice);
      const int chunk = lane % Rows::kChunks, column = chunk * kElements;
      const bool inside = offset >= 0 && column < columns;
      ptx::cp_async_16(ptx::shared_address(to) + Rows::offset(in_slice, chunk),
                       data + (inside ? (offset + column) * kElementBytes : 0), inside ? 16 : 0);
    }
  }
};

// A warp's part of a part of a head.
template <class Config>
struct DecodeWarp {
  static constexpr Dtype X = Config::X;
  using Rows = SliceRows<Config::kRowBytes>;
  using Scores = Fragments<float, 1, 2>;
  using Output = Fragments<float, 1, Config::kHeadDim / 8>;
  const AttentionDecodeParams& p;
  typename Config::SharedStorage& s;
  const DecodePart& part;
  const PackedRows rows;
  const int warp;
  Output o;
  OnlineSoftmax<1> sums;
  float q_scale[2], v_exponent = -126;  // of this lane's rows; v_scale per token: a power of two above all so far

  __device__ DecodeWarp(const AttentionDecodeParams& p, typename Config::SharedStorage& s, const DecodePart& part)
      : p(p), s(s), part(part), rows(p, part.batch, part.head), warp(threadIdx.x / 32) {
    o.clear();
    const bool one = Config::k8Bit && !p.cache.k_scale.per_token;
    q_scale[0] = q_scale[1] = p.scale * kLog2e * (one ? p.cache.k_scale.data[rows.kv_head * p.cache.k_scale.head] : 1);
  }
  // Two columns of a row as they are in memory, in the order of k's: of each sixteen, for 8-bit elements four
  // neighbours a lane.
  __device__ uint32_t load_q(int r, int step, int second) const {
    const int column =
        step * 16 + (Config::k8Bit ? thread_in_group() * 4 + second * 2 : accumulator_column(0) + second * 8);
    if (!rows.has(r) || column >= p.cache.head_dim) return 0;
    return *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(p.q.data) + rows.q(r) + column);
  }

  __device__ void run() {
    constexpr int kSlices = kDecodeKeys / Config::kSlice;
    const int first = part.begin * kSlices + warp, end = part.end * kSlices;
    const auto key = [&](int slice) { return part.keys.first + slice * Config::kSlice; };
    SliceCopy<Config> copy{p, part.batch, rows.kv_head, part.keys.length};
    copy.find(key(first));
    const auto copy_next = [&](int slice, int index) {
      if (slice < end) copy.copy(s, warp, index);
      ptx::cp_async_commit();
      if (slice + Config::kWarps < end) copy.find(key(slice + Config::kWarps));
    };
#pragma unroll 1
    for (int i = 0; i < Config::kStages - 1; ++i) copy_next(first + i * Config::kWarps, i);
    place_q();
    __syncthreads();  // q is there
    int stage = 0, last = Config::kStages - 1;
#pragma unroll 1
    for (int slice = first; slice < end; slice += Config::kWarps) {
      ptx::cp_async_wait<Config::kStages - 2>();  // in the end for all but empty groups
      __syncwarp();                               // and all lanes have read the stage that is filled next
      copy_next(slice + (Config::kStages - 1) * Config::kWarps, last);
      attend(stage, key(slice));
      last = stage, stage = stage == Config::kStages - 1 ? 0 : stage + 1;
    }
  }

 private:
  __device__ float2 q_floats(uint32_t pair) const {
    return p.dtype == Dtype::bf16 ? __bfloat1622float2(pair_of<__nv_bfloat162>(pair))
                                  : __half22float2(pair_of<__half2>(pair));
  }
  // A warp's steps of q, in pairs of columns.
  static constexpr int kSteps = Config::kHeadDim / 16 / Config::kWarps;
  using QPairs = uint32_t[kSteps][4];
  // q to shared memory, by all warps: each has some of the steps.
  __device__ void place_q() {
    QPairs pairs;
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        pairs[step][i] = load_q(accumulator_row(i % 2 * 2), step * Config::kWarps + warp, i / 2);
    if constexpr (Config::k8Bit) fit_q(pairs);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const auto& q = pairs[step];
      s.q[step * Config::kWarps + warp][threadIdx.x % 32] = {q[0], q[1], q[2], q[3]};
    }
  }
  // For 8-bit elements: q in fp16, divided by a power of two that makes a row's largest element 1 to 2.
  __device__ void fit_q(QPairs& pairs) {
    float most[2] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = q_floats(pairs[step][i]);
        most[i % 2] = fmaxf(most[i % 2], fmaxf(fabsf(pair.x), fabsf(pair.y)));
      }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      most[half] = over_group(most[half], fmaxf);
      if (thread_in_group() == 0) s.q_largest[warp][accumulator_row(half * 2)] = most[half];
    }
    __syncthreads();
    float smaller[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int w = 0; w < Config::kWarps; ++w)
        most[half] = fmaxf(most[half], s.q_largest[w][accumulator_row(half * 2)]);
      // the power of two below it, by its exponent's bits; of 0, denormal and infinite ones any will do
      const uint32_t exponent = min(max(__float_as_uint(most[half]) >> 23, 2u), 252u);
      smaller[half] = __uint_as_float((254 - exponent) << 23), q_scale[half] *= __uint_as_float(exponent << 23);
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = q_floats(pairs[step][i]);
        pairs[step][i] = pack<X>(pair.x * smaller[i % 2], pair.y * smaller[i % 2]);
      }
  }
  // A slice of keys, of which `key` is the first.
  __device__ void attend(int stage, int key) {
    Scores scores;
    scores.clear();
    qk(scores, ptx::shared_address(s.stage[warp][stage].k));
    scale(scores, s.k_scale[warp][stage]);
    if (p.alibi_slopes) add_alibi(scores, key);
    mask(scores, s.there[warp][stage], key);
    RowValues<1> factor;
    bool grown = sums.update(scores, 1, factor);
    if (Config::k8Bit && p.cache.v_scale.per_token) grown |= scale_values(scores, s.v_scale[warp][stage], factor);
    if (grown) rescale(o, factor);
    pv(scores, ptx::shared_address(s.stage[warp][stage].v));
  }
  // From q k to scores in units of log2(e), with softcap. k_scales: of the slice's keys, if they are per token.
  __device__ void scale(Scores& scores, const float* k_scales) const {
    if (Config::k8Bit && p.cache.k_scale.per_token) {
      scores.for_each([&](float& v, int, int j, int e) { v *= q_scale[e / 2] * k_scales[Scores::column(j, e)]; });
    } else {
      scores.for_each([&](float& v, int, int, int e) { v *= q_scale[e / 2]; });
    }
    if (p.softcap > 0) {
      const Softcap cap(p.softcap, 1);
      scores.for_each([&](float& v, int, int, int) { v = cap(v); });
    }
  }
  __device__ int first_position() const { return part.keys.length - p.rows; }  // of a sequence's rows
  __device__ void add_alibi(Scores& scores, int key) const {
    float slope[2];  // found anew, as registers that keep them would be everybody's
    int position[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = accumulator_row(half * 2);
      position[half] = first_position() + rows.row(r);
      slope[half] = rows.has(r) ? alibi_slope(p, part.batch, rows.q_head(r)) : 0;
    }
    scores.for_each([&](float& v, int, int j, int e) {
      v = with_alibi(v, slope[e / 2], position[e / 2], key + Scores::column(j, e));
    });
  }
  // Where a row may not see a key, or a key has no page.
  __device__ void mask(Scores& scores, uint32_t there, int key) const {
    const int first_position = this->first_position(), last_position = part.keys.length - 1;
    if (there == 0xffffffff && key + Config::kSlice - 1 <= first_position &&
        (p.left == kUnlimited || key >= last_position - p.left))
      return;
    // Without a page the score is NaN, which the row's maximum leaves out; its sum and values are NaN to the end.
    scores.for_each([&](float& v, int, int j, int e) {
      if (!(there >> Scores::column(j, e) & 1)) v = NAN;
    });
    const RowBounds<Scores> bounds(p.left != kUnlimited, [&](int r) {
      const int position = first_position + rows.row(r);
      return KeyRange{position - min(p.left, position), position + 1};
    });
    bounds(scores, key + accumulator_column(0));
  }
  // Multiplies p by the values' scales per token, relative to a power of two above all so far, as p is rounded to fp16.
  // True: that has grown; `factor`, by which o has to be multiplied, includes it.
  __device__ bool scale_values(Scores& scores, const float* v_scales, RowValues<1>& factor) {
    float most = 0;
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) most = fmaxf(most, v_scales[j * 8 + accumulator_column(e)]);
    most = over_group(most, fmaxf);
    const float exponent = fmaxf(v_exponent, static_cast<float>(ilogbf(most) + 1));
    const bool grown = exponent > v_exponent;
    if (grown) {
      const float smaller = ptx::ex2(v_exponent - exponent);
      factor[0][0] *= smaller, factor[0][1] *= smaller, v_exponent = exponent;
    }
    const float unit = ptx::ex2(-v_exponent);
    scores.for_each([&](float& v, int, int j, int e) { v *= v_scales[Scores::column(j, e)] * unit; });
    return grown;
  }
  // scores = q k^T
  __device__ void qk(Scores& scores, uint32_t k) const {
#pragma unroll
    for (int chunk = 0; chunk < Rows::kChunks; chunk += 2) {
      uint32_t r[4];
      ptx::ldmatrix_x4(r, k + Rows::template matrices<false>(chunk));
#pragma unroll
      for (int step = 0; step < (Config::k8Bit ? 2 : 1); ++step) {
        const uint4 words = s.q[Config::k8Bit ? chunk + step : chunk / 2][threadIdx.x % 32];
        const uint32_t q[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          uint32_t pair[2] = {r[j * 2], r[j * 2 + 1]};
          if constexpr (Config::k8Bit) upconvert<Config::Cache, X>(r[j * 2 + step], pair);
          ptx::mma_m16n8k16<X>(scores[0][j], q, pair, scores[0][j]);
        }
      }
    }
  }
  // o += p v
  __device__ void pv(const Scores& p, uint32_t v) {
    uint32_t weights[4];
    pack_operand<X>(weights, p[0], 0);
#pragma unroll
    for (int chunk = 0; chunk < Rows::kChunks; chunk += 2) {
      uint32_t r[4];
      ptx::ldmatrix_x4_trans(r, v + Rows::template matrices<true>(chunk));
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // tiles
        if (!Config::k8Bit && i >= 2) break;
        uint32_t pair[2] = {r[i % 2 * 2], r[i % 2 * 2 + 1]};
        if constexpr (Config::k8Bit)
          upconvert<Config::Cache, X>(__byte_perm(r[i / 2 * 2], r[i / 2 * 2 + 1], i % 2 ? 0x7531 : 0x6420), pair);
        auto& tile = o[0][Config::k8Bit ? chunk * 2 + i : chunk + i];
        ptx::mma_m16n8k16<X>(tile, weights, pair, tile);
      }
    }
  }

 public:
  // The column of this thread's element e of tile j.
  __device__ static int column(int j, int e) {
    return Config::k8Bit ? j / 2 * 16 + thread_in_group() * 4 + e % 2 * 2 + j % 2 : j * 8 + accumulator_column(e);
  }
};

// The warps' results of a part, in their order: to out if it is all of a head, else to the workspace.
template <class Config>
__device__ inline void finish_part(const AttentionDecodeParams& p, typename Config::SharedStorage& s,
                                   DecodeWarp<Config>& warp, const DecodePart& part, int64_t slot) {
  using Partial = typename Config::Partial;
  __syncthreads();  // all have read their stages
  auto& partial = s.partial[threadIdx.x / 32];
  const float unit = Config::k8Bit && p.cache.v_scale.per_token ? ptx::ex2(warp.v_exponent) : 1;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = sum_of_group(warp.sums.sum[0][half]);
    const int r = accumulator_row(half * 2);
    if (thread_in_group() == 0) partial.max[r] = warp.sums.max[0][half], partial.sum[r] = sum;
  }
#pragma unroll
  for (int j = 0; j < Config::kHeadDim / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      partial.o[accumulator_row(e)][DecodeWarp<Config>::column(j, e)] = warp.o[0][j][e] * unit;
  __syncthreads();
  const DecodeOutput output(p, part.batch, part.head);
  const int rows = min(decode_rows(p) - output.first, kDecodeRows);
  const PartialResult to = decode_partial(p, slot);
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * Config::kHeadDim / 2; i += Config::kThreads) {
    const int r = i / (Config::kHeadDim / 2), column = i % (Config::kHeadDim / 2) * 2;
    float max = -INFINITY, sum = 0, low = 0, high = 0;
#pragma unroll
    for (int w = 0; w < Config::kWarps; ++w) max = fmaxf(max, s.partial[w].max[r]);
    const float base = max == -INFINITY ? 0 : max;
#pragma unroll
    for (int w = 0; w < Config::kWarps; ++w) {
      const auto& from = s.partial[w];
      const float f = ptx::ex2(from.max[r] - base);
      sum = fmaf(from.sum[r], f, sum), low = fmaf(from.o[r][column], f, low),
      high = fmaf(from.o[r][column + 1], f, high);
    }
    if (part.whole()) {
      const float f = output.finish(r, column, max, sum);
      output.store(r, column, low * f, high * f);
    } else if (column < p.cache.value_dim) {
      if (column == 0) to.max[r] = max, to.sum[r] = sum;
      reinterpret_cast<float2&>(to.o[r * p.cache.value_dim + column]) = {low, high};
    }
  }
  __syncthreads();  // before stages are filled again
}

template <class Config, class = SharedBytesOf<Config>>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    attention_decode_kernel(const __grid_constant__ AttentionDecodeParams p) {
  extern __shared__ __align__(128) uint8_t memory[];
  auto& s = *reinterpret_cast<typename Config::SharedStorage*>(memory);
  ptx::wait_for_earlier_kernels();
  ptx::launch_dependents();
  for_each_part(p, [&](const DecodePart& part, int64_t slot) {
    DecodeWarp<Config> warp(p, s, part);
    warp.run();
    finish_part<Config>(p, s, warp, part, slot);
  });
}

// Combines the parts of each head, if there are several; a head without keys is 0, or NaN if its sequence is not in
// range. A row and 128 of its columns are of one warp where heads are many and have few parts each, else of all warps
// of a block: those have parts in turn, and then are combined in order.
struct CombineShape {
  int warps;     // of a row
  int rows;      // of a block
  int per_head;  // blocks for a head of the list
  int panels;    // of columns

  HOST_DEVICE explicit CombineShape(const AttentionDecodeParams& p) {
    const int of_head = decode_rows(p) < kDecodeRows ? decode_rows(p) : kDecodeRows;
    panels = (p.cache.value_dim + kCombineColumns - 1) / kCombineColumns;
    // the order of a sum is not for the batch to change where that is promised
    const bool many =
        !p.batch_invariant && int64_t{p.cache.batch} * decode_heads(p) * of_head * panels > 2 * p.device.sms;
    warps = many ? 1 : kCombineWarps;
    rows = many ? (of_head < kCombineWarps ? of_head : kCombineWarps) : 1;
    per_head = (of_head + rows - 1) / rows * panels;
  }
};

__global__ void __launch_bounds__(32 * kCombineWarps)
    combine_decode_kernel(const __grid_constant__ AttentionDecodeParams p) {
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
    const int64_t shares = list.shares(p.choice.grid), begin = list.begin_of_batch(batch) + int64_t{head} * keys.count;
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
  add_parts(result, warp, parts, shape.warps, r, column, p.cache.value_dim,
            [&](int n) { return decode_partial(p, n == 0 ? first : next + (n - 1) * step); });
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
  const float f = output.finish(r, column, result.max, result.sum);
  output.store(r, column, result.o.x * f, result.o.y * f);
  output.store(r, column + 2, result.o.z * f, result.o.w * f);
}

template <class Config>
int launch_decode(const AttentionDecodeParams& p, void* cuda_stream) {
  constexpr int kShared = sizeof(typename Config::SharedStorage);
  const auto stream = static_cast<cudaStream_t>(cuda_stream);
  const int64_t grid = p.choice.grid, heads = int64_t{p.cache.batch} * decode_heads(p);
  const CombineShape shape(p);
  if (grid > INT32_MAX || heads * shape.per_head > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (auto e = allow_shared<attention_decode_kernel<Config>>(kShared)) return e;
  const bool dependent = waits_for_earlier_kernels(p.device.arch);
  const Launch launch{.grid = grid, .block = Config::kThreads, .shared = kShared, .dependent = dependent};
  if (auto e = launch_kernel(attention_decode_kernel<Config>, launch, stream, p)) return e;
  const Launch combine{.grid = heads * shape.per_head, .block = 32 * shape.warps * shape.rows, .dependent = dependent};
  return launch_kernel(combine_decode_kernel, combine, stream, p);
}

template <class Config>
AttentionDecodeChoice choose_decode(const AttentionDecodeParams& p) {
  AttentionDecodeChoice choice{.launch = launch_decode<Config>};
  choice.grid = p.batch_invariant ? p.cache.batch * decode_heads(p) * invariant_parts(p)
                                  : int64_t{p.device.sms} * Config::blocks_per_sm(p.device);
  const int64_t parts = choice.grid * (p.batch_invariant ? 1 : 2);
  choice.workspace_bytes = parts * PartialResult::floats(decode_partial_rows(p), p.cache.value_dim) * sizeof(float);
  return choice;
}

}  // namespace forwardpass
