#include "cpu/few_rows.h"
#include "cpu/row_chunks.h"
#include "cpu/tier.h"
#include "cpu/upconvert_rows.h"
#include "cpu/w8a16_gemm.h"
#include "cpu/words.h"
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
  static constexpr int kStep = kLanes<V>, kBytes = 4, kBytesOfB = 1, kSums = kLanes<V> == 16 ? 16 : 8;
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

// sums[i * stride + j] of b's row j, which is p.b's row column + j as Dot takes it. Without scales of blocks a row is
// one block, of scale 1: a loop of its own for it was no faster, and this file took 24 s to compile, now 7.
template <class Dot>
INLINE void multiply(const W8a16Product& p, const Matrix& b, int64_t column, float* sums, int64_t stride) {
  const int64_t k = b.columns, a_stride = p.a.stride * Dot::kBytes, b_stride = b.stride * Dot::kBytesOfB;
  const int64_t block = p.block_scale ? kScaleBlock : std::max<int64_t>(k, 1), blocks = ceil_div(k, block);
  const float* scales = p.block_scale ? p.block_scale + column * blocks : nullptr;
  for_each_tile<Dot>(
      p.a.rows, 0, b.rows, [&](auto rows, auto columns, int64_t i, int64_t j) __attribute__((always_inline)) {
        auto a = static_cast<const uint8_t*>(p.a.data) + i * a_stride;
        auto of_b = static_cast<const uint8_t*>(b.data) + j * b_stride;
        Tile<Dot, rows, columns> tile;
        for (int64_t n = 0; n < blocks; ++n) {
          Tile<Dot, rows, columns> part;
          part.add(a, a_stride, of_b, b_stride, n * block, std::min((n + 1) * block, k));
          tile.add_scaled(part, [&](int column) { return scales ? scales[(j + column) * blocks + n] : 1.0f; });
        }
        tile.store(sums + i * stride + j, stride);
      });
}

INLINE Matrix rows_of(const Matrix& m, int64_t first, int64_t last) {
  return {static_cast<const char*>(m.data) + first * m.stride * size_of(m.dtype), m.dtype, last - first, m.columns,
          m.stride};
}

#if defined(__x86_64__)
// Elements of a copy of b in bfloat16 times bfloat16.
struct PairsDot {
  using V = BfloatPairs::V;
  using Sums = V;
  using Wide = V;
  static constexpr int kStep = 32, kBytes = 2, kBytesOfB = 2, kSums = 16;
  INLINE static V widen(const uint8_t* b) { return load<V, Dtype::f32>(b, 0); }
  INLINE static void add(V& sums, const uint8_t* a, V b) {
    sums = BfloatPairs::multiply_add(b, load<V, Dtype::f32>(a, 0), sums);
  }
};

// The copy of a few rows of b stays in a core's first cache for all of a's.
template <Dtype D>
INLINE void multiply_pairs(const W8a16Product& p, int64_t first, int64_t last, float* sums, int64_t stride) {
  using V = PairsDot::V;
  constexpr int64_t kMostCopied = 12288;  // elements, 24 KB
  const int64_t k = p.b.columns, copy_stride = round_up(k, W8a16Product::kDepth);
  const int64_t columns =
      std::clamp(kMostCopied / std::max<int64_t>(copy_stride, 1) / 4 * 4, int64_t{4}, kGroupColumns);
  const CacheLines memory = allocate(columns * copy_stride * 2);
  auto copy = reinterpret_cast<uint16_t*>(memory[0].bytes);
  std::fill_n(copy, columns * copy_stride, 0);
  for (int64_t begin = first; begin < last; begin += columns) {
    const Matrix b = rows_of(p.b, begin, std::min(last, begin + columns));
    for (int64_t r = 0; r < b.rows; ++r) {
      auto row = static_cast<const char*>(b.data) + r * b.stride;
      for (int64_t c = 0; c < k; c += kLine) __builtin_prefetch(row + c + kAhead, 0, kToL2);
      for_each_vector<V>(
          0, k,
          VECTOR_BODY(&) { store_bits(BfloatPairs::to_bfloat(load<V, D>(row, c, n)), copy + r * copy_stride + c, n); });
    }
    multiply<PairsDot>(p, {copy, Dtype::bf16, b.rows, k, copy_stride}, begin, sums + begin - first, stride);
  }
}
#endif

void multiply_by_tier(const W8a16Product& p, int64_t first, int64_t last, float* sums, int64_t stride) {
  with_vectors(VECTOR_CODE {
#if defined(__x86_64__)
    if constexpr (kLanes<V> == 16)
      if (p.a.dtype == Dtype::bf16)
        return p.b.dtype == Dtype::i8 ? multiply_pairs<Dtype::i8>(p, first, last, sums, stride)
                                      : multiply_pairs<Dtype::e4m3>(p, first, last, sums, stride);
#endif
    const Matrix b = rows_of(p.b, first, last);
    if (p.b.dtype == Dtype::i8) return multiply<FloatDot<V, Dtype::i8>>(p, b, first, sums, stride);
    multiply<FloatDot<V, Dtype::e4m3>>(p, b, first, sums, stride);
  });
}

constexpr int64_t kMaxColumns = 256;
constexpr int64_t kLeastPairs = 16;  // 8 rows take as long in float32 (csrc/README.md)
// Of bfloat16, 384 KB of 768 columns: they stay in a core's second-level cache while the columns pass.
constexpr int64_t kMostRowsOfA = 256;

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

Dtype W8a16Product::operand(Dtype x, int64_t rows) {
  return x == Dtype::bf16 && rows >= kLeastPairs && has_avx512_bf16() ? Dtype::bf16 : Dtype::f32;
}

int64_t W8a16Product::most_few_rows(Dtype b) {
  // Milliseconds of one core of a Zen 4 for 1536 x 576, with AVX-512 and AVX2: 16 rows 0.30 and 0.37, by many_rows
  // 0.55 and 0.54; 48 rows 0.87 and 1.06 for 1.18 and 1.17; 64 rows 1.18 and 1.48 for 1.46 and 1.44. e4m3 takes
  // more instructions, for every four rows, and what is neither has vectors of four.
  return tier() == Tier::baseline ? 4 : b == Dtype::i8 ? 48 : 16;
}

void W8a16Product::few_rows(int64_t first, int64_t last) const {
  multiply_columns<Dtype::f32>(a.rows, first, last, epilogue,
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

void convert_rows(const Matrix& a, int64_t first, const Matrix& to) {
  const int64_t size = size_of(to.dtype), rest = to.stride - a.columns;
  auto out = static_cast<char*>(const_cast<void*>(to.data));
  with_vectors(VECTOR_CODE {
    for (int64_t r = 0; r < to.rows; ++r, out += to.stride * size) {
      const char* row = static_cast<const char*>(a.data) + (first + r) * a.stride * size_of(a.dtype);
      if (a.dtype == to.dtype) {
        std::memcpy(out, row, a.columns * size);
      } else if (to.dtype == Dtype::f32) {
        to_floats<V>(row, a.dtype, a.columns, reinterpret_cast<float*>(out));
      } else {
        from_floats<V>(reinterpret_cast<const float*>(row), to.dtype, a.columns, out);
      }
      std::memset(out + a.columns * size, 0, rest * size);
    }
  });
}

void w8a16_gemm_cpu(const Tensor& x, const Matrix& a, const Matrix& b, const float* block_scale,
                    const Epilogue& epilogue) {
  const int64_t m = a.rows, stride = round_up(a.columns, W8a16Product::kDepth);
  const Dtype operand = W8a16Product::operand(a.dtype, m);
  if (operand == Dtype::f32 && m > W8a16Product::most_few_rows(b.dtype))
    return by_many_rows(as_matrix(x, a), {{nullptr, Dtype::f32, m, a.columns, 0}, b, block_scale, epilogue});
  CacheLines buffer;
  Matrix rows = a;
  if (a.dtype != operand || a.columns != stride) {
    buffer = allocate(m * stride * size_of(operand));
    rows = {buffer[0].bytes, operand, m, a.columns, stride};
    convert_rows(a, 0, rows);
  }
  for (int64_t r = 0; r < m; r += kMostRowsOfA) {
    const W8a16Product p{rows_of(rows, r, std::min(m, r + kMostRowsOfA)), b, block_scale, rows_from(epilogue, r)};
    multiply_few_rows<Dtype::f32>(p.a.rows, b, p.epilogue,
                                  [&](int64_t first, int64_t last, float* sums, int64_t sums_stride) {
                                    multiply_by_tier(p, first, last, sums, sums_stride);
                                  });
  }
}

}  // namespace forwardpass
