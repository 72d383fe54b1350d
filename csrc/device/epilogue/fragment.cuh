#pragma once
// The epilogue of a warp's accumulators as they lie in its registers, and the general one beside it.
//
// The outputs that most products have, of 16 bits, quantised in groups or, of integers, in int8 with a static
// out_scale, are made directly: values are computed in the fragments' layout, and only their 16 or 8 bits go through
// shared memory, in which a lane finds 16 bytes of a row. Everything else (fp32, a zero point, partial sums) takes the
// general epilogue, which is staged.cuh's. Which one is decided on the host, once a launch; a warp whose columns have
// an out_scale beyond 2^96 or below 2^-96 takes the general one. The bits are the same.
//
// Columns: the scales and biases of a warp's columns are loaded once a tile, a lane one of each 32, and staged as pairs
// of floats. So their kinds (per column or one, three types, none) are decided there, all loads are in flight
// together, and a lane's two columns of an n8 tile are one load of 16 bytes from shared memory. On wgmma that is done
// while the first wgmmas run. The scales of a lane's rows, two for each sixteen, stay in registers.
//
// Then sixteen rows by 64 columns at a time, in a loop, so that the code of each activation exists once. Registers can
// be indexed by constants only: the step that reads accumulators, dequantisation, is the body of a switch. Beside the
// accumulators a chunk's 32 values are alive. For eight outputs in 16 bits, which is 16 bytes: 2 loads of columns, 8
// conversions of int32, 8 products of scales, 8 fma, 4 packings, one matrix of 8 x 8 stored (a quarter of an stmatrix,
// from sm_90 on), one load and one store. Rows of 128, 64 or 32 bytes are swizzled: no bank conflicts. Shared memory
// moves 4 bytes for an output, 8 in the general epilogue.
//
// Instructions of a warp for its part of a tile of 128 x 256 on sm_90a, 4096 accumulators, read from the machine code
// (nvcc 13.0) along the path of a whole tile: int8 to bf16, row by column scales 870 (2570 in the general epilogue);
// e4m3, silu_mul and quantised 1230.
#include "device/epilogue/staged.cuh"
#include "device/swizzled_rows.cuh"

namespace forwardpass {

// What a warp with kColumns columns stages.
template <int kColumns>
union FragmentStaging {
  Staging general;
  struct {
    float2 column[kColumns];      // scale and bias
    uint4 out[kStagingRows * 8];  // rows of up to 128 bytes
  } direct;
};

// p[column of this lane] for each 32 columns, the last of the `columns` that there are instead of those beyond it.
template <int kCount, class T>
__device__ inline void load_columns(T (&v)[kCount], const T* p, int columns) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = p[min(i * 32 + static_cast<int>(threadIdx.x % 32), columns - 1)];
}

// A tile of a warp's accumulators to outputs of 16 bits, or to e4m3 with a scale for each group.
// kInSteps: or to int8 with a static scale.
template <class Accumulators, bool kBlockScaled, bool kInSteps>
struct DirectEpilogue {
  static constexpr int kRows = (Accumulators::kTilesM - 1) * Accumulators::kStep + 16,
                       kColumns = Accumulators::kTilesN * 8;
  // A chunk: sixteen rows by kTiles n8 tiles, kAcross of them beside each other.
  static constexpr int kTiles = Accumulators::kTilesN < 8 ? Accumulators::kTilesN : 8,
                       kAcross = Accumulators::kTilesN / kTiles, kChunks = Accumulators::kTilesM * kAcross;
  using Element = typename Accumulators::Element;
  static constexpr bool kInteger = std::is_same_v<Element, int32_t>;
  // Whether a residual may come before the activation: on wgmma. On mma.sync the assembler takes six registers more for
  // it and moves addresses in a convolution's main loop, 437 instead of 405 instructions for 2^20 multiply-adds.
  static constexpr bool kResidualFirst = kInteger && Accumulators::kStep > 16;
  using Storage = FragmentStaging<kColumns>;
  using OfRows = float[Accumulators::kTilesM][2];  // a value for each row of a lane
  // A chunk's outputs, four to a tile: of gates and ups, whose tiles alternate, there are half as many.
  template <bool kGated>
  static constexpr int kOut = kGated ? kTiles / 2 : kTiles;

  Storage& storage;
  const GemmOutput& o;
  const int64_t row, column;  // this warp's first
  const int rows, columns;    // of this warp's, those inside the output
  const bool whole;           // all are, and the output takes 16 bytes at a time

  __device__ DirectEpilogue(Storage& storage, const GemmOutput& o, int64_t row, int64_t column)
      : storage(storage),
        o(o),
        row(row),
        column(column),
        rows(inside(o.rows - row, kRows)),
        columns(inside(o.columns - column, kColumns)),
        whole(o.access.out && rows == kRows && columns == kColumns) {}
  // Stages the columns, and has the scales of this lane's rows.
  __device__ void load(OfRows& a_scale) const {
    for_each_row([&](int i, int half) { a_scale[i][half] = 0; });
    if (empty()) return;
    const Epilogue& e = o.epilogue;
    constexpr int kCount = kColumns / 32;
    float scale[kCount] = {}, bias[kCount] = {};
    if (e.b_scale) {
      load_columns(scale, e.b_scale + (e.b_scale_per_column ? column : 0), e.b_scale_per_column ? columns : 1);
    } else {
      apply(scale, [](float) { return 1.0f; });
    }
    if (e.bias) {
      if (e.bias_dtype == Dtype::f32) {
        load_columns(bias, static_cast<const float*>(e.bias) + column, columns);
      } else {  // one load for two types
        uint16_t bits[kCount];
        load_columns(bits, static_cast<const uint16_t*>(e.bias) + column, columns);
        const bool is_f16 = e.bias_dtype == Dtype::f16;
#pragma unroll
        for (int i = 0; i < kCount; ++i)
          bias[i] = is_f16 ? to_float(reinterpret_cast<const __half&>(bits[i]))
                           : to_float(reinterpret_cast<const __nv_bfloat16&>(bits[i]));
      }
    }
    const float* from = e.a_scale + (e.a_scale_per_row ? row : 0);
    for_each_row([&](int i, int half) {
      const int r = min(Accumulators::row(i, 2 * half), e.a_scale_per_row ? rows - 1 : 0);
      a_scale[i][half] = e.a_scale ? from[r] : 1.0f;
    });
#pragma unroll
    for (int i = 0; i < kCount; ++i) storage.direct.column[i * 32 + threadIdx.x % 32] = {scale[i], bias[i]};
    __syncwarp();
  }
  __device__ bool empty() const { return rows == 0 || columns == 0; }
  // Whether outputs are int8 with a static scale.
  __device__ bool in_steps() const { return kInSteps && o.epilogue.out_dtype == Dtype::i8; }
  // Whether no division is needed for them.
  __device__ bool has_usual_steps() const {
    float size[kColumns / 32];
    const Epilogue& e = o.epilogue;
    load_columns(size, e.out_scale + (e.out_scale_per_column ? column : 0), e.out_scale_per_column ? columns : 1);
    bool usual = true;
#pragma unroll
    for (int i = 0; i < kColumns / 32; ++i) usual = usual && is_usual_step(size[i]);
    return __all_sync(0xffffffff, usual);
  }
  __device__ static int inside(int64_t left, int most) {
    return static_cast<int>(max(min(left, int64_t{most}), int64_t{0}));
  }

  // f(i, half) for each row of a lane.
  template <class F>
  __device__ static void for_each_row(F f) {
#pragma unroll
    for (int i = 0; i < Accumulators::kTilesM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) f(i, half);
  }
  // f(row of tiles, first tile) of a chunk, as at_index calls it.
  template <class F>
  __device__ static void at_chunk(int chunk, F f) {
    at_index<kChunks>(chunk, [&](int i) { f(i / kAcross, i % kAcross * kTiles); });
  }

  // Scale and bias of one of this lane's columns in a tile, and of the next one.
  __device__ const float4& columns_of(int tile) const {
    return reinterpret_cast<const float4&>(storage.direct.column[tile * 8 + accumulator_column(0)]);
  }
  // Those of a chunk: gates, which become the outputs, and ups.
  template <bool kGated>
  struct Values {
    float y[kOut<kGated> * 4], up[kGated ? kOut<kGated> * 4 : 1];
  };
  // Of the four accumulators that a lane has in a tile: two columns of two rows.
  struct TwoByTwo {
    const float (&a_scale)[2];
    float4 pair;  // scale and bias of either column
    __device__ float row_scale(int e) const { return a_scale[e / 2]; }
    __device__ ColumnTerms column(int e) const {
      return e % 2 ? ColumnTerms{pair.z, pair.w} : ColumnTerms{pair.x, pair.y};
    }
  };
  // Where the values of tile t of a chunk go.
  template <bool kGated>
  __device__ static float (&values_of(Values<kGated>& values, int t))[4] {
    if (kGated && t % 2) return reinterpret_cast<float (&)[4]>(values.up[t / 2 * 4]);
    return reinterpret_cast<float (&)[4]>(values.y[(kGated ? t / 2 : t) * 4]);
  }
  // Of row i of tiles, from tile `first` on.
  template <bool kGated>
  __device__ void dequantize_chunk(Values<kGated>& values, const Accumulators& acc, const OfRows& a_scale, int i,
                                   int first) const {
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
      dequantize(values_of(values, t), acc[i][first + t], TwoByTwo{a_scale[i], columns_of(first + t)});
  }
  // Accumulators that are the values: block scales have been multiplied in, and there is no bias.
  template <bool kGated>
  __device__ static void copy_chunk(Values<kGated>& values, const Accumulators& acc, int i, int first) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) values_of(values, t)[e] = acc[i][first + t][e];
  }
  template <bool kGated>
  __device__ Values<kGated> values(const Accumulators& acc, const OfRows& a_scale, int chunk) const {
    Values<kGated> values;
    if (kBlockScaled && o.plain) {
      at_chunk(chunk, [&](int i, int first) { copy_chunk(values, acc, i, first); });
    } else {
      at_chunk(chunk, [&](int i, int first) { dequantize_chunk(values, acc, a_scale, i, first); });
    }
    if constexpr (kResidualFirst && !kGated)
      if (o.epilogue.residual && o.epilogue.residual_first) add_residual_to(values.y, chunk);
    // A branch for each sixteen that are interleaved: 32 of the largest activation take more registers than there are.
    constexpr int kTogether = kOut<kGated> * 4 < 16 ? kOut<kGated> * 4 : 16;
#pragma unroll
    for (int k = 0; k < kOut<kGated> * 4; k += kTogether) {
      const auto activation = static_cast<Activation>(ptx::unknown(static_cast<int32_t>(o.epilogue.activation)));
      activate(activation, reinterpret_cast<float (&)[kTogether]>(values.y[k]));
    }
    if constexpr (kGated) multiply_by_up(values.y, values.up);
    return values;
  }
  // This lane's first row of a chunk.
  __device__ static int row_of(int chunk) {
    return (Accumulators::kTilesM == 1 ? 0 : chunk / kAcross * Accumulators::kStep) + group_id();
  }
  // What a chunk's outputs are multiplied by, or what is added to them, by two columns of a row. first: of
  // row_of(chunk), below: how far from it that of the row eight below is. Four lanes have 16 bytes of a row, and find
  // the other half of a sector in L1. As rows are aligned, all eight columns of a tile are inside the output, or none
  // is.
  template <int kWords>
  __device__ void load_pairs(uint32_t (&pair)[kWords][2], int chunk, const void* from, int64_t first,
                             int64_t below) const {
    const int first_row = row_of(chunk), first_column = chunk % kAcross * kWords * 8;
    const auto* p = static_cast<const uint16_t*>(from) + first + column + first_column + thread_in_group() * 2;
#pragma unroll
    for (int t = 0; t < kWords; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        pair[t][half] = 0;
        if (first_row + half * 8 < rows && first_column + t * 8 < columns)
          pair[t][half] = *reinterpret_cast<const uint32_t*>(p + half * below + t * 8);
      }
  }
  template <int kWords>
  __device__ void load_residual(uint32_t (&pair)[kWords][2], int chunk) const {
    const int64_t stride = o.epilogue.residual_stride;
    load_pairs(pair, chunk, o.epilogue.residual, (row + row_of(chunk)) * stride, 8 * stride);
  }
  template <int kWords>
  __device__ void load_ada_gate(uint32_t (&pair)[kWords][2], int chunk) const {
    const int64_t first = row + row_of(chunk), sample = sample_of(o.epilogue, first),
                  stride = o.epilogue.ada_gate_stride;
    load_pairs(pair, chunk, o.epilogue.ada_gate, sample * stride, (sample_of(o.epilogue, first + 8) - sample) * stride);
  }

  // Chunks to the output, rows of kWords times 16 bytes. A lane has 16 bytes of every kAtOnce-th row.
  template <int kWords, class T>
  struct Store {
    using Rows = SwizzledRows<kWords * 16>;
    static constexpr int kAtOnce = 32 / kWords, kSteps = kStagingRows / kAtOnce, kElements = 16 / sizeof(T);
    const DirectEpilogue& direct;
    T* first;  // in the first chunk

    const int columns;  // inside the output

    __device__ Store(const DirectEpilogue& direct, bool gated)
        : direct(direct), columns(gated ? direct.columns / 2 : direct.columns) {
      const int lane = threadIdx.x % 32;
      first = static_cast<T*>(direct.o.epilogue.out) + (direct.row + lane / kWords) * direct.o.epilogue.out_stride +
              (gated ? direct.column / 2 : direct.column) + lane % kWords * kElements;
      ptx::compute_here(first);
    }
    // Words of a chunk: of row group_id(), and of the row eight below.
    __device__ void operator()(const uint32_t (&word)[kWords][2], int chunk) const {
      auto* staged = reinterpret_cast<uint8_t*>(direct.storage.direct.out);
      const int lane = threadIdx.x % 32;
#if __CUDA_ARCH__ >= 900
      const uint32_t to = ptx::shared_address(staged) + Rows::offset(lane % 16, lane / 16);
#pragma unroll
      for (int w = 0; w < kWords; w += 2)
        ptx::stmatrix_x4(to ^ w * 16, {word[w][0], word[w][1], word[w + 1][0], word[w + 1][1]});
#else
#pragma unroll
      for (int w = 0; w < kWords; ++w)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<uint32_t*>(staged + Rows::offset(group_id() + half * 8, w) + thread_in_group() * 4) =
              word[w][half];
#endif
      __syncwarp();
      uint4 v[kSteps];
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        v[i] = *reinterpret_cast<const uint4*>(staged + Rows::offset(lane / kWords + i * kAtOnce, lane % kWords));
        if constexpr (sizeof(T) == 1) v[i] = separate(v[i]);
      }
      __syncwarp();
      const int64_t stride = direct.o.epilogue.out_stride;
      const int below = Accumulators::kTilesM == 1 ? 0 : chunk / kAcross * Accumulators::kStep,
                right = chunk % kAcross * kWords * kElements;
      T* p = first + below * stride + right;
      if (direct.whole) {
#pragma unroll
        for (int i = 0; i < kSteps; ++i, p += kAtOnce * stride) ptx::st_global(p, v[i]);
      } else {
        masked(v, p, direct.rows - below - lane / kWords, columns - right - lane % kWords * kElements);
      }
    }
    // The same of what is among the `rows` and `columns` that there are from p on.
    __device__ void masked(const uint4 (&v)[kSteps], T* p, int rows, int columns) const {
#pragma unroll
      for (int i = 0; i < kSteps; ++i, p += kAtOnce * direct.o.epilogue.out_stride) {
        if (i * kAtOnce >= rows) break;
#pragma unroll
        for (int j = 0; j < kElements; j += kVec)
          store_vec(reinterpret_cast<const Vec<T>*>(&v[i])[j / kVec], p + j, columns - j, direct.o.access.out);
      }
    }
  };
  // From pairs of the bytes of two tiles in each word, the eight bytes of the first tile and those of the second.
  __device__ static uint4 separate(uint4 v) {
    return {__byte_perm(v.x, v.y, 0x5410), __byte_perm(v.z, v.w, 0x5410), __byte_perm(v.x, v.y, 0x7632),
            __byte_perm(v.z, v.w, 0x7632)};
  }

  // Outputs of 16 bits or, of integers, of int8 in steps.
  template <bool kGated>
  __device__ void store_values(const Accumulators& acc, const OfRows& a_scale) const {
    const Store<kOut<kGated>, uint16_t> store(*this, kGated);
#pragma unroll 1
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      auto v = values<kGated>(acc, a_scale, chunk);
      if constexpr (kInSteps && !kGated)
        if (in_steps()) {
          store_in_steps(v.y, chunk);
          continue;
        }
      uint32_t word[kOut<kGated>][2];
      if (!kGated && o.epilogue.residual && !(kResidualFirst && o.epilogue.residual_first)) {
        pack_sums(word, v.y, chunk);
      } else if (o.epilogue.out_dtype == Dtype::bf16) {
        pack<Dtype::bf16>(word, v.y);
      } else {
        pack<Dtype::f16>(word, v.y);
      }
      store(word, chunk);
    }
  }

  // Outputs of 8 bits with a scale for each group of a row, or for the row, all of whose columns this warp has. Two
  // passes: the values take their accumulators' place, until a row's largest magnitudes are known. Of the rows and
  // groups that four lanes share, each lane has one's scale to compute.
  template <bool kGated>
  __device__ void quantize(Accumulators& acc, const OfRows& a_scale) const {
    static_assert(Accumulators::kTilesM == 1 && (kGroups<kGated> == 1 || kGroups<kGated> == 2));
    float most[kGroups<kGated>][2] = {}, inverse[kGroups<kGated>][2];
    replace_by_values<kGated>(acc, a_scale, most);
    if constexpr (kGroups<kGated> == 2)
      if (rowwise())
#pragma unroll
        for (int half = 0; half < 2; ++half) most[0][half] = most[1][half] = ptx::max_nan(most[0][half], most[1][half]);
    store_group_scales<kGated>(most, inverse);
    const Store<kOut<kGated> / 2, uint8_t> store(*this, kGated);
#pragma unroll(kInteger ? 1 : kChunks)  // as a loop it is 9 KB less, and up to 3 % slower at a K of 256
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      uint32_t word[kOut<kGated> / 2][2];
      at_chunk(chunk, [&](int, int first) { pack_8_bits<kGated>(word, acc, first, inverse[group_of<kGated>(first)]); });
      store(word, chunk);
    }
  }

  // A row is one group.
  __device__ bool rowwise() const { return o.epilogue.group_scale_stride == 0; }

 private:
  // Columns of the output in a chunk; groups of the warp's columns; that of the chunk whose first tile this is.
  template <bool kGated>
  static constexpr int kChunkColumns = kOut<kGated> * 8;
  template <bool kGated>
  static constexpr int kGroups = kAcross * kChunkColumns<kGated> / kScaleBlock;
  template <bool kGated>
  __device__ static constexpr int group_of(int first) {
    return first / kTiles * kChunkColumns<kGated> / kScaleBlock;
  }

  template <Dtype Out, int kWords>
  __device__ static void pack(uint32_t (&word)[kWords][2], const float (&y)[kWords * 4]) {
    round_pairs<Out>(reinterpret_cast<uint32_t (&)[kWords * 2]>(word), y);
  }
  // The same with the residual, and with the gate before it. On a way of its own, down to the words: were sums and
  // values to meet in registers, each value would be moved there.
  template <int kWords>
  __device__ void pack_sums(uint32_t (&word)[kWords][2], float (&y)[kWords * 4], int chunk) const {
    if (o.epilogue.ada_gate) {
      uint32_t gate[kWords][2];
      load_ada_gate(gate, chunk);
      if (o.epilogue.out_dtype == Dtype::bf16) {
        multiply_by_ada_gate(y, reinterpret_cast<__nv_bfloat16(&)[kWords * 4]>(gate));
      } else {
        multiply_by_ada_gate(y, reinterpret_cast<__half(&)[kWords * 4]>(gate));
      }
    }
    uint32_t residual[kWords][2];
    load_residual(residual, chunk);
    if (o.epilogue.out_dtype == Dtype::bf16) {
      add_residual(y, reinterpret_cast<__nv_bfloat16(&)[kWords * 4]>(residual));
      pack<Dtype::bf16>(word, y);
    } else {
      add_residual(y, reinterpret_cast<__half(&)[kWords * 4]>(residual));
      pack<Dtype::f16>(word, y);
    }
  }
  // A chunk's values plus the residual, before the activation.
  __device__ void add_residual_to(float (&y)[kTiles * 4], int chunk) const {
    uint32_t residual[kTiles][2];
    load_residual(residual, chunk);
    if (o.epilogue.out_dtype == Dtype::bf16) {
      add_residual(y, reinterpret_cast<__nv_bfloat16(&)[kTiles * 4]>(residual));
    } else {
      add_residual(y, reinterpret_cast<__half(&)[kTiles * 4]>(residual));
    }
  }
  // A chunk in int8. The steps of its columns are staged where its outputs will be.
  __device__ void store_in_steps(const float (&y)[kTiles * 4], int chunk) const {
    const Epilogue& e = o.epilogue;
    const float* size = e.out_scale + (e.out_scale_per_column ? column : 0);
    auto* steps = reinterpret_cast<Step*>(storage.direct.out);
#pragma unroll
    for (int i = threadIdx.x % 32; i < kTiles * 8; i += 32) {
      const int c = min(chunk % kAcross * kTiles * 8 + i, columns - 1);
      const float s = size[e.out_scale_per_column ? c : 0];
      steps[i] = {s, __frcp_rn(s)};
    }
    __syncwarp();
    uint32_t word[kTiles / 2][2];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const Step first = steps[t * 8 + accumulator_column(0)], second = steps[t * 8 + accumulator_column(1)];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t pair = __byte_perm(nearest_step(y[t * 4 + half * 2], first),
                                          nearest_step(y[t * 4 + half * 2 + 1], second), 0x0040);
        word[t / 2][half] = t % 2 ? __byte_perm(word[t / 2][half], pair, 0x5410) : pair;
      }
    }
    __syncwarp();
    Store<kTiles / 2, uint8_t>(*this, false)(word, chunk);
  }
  // Of two tiles from `first` on in each word, times a row's factor.
  template <bool kGated>
  __device__ static void pack_8_bits(uint32_t (&word)[kOut<kGated> / 2][2], const Accumulators& acc, int first,
                                     const float (&factor)[2]) {
#pragma unroll
    for (int w = 0; w < kOut<kGated> / 2; ++w)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        word[w][half] = pair_of_8_bits(acc[0][first + 2 * w], half, factor[half]) |
                        pair_of_8_bits(acc[0][first + 2 * w + 1], half, factor[half]) << 16;
  }
  __device__ static uint32_t pair_of_8_bits(const Element (&y)[4], int half, float factor) {
    const float low = __fmul_rn(value(y[half * 2]), factor), high = __fmul_rn(value(y[half * 2 + 1]), factor);
    if constexpr (kInteger) {
      return (to_int(low, -127, 127) & 0xff) | (to_int(high, -127, 127) & 0xff) << 8;
    } else {
      return to_e4m3x2(high, low);
    }
  }
  // A value in the place of its accumulator.
  __device__ static float& value(Element& acc) { return reinterpret_cast<float&>(acc); }
  __device__ static float value(const Element& acc) { return reinterpret_cast<const float&>(acc); }

  // The first pass. most: of each group and row of this lane, the largest magnitude.
  template <bool kGated>
  __device__ void replace_by_values(Accumulators& acc, const OfRows& a_scale, float (&most)[kGroups<kGated>][2]) const {
#pragma unroll 1
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      auto v = values<kGated>(acc, a_scale, chunk);
      if (!whole) trim<kGated>(v.y, columns - chunk * kTiles * 8);
      at_chunk(chunk, [&](int, int first) { replace_chunk<kGated>(acc, v.y, first, most[group_of<kGated>(first)]); });
    }
  }
  template <bool kGated>
  __device__ static void replace_chunk(Accumulators& acc, const float (&y)[kOut<kGated> * 4], int first,
                                       float (&most)[2]) {
#pragma unroll
    for (int t = 0; t < kOut<kGated>; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        value(acc[0][first + t][e]) = y[t * 4 + e];
        most[e / 2] = ptx::max_nan(most[e / 2], fabsf(y[t * 4 + e]));
      }
  }
  // Between the passes. inverse: of each group and row, by what its values are multiplied.
  template <bool kGated>
  __device__ void store_group_scales(const float (&most)[kGroups<kGated>][2],
                                     float (&inverse)[kGroups<kGated>][2]) const {
    constexpr int kOfLane = 2 * kGroups<kGated>;
    const int of_lane = thread_in_group() % kOfLane;  // the first lanes' store; others compute the same
    float range = 0;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      float m = most[i / 2][i % 2];
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) m = ptx::max_nan(m, __shfl_xor_sync(0xffffffff, m, lanes));
      if (i == of_lane) range = m;
    }
    range = range < kLeastRange ? kLeastRange : range;
    constexpr float kSteps = kInteger ? 127 : 448;
    const float inverse_of_mine = __fdiv_rn(kSteps, range);
    const Epilogue& e = o.epilogue;
    const int r = Accumulators::row(0, of_lane % 2 * 2), group = of_lane / 2;
    const bool is_first = group == 0 || (!rowwise() && group * kScaleBlock * (kGated ? 2 : 1) < columns);
    if (thread_in_group() < kOfLane && r < rows && is_first)
      e.group_scale[row + r + (column / (kGated ? 2 : 1) / kScaleBlock + group) * e.group_scale_stride] =
          __fdiv_rn(range, kSteps);
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) inverse[i / 2][i % 2] = __shfl_sync(0xffffffff, inverse_of_mine, i, 4);
  }
  // Zeros from the column `left` of a chunk on: outside the output, they make no group's scale larger.
  template <bool kGated>
  __device__ static void trim(float (&y)[kOut<kGated> * 4], int left) {
#pragma unroll
    for (int k = 0; k < kOut<kGated> * 4; ++k)
      if ((kGated ? 2 : 1) * (k / 4) * 8 + accumulator_column(k % 4) >= left) y[k] = 0;
  }
};

// From a warp's accumulators, whose first is in `row` and `column` of a tile, to the output. Element::kBlockScaled:
// there may be block scales, so that the accumulators are the outputs.
template <class Config>
struct FragmentEpilogue : WarpEpilogue<FragmentStaging<Config::Accumulators::kTilesN * 8>> {
  using Accumulators = typename Config::Accumulators;
  using WarpEpilogue<FragmentStaging<Accumulators::kTilesN * 8>>::WarpEpilogue;
  static constexpr bool kQuantizes = false, kBlockScaled = Config::Element::kBlockScaled;
  // Not of a grouped GEMM: on mma.sync it would spill 20 bytes.
  static constexpr bool kInSteps = std::is_same_v<typename Config::Acc, int32_t> && Config::kExperts == 0;
  using Direct = DirectEpilogue<Accumulators, kBlockScaled, kInSteps>;

  typename Direct::OfRows a_scale = {};  // of this lane's rows in the tile that has begun

  template <class Tile>
  __device__ Direct direct(const Tile& tile, int row, int column) const {
    return {*this->staging, this->out, tile.row + row, tile.column + column};
  }
  // What a tile's outputs need beside its accumulators, loaded while those are computed.
  template <class Tile>
  __device__ void begin(const Tile& tile, int row, int column) {
    if (this->out.direct && !(kBlockScaled && this->out.plain)) direct(tile, row, column).load(a_scale);
  }
  template <class Tile>
  __device__ void operator()(const Accumulators& acc, const Tile& tile, int row, int column) const {
    const GemmOutput& out = this->out;
    const auto direct = this->direct(tile, row, column);
    if (!out.direct || (direct.in_steps() && !direct.empty() && !direct.has_usual_steps()))
      return finish_fragments(acc, this->staging->general, out, tile.row + row, tile.column + column, tile.split);
    if (direct.empty()) return;
    if constexpr (Config::Mainloop::kGated)
      if (is_gated(out.epilogue.activation)) return direct.template store_values<true>(acc, a_scale);
    direct.template store_values<false>(acc, a_scale);
  }
};

// The same where outputs may have to be quantised in groups of 128 or in rows, all of whose columns a warp has: to e4m3
// or, of integers, to int8, those in rows without a gate.
template <class Config>
struct QuantizingEpilogue : FragmentEpilogue<Config> {
  using Base = FragmentEpilogue<Config>;
  using Base::Base;
  static constexpr bool kQuantizes = true;
  static_assert(Config::kN % kScaleBlock == 0);

  template <class Tile>
  __device__ void operator()(typename Config::Accumulators& acc, const Tile& tile, int row, int column) const {
    const Epilogue& e = this->out.epilogue;
    if (!e.group_scale) return Base::operator()(acc, tile, row, column);
    const auto direct = this->direct(tile, row, column);
    if (direct.empty()) return;
    if (!is_gated(e.activation)) {
      direct.template quantize<false>(acc, this->a_scale);
    } else if constexpr (Config::kConsumerN == 2 * kScaleBlock && Base::kBlockScaled) {
      direct.template quantize<true>(acc, this->a_scale);
    }
  }
};

}  // namespace forwardpass
