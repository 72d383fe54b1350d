// attention on mma.sync m16n8k16. A block computes M rows of one head, key block after key block. K and V have one
// buffer each, filled by cp.async: V's during q k^T, the next K's during p v.
//
// Tensor cores bind, if they are kept busy. A score at head dim 128, 256 multiply-adds, takes them one clock on a
// subpartition of an A100 and four on one of a 4090; the other instructions, about 14 per score of 32 lanes, issue in
// 0.5 clocks.
#include "device/shared_bytes.cuh"
#include "device/softmax.cuh"
#include "kernels/attention/attention_instance.cuh"
#include "kernels/attention/attention_kernel.h"
#include "kernels/attention/attention_scores.cuh"

namespace forwardpass {

// D, V: columns of q and k, and of v. Modified: with score modifiers. Blocks: how many share a multiprocessor.
template <Dtype T_, int D, int V, bool Modified, int M, int N, int Warps, int Blocks>
struct AttentionConfig {
  static constexpr Dtype T = T_;
  static constexpr int kD = D, kV = V, kM = M, kN = N, kWarps = Warps, kThreads = 32 * Warps, kBlocks = Blocks;
  static constexpr bool kModified = Modified;
  static constexpr int kRows = M / Warps / 16;  // of a warp: m16 tiles
  static constexpr int kTiles = N / 8, kOutTiles = V / 8;

  struct SharedStorage {
    alignas(128) uint16_t q[M * D];  // in the end the rows of out
    uint16_t k[N * D], v[N * V];
    // In shared memory, as registers would spill.
    AttentionTile tile;
    KeyBlocks blocks;
  };
  static_assert(V <= D);
};

// The shared-memory layout of rows of C columns of 16 bits: panels of 64 or 32 columns, in which 16-byte chunks are
// swizzled so that the eight rows of a column of chunks, which an ldmatrix reads, fall into different banks.
template <int C>
struct Panels {
  static constexpr int kColumns = C % 64 == 0 ? 64 : 32, kChunks = kColumns / 8, kCount = C / kColumns;
  static_assert(C % kColumns == 0);
  // Byte offset of a chunk in the first panel; those of the next panels are rows * kColumns * 2 bytes further each.
  __device__ static int offset(int row, int chunk) {
    return (row * kChunks + (chunk ^ (kChunks == 8 ? row % 8 : row / 2 % 4))) * 16;
  }
  // Byte offset of any column that is a multiple of 8, with R rows.
  template <int R>
  __device__ static int at(int row, int column) {
    return column / kColumns * R * kColumns * 2 + offset(row, column % kColumns / 8);
  }
  // A lane's address for an ldmatrix of four 8 x 8 matrices: sixteen rows from `row` on of two chunks from `column` on,
  // both multiples of 16. kLowerSecond: the second matrix is the lower rows of the first chunk, else the second chunk
  // of the upper rows, whichever makes pairs of registers for the mma.
  template <int R, bool kLowerSecond>
  __device__ static uint32_t matrices(const uint16_t* shared, int row, int column) {
    const int lane = threadIdx.x % 32, i = lane / 8, lower = kLowerSecond ? i % 2 : i / 2,
              chunk = kLowerSecond ? i / 2 : i % 2;
    return ptx::shared_address(shared) + (column / kColumns * R + row) * kColumns * 2 +
           (offset(lower * 8 + lane % 8, chunk) ^ column % kColumns * 2);
  }
};

// A thread's share in copying R rows of C columns, and in each further call the R rows before: in each panel a chunk of
// every kStep-th row.
template <class Config, int R, int C>
struct RowCopy {
  using P = Panels<C>;
  static constexpr int kStep = Config::kThreads / P::kChunks, kCount = R / kStep;
  static_assert(R % kStep == 0 && kStep % 8 == 0);
  const char* from;  // address of this thread's first row

  // Bytes from one of a thread's rows to its next. Computed on the host, as kernel parameters take no registers.
  static int64_t step(const AttentionTensor& t) { return t.row * kStep * 2; }

  __device__ RowCopy(const AttentionTensor& t, int64_t offset)
      : from(static_cast<const char*>(t.data) + (offset + row() * t.row + column()) * 2) {}
  __device__ static int row() { return threadIdx.x / P::kChunks; }
  __device__ static int column() { return threadIdx.x % P::kChunks * 8; }
  // `rows` rows and `columns` columns exist (kWhole: all rows); the rest is zero-filled.
  template <bool kWhole>
  __device__ void operator()(uint16_t* shared, int64_t step, int rows, int columns) {
    const uint32_t to = ptx::shared_address(shared) + P::offset(row(), threadIdx.x % P::kChunks);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool inside = kWhole || row() + i * kStep < rows;
#pragma unroll
      for (int panel = 0; panel < P::kCount; ++panel)
        ptx::cp_async_16(to + (panel * R + i * kStep) * P::kColumns * 2, from + panel * P::kColumns * 2,
                         inside && panel * P::kColumns + column() < columns ? 16 : 0);
      from += step;
    }
    ptx::cp_async_commit();
  }
};

template <class Config>
using ScoreFragments = float[Config::kRows][Config::kTiles][4];
template <class Config>
using OutFragments = float[Config::kRows][Config::kOutTiles][4];

// s = q k^T, of this warp's rows and a block of keys.
template <class Config>
__device__ inline void mma_q_k(ScoreFragments<Config>& s, const typename Config::SharedStorage& shared, int row) {
  using P = Panels<Config::kD>;
  constexpr float kZeros[4] = {};
#pragma unroll
  for (int step = 0; step < Config::kD / 16; ++step) {
    uint32_t a[Config::kRows][4];
#pragma unroll
    for (int r = 0; r < Config::kRows; ++r)
      ptx::ldmatrix_x4(a[r], P::template matrices<Config::kM, true>(shared.q, row + r * 16, step * 16));
#pragma unroll
    for (int t = 0; t < Config::kTiles; t += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, P::template matrices<Config::kN, false>(shared.k, t * 8, step * 16));
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t pair[2] = {b[j * 2], b[j * 2 + 1]};
#pragma unroll
        for (int r = 0; r < Config::kRows; ++r)
          if (step == 0)
            ptx::mma_m16n8k16<Config::T>(s[r][t + j], a[r], pair, kZeros);
          else
            ptx::mma_m16n8k16<Config::T>(s[r][t + j], a[r], pair, s[r][t + j]);
      }
    }
  }
}

// o += p v. Two n8 tiles of p, rounded to 16 bits, are the first operand of an mma as they are.
template <class Config>
__device__ inline void mma_p_v(OutFragments<Config>& o, const ScoreFragments<Config>& p,
                               const typename Config::SharedStorage& shared) {
  using P = Panels<Config::kV>;
#pragma unroll
  for (int step = 0; step < Config::kN / 16; ++step) {
    uint32_t a[Config::kRows][4];
#pragma unroll
    for (int r = 0; r < Config::kRows; ++r) pack_operand<Config::T>(a[r], p[r], step);
#pragma unroll
    for (int t = 0; t < Config::kOutTiles; t += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, P::template matrices<Config::kN, true>(shared.v, step * 16, t * 8));
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t pair[2] = {b[j * 2], b[j * 2 + 1]};
#pragma unroll
        for (int r = 0; r < Config::kRows; ++r) ptx::mma_m16n8k16<Config::T>(o[r][t + j], a[r], pair, o[r][t + j]);
      }
    }
  }
}

// Stores this warp's rows in words of 16 bytes, through its own rows of q in shared memory: no other warp reads those,
// and this one read them before a barrier.
template <class Config>
__device__ inline void store_rows(const OutFragments<Config>& o, const AttentionParams& p, const AttentionTile& tile,
                                  typename Config::SharedStorage& shared, int row) {
  using P = Panels<Config::kV>;
  constexpr int kRows = Config::kRows * 16;
  const int lane = threadIdx.x % 32;
  const auto rows = reinterpret_cast<char*>(shared.q + row * Config::kD);
#pragma unroll
  for (int r = 0; r < Config::kRows; ++r)
#pragma unroll
    for (int t = 0; t < Config::kOutTiles; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = P::template at<kRows>(r * 16 + half * 8 + lane / 4, t * 8) + lane % 4 * 4;
        *reinterpret_cast<uint32_t*>(rows + at) = pack<Config::T>(o[r][t][half * 2], o[r][t][half * 2 + 1]);
      }
  __syncwarp();
  constexpr int kAcross = P::kChunks, kStep = 32 / kAcross;
#pragma unroll
  for (int r = 0; r < kRows; r += kStep) {
    const int in_warp = r + lane / kAcross, at = tile.row + row + in_warp;
    if (at >= tile.rows) continue;
    const auto out = static_cast<uint16_t*>(p.out) + tile.out(p, at);
#pragma unroll
    for (int panel = 0; panel < P::kCount; ++panel) {
      const int column = panel * P::kColumns + lane % kAcross * 8;
      if (column < p.value_dim)
        *reinterpret_cast<uint4*>(out + column) =
            *reinterpret_cast<const uint4*>(rows + P::template at<kRows>(in_warp, column));
    }
  }
}

struct Launch {
  unsigned tiles;                  // of a head
  int64_t q_step, k_step, v_step;  // RowCopy's
  int64_t k_back, v_back;          // bytes from the end of a key block to the beginning of the block before
  float scale;                     // of the softmax
};

template <class Config, class = SharedBytesOf<Config>>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks)
    attention_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Launch l) {
  extern __shared__ __align__(128) uint8_t memory[];
  auto& shared = *reinterpret_cast<typename Config::SharedStorage*>(memory);
  {
    AttentionTile tile;
    if (!tile.find(p, Config::kM, l.tiles, blockIdx.x)) return;
    if (threadIdx.x == 0) shared.tile = tile, shared.blocks = KeyBlocks(p, tile, Config::kM, Config::kN);
    __syncthreads();
  }
  const AttentionTile& tile = shared.tile;
  const KeyBlocks& blocks = shared.blocks;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * Config::kRows * 16;  // this warp's first in the tile
  const auto own = [&] { return tile.row + row + lane / 4; };  // this thread's first in the sequence
  const int first = (blocks.end - 1) * Config::kN;             // key, of the block that comes first: the last one
  RowCopy<Config, Config::kN, Config::kD> copy_k(p.k, tile.k(p) + first * p.k.row);
  RowCopy<Config, Config::kN, Config::kV> copy_v(p.v, tile.v(p) + first * p.v.row);
  OnlineSoftmax<Config::kRows> softmax;
  OutFragments<Config> o = {};
  if (blocks.end > blocks.begin) {
    RowCopy<Config, Config::kM, Config::kD> copy_q(p.q, tile.q(p) + tile.row * p.q.row);
    copy_q.template operator()<false>(shared.q, l.q_step, tile.rows - tile.row, p.head_dim);
    copy_k.template operator()<false>(shared.k, l.k_step, tile.keys - first, p.head_dim);
  }
  // From the last block to the first, so that the one that may end beyond the keys comes first.
  const auto attend = [&](int block, auto masked) {
    ScoreFragments<Config> s;
    ptx::cp_async_wait<0>();
    __syncthreads();  // k has arrived for all warps, and all have read v
    copy_v.template operator()<!decltype(masked)::value>(shared.v, l.v_step, tile.keys - block * Config::kN,
                                                         p.value_dim);
    mma_q_k<Config>(s, shared, row);
    ptx::cp_async_wait<0>();
    __syncthreads();  // v has arrived, and all have read k
    copy_v.from -= l.v_back, copy_k.from -= l.k_back;
    if (block > blocks.begin) copy_k.template operator()<true>(shared.k, l.k_step, Config::kN, p.head_dim);
    const int key = block * Config::kN + lane % 4 * 2;
    if (Config::kModified) ScoreModifiers<Config::kRows, Config::kTiles>(p, tile, own())(s, key);
    if (decltype(masked)::value) RowBounds<Config::kRows>(p, tile, own())(s, key);
    RowValues<Config::kRows> factor;
    if (softmax.update(s, l.scale, factor)) rescale(o, factor);
    mma_p_v<Config>(o, s, shared);
  };
  int block = blocks.end - 1;
#pragma unroll 1
  for (int phase = 0; phase < 2; ++phase) {
    const int stop = phase == 0 ? blocks.unmasked_end : blocks.begin;
#pragma unroll 1
    for (; block >= stop; --block) attend(block, std::true_type{});
    if (phase == 1) break;
#pragma unroll 1
    for (; block >= blocks.unmasked_begin; --block) attend(block, std::false_type{});
  }

  RowValues<Config::kRows> factor, lse;
  softmax.finish(sink_of(p, tile.head), factor, lse);
  rescale(o, factor);
  store_rows<Config>(o, p, tile, shared, row);
  store_lse<Config::kRows>(lse, p, tile, own());
}

template <class Config>
cudaError_t launch(const AttentionParams& p, cudaStream_t stream) {
  constexpr int kShared = sizeof(typename Config::SharedStorage);
  const int64_t tiles = row_tiles(p, Config::kM), grid = tiles * all_heads(p);
  if (grid > 0x7fffffff) return cudaErrorInvalidConfiguration;
  if (auto e = allow_shared<attention_kernel<Config>>(kShared)) return e;
  using CopyQ = RowCopy<Config, Config::kM, Config::kD>;
  using CopyK = RowCopy<Config, Config::kN, Config::kD>;
  using CopyV = RowCopy<Config, Config::kN, Config::kV>;
  const Launch l{static_cast<unsigned>(tiles),
                 CopyQ::step(p.q),
                 CopyK::step(p.k),
                 CopyV::step(p.v),
                 Config::kN * 4 * p.k.row,
                 Config::kN * 4 * p.v.row,
                 Config::kModified ? 1 : p.scale * kLog2e};
  attention_kernel<Config><<<static_cast<unsigned>(grid), Config::kThreads, kShared, stream>>>(p, l);
  return cudaGetLastError();
}

// Two warps per scheduler, so that one's softmax overlaps the other's mma, in the 100 KB of an L40S: two blocks of four
// warps with 32 rows each or, where those accumulators do not fit the registers, one of eight warps with 16 rows.
template <Dtype T, int D, int V, bool Modified>
constexpr auto config() {
  if constexpr (D >= 192)
    return AttentionConfig<T, D, V, Modified, 128, D == 256 ? 32 : 64, 8, 1>();
  else if constexpr (Modified)
    return AttentionConfig<T, D, V, true, 128, 64, 8, 1>();
  else
    return AttentionConfig<T, D, V, false, 128, D == 128 ? 32 : 64, 4, 2>();
}

namespace {

cudaError_t launch_any(const AttentionParams& p, cudaStream_t stream) {
  return launch_instance(p, [&](auto instance) {
    using I = decltype(instance);
    return launch<decltype(config<I::kT, I::kD, I::kV, I::kModified>())>(p, stream);
  });
}

const AttentionKernel kernels[] = {{.arch = sm_80, .launch = launch_any}};
const AttentionKernels registered(kernels);

}  // namespace
}  // namespace forwardpass
