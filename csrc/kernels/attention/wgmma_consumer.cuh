#pragma once
// What a consumer warpgroup of attention on wgmma does: a tile's products, its softmax and its output.
#include "device/pipeline.cuh"
#include "device/softmax.cuh"
#include "device/wgmma.cuh"
#include "kernels/attention/combine_prefill.cuh"
#include "kernels/attention/scores.cuh"
#include "kernels/attention/source_tma.cuh"

namespace forwardpass {

// A tile, as the producer tells the consumers of it: they have no time to divide.
struct WgmmaAttentionWork {
  AttentionTile tile;
  KeyBlocks blocks;
  int64_t slot;  // in the workspace, of its part of the keys; -1: there are no more tiles
};

// A consumer warpgroup. A tile's prologue is its first block's q k^T and softmax; then p v of each block runs beside q
// k^T and softmax of the next, and the last one's, where shared memory and registers allow (Config::kAhead), beside the
// next tile's prologue.
template <class Config>
struct WgmmaAttentionConsumer {
  static constexpr Dtype kDtype = Config::kDtype;
  static constexpr bool kModified = Config::kModified;
  // Named barriers, one for each warpgroup; 0 is __syncthreads. Two meet at one: who waits and who passes the turn.
  static constexpr int kFirstTurn = 1, kTurnThreads = 2 * ptx::kWarpgroup;
  static constexpr int kStep = 16 * sizeof(uint16_t) / ptx::kDescriptorUnit;  // 16 columns
  static constexpr int kRow = kPanel * sizeof(uint16_t) / ptx::kDescriptorUnit;
  using Scores = typename Config::Scores;
  using Output = typename Config::Output;
  using MaskWords = typename ScoreModifiers<Scores>::MaskWords;
  using Weights = uint32_t[Config::kN / 16][4];  // p, rounded to 16 bits: the first operand of p v
  // A tile, of which this warp has sixteen rows.
  struct Tile : AttentionTile {
    KeyBlocks blocks;
    int64_t slot;
    int first_row;  // this warp's, in its sequence
    RowBounds<Scores> bounds;
    ScoreModifiers<Scores> modify;

    Tile() = default;
    __device__ Tile(const AttentionParams& p, const WgmmaAttentionWork& work, int warpgroup)
        : AttentionTile(work.tile),
          blocks(work.blocks),
          slot(work.slot),
          first_row(row + warpgroup * ptx::kWgmmaRows + threadIdx.x / 32 % 4 * 16),
          bounds(p, *this, first_row),
          modify(p, *this, first_row, ScoreModifiers<Scores>::in_vectors(p, *this)) {}
  };

  // A block of keys.
  struct Block {
    int key;  // of this thread's first column
    bool masked;
    __device__ Block(int index, bool masked) : key(index * Config::kN + accumulator_column(0)), masked(masked) {}
  };

  const AttentionParams& p;
  const typename Config::SharedStorage& s;
  const int warpgroup;
  typename Config::QPipeline q;
  typename Config::Pipeline k, v;
  uint32_t q_rows, k_rows, v_rows;  // low halves of the wgmma descriptors: of this warpgroup's rows; in the first stage
  const float scale;

  Tile current;
  OnlineSoftmax<1> sums;
  Output o;
  Weights weights;  // of the block of keys whose p v comes next

  __device__ WgmmaAttentionConsumer(const AttentionArguments& a, const typename Config::SharedStorage& s, int warpgroup)
      : p(a.p),
        s(s),
        warpgroup(warpgroup),
        q(s.q_barriers),
        k(s.k_barriers),
        v(s.v_barriers),
        scale(kModified ? 1 : p.scale * kLog2e) {
    q_rows = uniform(ptx::descriptor(ptx::shared_address(s.q[0].panel[0][warpgroup * ptx::kWgmmaRows])));
    k_rows = uniform(ptx::descriptor(ptx::shared_address(s.k[0].panel)));
    v_rows = uniform(ptx::descriptor(ptx::shared_address(s.v[0].panel), Config::kN * kPanel * sizeof(uint16_t)));
  }

  // All tiles of this block.
  __device__ void operator()() {
    if (warpgroup == Config::kConsumers - 1) pass_turn();
    while (wait_tile()) {
      if (!next_has_keys()) {
        begin_tile();
        store_nothing();
        release_q();
        continue;
      }
      o.clear();
      first_block();
      bool ahead;
      do {
        other_blocks();
        release_q();
        ahead = Config::kAhead && wait_tile() && next_has_keys();
        if (ahead) end_beside_next();
      } while (ahead);
      end();
    }
    if (warpgroup == 0) wait_turn();  // takes the last pass, so that the barrier is left empty
  }

 private:
  // Waits for the next tile's q. False: there are no more tiles.
  __device__ bool wait_tile() {
    q.wait_full();
    return uniform(s.work[q.stage].slot >= 0);
  }
  __device__ bool next_has_keys() const {
    const WgmmaAttentionWork& work = s.work[q.stage];
    return uniform(work.blocks.end > work.blocks.begin);
  }
  __device__ void begin_tile() {
    current = Tile(p, s.work[q.stage], warpgroup);
    sums = OnlineSoftmax<1>();
  }
  __device__ void release_q() {
    q.release(q.stage);
    q.advance();
  }
  // Ping-pong, by a named barrier per warpgroup: it waits for its turn, and passes the turn to the next one.
  __device__ void wait_turn() const {
    if (Config::kPingPong) ptx::barrier_sync(kFirstTurn + warpgroup, kTurnThreads);
  }
  __device__ void pass_turn() const {
    if (Config::kPingPong) ptx::barrier_arrive(kFirstTurn + (warpgroup + 1) % Config::kConsumers, kTurnThreads);
  }

  // The prologue, with nothing beside it.
  __device__ void first_block() {
    Scores scores;
    qk(scores);
    pass_turn();
    begin_tile();
    const Block block = first();
    MaskWords mask;
    load_mask(mask, block);
    wait_qk<0>(scores);
    RowValues<1> factor;
    softmax(scores, mask, block, factor);
    pack_weights(scores);
  }
  // One of the others, beside p v of the block before.
  __device__ void next_block(const Block& block) {
    Scores scores;
    qk(scores);
    const int v_stage = pv();
    pass_turn();
    MaskWords mask;
    load_mask(mask, block);
    wait_qk<1>(scores);
    // The registers of `weights` are needed: without this wait 968 bytes are spilled at 128 columns. Blocks of 96 keys
    // need no wait here; with them a bool mask was 7 % faster and one of 16 bits slower (modelled).
    if (kModified) wait_pv(v_stage);
    RowValues<1> factor;
    const bool grown = softmax(scores, mask, block, factor);
    if (!kModified) wait_pv(v_stage);
    // Here, not before pv(): it would stand before the wgmmas of this warpgroup's turn.
    if (grown) rescale(o, factor);
    pack_weights(scores);
  }
  // The last p v of a tile beside the next one's prologue.
  __device__ void end_beside_next() {
    Scores scores;
    qk(scores);
    const int v_stage = pv();
    pass_turn();
    const Tile previous = current;
    RowValues<1> previous_factor;
    finish_softmax(previous_factor);
    begin_tile();
    const Block block = first();
    wait_qk<1>(scores);
    MaskWords none;  // kAhead is of kernels without modifiers
    RowValues<1> factor;
    softmax(scores, none, block, factor);
    wait_pv(v_stage);
    finish(previous, o, previous_factor);
    o.clear();
    pack_weights(scores);
  }
  // The last p v of a tile, with nothing beside it.
  __device__ void end() {
    const int v_stage = pv();
    RowValues<1> factor;
    finish_softmax(factor);
    wait_pv(v_stage);
    finish(current, o, factor);
  }
  // All blocks of a tile but the first one.
  __device__ void other_blocks() {
    const int begin = uniform(current.blocks.begin), unmasked_begin = uniform(current.blocks.unmasked_begin),
              unmasked_end = uniform(current.blocks.unmasked_end);
    int block = uniform(current.blocks.end) - 2;
    if constexpr (kModified) {  // as in mma.cuh
#pragma unroll 1
      for (; block >= begin; --block) next_block({block, block >= unmasked_end || block < unmasked_begin});
    } else {
      // Masked blocks down to the first unmasked one, those, and masked ones again: two phases of one loop, so that
      // the code for a masked block exists once.
#pragma unroll 1
      for (int phase = 0; phase < 2; ++phase) {
        const int stop = phase == 0 ? unmasked_end : begin;
#pragma unroll 1
        for (; block >= stop; --block) next_block({block, true});
        if (phase == 1) break;
#pragma unroll 1
        for (; block >= unmasked_begin; --block) next_block({block, false});
      }
    }
  }
  // Blocks of keys come from the last to the first, so that the one that may end beyond the keys is the first.
  __device__ Block first() const {
    const int index = uniform(current.blocks.end) - 1;
    return {index, index >= uniform(current.blocks.unmasked_end)};
  }

  // Begins scores = q k^T, of this warpgroup's rows and the next block of keys.
  __device__ void qk(Scores& scores) const {
    k.wait_full();
    wait_turn();
    ptx::wgmma_fence();
    const uint32_t q_stage = q_rows + q.stage * (sizeof(typename Config::Query) / ptx::kDescriptorUnit),
                   rows = k_rows + k.stage * (sizeof(typename Config::Key) / ptx::kDescriptorUnit);
#pragma unroll
    for (int i = 0; i < Config::kHeadDim / 16; ++i) {
      const int column = i % 4 * kStep, panel = i / 4 * kRow;
      ptx::wgmma_k16<kDtype>(scores[0], q_stage + panel * Config::kM + column, rows + panel * Config::kN + column,
                             i > 0);
    }
    ptx::wgmma_commit();
  }
  // Waits for it; kPending: wgmmas that were begun later, which go on.
  template <int kPending>
  __device__ void wait_qk(Scores& scores) {
    ptx::wgmma_wait<kPending>();
    ptx::wgmma_keep(scores[0]);
    k.release(k.stage);
    k.advance();
  }
  // Begins o += p v. Returns the stage of v.
  __device__ int pv() {
    ptx::wgmma_keep(o[0]);
    ptx::wgmma_fence();
    const int stage = v.stage;
    const uint32_t rows = v_rows + stage * (sizeof(typename Config::Value) / ptx::kDescriptorUnit);
#pragma unroll
    for (int i = 0; i < Config::kN / 16; ++i) ptx::wgmma_k16<kDtype, 1>(o[0], weights[i], rows + i * 16 * kRow, true);
    ptx::wgmma_commit();
    v.advance();
    return stage;
  }
  __device__ void wait_pv(int stage) {
    ptx::wgmma_wait<0>();
    ptx::wgmma_keep(o[0]);
    v.release(stage);
  }
  // Begins to load what a block's mask adds to its scores.
  __device__ void load_mask(MaskWords& mask, const Block& block) const {
    if (kModified) current.modify.load(mask, block.key);
  }
  // Turns the scores of a block into p. True: `o` has then to be multiplied by `factor`.
  __device__ bool softmax(Scores& scores, MaskWords& mask, const Block& block, RowValues<1>& factor) {
    if (kModified) current.modify(scores, mask, block.key);
    if (block.masked) current.bounds(scores, block.key);
    const bool grown = sums.update(scores, scale, factor);
    ptx::wgmma_keep(scores[0]);
    // This wait is here, not where v is needed: ptxas moves the wgmma wait below it upwards across anything but a
    // branch, and the softmax would then begin after p v has completed. A third stage of v, or of k, for which there
    // is room at head dim 128, changes little: 4 x 4096 rows are 1.2 % faster, 16 x 1024 causal ones 1.4 % slower.
    v.wait_full();
    return grown;
  }
  __device__ void pack_weights(const Scores& scores) {
#pragma unroll
    for (int i = 0; i < Config::kN / 16; ++i) pack_operand<kDtype>(weights[i], scores[0], i);
  }

  // Split-KV: where the result of a tile's part goes.
  __device__ PartialResult partial(const Tile& t) const { return {p.workspace, t.slot, Config::kM, p.value_dim}; }
  __device__ static int warp_row(const Tile& t) { return t.first_row - t.row; }
  // Of one of this thread's rows.
  __device__ float sink(int half) const {
    return sink_of(p, current.query_head(p, current.first_row + Output::row(0, half * 2)));
  }
  // After all keys of the current tile: its lse, or its part's sums. The output has then to be multiplied by `factor`.
  __device__ void finish_softmax(RowValues<1>& factor) {
    if (p.choice.splits > 1) {
      store_sums(partial(current), warp_row(current), sums);
      factor[0][0] = factor[0][1] = 1;
    } else {
      sums.finish([&](int, int half) { return sink(half); }, factor);
      store_lse<Output>(sums, p, current, current.first_row);
    }
    __syncwarp();  // lanes diverged at their rows' ends; what follows is warp-synchronous
  }
  __device__ void finish(const Tile& t, Output& values, const RowValues<1>& factor) const {
    if (p.choice.splits > 1) {
      store_values(partial(t), warp_row(t), values, p.value_dim);
      __syncwarp();
    } else {
      typename Config::Epilogue{p}(t, t.first_row, values, factor);
    }
  }
  // Of a tile without keys: zeros, and the sink; of rows whose sequence is not known: NaN. Not o: with another way to
  // its epilogue ptxas would serialise the wgmmas that add to it (C7515).
  __device__ void store_nothing() {
    if (p.choice.splits > 1) {
      store_sums(partial(current), warp_row(current), sums);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        sums.max[0][half] = current.known() ? sink(half) : NAN, sums.sum[0][half] = 1;
      store_lse<Output>(sums, p, current, current.first_row);
    }
    __syncwarp();
    Output none;
    none.clear();
    const float value = current.known() ? 1 : NAN;
    const RowValues<1> factor = {{value, value}};
    finish(current, none, factor);
  }
};

template <class Config>
struct WgmmaAttentionEpilogue {
  using Output = typename Config::Output;
  const AttentionParams& p;

  // first_row: this warp's, in its sequence.
  __device__ void operator()(const AttentionTile& tile, int first_row, Output& o, const RowValues<1>& factor) const {
    rescale(o, factor);
    store_rows(o, tile, first_row);
    __syncwarp();
  }

 private:
  // Stores a tile's rows. The four lanes that share a row exchange their columns so that each has eight neighbouring
  // ones: 16 bytes.
  __device__ void store_rows(const Output& o, const AttentionTile& tile, int first_row) const {
    constexpr int kVectors = Output::kTilesN / 4;  // of eight columns, in a lane
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + Output::row(0, half * 2);
      const auto out = static_cast<uint16_t*>(p.out) + tile.out(p, min(row, tile.rows - 1));
      uint32_t x[kVectors][4];
#pragma unroll
      for (int j = 0; j < Output::kTilesN; ++j)
        x[j / 4][j % 4] = pack<Config::kDtype>(o[0][j][half * 2], o[0][j][half * 2 + 1]);
      transpose_in_group(x);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int column = (i * 4 + thread_in_group()) * 8;
        if (row < tile.rows && column < p.value_dim)
          *reinterpret_cast<uint4*>(out + column) = make_uint4(x[i][0], x[i][1], x[i][2], x[i][3]);
      }
    }
  }
};

}  // namespace forwardpass
