#include "cpu/few_rows.h"
#include "cpu/row_chunks.h"
#include "cpu/tier.h"
#include "cpu/upconvert_rows.h"
#include "cpu/w8a16_gemm.h"
#include "params/dequant_activation.h"
#include "params/gemm.h"
#include "torch/torch_ops.h"

namespace forwardpass {
namespace {

using namespace cpu;

// Elements of b, of dtype D, as they are in registers for an instant, times fp32.
template <class V, Dtype D>
struct FloatDot {
  using Sums = V;
  using Wide = V;
  static constexpr int kStep = kLanes<V>, kBytes = 4, kSums = kLanes<V> == 16 ? 16 : 8;
  INLINE static V widen(const uint8_t* b) { return load<V, D>(b, 0); }
  INLINE static void add(V& sums, const uint8_t* a, V b) {
    const V row = load<V, Dtype::f32>(a, 0);
#if defined(__x86_64__)
    // As assembly: of the fma of vector.h g++ leaves copies of its operands on the stack, at half the speed.
    if constexpr (kLanes<V> > 4) {
      asm("vfmadd231ps %2, %1, %0" : "+v"(sums) : "v"(b), "v"(row));
      return;
    }
#endif
    sums += b * row;
  }
};

// sums[i * stride + j - first], of b's rows from `first` to `last`. Without scales of blocks a row is one block, of
// scale 1: a loop of its own for it was no faster, and this file took 24 s to compile, now 7.
template <class Dot>
INLINE void multiply(const W8a16Product& p, int64_t first, int64_t last, float* sums, int64_t stride) {
  const int64_t k = p.b.columns, a_stride = p.stride * 4;
  const int64_t block = p.block_scale ? kScaleBlock : std::max<int64_t>(k, 1), blocks = ceil_div(k, block);
  for_each_tile<Dot>(
      p.rows, first, last, [&](auto rows, auto columns, int64_t i, int64_t j) __attribute__((always_inline)) {
        auto a = reinterpret_cast<const uint8_t*>(p.a + i * p.stride);
        auto b = static_cast<const uint8_t*>(p.b.data) + j * p.b.stride;
        Tile<Dot, rows, columns> tile;
        for (int64_t n = 0; n < blocks; ++n) {
          Tile<Dot, rows, columns> part;
          part.add(a, a_stride, b, p.b.stride, n * block, std::min((n + 1) * block, k));
          tile.add_scaled(part,
                          [&](int column) { return p.block_scale ? p.block_scale[(j + column) * blocks + n] : 1.0f; });
        }
        tile.store(sums + i * stride + j - first, stride, [](float sum, int) { return sum; });
      });
}

void multiply_by_tier(const W8a16Product& p, int64_t first, int64_t last, float* sums, int64_t stride) {
  with_vectors(VECTOR_CODE {
    if (p.b.dtype == Dtype::i8) return multiply<FloatDot<V, Dtype::i8>>(p, first, last, sums, stride);
    multiply<FloatDot<V, Dtype::e4m3>>(p, first, last, sums, stride);
  });
}

constexpr int64_t kMaxColumns = 256;

// A thread takes some rows of b (columns of the output) at a time.
void by_many_rows(const Tensor& a, const W8a16Product& p) {
  const Tensor a_fp32 = torch::stable::to(a, ScalarType::Float);
  const int64_t n = p.b.rows, threads = torch::stable::get_num_threads();
  const int64_t chunk = std::min(kMaxColumns, round_up((n + threads - 1) / threads, 16));
  torch::stable::parallel_for(0, (n + chunk - 1) / chunk, 1, [&](int64_t begin, int64_t end) {
    const Tensor buffer = contiguous_rows({chunk, p.b.columns}, ScalarType::Float, a);
    for (int64_t column = begin * chunk; column < std::min(end * chunk, n); column += chunk)
      p.many_rows(a_fp32, column, std::min(column + chunk, n), buffer);
  });
}

}  // namespace

int64_t W8a16Product::most_few_rows(Dtype b) {
  // Milliseconds of one core of a Zen 4 for 1536 x 576, with AVX-512 and AVX2: 16 rows 0.30 and 0.37, by many_rows
  // 0.55 and 0.54; 48 rows 0.87 and 1.06 for 1.18 and 1.17; 64 rows 1.18 and 1.48 for 1.46 and 1.44. e4m3 takes
  // more instructions, for every four rows, and what is neither has vectors of four.
  return tier() == Tier::baseline ? 4 : b == Dtype::i8 ? 48 : 16;
}

void W8a16Product::few_rows(int64_t first, int64_t last) const {
  multiply_columns<Dtype::f32>(rows, first, last, epilogue,
                               [&](int64_t from, int64_t to, float* sums, int64_t sums_stride) {
                                 multiply_by_tier(*this, from, to, sums, sums_stride);
                               });
}

// The copy stays in the thread's cache while oneDNN multiplies by it; so does the product until the epilogue has read
// it.
void W8a16Product::many_rows(Tensor x, int64_t first, int64_t last, const Tensor& buffer) const {
  constexpr int64_t kMaxRows = 1024;  // the product of one thread: 1 MB of fp32, its second-level cache
  const int64_t columns = last - first, m = x.size(0);
  auto b_fp32 = static_cast<float*>(buffer.mutable_data_ptr());
  upconvert_rows({b, block_scale, first, last, b_fp32});
  const Tensor b_transposed = transposed(buffer, {b_fp32, Dtype::f32, columns, b.columns, b.columns});
  for (int64_t row = 0; row < m; row += kMaxRows) {
    Tensor acc = call("aten::mm", torch::stable::narrow(x, 0, row, std::min(kMaxRows, m - row)), b_transposed);
    dequant_activation_cpu({matrix(acc, "w8a16_gemm", "acc"), columns_from(rows_from(epilogue, row), first)});
  }
}

void rows_to_fp32(const Matrix& a, int64_t first, int64_t last, float* to, int64_t stride) {
  with_vectors(VECTOR_CODE {
    for (int64_t r = first; r < last; ++r) {
      float* row = to + (r - first) * stride;
      to_floats<V>(static_cast<const char*>(a.data) + r * a.stride * size_of(a.dtype), a.dtype, a.columns, row);
      std::fill(row + a.columns, row + stride, 0.0f);
    }
  });
}

void w8a16_gemm_cpu(const Tensor& x, const Matrix& a, const Matrix& b, const float* block_scale,
                    const Epilogue& epilogue) {
  const int64_t m = a.rows, stride = round_up(a.columns, kMostLanes);
  if (m > W8a16Product::most_few_rows(b.dtype))
    return by_many_rows(as_matrix(x, a), {nullptr, m, 0, b, block_scale, epilogue});
  const CacheLines buffer = allocate(m * stride * 4);
  auto rows = reinterpret_cast<float*>(buffer[0].bytes);
  rows_to_fp32(a, 0, m, rows, stride);
  const W8a16Product p{rows, m, stride, b, block_scale, epilogue};
  multiply_few_rows<Dtype::f32>(m, b, epilogue, [&](int64_t first, int64_t last, float* sums, int64_t sums_stride) {
    multiply_by_tier(p, first, last, sums, sums_stride);
  });
}

}  // namespace forwardpass
