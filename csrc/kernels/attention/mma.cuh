#pragma once
// attention on mma.sync m16n8k16. A block computes M rows of one head, key block after key block. K and V have one
// buffer each, filled by cp.async: V's during q k^T, the next K's during p v.
//
// Tensor cores bind, if they are kept busy. A score at head dim 128, 256 multiply-adds, takes them one clock on a
// subpartition of an A100 and four on one of a 4090; the other instructions, about 14 per score of 32 lanes, issue in
// 0.5 clocks.
#include "device/shared_bytes.cuh"
#include "device/softmax.cuh"
#include "device/swizzled_rows.cuh"
#include "kernels/attention/kernel.h"
#include "kernels/attention/scores.cuh"

namespace forwardpass {

// What a block computes.
struct MmaAttentionTile {
  int m, n;           // rows, and keys of a block of keys
  int warps;          // that divide the rows
  int blocks_per_sm;  // that share a multiprocessor
};

// Two warps per scheduler, so that one's softmax overlaps the other's mma: two blocks of four warps with 32 rows each
// or, where those accumulators do not fit the registers, one of eight warps with 16 rows. Blocks of 64 keys, which take
// a fifth fewer instructions per score than those of 32, where the multiprocessor's shared memory holds them: in an
// A100's 164 KB always (`large`), in an L40S's 100 KB at some head dims.
constexpr MmaAttentionTile tile_of(AttentionInstance i, bool large) {
  if (i.head_dim >= 192) return {.m = 128, .n = i.head_dim == 256 && !large ? 32 : 64, .warps = 8, .blocks_per_sm = 1};
  if (i.modified) return {.m = 128, .n = 64, .warps = 8, .blocks_per_sm = 1};
  return {.m = 128, .n = i.head_dim == 128 && !large ? 32 : 64, .warps = 4, .blocks_per_sm = 2};
}

template <class Config>
struct MmaAttentionSchedule;
template <class Config>
struct MmaAttentionMainloop;
template <class Config>
struct MmaAttentionEpilogue;

template <AttentionInstance kInstance, MmaAttentionTile kTile>
struct MmaAttentionConfig {
  static constexpr Dtype kDtype = kInstance.dtype;
  static constexpr int kHeadDim = kInstance.head_dim, kValueDim = kInstance.value_dim;
  static constexpr bool kModified = kInstance.modified;
  static constexpr int kM = kTile.m, kN = kTile.n, kWarps = kTile.warps, kThreads = 32 * kWarps,
                       kBlocksPerSm = kTile.blocks_per_sm;
  static constexpr int kWarpM = kM / kWarps, kTilesM = kWarpM / 16;

  using Schedule = MmaAttentionSchedule<MmaAttentionConfig>;
  using Scores = Fragments<float, kTilesM, kN / 8>;
  using Output = Fragments<float, kTilesM, kValueDim / 8>;
  using Mainloop = MmaAttentionMainloop<MmaAttentionConfig>;
  using Epilogue = MmaAttentionEpilogue<MmaAttentionConfig>;

  struct SharedStorage {
    alignas(128) uint16_t q[kM * kHeadDim];  // in the end the rows of out
    uint16_t k[kN * kHeadDim], v[kN * kValueDim];
    // In shared memory, as registers would spill.
    AttentionTile tile;
    KeyBlocks blocks;
  };
  static_assert(kValueDim <= kHeadDim);
  // Shared memory of a multiprocessor that holds the tile's blocks; the system has 1 KB of each.
  static constexpr int kLeastSharedKib = (kBlocksPerSm * (sizeof(SharedStorage) + 1024) + 1023) / 1024;
};

// The shared-memory layout of rows of kColumns columns of 16 bits: panels of 64 or 32 columns; each has all rows.
template <int kColumns>
struct Panels {
  static constexpr int kPanel = kColumns % 64 == 0 ? 64 : 32, kCount = kColumns / kPanel;
  static constexpr int kRowBytes = kPanel * 2, kChunks = kPanel / 8;
  static_assert(kColumns % kPanel == 0);
  using Rows = SwizzledRows<kRowBytes>;

  // Byte offset of any column that is a multiple of 8, with kRows rows.
  template <int kRows>
  __device__ static int offset(int row, int column) {
    return column / kPanel * kRows * kRowBytes + Rows::offset(row, column % kPanel / 8);
  }
  // A lane's address for an ldmatrix of four 8 x 8 matrices: sixteen rows from `row` on of two chunks from `column` on,
  // both multiples of 16. kLowerSecond: the second matrix is the lower rows of the first chunk, else the second chunk
  // of the upper rows, whichever makes pairs of registers for the mma.
  template <int kRows, bool kLowerSecond>
  __device__ static uint32_t matrices(const uint16_t* shared, int row, int column) {
    const int lane = threadIdx.x % 32, i = lane / 8, lower = kLowerSecond ? i % 2 : i / 2,
              chunk = kLowerSecond ? i / 2 : i % 2;
    return ptx::shared_address(shared) + (column / kPanel * kRows + row) * kRowBytes +
           (Rows::offset(lower * 8 + lane % 8, chunk) ^ column % kPanel * 2);
  }
};

// Copies kRows rows of kColumns columns, and in each further call the kRows rows before.
template <int kRows, int kColumns, int kThreads>
struct RowCopy {
  using P = Panels<kColumns>;
  using Share = CopyShare<P::kRowBytes, kRows, kThreads>;
  const char* from;  // address of this thread's first row

  // Bytes from one of a thread's rows to its next. Computed on the host, as kernel parameters take no registers.
  static int64_t step(const AttentionTensor& t) { return t.row * Share::kStep * 2; }

  __device__ RowCopy(const AttentionTensor& t, int64_t offset)
      : from(static_cast<const char*>(t.data) + (offset + Share::row() * t.row + column()) * 2) {}
  __device__ static int column() { return Share::chunk() * 8; }
  // `rows` rows and `columns` columns exist (kWhole: all rows); the rest is zero-filled.
  template <bool kWhole>
  __device__ void copy(uint16_t* shared, int64_t step, int rows, int columns) {
    const uint32_t to = ptx::shared_address(shared) + Share::offset();
#pragma unroll
    for (int i = 0; i < Share::kCount; ++i) {
      const bool inside = kWhole || Share::row() + i * Share::kStep < rows;
#pragma unroll
      for (int panel = 0; panel < P::kCount; ++panel)
        ptx::cp_async_16(to + (panel * kRows + i * Share::kStep) * P::kRowBytes, from + panel * P::kRowBytes,
                         inside && panel * P::kPanel + column() < columns ? 16 : 0);
      from += step;
    }
    ptx::cp_async_commit();
  }
};

template <class Config>
using CopyQ = RowCopy<Config::kM, Config::kHeadDim, Config::kThreads>;
template <class Config>
using CopyK = RowCopy<Config::kN, Config::kHeadDim, Config::kThreads>;
template <class Config>
using CopyV = RowCopy<Config::kN, Config::kValueDim, Config::kThreads>;

struct MmaAttentionArguments {
  AttentionParams p;
  unsigned tiles;                  // of a head
  int64_t q_step, k_step, v_step;  // RowCopy's
  int64_t k_back, v_back;          // bytes from the end of a key block to the beginning of the block before
  float scale;                     // of the softmax
};

// A block computes one tile: f().
template <class Config>
struct MmaAttentionSchedule {
  const MmaAttentionArguments& a;
  typename Config::SharedStorage& s;

  template <class F>
  __device__ void for_each(F f) const {
    AttentionTile tile;
    if (!tile.find(a.p, Config::kM, a.tiles, blockIdx.x, known_sequences(a.p))) return;
    if (threadIdx.x == 0) s.tile = tile, s.blocks = KeyBlocks(a.p, tile, Config::kM, Config::kN);
    __syncthreads();
    f(s.tile, s.blocks);
  }
};

template <class Config>
struct MmaAttentionMainloop {
  static constexpr Dtype kDtype = Config::kDtype;
  using Scores = typename Config::Scores;
  using Output = typename Config::Output;
  const MmaAttentionArguments& a;
  typename Config::SharedStorage& s;
  const int warp_row;  // this warp's first row in the tile

  __device__ void operator()(const AttentionTile& tile, const KeyBlocks& blocks, Output& o,
                             OnlineSoftmax<Config::kTilesM>& softmax) const {
    const AttentionParams& p = a.p;
    const auto first_row = [&] { return tile.row + warp_row; };  // this warp's, in the sequence
    const int first_key = (blocks.end - 1) * Config::kN;         // of the block that comes first: the last one
    CopyK<Config> copy_k(p.k, tile.k(p) + first_key * p.k.row);
    CopyV<Config> copy_v(p.v, tile.v(p) + first_key * p.v.row);
    o.clear();
    if (blocks.end > blocks.begin) {
      CopyQ<Config> copy_q(p.q, tile.q(p) + tile.row * p.q.row);
      copy_q.template copy<false>(s.q, a.q_step, tile.rows - tile.row, p.head_dim);
      copy_k.template copy<false>(s.k, a.k_step, tile.keys - first_key, p.head_dim);
    }
    const bool vectors = Config::kModified && ScoreModifiers<Scores>::in_vectors(p, tile);
    // From the last block to the first, so that the one that may end beyond the keys comes first.
    const auto attend = [&](int block, auto may_be_masked, bool masked = true) {
      constexpr bool kMayBeMasked = decltype(may_be_masked)::value;
      Scores scores;
      ptx::cp_async_wait<0>();
      __syncthreads();  // k has arrived for all warps, and all have read v
      const int keys = tile.keys - block * Config::kN;
      if (kMayBeMasked && masked)
        copy_v.template copy<false>(s.v, a.v_step, keys, p.value_dim);
      else
        copy_v.template copy<true>(s.v, a.v_step, keys, p.value_dim);
      const int key = block * Config::kN + accumulator_column(0);
      typename ScoreModifiers<Scores>::MaskWords mask;
      if (Config::kModified) ScoreModifiers<Scores>(p, tile, first_row(), vectors).load(mask, key);
      mma_q_k(scores);
      ptx::cp_async_wait<0>();
      __syncthreads();  // v has arrived, and all have read k
      copy_v.from -= a.v_back, copy_k.from -= a.k_back;
      if (block > blocks.begin) copy_k.template copy<true>(s.k, a.k_step, Config::kN, p.head_dim);
      if (Config::kModified) ScoreModifiers<Scores>(p, tile, first_row(), vectors)(scores, mask, key);
      if (kMayBeMasked && masked) RowBounds<Scores>(p, tile, first_row())(scores, key);
      RowValues<Config::kTilesM> factor;
      if (softmax.update(scores, a.scale, factor)) rescale(o, factor);
      mma_p_v(o, scores);
    };
    int block = blocks.end - 1;
    if constexpr (Config::kModified) {
      // A branch around RowBounds: a second copy of the modifiers takes as long to compile as all the rest.
      const int unmasked_begin = blocks.unmasked_begin, unmasked_end = blocks.unmasked_end;
#pragma unroll 1
      for (; block >= blocks.begin; --block)
        attend(block, std::true_type{}, block >= unmasked_end || block < unmasked_begin);
    } else {
#pragma unroll 1
      for (int phase = 0; phase < 2; ++phase) {
        const int stop = phase == 0 ? blocks.unmasked_end : blocks.begin;
#pragma unroll 1
        for (; block >= stop; --block) attend(block, std::true_type{});
        if (phase == 1) break;
#pragma unroll 1
        for (; block >= blocks.unmasked_begin; --block) attend(block, std::false_type{});
      }
    }
  }

 private:
  // scores = q k^T, of this warp's rows and a block of keys.
  __device__ void mma_q_k(Scores& scores) const {
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
  __device__ void mma_p_v(Output& o, const Scores& p) const {
    using P = Panels<Config::kValueDim>;
#pragma unroll
    for (int step = 0; step < Config::kN / 16; ++step) {
      uint32_t weights[Config::kTilesM][4];
#pragma unroll
      for (int i = 0; i < Config::kTilesM; ++i) pack_operand<kDtype>(weights[i], p[i], step);
#pragma unroll
      for (int j = 0; j < Output::kTilesN; j += 2) {
        uint32_t v[4];
        ptx::ldmatrix_x4_trans(v, P::template matrices<Config::kN, true>(s.v, step * 16, j * 8));
#pragma unroll
        for (int next = 0; next < 2; ++next) {
          const uint32_t pair[2] = {v[next * 2], v[next * 2 + 1]};
#pragma unroll
          for (int i = 0; i < Config::kTilesM; ++i)
            ptx::mma_m16n8k16<kDtype>(o[i][j + next], weights[i], pair, o[i][j + next]);
        }
      }
    }
  }
};

template <class Config>
struct MmaAttentionEpilogue {
  using Output = typename Config::Output;
  const AttentionParams& p;
  typename Config::SharedStorage& s;
  const int warp_row;  // this warp's first row in the tile

  __device__ void operator()(const AttentionTile& tile, Output& o, OnlineSoftmax<Config::kTilesM>& softmax) const {
    RowValues<Config::kTilesM> factor;
    softmax.finish(tile.known() ? sink_of(p, tile.head) : NAN, factor);
    rescale(o, factor);
    store_rows(o, tile);
    store_lse<Output>(softmax, p, tile, tile.row + warp_row);
  }

 private:
  // Stores this warp's rows in words of 16 bytes, through its own rows of q in shared memory: no other warp reads
  // those, and this one read them before a barrier.
  __device__ void store_rows(const Output& o, const AttentionTile& tile) const {
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

// Large tiles are compiled for 8.0 alone. What is compiled for 8.9 runs on every later architecture, where some have no
// more shared memory than an L40S, and ptxas spills 64 bytes for 10.0.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
constexpr int kSharedKib = 100;
#else
constexpr int kSharedKib = 164;
#endif

template <class Config, class = SharedBytesOf<Config>>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    attention_mma_kernel(const __grid_constant__ MmaAttentionArguments a) {
  if constexpr (Config::kLeastSharedKib > kSharedKib) return;  // never launched there: no code for it is in the library
  extern __shared__ __align__(128) uint8_t memory[];
  auto& s = *reinterpret_cast<typename Config::SharedStorage*>(memory);
  const int warp_row = threadIdx.x / 32 * Config::kWarpM;
  const typename Config::Mainloop mainloop{a, s, warp_row};
  const typename Config::Epilogue epilogue{a.p, s, warp_row};
  typename Config::Schedule{a, s}.for_each([&](const AttentionTile& tile, const KeyBlocks& blocks) {
    OnlineSoftmax<Config::kTilesM> softmax;
    typename Config::Output o;
    mainloop(tile, blocks, o, softmax);
    epilogue(tile, o, softmax);
  });
}

template <class Config>
cudaError_t launch_mma(const AttentionParams& p, cudaStream_t stream) {
  constexpr int kShared = sizeof(typename Config::SharedStorage);
  const int64_t tiles = row_tiles(p, Config::kM), grid = tiles * all_heads(p);
  if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (auto e = allow_shared<attention_mma_kernel<Config>>(kShared)) return e;
  const MmaAttentionArguments arguments{.p = p,
                                        .tiles = static_cast<unsigned>(tiles),
                                        .q_step = CopyQ<Config>::step(p.q),
                                        .k_step = CopyK<Config>::step(p.k),
                                        .v_step = CopyV<Config>::step(p.v),
                                        .k_back = Config::kN * 4 * p.k.row,
                                        .v_back = Config::kN * 4 * p.v.row,
                                        .scale = Config::kModified ? 1 : p.scale * kLog2e};
  attention_mma_kernel<Config><<<static_cast<unsigned>(grid), Config::kThreads, kShared, stream>>>(arguments);
  return cudaGetLastError();
}

template <AttentionInstance kInstance>
cudaError_t launch_instance(const AttentionParams& p, cudaStream_t stream) {
  using Large = MmaAttentionConfig<kInstance, tile_of(kInstance, true)>;
  using Small = MmaAttentionConfig<kInstance, tile_of(kInstance, false)>;
  const bool large = p.device.arch < 89 && p.device.shared_kib >= Large::kLeastSharedKib;
  return large ? launch_mma<Large>(p, stream) : launch_mma<Small>(p, stream);
}
template <AttentionInstance kInstance>
constexpr AttentionKernel mma_attention{.arch = sm_80, .instance = kInstance, .launch = launch_instance<kInstance>};

}  // namespace forwardpass
