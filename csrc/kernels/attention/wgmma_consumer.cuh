#pragma once
// What a consumer warpgroup of attention on wgmma does: a tile's products, its softmax and its output.
#include "device/pipeline.cuh"
#include "device/softmax.cuh"
#include "kernels/attention/combine_prefill.cuh"
#include "kernels/attention/scores.cuh"
#include "kernels/attention/wgmma_products.cuh"

namespace forwardpass {

// A tile, as the producer tells the consumers of it: they have no time to divide.
struct WgmmaAttentionWork {
  AttentionTile tile;
  KeyBlocks blocks;
  int64_t slot;  // in the workspace, of its part of the keys; -1: there are no more tiles
};

// What two consumers do in turns (ping-pong), so that they need different units at a time: issue wgmmas, or compute
// exponentials, which take longer than the wgmmas of 8 bits.
enum class PingPong { none, products, exponentials };

// A consumer warpgroup. A tile's prologue is its first block's q k^T and softmax; then p v of each block runs beside q
// k^T and softmax of the next, and the last one's, where shared memory and registers allow (Config::kAhead), beside the
// next tile's prologue.
template <class Config>
struct WgmmaAttentionConsumer {
  static constexpr bool kModified = Config::kModified;
  // Named barriers, one for each warpgroup; 0 is __syncthreads. Two meet at one: who waits and who passes the turn.
  static constexpr int kFirstTurn = 1, kTurnThreads = 2 * ptx::kWarpgroup;
  using Products = typename Config::Products;
  using Sums = typename Products::Sums;
  using Scores = typename Config::Scores;
  using Output = typename Config::Output;
  using MaskWords = typename ScoreModifiers<Scores>::MaskWords;
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

  const typename Config::Arguments& a;
  const AttentionParams& p;
  const typename Config::SharedStorage& s;
  const int warpgroup;
  typename Config::QPipeline q;
  typename Config::Pipeline k, v;
  Products products;

  Tile current;
  OnlineSoftmax<1> sums;
  Output o;

  __device__ WgmmaAttentionConsumer(const typename Config::Arguments& a, const typename Config::SharedStorage& s,
                                    int warpgroup)
      : a(a),
        p(a.p),
        s(s),
        warpgroup(warpgroup),
        q(s.q_barriers),
        k(s.k_barriers),
        v(s.v_barriers),
        products(a, s, warpgroup) {}

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
    if (Config::kPingPong != PingPong::none) ptx::barrier_sync(kFirstTurn + warpgroup, kTurnThreads);
  }
  __device__ void pass_products() const {
    if (Config::kPingPong == PingPong::products) pass_turn();
  }
  __device__ void pass_turn() const {
    if (Config::kPingPong != PingPong::none)
      ptx::barrier_arrive(kFirstTurn + (warpgroup + 1) % Config::kConsumers, kTurnThreads);
  }

  // The prologue, with nothing beside it.
  __device__ void first_block() {
    Sums dots;
    qk(dots);
    pass_products();
    begin_tile();
    products.begin_tile(s.q[q.stage], current.first_row - current.row, sums);
    const Block block = first();
    MaskWords mask;
    load_mask(mask, block);
    Scores& scores = wait_qk<0>(dots, block);
    RowValues<1> factor;
    softmax<false>(scores, mask, block, factor, 0);
    products.pack(scores);
  }
  // One of the others, beside p v of the block before.
  __device__ void next_block(const Block& block) {
    Sums dots;
    qk(dots);
    const int v_stage = pv();
    pass_products();
    MaskWords mask;
    load_mask(mask, block);
    Scores& scores = wait_qk<1>(dots, block);
    // The registers of `weights` are needed: without this wait 968 bytes are spilled at 128 columns. Blocks of 96 keys
    // need no wait here; with them a bool mask was 7 % faster and one of 16 bits slower (modelled).
    if (kModified) wait_pv(v_stage);
    RowValues<1> factor;
    const bool grown = softmax<Products::kWaitsInSoftmax>(scores, mask, block, factor, v_stage);
    if (Products::kWaitsInSoftmax)
      v.release(v_stage);
    else if (!kModified)
      wait_pv(v_stage);
    // Here, not before pv(): it would stand before the wgmmas of this warpgroup's turn.
    if (grown) products.rescale(o, factor);
    products.pack(scores);
  }
  // The last p v of a tile beside the next one's prologue.
  __device__ void end_beside_next() {
    Sums dots;
    qk(dots);
    const int v_stage = pv();
    pass_products();
    const Tile previous = current;
    RowValues<1> previous_factor;
    finish_softmax(previous_factor);
    begin_tile();
    const Block block = first();
    Scores& scores = wait_qk<1>(dots, block);
    MaskWords none;  // kAhead is of kernels without modifiers
    RowValues<1> factor;
    softmax<false>(scores, none, block, factor, 0);
    wait_pv(v_stage);
    finish(previous, o, previous_factor);
    o.clear();
    products.pack(scores);
  }
  // The last p v of a tile, with nothing beside it.
  __device__ void end() {
    const int v_stage = pv();
    RowValues<1> factor;
    finish_softmax(factor);
    wait_pv(v_stage);
    products.end_tile(o);
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

  // Begins q k^T of this warpgroup's rows and the next block of keys.
  __device__ void qk(Sums& dots) const {
    k.wait_full();
    if (Config::kPingPong == PingPong::products) wait_turn();
    ptx::wgmma_fence();
    products.qk(dots, q.stage, k.stage);
    ptx::wgmma_commit();
  }
  // Waits for it; kPending: wgmmas that were begun later, which go on.
  template <int kPending>
  __device__ Scores& wait_qk(Sums& dots, const Block& block) {
    ptx::wgmma_wait<kPending>();
    Scores& scores = products.scores(dots, s, k.stage);
    if constexpr (Products::kGrouped)
      if (block.masked) products.mask_keys(current.bounds, scores, s, k.stage, block.key - accumulator_column(0));
    k.release(k.stage);
    k.advance();
    return scores;
  }
  // Begins o += p v. Returns the stage of v.
  __device__ int pv() {
    const int stage = v.stage;
    products.pv(o, stage);
    v.advance();
    return stage;
  }
  __device__ void wait_pv(int stage) {
    products.wait_pv(o, stage);
    v.release(stage);
  }
  // Begins to load what a block's mask adds to its scores.
  __device__ void load_mask(MaskWords& mask, const Block& block) const {
    if (kModified) current.modify.load(mask, block.key);
  }
  // Turns the scores of a block into p; kPending: and ends p v of the block before, whose v is in v_stage. True: `o`
  // has then to be multiplied by `factor`.
  template <bool kPending>
  __device__ bool softmax(Scores& scores, MaskWords& mask, const Block& block, RowValues<1>& factor, int v_stage) {
    if (kModified) current.modify(scores, mask, block.key);
    if (!Products::kGrouped && block.masked) current.bounds(scores, block.key);
    const bool grown = products.template update<kPending>(sums, scores, factor, o, v_stage, [&](bool begins) {
      if (Config::kPingPong != PingPong::exponentials) return;
      begins ? wait_turn() : pass_turn();
    });
    ptx::wgmma_keep(scores[0]);
    // This wait is here, not where v is needed: ptxas moves the wgmma wait below it upwards across anything but a
    // branch, and the softmax would then begin after p v has completed. A third stage of v, or of k, for which there
    // is room at head dim 128, changes little: 4 x 4096 rows are 1.2 % faster, 16 x 1024 causal ones 1.4 % slower.
    v.wait_full();
    return grown;
  }

  __device__ bool is_split() const { return Config::kSplits && p.choice.splits > 1; }
  // Split-KV: where the result of a tile's part goes.
  __device__ PartialResult partial(const Tile& t) const { return {p.workspace, t.slot, Config::kM, p.value_dim}; }
  __device__ static int warp_row(const Tile& t) { return t.first_row - t.row; }
  // Of one of this thread's rows.
  __device__ float sink(int half) const {
    return sink_of(p, current.query_head(p, current.first_row + Output::row(0, half * 2)));
  }
  // After all keys of the current tile: its lse, or its part's sums. The output has then to be multiplied by `factor`.
  __device__ void finish_softmax(RowValues<1>& factor) {
    if (is_split()) {
      store_sums(partial(current), warp_row(current), sums);
      factor[0][0] = factor[0][1] = 1;
    } else {
      sums.finish([&](int, int half) { return sink(half) - products.sink_shift(half); }, factor);
      products.add_shift(sums);
      store_lse<Output>(sums, p, current, current.first_row);
    }
    __syncwarp();  // lanes diverged at their rows' ends; what follows is warp-synchronous
  }
  __device__ void finish(const Tile& t, Output& values, const RowValues<1>& factor) const {
    if (is_split()) {
      store_values(partial(t), warp_row(t), values, p.value_dim);
      __syncwarp();
    } else {
      typename Config::Epilogue{a, p}(t, t.first_row, values, factor);
    }
  }
  // Of a tile without keys: zeros, and the sink; of rows whose sequence is not known: NaN. Not o: with another way to
  // its epilogue ptxas would serialise the wgmmas that add to it (C7515).
  __device__ void store_nothing() {
    RowValues<1> factor = {};
    if (is_split()) {
      store_sums(partial(current), warp_row(current), sums);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        factor[0][half] = current.known() ? Products::without_keys(a, current, current.first_row, half) : NAN;
        sums.max[0][half] = sink(half) + factor[0][half], sums.sum[0][half] = 1;
      }
      store_lse<Output>(sums, p, current, current.first_row);
    }
    __syncwarp();
    Output none;
    none.clear();
    finish(current, none, factor);
  }
};

template <class Config>
struct WgmmaAttentionEpilogue {
  using Output = typename Config::Output;
  const typename Config::Arguments& a;
  const AttentionParams& p;

  // first_row: this warp's, in its sequence.
  __device__ void operator()(const AttentionTile& tile, int first_row, Output& o, const RowValues<1>& factor) const {
    rescale(o, factor);
    store_rows<Config::kDtype>(o, tile, first_row);
    __syncwarp();
  }

 protected:
  // Stores a tile's rows. The four lanes that share a row exchange their columns so that each has eight neighbouring
  // ones: 16 bytes.
  template <Dtype D>
  __device__ void store_rows(const Output& o, const AttentionTile& tile, int first_row) const {
    constexpr int kVectors = Output::kTilesN / 4;  // of eight columns, in a lane
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + Output::row(0, half * 2);
      const auto out = static_cast<uint16_t*>(p.out) + tile.out(p, min(row, tile.rows - 1));
      uint32_t x[kVectors][4];
#pragma unroll
      for (int j = 0; j < Output::kTilesN; ++j) x[j / 4][j % 4] = pack<D>(o[0][j][half * 2], o[0][j][half * 2 + 1]);
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
