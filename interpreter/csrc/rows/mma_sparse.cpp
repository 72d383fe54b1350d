// mma.sp: half of A's elements are zeros that nobody stores, and metadata says where the others lie along K,
// PTX ISA 9.7.14.6. A's registers are those of mma with half of K. What a zero would multiply is not looked at: of an
// infinity there it does not become NaN. So a row has columns of B of its own, and the products are added one by one.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "rows/matrix_rows.h"
#include "undefined.h"

namespace gpuless {
namespace {

template <class T>
using Read = T (*)(const uint8_t* row, int k);  // element k of a row of A, or of a column of B

template <class F>
float read_float(const uint8_t* row, int k) {
  uint16_t bits;
  std::memcpy(&bits, row + k * 2, 2);
  return decode<F>(bits);
}
float read_tf32(const uint8_t* row, int k) {
  uint32_t bits;
  std::memcpy(&bits, row + k * 4, 4);
  return bit_cast<float>(bits & 0xffffe000);
}
template <class T>
int64_t read_byte(const uint8_t* row, int k) {
  return static_cast<T>(row[k]);
}
template <class T>
int64_t read_nibble(const uint8_t* row, int k) {
  return static_cast<T>(row[k / 2] >> k % 2 * 4 << 4) / 16;
}

struct SparseMma {
  MmaRegisters registers;
  int depth;        // K
  int group = 1;    // elements that lie or are missing together: two of 4 bits
  int indices = 2;  // in the four bits of metadata for a chunk of A: two of four groups, or of tf32 one of two
  bool by_rows;     // 32 bits of metadata are of one row, else 16 of row g and 16 of row g + 8
  int lanes = 1;    // of four, whose metadata is of one row
  int selector;
  bool ordered, saturate;
  Read<float> floats[2] = {};
  Read<int64_t> integers[2] = {};

  int chunks() const { return depth / (indices * 2 * group); }
  int metadata_lane(int row, int chunk) const {
    return row % 8 * 4 + (by_rows ? (selector + chunk / 8) * 2 + row / 8 : selector * lanes + chunk / 4);
  }
  int metadata_shift(int row, int chunk) const { return by_rows ? chunk % 8 * 4 : row / 8 * 16 + chunk % 4 * 4; }
  int index(uint32_t chunk, int n) const { return indices == 1 ? chunk == 14 : chunk >> n * 2 & 3; }
  bool valid(uint32_t chunk) const {
    if (indices == 1) return chunk == 4 || chunk == 14;
    return ordered ? index(chunk, 0) < index(chunk, 1) : index(chunk, 0) != index(chunk, 1);
  }
  template <class T>
  const Read<T>* reads() const {
    if constexpr (std::is_same_v<T, float>) {
      return floats;
    } else {
      return integers;
    }
  }
};
constexpr int kMostDepth = 128, kMostBytes = 64;

float add_product(float x, float y, float sum) { return std::fma(x, y, sum); }
int64_t add_product(int64_t x, int64_t y, int64_t sum) { return x * y + sum; }

// Row r and column n of D are in register r / 8 of two columns a lane: both halves of it, or it and the next.
struct Accumulators {
  Warp& w;
  const Offset* registers;
  bool half;

  uint32_t* word(int r, int n) const {
    return w.at<uint32_t>(registers[half ? r / 8 : r / 8 * 2 + n % 2]) + (r % 8 * 4 + n / 2);
  }
  float get(int r, int n, float) const {
    return half ? float{Half::from_bits(*word(r, n) >> n % 2 * 16 & 0xffff)} : bit_cast<float>(*word(r, n));
  }
  int64_t get(int r, int n, int64_t) const { return static_cast<int32_t>(*word(r, n)); }
  void set(int r, int n, float sum) const {
    const int shift = n % 2 * 16;
    uint32_t& bits = *word(r, n);
    bits = half ? (bits & ~(0xffffu << shift)) | uint32_t{Half(sum).bits} << shift : bit_cast<uint32_t>(sum);
  }
  void set(int r, int n, int64_t sum) const { *word(r, n) = static_cast<uint32_t>(sum); }
};

// Rows of D whose metadata is undefined.
uint32_t undefined_rows(const Warp& w, Offset metadata, const SparseMma& m) {
  const Mask lanes = w.undefined->lanes(w, metadata);
  uint32_t rows = 0;
  for (int row = 0; lanes && row < 16; ++row) {
    for (int chunk = 0; chunk < m.chunks(); ++chunk) rows |= (lanes >> m.metadata_lane(row, chunk) & 1) << row;
  }
  return rows;
}

template <class T>
Step mma_sparse(Warp& w, const Instruction& i, Mask mask) {
  require_whole_warp(w, mask);
  const SparseMma& m = *static_cast<const SparseMma*>(i.data);
  const MatrixTimer timer(*w.cta, uint64_t{16} * 8 * m.depth / 2);
  const Offset *const a = i.operand + m.registers.d, *const b = a + m.registers.a, *const c = b + m.registers.b;
  const Offset e = c[m.registers.d];
  const uint32_t* const metadata = w.at<uint32_t>(e);
  const bool undefined = w.undefined && !w.undefined->empty();
  const uint32_t unknown = undefined ? undefined_rows(w, e, m) : 0;
  const Read<T>* const read = m.reads<T>();

  T right[kMostDepth][8], sums[16][8];
  for (int n = 0; n < 8; ++n) {
    uint8_t column[kMostBytes];
    for (int r = 0; r < m.registers.b; ++r) std::memcpy(column + r * 16, w.at<uint32_t>(b[r]) + n * 4, 16);
    for (int k = 0; k < m.depth; ++k) right[k][n] = read[1](column, k);
  }
  for (int row = 0; row < 16; ++row) {
    uint8_t left[kMostBytes / 2];
    for (int h = 0; h < m.registers.a / 2; ++h) {
      std::memcpy(left + h * 16, w.at<uint32_t>(a[h * 2 + row / 8]) + row % 8 * 4, 16);
    }
    for (int n = 0; n < 8; ++n) sums[row][n] = Accumulators{w, c, m.registers.half}.get(row, n, T{});
    for (int chunk = 0; chunk < m.chunks(); ++chunk) {
      const int lane = m.metadata_lane(row, chunk);
      const uint32_t where = metadata[lane] >> m.metadata_shift(row, chunk) & 15;
      const int per_chunk = m.indices * m.group;
      bool zeros = true;
      for (int k = 0; k < per_chunk; ++k) {
        const T x = read[0](left, chunk * per_chunk + k);
        zeros = zeros && x == 0;
        const int from = chunk * per_chunk * 2 + m.index(where, k / m.group) * m.group + k % m.group;
        for (int n = 0; n < 8; ++n) sums[row][n] = add_product(x, right[from][n], sums[row][n]);
      }
      // Rows and columns that a tile has too many may be zeros with metadata of zeros.
      if (!zeros && !m.valid(where) && !(unknown >> row & 1)) {
        w.fail(Kind::illegal,
               "the metadata of row " + std::to_string(row) + " and the elements of K from " +
                   std::to_string(chunk * per_chunk * 2) + " is " + hexadecimal(where) + ": it must be " +
                   (m.indices == 1 ? "0x4 or 0xe"
                    : m.ordered    ? "two indices, the lower one in the lower bits"
                                   : "two indices that differ"),
               lane);
      }
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int n = 0; n < 8; ++n) {
      T sum = sums[row][n];
      if constexpr (std::is_same_v<T, int64_t>) {
        if (m.saturate) sum = std::min<int64_t>(std::max<int64_t>(sum, INT32_MIN), INT32_MAX);
      }
      Accumulators{w, i.operand, m.registers.half}.set(row, n, sum);
    }
  }
  if (undefined) {
    multiply_undefined(w, i, m.registers, unknown, unknown ? w.undefined->origin_of(w, e) : 0);
  }
  return Step::next;
}

Read<float> float_read(std::string_view type) {
  return type == "f16" ? &read_float<F16> : type == "bf16" ? &read_float<Bf16> : &read_tf32;
}
Read<int64_t> integer_read(std::string_view type) {
  return type == "s8"   ? &read_byte<int8_t>
         : type == "u8" ? &read_byte<uint8_t>
         : type == "s4" ? &read_nibble<int8_t>
                        : &read_nibble<uint8_t>;
}

void bind_sparse(Bind& b) {
  expect_operands(b, 6);
  const int last = b.slots() - (b.slot(b.slots() - 1) == "satfinite" ? 2 : 1);
  const std::string_view type = b.slot(last - 2);
  const Type d = b.type(last);
  const int bits = type == "tf32" ? 32 : type.back() == '6' ? 16 : type.back() - '0';
  SparseMma& m = b.data<SparseMma>();
  m.depth = shape_of(b.slot(4)).k;
  m.group = bits == 4 ? 2 : 1;
  m.indices = bits == 32 ? 1 : 2;
  m.by_rows = bits < 16;
  m.ordered = b.has("sp::ordered_metadata");
  m.saturate = b.has("satfinite");
  const int fragments = m.depth / 2 * bits / 128;  // of 8 rows of A along K
  m.registers = {fragments * 2, 2, fragments * 2, d == Type::f16 ? 2 : 4, d == Type::f16};
  m.lanes = fragments;
  // Whose metadata it is: one lane of four, the first or the second two, or all.
  const int64_t selectors = 4 / (m.lanes * (m.by_rows ? 2 : 1));
  const int64_t selector = b.constant(b.operand(5));
  if (selector < 0 || selector >= selectors) {
    b.refuse(b.statement.opcode + ": the sparsity selector must be below " + std::to_string(selectors) + ", not " +
             std::to_string(selector));
  }
  m.selector = static_cast<int>(selector);
  const Type word = d == Type::f32 ? Type::f32 : Type::b32;
  for (const Operand& o : registers_of(b, 0, m.registers.d)) destination(b, o, word);
  for (const Operand& o : registers_of(b, 1, m.registers.a)) b.source(o, Type::b32);
  for (const Operand& o : registers_of(b, 2, m.registers.b)) b.source(o, Type::b32);
  for (const Operand& o : registers_of(b, 3, m.registers.d)) b.source(o, word);
  b.source(4, Type::b32);
  b.instruction.undefined = Undefined::product;
  if (d == Type::s32) {
    for (int x = 0; x < 2; ++x) m.integers[x] = integer_read(b.slot(last - 2 + x));
    b.run(&mma_sparse<int64_t>);
  } else {
    for (int x = 0; x < 2; ++x) m.floats[x] = float_read(b.slot(last - 2 + x));
    b.run(&mma_sparse<float>);
  }
}

void refuse_fp8(Bind& b) {
  b.refuse(b.statement.opcode + ": sparse products of fp8 are not supported by the interpreter; use mma.sync");
}

#define SPARSE "mma.sp|sp::ordered_metadata.sync.aligned."
constexpr char kSection[] = "9.7.14.6.3";
const Row rows[] = {
    {SPARSE "m16n8k16|m16n8k32.row.col.f32.f16.f16.f32", kSection, bind_sparse},
    {SPARSE "m16n8k16|m16n8k32.row.col.f16.f16.f16.f16", kSection, bind_sparse},
    {SPARSE "m16n8k16|m16n8k32.row.col.f32.bf16.bf16.f32", kSection, bind_sparse},
    {SPARSE "m16n8k8|m16n8k16.row.col.f32.tf32.tf32.f32", kSection, bind_sparse},
    {SPARSE "m16n8k32|m16n8k64.row.col.satfinite?.s32.s8|u8.s8|u8.s32", kSection, bind_sparse},
    {SPARSE "m16n8k64|m16n8k128.row.col.satfinite?.s32.s4|u4.s4|u4.s32", kSection, bind_sparse},
    // not the ISA's spelling, but CUTLASS's, and ptxas takes it
    {SPARSE "m16n8k32|m16n8k64.row.col.s32.s8|u8.s8|u8.s32.satfinite", kSection, bind_sparse},
    {SPARSE "m16n8k64|m16n8k128.row.col.s32.s4|u4.s4|u4.s32.satfinite", kSection, bind_sparse},
    {SPARSE "m16n8k64.row.col.f32|f16.e4m3|e5m2.e4m3|e5m2.f32|f16", kSection, refuse_fp8},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
