#pragma once
// What a warp of attention on mma.sync does: the copies of a tile's q, keys and values that it shares with the others,
// the products of its own rows, their softmax and output.
#include "device/softmax.cuh"
#include "kernels/attention/combine_prefill.cuh"
#include "kernels/attention/scores.cuh"
#include "kernels/attention/source_paged.cuh"

namespace forwardpass {

template <class Config>
using CopyQ = RowCopy<Config::kM, Config::kHeadDim, Config::kThreads>;

struct MmaAttentionArguments {
  AttentionParams p;
  unsigned tiles;  // of a head
  int64_t q_step;  // RowCopy's
  DenseSteps source;
  float scale;  // of the softmax
};

// A tile, or of one a part of the keys. K and V have one buffer each: V's is filled during q k^T of a block of keys,
// the next K's during softmax and p v.
template <class Config>
struct MmaAttentionConsumer {
  static constexpr Dtype kDtype = Config::kDtype;
  static constexpr bool kModified = Config::kModified;
  using Scores = typename Config::Scores;
  using Output = typename Config::Output;
  using Modifiers = ScoreModifiers<Scores, !Config::kPaged>;
  using MaskWords = typename Modifiers::MaskWords;

  const MmaAttentionArguments& a;
  const AttentionParams& p;
  typename Config::SharedStorage& s;
  const AttentionTile& tile;
  const KeyBlocks& blocks;
  const int warp_row;  // this warp's first row in the tile
  // References, as a register more is spilled where they are members.
  OnlineSoftmax<Config::kTilesM>& sums;
  Output& o;
  typename Config::Source source;
  bool vectors = false;  // the mask's rows are read 16 bytes at a time

  __device__ MmaAttentionConsumer(const MmaAttentionArguments& a, typename Config::SharedStorage& s,
                                  const AttentionTile& tile, const KeyBlocks& blocks,
                                  OnlineSoftmax<Config::kTilesM>& sums, Output& o)
      : a(a),
        p(a.p),
        s(s),
        tile(tile),
        blocks(blocks),
        warp_row(threadIdx.x / 32 * Config::kWarpM),
        sums(sums),
        o(o),
        source(a, s.source, tile, blocks.end - 1) {}

  __device__ void operator()() {
    o.clear();
    if (blocks.end > blocks.begin) begin();
    all_blocks();
    finish();
  }

 private:
  __device__ int first_row() const { return tile.row + warp_row; }  // this warp's, in the sequence
  // Begins to copy q, and the keys of the block that comes first: the last one.
  __device__ void begin() {
    const int block = blocks.end - 1;
    CopyQ<Config> copy_q(p.q, tile.q(p) + tile.row * p.q.row);
    copy_q.template copy<false>(s.q, a.q_step, tile.rows - tile.row, p.head_dim);
    source.begin(block);
    source.template copy_k<false>(s.k, block, tile.keys - block * Config::kN, p.head_dim);
  }
  // From the last block to the first, so that the one that may end beyond the keys comes first.
  __device__ void all_blocks() {
    // Read anew: kept since begin(), it is a register more, which the kernels of 128 columns spill.
    int block = static_cast<const volatile KeyBlocks&>(blocks).end - 1;
    if constexpr (kModified) {
      // A branch around RowBounds: a second copy of the modifiers takes as long to compile as all the rest.
      vectors = Modifiers::in_vectors(p, tile);
      const int unmasked_begin = blocks.unmasked_begin, unmasked_end = blocks.unmasked_end;
#pragma unroll 1
      for (; block >= blocks.begin; --block) next_block(block, block >= unmasked_end || block < unmasked_begin);
    } else {
#pragma unroll 1
      for (int phase = 0; phase < 2; ++phase) {
        const int stop = phase == 0 ? blocks.unmasked_end : blocks.begin;
#pragma unroll 1
        for (; block >= stop; --block) next_block(block, true);
        if (phase == 1) break;
#pragma unroll 1
        for (; block >= blocks.unmasked_begin; --block) next_block(block, false);
      }
    }
  }
  __device__ void next_block(int block, bool masked) {
    Scores scores;
    ptx::cp_async_wait<0>();
    __syncthreads();  // k has arrived for all warps, and all have read v
    copy_v(block, masked);
    if (block > blocks.begin) source.look_up(block - 1);
    const int key = block * Config::kN + accumulator_column(0);
    MaskWords mask;
    if (kModified) modifiers().load(mask, key);
    qk(scores);
    if (block > blocks.begin) source.keep(block - 1);
    ptx::cp_async_wait<0>();
    __syncthreads();  // v has arrived, and all have read k
    source.step_back();
    if (block > blocks.begin) source.template copy_k<true>(s.k, block - 1, Config::kN, p.head_dim);
    RowValues<Config::kTilesM> factor;
    if (softmax(scores, mask, key, masked, factor)) rescale(o, factor);
    pv(scores);
  }
  __device__ void copy_v(int block, bool masked) {
    const int keys = tile.keys - block * Config::kN;
    if (masked)
      source.template copy_v<false>(s.v, block, keys, p.value_dim);
    else
      source.template copy_v<true>(s.v, block, keys, p.value_dim);
  }
  // Made anew for each block, as registers that keep it would spill.
  __device__ Modifiers modifiers() const { return {p, tile, first_row(), vectors}; }
  // Turns the scores of a block into p. True: `o` has then to be multiplied by `factor`.
  __device__ bool softmax(Scores& scores, MaskWords& mask, int key, bool masked, RowValues<Config::kTilesM>& factor) {
    if (kModified) modifiers()(scores, mask, key);
    if (masked) RowBounds<Scores>(p, tile, first_row())(scores, key);
    return sums.update(scores, a.scale, factor);
  }
  // scores = q k^T, of this warp's rows and a block of keys.
  __device__ void qk(Scores& scores) const {
    using P = Panels<Config::kHeadDim>;
    constexpr float kZeros[4] = {};
#pragma unroll
    for (int step = 0; step < Config::kHeadDim / 16; ++step) {
      uint32_t q[Config::kTilesM][4];
#pragma unroll
      for (int i = 0; i < Config::kTilesM; ++i)
        ptx::ldmatrix_x4(q[i], P::template matrices<Config::kM, true>(s.q, warp_row + i * 16, step * 16));
#pragma unroll
      for (int j = 0; j < Scores::kTilesN; j += 2) {
        uint32_t k[4];
        ptx::ldmatrix_x4(k, P::template matrices<Config::kN, false>(s.k, j * 8, step * 16));
#pragma unroll
        for (int next = 0; next < 2; ++next) {
          const uint32_t pair[2] = {k[next * 2], k[next * 2 + 1]};
#pragma unroll
          for (int i = 0; i < Config::kTilesM; ++i)
            if (step == 0)
              ptx::mma_m16n8k16<kDtype>(scores[i][j + next], q[i], pair, kZeros);
            else
              ptx::mma_m16n8k16<kDtype>(scores[i][j + next], q[i], pair, scores[i][j + next]);
        }
      }
    }
  }
  // o += p v. Two tiles of p, rounded to 16 bits, are the first operand of an mma as they are.
  __device__ void pv(const Scores& weights) {
    using P = Panels<Config::kValueDim>;
#pragma unroll
    for (int step = 0; step < Config::kN / 16; ++step) {
      uint32_t packed[Config::kTilesM][4];
#pragma unroll
      for (int i = 0; i < Config::kTilesM; ++i) pack_operand<kDtype>(packed[i], weights[i], step);
#pragma unroll
      for (int j = 0; j < Output::kTilesN; j += 2) {
        uint32_t v[4];
        ptx::ldmatrix_x4_trans(v, P::template matrices<Config::kN, true>(s.v, step * 16, j * 8));
#pragma unroll
        for (int next = 0; next < 2; ++next) {
          const uint32_t pair[2] = {v[next * 2], v[next * 2 + 1]};
#pragma unroll
          for (int i = 0; i < Config::kTilesM; ++i)
            ptx::mma_m16n8k16<kDtype>(o[i][j + next], packed[i], pair, o[i][j + next]);
        }
      }
    }
  }
  // After all keys: the rows of out and their lse, or the part's sums and values.
  __device__ void finish() {
    if (p.choice.splits > 1) {
      const PartialResult to(p.workspace, blockIdx.x, Config::kM, p.value_dim);
      store_sums(to, warp_row, sums);
      return store_values(to, warp_row, o, p.value_dim);
    }
    RowValues<Config::kTilesM> factor;
    const float sink = tile.known() ? sink_of(p, tile.head) : NAN;
    sums.finish([&](int, int) { return sink; }, factor);
    rescale(o, factor);
    typename Config::Epilogue{p, s, warp_row}(o, tile);
    store_lse<Output>(sums, p, tile, first_row());
  }
};

template <class Config>
struct MmaAttentionEpilogue {
  using Output = typename Config::Output;
  const AttentionParams& p;
  typename Config::SharedStorage& s;
  const int warp_row;  // this warp's first row in the tile

  // Stores this warp's rows in words of 16 bytes, through its own rows of q in shared memory: no other warp reads
  // those, and this one read them before a barrier.
  __device__ void operator()(const Output& o, const AttentionTile& tile) const {
    using P = Panels<Config::kValueDim>;
    constexpr int kRows = Config::kWarpM;
    const int lane = threadIdx.x % 32;
    const auto rows = reinterpret_cast<char*>(s.q + warp_row * Config::kHeadDim);
#pragma unroll
    for (int i = 0; i < Output::kTilesM; ++i)
#pragma unroll
      for (int j = 0; j < Output::kTilesN; ++j)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          const int offset = P::template offset<kRows>(o.row(i, e), j * 8) + accumulator_column(e) * 2;
          *reinterpret_cast<uint32_t*>(rows + offset) = pack<Config::kDtype>(o[i][j][e], o[i][j][e + 1]);
        }
    __syncwarp();
    constexpr int kAcross = P::kChunks, kStep = 32 / kAcross;
#pragma unroll
    for (int r = 0; r < kRows; r += kStep) {
      const int in_warp = r + lane / kAcross, row = tile.row + warp_row + in_warp;
      if (row >= tile.rows) continue;
      const auto out = static_cast<uint16_t*>(p.out) + tile.out(p, row);
#pragma unroll
      for (int panel = 0; panel < P::kCount; ++panel) {
        const int column = panel * P::kPanel + lane % kAcross * 8;
        if (column < p.value_dim)
          *reinterpret_cast<uint4*>(out + column) =
              *reinterpret_cast<const uint4*>(rows + P::template offset<kRows>(in_warp, column));
      }
    }
  }
};

}  // namespace forwardpass
