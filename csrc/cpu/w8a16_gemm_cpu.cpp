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

struct Product {
  const uint8_t* a;  // fp32, rows `stride` bytes apart, zero from K on
  int64_t rows, stride;
  Matrix b;
  const float* block_scale;
};

// sums[i * stride + j - first], of b's rows from `first` to `last`.
template <class Dot>
INLINE void multiply(const Product& p, int64_t first, int64_t last, float* sums, int64_t stride) {
  const int64_t k = p.b.columns, blocks = ceil_div(k, kScaleBlock);
  for_each_tile<Dot>(
      p.rows, first, last, [&](auto rows, auto columns, int64_t i, int64_t j) __attribute__((always_inline)) {
        const uint8_t *a = p.a + i * p.stride, *b = static_cast<const uint8_t*>(p.b.data) + j * p.b.stride;
        Tile<Dot, rows, columns> tile;
        if (!p.block_scale) {
          tile.add(a, p.stride, b, p.b.stride, 0, k);
        } else {
          for (int64_t block = 0; block < blocks; ++block) {
            Tile<Dot, rows, columns> part;
            part.add(a, p.stride, b, p.b.stride, block * kScaleBlock, std::min((block + 1) * kScaleBlock, k));
            tile.add_scaled(part, [&](int column) { return p.block_scale[(j + column) * blocks + block]; });
          }
        }
        tile.store(sums + i * stride + j - first, stride, [](float sum, int) { return sum; });
      });
}

void by_few_rows(const Matrix& a, const Matrix& b, const float* block_scale, const Epilogue& epilogue) {
  const int64_t m = a.rows, stride = round_up(a.columns, kMostLanes);
  const CacheLines buffer = allocate(m * stride * 4);
  auto rows = reinterpret_cast<float*>(buffer[0].bytes);
  with_vectors(VECTOR_CODE {
    with_float_dtype(a.dtype, [&](auto D) __attribute__((always_inline)) {
      for (int64_t r = 0; r < m; ++r) {
        const void* x = static_cast<const char*>(a.data) + r * a.stride * size_of(D);
        for_each_vector<V>(
            0, a.columns, VECTOR_BODY(&) { store<Dtype::f32>(load<V, D()>(x, c, n), rows + r * stride, c, n); });
        std::fill(rows + r * stride + a.columns, rows + (r + 1) * stride, 0.0f);
      }
    });
  });
  const Product p{buffer[0].bytes, m, stride * 4, b, block_scale};
  multiply_few_rows<Dtype::f32>(m, b, epilogue, [&](int64_t first, int64_t last, float* sums, int64_t sums_stride) {
    with_vectors(VECTOR_CODE {
      if (b.dtype == Dtype::i8) return multiply<FloatDot<V, Dtype::i8>>(p, first, last, sums, sums_stride);
      multiply<FloatDot<V, Dtype::e4m3>>(p, first, last, sums, sums_stride);
    });
  });
}

// A thread takes some rows of b (columns of the output) at a time. They are upconverted to fp32 and stay in its cache
// while oneDNN multiplies by them; so does the product until the epilogue has read it.
void by_upconverted_columns(const Tensor& a, const Matrix& b, const float* block_scale, const Epilogue& epilogue) {
  const Tensor a_fp32 = torch::stable::to(a, ScalarType::Float);
  const int64_t m = a.size(0), n = b.rows, threads = torch::stable::get_num_threads();
  constexpr int64_t kMaxColumns = 256,
                    kMaxRows = 1024;  // the product of one thread: 1 MB of fp32, its second-level cache
  const int64_t chunk = std::min(kMaxColumns, round_up((n + threads - 1) / threads, 16));
  torch::stable::parallel_for(0, (n + chunk - 1) / chunk, 1, [&](int64_t begin, int64_t end) {
    Tensor b_fp32 = contiguous_rows({chunk, b.columns}, ScalarType::Float, a), rows = a_fp32;
    for (int64_t column = begin * chunk; column < std::min(end * chunk, n); column += chunk) {
      const int64_t columns = std::min(chunk, n - column);
      auto b_data = static_cast<float*>(b_fp32.mutable_data_ptr());
      upconvert_rows({b, block_scale, column, column + columns, b_data});
      const Tensor b_transposed = transposed(b_fp32, {b_data, Dtype::f32, columns, b.columns, b.columns});
      for (int64_t row = 0; row < m; row += kMaxRows) {
        Tensor acc = call("aten::mm", torch::stable::narrow(rows, 0, row, std::min(kMaxRows, m - row)), b_transposed);
        dequant_activation_cpu({matrix(acc, "w8a16_gemm", "acc"), columns_from(rows_from(epilogue, row), column)});
      }
    }
  });
}

}  // namespace

void w8a16_gemm_cpu(const Tensor& x, const Matrix& a, const Matrix& b, const float* block_scale,
                    const Epilogue& epilogue) {
  // Milliseconds of one core of a Zen 4 for 1536 x 576, with AVX-512 and AVX2: 16 rows 0.30 and 0.37, by upconverted
  // columns 0.55 and 0.54; 48 rows 0.87 and 1.06 for 1.18 and 1.17; 64 rows 1.18 and 1.48 for 1.46 and 1.44. e4m3 takes
  // more instructions, for every four rows, and what is neither has vectors of four.
  const int64_t few = tier() == Tier::baseline ? 4 : b.dtype == Dtype::i8 ? 48 : 16;
  if (a.rows <= few) return by_few_rows(a, b, block_scale, epilogue);
  by_upconverted_columns(as_matrix(x, a), b, block_scale, epilogue);
}

}  // namespace forwardpass
