// permute_quantize: a counting sort of the choices by expert, then a pass over the tokens that is bound by bytes: of
// each element 2 or 4 are read and one is written for each choice. No atomics: a choice's place is its rank, which the
// order of experts, tokens and choices alone decides.
#include "device/quantize_rows.cuh"
#include "device/shared_bytes.cuh"
#include "params/permute_quantize.h"

namespace forwardpass {

struct PositionsConfig {
  static constexpr int kThreads = kCountedExperts, kWarps = kThreads / 32;
  static constexpr int kEach = kCountedChoices / kThreads;  // choices of a thread
  struct SharedStorage {
    int ranks[kWarps][kCountedExperts];  // how many choices of an expert a warp has had; then those before it too
  };
};

// The sum of v of all threads before this one.
__device__ int sum_before(int v, int* warp_sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = v;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int other = __shfl_up_sync(0xffffffff, sum, lanes);
    if (lane >= lanes) sum += other;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  for (int i = 0; i < warp; ++i) sum += warp_sums[i];
  return sum - v;
}

// Where the rows begin of this thread's expert and block: behind those of the experts before it, and of the blocks
// before this one. choices: of the expert in this block, where there is no other. By all threads.
__device__ int first_row(const PermuteQuantizeParams& p, int choices, int* warp_sums) {
  const int expert = threadIdx.x;
  int earlier = 0, total = choices;  // of the expert's choices: those of the blocks before this one, and all
  if (p.counts && expert < p.experts) {
    total = 0;
#pragma unroll 8
    for (int block = 0; block < gridDim.x; ++block) {
      if (block == blockIdx.x) earlier = total;
      total += p.counts[block * p.experts + expert];
    }
  }
  const int begin = sum_before(total, warp_sums);
  if (expert < p.experts && blockIdx.x == 0) p.offs[expert] = begin + total;
  return begin + earlier;
}

// The experts that this thread's choices name, every 32nd from `first` on; -1: none.
using ChosenExperts = int[PositionsConfig::kEach];
__device__ void load_chosen(const PermuteQuantizeParams& p, int64_t first, ChosenExperts& experts) {
  const int64_t rows = p.rows();
#pragma unroll
  for (int i = 0; i < PositionsConfig::kEach; ++i) {
    const int64_t choice = first + i * 32;
    int64_t e = -1;
    if (choice < rows)
      e = p.wide_index ? static_cast<const int64_t*>(p.index)[choice] : static_cast<const int32_t*>(p.index)[choice];
    experts[i] = e >= 0 && e < p.experts ? static_cast<int>(e) : -1;
  }
}
// rank(i, how many choices of the same expert the warp has had before choice i); ranks: the warp's, of each expert.
template <class F>
__device__ inline void count_chosen(const ChosenExperts& experts, int* ranks, F rank) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < PositionsConfig::kEach; ++i) {
    const int e = experts[i];
    const unsigned same = __match_any_sync(0xffffffff, e);
    const int before = __popc(same & ((1u << lane) - 1));
    int had = 0;
    if (e >= 0) had = ranks[e];
    rank(i, had + before);
    __syncwarp();
    if (e >= 0 && before == 0) ranks[e] = had + __popc(same);
    __syncwarp();
  }
}

// A block has consecutive choices, kCountedChoices in each of `rounds`, and of those a warp consecutive ones, 32 at a
// time. `counting`: only counts them into p.counts, for the blocks of the launch that follows.
__device__ void find_positions(const PermuteQuantizeParams& p, bool counting, int rounds) {
  constexpr int kWarps = PositionsConfig::kWarps, kEach = PositionsConfig::kEach;
  extern __shared__ int4 shared_memory[];
  auto& ranks = reinterpret_cast<PositionsConfig::SharedStorage*>(shared_memory)->ranks;
  __shared__ int warp_sums[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, expert = threadIdx.x;
  const int64_t rows = p.rows();
  const bool has_expert = expert < p.experts;
  int row = 0;  // of this thread's expert: where its next choice goes; counting: how many there were

#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    const int64_t first = (int64_t{blockIdx.x} * rounds + round) * kCountedChoices + warp * (32 * kEach) + lane;
    ChosenExperts experts;
    load_chosen(p, first, experts);
    for (int e = lane; e < p.experts; e += 32) ranks[warp][e] = 0;
    __syncwarp();
    count_chosen(experts, ranks[warp], [](int, int) {});
    __syncthreads();

    int choices = 0;
    if (has_expert && (counting || round == 0))
      for (int i = 0; i < kWarps; ++i) choices += ranks[i][expert];
    if (counting) {
      row += choices;
      __syncthreads();
      continue;
    }
    if (round == 0) row = first_row(p, choices, warp_sums);
    if (has_expert)
      for (int i = 0; i < kWarps; ++i) {
        const int of_warp = ranks[i][expert];
        ranks[i][expert] = row;
        row += of_warp;
      }
    __syncthreads();
    count_chosen(experts, ranks[warp], [&](int i, int place) {
      if (const int64_t choice = first + i * 32; choice < rows) p.position[choice] = experts[i] >= 0 ? place : -1;
    });
  }
  if (counting && has_expert) p.counts[int64_t{blockIdx.x} * p.experts + expert] = row;
}

// A token's row, or a group of it, to the first of its places, by the threads that share it; each then copies what it
// has written to the others. So it is quantised once: once for each of eight choices issue would bind, not bytes.
__device__ void quantize_token(const PermuteQuantizeParams& p, const RowsLaunch& l, bool aligned) {
  Segment s(l, p.out);
  const int64_t token = s.row;
  const int begin = static_cast<int>(token) * p.choices, end = s.active ? begin + p.choices : begin;  // at most 2^30
  const auto load = [&](auto* x, int base, Chunk& v) {
    load_chunk(v, x + token * p.x.stride + s.begin, s, base, aligned);
  };
  SegmentValues values(s, [&](int base, Chunk& v) {
    if (p.x.dtype == Dtype::f32)
      load(static_cast<const float*>(p.x.data), base, v);
    else if (p.x.dtype == Dtype::f16)
      load(static_cast<const __half*>(p.x.data), base, v);
    else
      load(static_cast<const __nv_bfloat16*>(p.x.data), base, v);
  });
  if (values.resident()) values.for_each([](int, int, float (&)[kVec]) {});  // loads do not wait for positions

  int i = begin;
  while (i < end && p.position[i] < 0) ++i;
  if (i < end) {
    s.row = p.position[i];
  } else {
    s.active = false;  // it still takes part in what the warp or the block does together
    s.length = 0;
  }
  quantize_segment(values, s, p.out);

  const bool whole_vectors = p.out.group % kVec == 0 || p.out.group == p.out.columns;  // a group begins where one may
  const auto q = [&](int64_t row) { return static_cast<uint8_t*>(p.out.q) + row * p.out.q_stride + s.begin; };
  float* const scale = p.out.scale + s.group * p.out.scale_stride;  // [rows]
  const auto for_each_other = [&](auto f) {                         // f(row)
#pragma unroll 4
    for (int other = i + 1; other < end; ++other)
      if (const int row = __ldg(p.position + other); row >= 0) f(int64_t{row});
  };
  if (i + 1 < end) {
    // A chunk at a time, so that its loads are in flight together.
    for (int base = s.lane * kVec; base < s.length; base += s.width * kVec * RowsConfig::kVecs) {
      Vec<uint8_t> vectors[RowsConfig::kVecs];
      for_each_vector(s, base,
                      [&](int j, int column, int n) { vectors[j] = load_vec(q(s.row) + column, n, whole_vectors); });
      for_each_other([&](int64_t row) {
        for_each_vector(s, base,
                        [&](int j, int column, int n) { store_vec(vectors[j], q(row) + column, n, whole_vectors); });
      });
    }
    if (s.lane == 0) {
      const float of_first = scale[s.row];
      for_each_other([&](int64_t row) { scale[row] = of_first; });
    }
  }
  const int of_group = static_cast<int>(min(p.out.group, p.out.columns - s.begin));
  for (int row = max(begin, p.offs[p.experts - 1]); row < end; ++row) {
    for (int column = s.lane * kVec; column < of_group; column += s.width * kVec)
      store_vec(Vec<uint8_t>{}, q(row) + column, min(kVec, of_group - column), whole_vectors);
    if (s.lane == 0) scale[row] = 0;
  }
}

enum class Phase { count, place, quantize };

// One kernel for what are three launches, as instances are counted, not what is in them.
template <class Config, class = SharedBytesOf<Config>>
__global__ void __launch_bounds__(Config::kThreads, 1)
    permute_quantize_kernel(PermuteQuantizeParams p, Phase phase, int rounds, RowsLaunch l, bool aligned) {
  if (phase == Phase::quantize) {
    ptx::launch_dependents();
    quantize_token(p, l, aligned);
  } else {
    find_positions(p, phase == Phase::count, rounds);
  }
}

}  // namespace forwardpass

int forwardpass_permute_quantize(const forwardpass::PermuteQuantizeParams* p, void* stream) {
  using namespace forwardpass;
  const int rounds = static_cast<int>(p->counting_rounds());
  const RowsLaunch l = rows_launch(p->x.rows, p->out);
  const int64_t size = size_of(p->x.dtype);
  const bool aligned = aligned16(p->x.data, p->x.stride * size, p->out.group * size, l.groups);
  const auto launch = [&](Phase phase, int64_t grid, int block, size_t shared) {
    permute_quantize_kernel<PositionsConfig>
        <<<static_cast<unsigned>(grid), block, shared, cudaStream_t(stream)>>>(*p, phase, rounds, l, aligned);
    return cudaGetLastError();
  };
  const auto over_choices = [&](Phase phase) {
    return launch(phase, p->counting_blocks(), PositionsConfig::kThreads, sizeof(PositionsConfig::SharedStorage));
  };
  if (p->counts)
    if (const cudaError_t error = over_choices(Phase::count)) return error;
  if (const cudaError_t error = over_choices(Phase::place)) return error;
  return p->rows() ? launch(Phase::quantize, l.grid(), l.block, 0) : cudaSuccess;
}
