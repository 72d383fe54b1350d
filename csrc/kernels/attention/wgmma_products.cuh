#pragma once
// What a consumer of attention on wgmma multiplies, and what it makes of scores: the Products of its Config. The
// consumer says when. These are those of 16 bits; int8_wgmma_products.cuh has those of 8.
#include "device/pipeline.cuh"
#include "device/softmax.cuh"
#include "device/wgmma.cuh"
#include "kernels/attention/source_tma.cuh"

namespace forwardpass {

// Operands are panels of 64 columns, under a swizzle of 128 bytes. p v is added up over all keys in place.
template <class Config>
struct HalfProducts {
  static constexpr Dtype kDtype = Config::kDtype;
  static constexpr int kStep = 16 * sizeof(uint16_t) / ptx::kDescriptorUnit;  // 16 columns
  static constexpr int kRow = kPanel * sizeof(uint16_t) / ptx::kDescriptorUnit;
  using Scores = typename Config::Scores;
  using Output = typename Config::Output;
  using Sums = Scores;  // accumulators of q k^T

  uint32_t q_rows, k_rows, v_rows;  // low halves of the wgmma descriptors: of this warpgroup's rows; in the first stage
  const float scale;
  uint32_t weights[Config::kN / 16][4];  // p of the block of keys whose p v comes next: an mma's first operand

  __device__ HalfProducts(const AttentionArguments& a, const typename Config::SharedStorage& s, int warpgroup)
      : scale(Config::kModified ? 1 : a.p.scale * kLog2e) {
    q_rows = uniform(ptx::descriptor(ptx::shared_address(s.q[0].panel[0][warpgroup * ptx::kWgmmaRows])));
    k_rows = uniform(ptx::descriptor(ptx::shared_address(s.k[0].panel)));
    v_rows = uniform(ptx::descriptor(ptx::shared_address(s.v[0].panel), Config::kN * kPanel * sizeof(uint16_t)));
  }

  __device__ static void begin_tile(const typename Config::Query&, int, const OnlineSoftmax<1>&) {}
  // Issues q k^T.
  __device__ void qk(Sums& sums, int q_stage, int k_stage) const {
    const uint32_t q = q_rows + q_stage * (sizeof(typename Config::Query) / ptx::kDescriptorUnit),
                   rows = k_rows + k_stage * (sizeof(typename Config::Key) / ptx::kDescriptorUnit);
#pragma unroll
    for (int i = 0; i < Config::kHeadDim / 16; ++i) {
      const int column = i % 4 * kStep, panel = i / 4 * kRow;
      ptx::wgmma_k16<kDtype>(sums[0], q + panel * Config::kM + column, rows + panel * Config::kN + column, i > 0);
    }
  }
  // Once it has completed, while the stage is there.
  __device__ static Scores& scores(Sums& sums, const typename Config::SharedStorage&, int) {
    ptx::wgmma_keep(sums[0]);
    return sums;
  }
  // Issues o += p v.
  __device__ void pv(Output& o, int v_stage) const {
    ptx::wgmma_keep(o[0]);
    ptx::wgmma_fence();
    const uint32_t rows = v_rows + v_stage * (sizeof(typename Config::Value) / ptx::kDescriptorUnit);
#pragma unroll
    for (int i = 0; i < Config::kN / 16; ++i) ptx::wgmma_k16<kDtype, 1>(o[0], weights[i], rows + i * 16 * kRow, true);
    ptx::wgmma_commit();
  }
  static constexpr bool kGrouped = false;         // keys are in their order
  static constexpr bool kWaitsInSoftmax = false;  // where update<true>() waits for it, else wait_pv()
  __device__ static void wait_pv(Output& o, int) {
    ptx::wgmma_wait<0>();
    ptx::wgmma_keep(o[0]);
  }
  // Turns scores into p. True: what has been added up before has to be multiplied by `factor`.
  template <bool, class Turn>
  __device__ bool update(OnlineSoftmax<1>& sums, Scores& scores, RowValues<1>& factor, Output&, int, Turn) const {
    return sums.update(scores, scale, factor);
  }
  __device__ void rescale(Output& o, const RowValues<1>& factor) const { forwardpass::rescale(o, factor); }
  __device__ void pack(const Scores& scores) {
#pragma unroll
    for (int i = 0; i < Config::kN / 16; ++i) pack_operand<kDtype>(weights[i], scores[0], i);
  }
  // After all keys. What scores lack, in units of log2(e), as 8 bits have it: nothing.
  __device__ static void end_tile(Output&) {}
  __device__ static float sink_shift(int) { return 0; }
  __device__ static void add_shift(OnlineSoftmax<1>&) {}
  // What a row without keys has beside its sink.
  __device__ static float without_keys(const AttentionArguments&, const AttentionTile&, int, int) { return 0; }
};

}  // namespace forwardpass
