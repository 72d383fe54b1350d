#pragma once
// attention on wgmma, warp-specialised. Blocks are persistent: each computes tile after tile of 64 rows per consumer
// warpgroup. One producer thread finds the tiles and loads q, and block after block of keys and values, by TMA. A
// consumer's q k^T of the next block runs while it computes the softmax of this one, and so does p v, which takes p
// from registers. Two consumers take turns at issuing them (ping-pong).
#include "device/dependent_launch.cuh"
#include "device/pipeline.cuh"
#include "device/shared_bytes.cuh"
#include "device/softmax.cuh"
#include "device/wgmma.cuh"
#include "kernels/attention/combine_prefill.cuh"
#include "kernels/attention/kernel.h"
#include "kernels/attention/scores.cuh"
#include "kernels/attention/source_tma.cuh"
#include "schedule/persistent.cuh"

namespace forwardpass {

// What a block computes: 64 rows, those of a wgmma, per consumer warpgroup, by blocks of n keys.
struct WgmmaAttentionTile {
  int consumers;
  int n;
};

// Instructions per score in the main loop: 6.1 at 64 columns, 6.3 at 96, 6.5 at 128, 7.0 at 192, 8.4 at 256; 6.7 at
// 192 with 128 of v. Where a row's maximum grows, value_dim / n more, which rescale the output. Of the consumers'
// registers (240 with two warpgroups, 160 with three) a thread's accumulators take value_dim / 2, its scores n / 2 and
// p n / 4; tile, pipelines and softmax take about 40.
constexpr WgmmaAttentionTile tile_of(AttentionInstance i) {
  // Shared memory binds: q and two stages fill it. Score modifiers need registers.
  if (i.value_dim == 256) return {.consumers = 2, .n = i.modified ? 64 : 80};
  if (i.value_dim == 192) return {.consumers = 2, .n = 112};
  // At 64 columns there are enough registers for three consumer warpgroups, except with score modifiers; 160 keys would
  // spill 404 bytes.
  if (i.value_dim == 64 && !i.modified) return {.consumers = 3, .n = 128};
  // At 96 and 128 columns 176 keys would fit: with the rescaling, 6.7 instructions per score instead of 7.4. But blocks
  // of 128 end where the rows of a causal tile end; with 2048 keys, blocks of 176 compute 7 % more scores.
  return {.consumers = 2, .n = 128};
}

// What a block may have.
constexpr int kSharedBytes = 227 << 10;

// A tile, as the producer tells the consumers of it: they have no time to divide.
struct WgmmaAttentionWork {
  AttentionTile tile;
  KeyBlocks blocks;
  int64_t slot;  // in the workspace, of its part of the keys; -1: there are no more tiles
};

template <class Config>
struct WgmmaAttentionSchedule;
template <class Config>
struct WgmmaAttentionConsumer;
template <class Config>
struct WgmmaAttentionEpilogue;

template <AttentionInstance kInstance, WgmmaAttentionTile kTile>
struct WgmmaAttentionConfig {
  static constexpr Dtype kDtype = kInstance.dtype;
  static constexpr int kHeadDim = kInstance.head_dim, kValueDim = kInstance.value_dim;
  static constexpr bool kModified = kInstance.modified;
  static constexpr int kConsumers = kTile.consumers, kM = ptx::kWgmmaRows * kConsumers, kN = kTile.n,
                       kStages = kHeadDim == 64 ? 4 : 2;  // what shared memory holds
  static constexpr int kBlocksPerSm = 1, kThreads = ptx::kWarpgroup * (1 + kConsumers);
  static constexpr int kPanelsD = (kHeadDim + kPanel - 1) / kPanel, kPanelsV = (kValueDim + kPanel - 1) / kPanel;
  // Two stages of q, where shared memory holds them, so that the next tile's is there when this one ends.
  static constexpr int kRowBytes = kPanel * sizeof(uint16_t), kBlockBytes = kN * (kPanelsD + kPanelsV) * kRowBytes,
                       kQBytes = kM * kPanelsD * kRowBytes,
                       kQStages = 2 * kQBytes + kStages * kBlockBytes <= kSharedBytes - 1024 ? 2 : 1;
  // Whether a tile's last p v runs beside the next one's first q k^T, as within a tile. Head dim 128, modelled: without
  // it 16 x 1024 rows take 3 % longer, causal 7 %. Three consumers' registers do not hold both tiles (44 bytes are
  // spilled), nor do those of two with score modifiers at 128 columns (8 bytes).
  static constexpr bool kAhead = kQStages == 2 && kConsumers == 2 && !kModified;
  // At launch each thread has 168 registers with 384 threads, 128 with 512; setmaxnreg moves them from the producer to
  // the consumers.
  static constexpr int kProducerRegisters = kConsumers == 2 ? 24 : 32, kConsumerRegisters = kConsumers == 2 ? 240 : 160;
  // Ping-pong: two warpgroups take turns at issuing wgmmas, so that one computes its softmax while the other's wgmmas
  // run. With more columns the wgmmas take so long that they overlap anyway. Three of 64 columns wait for the special
  // functions as much as for the tensor cores: in turns, all three wait for the one whose softmax the schedulers serve
  // last, and 16 x 1024 rows take 8 % longer (modelled; 4 % in turns from the youngest to the oldest).
  static constexpr bool kPingPong = kHeadDim <= 128 && kConsumers == 2;

  using Schedule = WgmmaAttentionSchedule<WgmmaAttentionConfig>;
  using Pipeline = forwardpass::Pipeline<kStages>;
  using QPipeline = forwardpass::Pipeline<kQStages>;
  using Scores = Fragments<float, 1, kN / 8>;
  using Output = Fragments<float, 1, kValueDim / 8>;
  using Consumer = WgmmaAttentionConsumer<WgmmaAttentionConfig>;
  using Epilogue = WgmmaAttentionEpilogue<WgmmaAttentionConfig>;

  using Rows = uint16_t[kPanel];
  struct Key {
    Rows panel[kPanelsD][kN];
  };
  struct Value {
    Rows panel[kPanelsV][kN];
  };
  struct Query {
    Rows panel[kPanelsD][kM];
  };
  struct SharedStorage {
    Query q[kQStages];
    Key k[kStages];
    Value v[kStages];
    WgmmaAttentionWork work[kQStages];  // whose q it is
    // Of the producer, not in the 24 registers that it has: known_sequences, and of each lane what it loads of v next.
    int known;
    struct {
      Box box;
      int head;
    } next_v[32];
    PipelineBarriers<kQStages> q_barriers;
    PipelineBarriers<kStages> k_barriers, v_barriers;
  };
};

// The persistent tile schedule: f(tile, its key blocks, slot) for each tile of this block, or part of a tile's keys.
template <class Config>
struct WgmmaAttentionSchedule {
  const AttentionArguments& a;
  const int& known;  // sequences

  template <class F>
  __device__ void for_each(F f) const {
    for_each_tile(a.blocks, blockIdx.x, gridDim.x, [&](int64_t slot) {
      AttentionTile tile;
      const unsigned index = static_cast<unsigned>(slot), splits = a.splits;
      if (tile.find(a.p, Config::kM, a.tiles, index / splits, known))
        f(tile, KeyBlocks(a.p, tile, Config::kM, Config::kN).part(index % splits, splits), index);
    });
  }
};

// The producer, a warp: each lane finds and loads a box of each block of keys. k of a block comes before v of the block
// before, as the consumers use them, be that the last one of the tile before.
template <class Config>
struct WgmmaAttentionProducer {
  const AttentionArguments& a;
  typename Config::SharedStorage& s;
  typename Config::QPipeline q;
  typename Config::Pipeline k, v;
  bool has_v = false;  // there is a block whose k has been loaded, and not its v

  __device__ WgmmaAttentionProducer(const AttentionArguments& a, typename Config::SharedStorage& s)
      : a(a), s(s), q(s.q_barriers), k(s.k_barriers), v(s.v_barriers) {}

  // All tiles of this block.
  __device__ void operator()() {
    typename Config::Schedule{a, s.known}.for_each([&](const AttentionTile& t, const KeyBlocks& blocks, int slot) {
      const bool any = blocks.end > blocks.begin;
      load_q({t, blocks, slot}, any);
#pragma unroll 1
      for (int block = blocks.end - 1; block >= blocks.begin; --block) load_keys(t, block);
      if (!Config::kAhead || !any) load_v();
    });
    load_v();
    announce({.slot = -1}, 0);
  }

 private:
  __device__ static int lane() { return static_cast<int>(threadIdx.x % 32); }
  __device__ void load_q(const WgmmaAttentionWork& work, bool any) {
    announce(work, any ? sizeof(typename Config::Query) : 0);
    if (any && lane() == 0)
      a.find_q(work.tile).load(s.q[q.stage].panel, 0, a.q, a.q_steps, work.tile.head, q.full(q.stage));
    q.advance();
  }
  // Tells the consumers of a tile, of whose q so many bytes follow.
  __device__ void announce(const WgmmaAttentionWork& work, int bytes) {
    q.wait_empty();
    if (lane() > 0) return;
    s.work[q.stage] = work;
    q.announce(bytes);
  }
  __device__ void load_keys(const AttentionTile& t, int block) {
    const Box box = a.find_keys(t, block * Config::kN + lane() * a.box_rows);
    const int head = t.kv_head(a.p);
    load(s.k[k.stage].panel, k, box, box.page < 0 ? a.k_nan : a.k, a.k_steps, head);
    load_v();
    has_v = true, s.next_v[lane()] = {box, head};
  }
  __device__ void load_v() {
    if (has_v) load(s.v[v.stage].panel, v, s.next_v[lane()].box, a.v, a.v_steps, s.next_v[lane()].head);
    has_v = false;
  }
  // Waits until a stage of k or v is empty, and loads it.
  template <class Panels>
  __device__ void load(Panels& to, typename Config::Pipeline& pipeline, const Box& box, const CUtensorMap& map,
                       const BoxSteps& steps, int head) {
    pipeline.wait_empty();
    if (lane() == 0) pipeline.announce(sizeof(to));
    __syncwarp();
    if (lane() < Config::kN / a.box_rows)
      box.load(to, lane() * a.box_rows, map, steps, head, pipeline.full(pipeline.stage));
    pipeline.advance();
  }
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
  const int& splits;
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
        splits(a.splits),
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
  // After all keys of the current tile: its lse, or its part's sums. The output has then to be multiplied by `factor`.
  __device__ void finish_softmax(RowValues<1>& factor) {
    if (splits > 1) {
      store_sums(partial(current), warp_row(current), sums);
      factor[0][0] = factor[0][1] = 1;
    } else {
      sums.finish(sink_of(p, current.head), factor);
      store_lse<Output>(sums, p, current, current.first_row);
    }
    __syncwarp();  // lanes diverged at their rows' ends; what follows is warp-synchronous
  }
  __device__ void finish(const Tile& t, Output& values, const RowValues<1>& factor) const {
    if (splits > 1) {
      store_values(partial(t), warp_row(t), values, p.value_dim);
      __syncwarp();
    } else {
      typename Config::Epilogue{p}(t, t.first_row, values, factor);
    }
  }
  // Of a tile without keys: zeros, and the sink; of rows whose sequence is not known: NaN. Not o: with another way to
  // its epilogue ptxas would serialise the wgmmas that add to it (C7515).
  __device__ void store_nothing() {
    const bool known = splits > 1 || current.known();  // of several parts, who combines them asks
    if (splits > 1) {
      store_sums(partial(current), warp_row(current), sums);
    } else {
      const float lse = known ? sink_of(p, current.head) : NAN;
#pragma unroll
      for (int half = 0; half < 2; ++half) sums.max[0][half] = lse, sums.sum[0][half] = 1;
      store_lse<Output>(sums, p, current, current.first_row);
    }
    __syncwarp();
    Output none;
    none.clear();
    const float value = known ? 1 : NAN;
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

template <class Config, class = SharedBytesOf<Config>>
__global__ void __launch_bounds__(Config::kThreads, 1)
    attention_wgmma_kernel(const __grid_constant__ AttentionArguments a) {
  extern __shared__ __align__(ptx::kSwizzleBytes) uint8_t memory[];
  auto& s = *reinterpret_cast<typename Config::SharedStorage*>(memory);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(a.q);
    ptx::prefetch_tensor_map(a.k);
    ptx::prefetch_tensor_map(a.v);
    constexpr int kConsumerWarps = 4 * Config::kConsumers;
    s.q_barriers.init(kConsumerWarps);
    s.k_barriers.init(kConsumerWarps);
    s.v_barriers.init(kConsumerWarps);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::wait_for_earlier_kernels();
  ptx::launch_dependents();
  const int known = known_sequences(a.p);
  if (threadIdx.x == Config::kConsumers * ptx::kWarpgroup) s.known = known;
  __syncwarp();
  const int warpgroup = uniform(threadIdx.x / ptx::kWarpgroup);
  if (warpgroup == Config::kConsumers) {
    ptx::setmaxnreg_dec<Config::kProducerRegisters>();
    if (threadIdx.x < Config::kConsumers * ptx::kWarpgroup + 32) WgmmaAttentionProducer<Config>(a, s)();
  } else {
    ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
    typename Config::Consumer(a, s, warpgroup)();
  }
}

template <class Config>
cudaError_t launch_wgmma(const AttentionParams& p, cudaStream_t stream) {
  constexpr int kShared = sizeof(typename Config::SharedStorage);
  const int64_t tiles = row_tiles(p, Config::kM);
  const int splits = splits_of<Config>(p);
  AttentionArguments a{
      .p = p, .tiles = static_cast<unsigned>(tiles), .splits = splits, .blocks = tiles * all_heads(p) * splits};
  if (a.blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (auto e = a.encode(Config::kM, Config::kN)) return e;
  if (auto e = allow_shared<attention_wgmma_kernel<Config>>(kShared)) return e;
  const Launch launch{.grid = std::min<int64_t>(a.blocks, p.device.sms),
                      .block = Config::kThreads,
                      .shared = kShared,
                      .dependent = true};
  if (auto e = launch_kernel(attention_wgmma_kernel<Config>, launch, stream, a); e || splits == 1) return e;
  return launch_combine<Config, true>(p, splits, stream);
}

template <AttentionInstance kInstance>
constexpr AttentionKernel wgmma_attention{
    .arch = sm_90a,
    .instance = kInstance,
    .reads = loads_by_boxes,
    .launch = launch_wgmma<WgmmaAttentionConfig<kInstance, tile_of(kInstance)>>,
    .workspace = workspace_bytes<WgmmaAttentionConfig<kInstance, tile_of(kInstance)>>};

}  // namespace forwardpass
