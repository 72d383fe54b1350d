// mma.sync, PTX ISA 9.7.14.5.14.
#include "rows/mma.h"

#include <cmath>
#include <cstring>

#include "rows/matrix_rows.h"
#include "undefined.h"

namespace gpuless {
namespace {

constexpr uint32_t kNoRows[kLanes] = {};  // the lower half of A and C where the shape has 8 rows

}  // namespace

void multiply_undefined(Warp& w, const Instruction& i, const MmaRegisters& m, uint32_t undefined_rows,
                        uint32_t origin) {
  const Offset* const a = i.operand + m.d;
  const Offset* const b = a + m.a;
  const Offset* const c = b + m.b;
  const int pairs = m.half ? 1 : 2;
  struct {
    uint32_t which = 0, origin = 0;
    void take(const Warp& w, Offset o, int shift) {
      for (Mask rest = w.undefined->lanes(w, o); rest; rest &= rest - 1)
        which |= 1u << (shift + __builtin_ctz(rest) / 4);
      if (w.undefined->lanes(w, o)) origin = w.undefined->origin_of(w, o);
    }
  } rows{undefined_rows, origin}, columns;
  for (int r = 0; r < m.a; ++r) rows.take(w, a[r], r % m.rows * 8);
  for (int r = 0; r < m.b; ++r) columns.take(w, b[r], 0);
  struct {
    Mask lanes;
    uint32_t origin;
  } results[4];  // all of them before the first is set: D may be C
  for (int r = 0; r < m.d; ++r) {
    const Mask before = w.undefined->lanes(w, c[r]);
    Mask of_rows = 0, of_columns = 0;
    for (int l = 0; l < kLanes; ++l) {
      const uint32_t column_bits = pairs == 1 ? 3u << l % 4 * 2 : 1u << (l % 4 * 2 + r % 2);
      of_rows |= (rows.which >> (r / pairs * 8 + l / 4) & 1) << l;
      of_columns |= Mask{(columns.which & column_bits) != 0} << l;
    }
    results[r] = {before | of_rows | of_columns, before    ? w.undefined->origin_of(w, c[r])
                                                 : of_rows ? rows.origin
                                                           : columns.origin};
  }
  for (int r = 0; r < m.d; ++r) {
    w.undefined->set(w, i.operand[r], kAllLanes, results[r].lanes, results[r].origin);
  }
}

Step mma(Warp& w, const Instruction& i, Mask mask) {
  require_whole_warp(w, mask);
  const Mma& m = *static_cast<const Mma*>(i.data);
  const Product& product = w.cta->launch->options.truncating ? m.truncating : m.exact;
  const MatrixTimer timer(*w.cta, m.macs, true);
  const Offset* const a = i.operand + m.d_registers;
  const Offset* const b = a + m.a_registers;
  const Offset* const c = b + m.b_registers;

  Fragment left[4], right[2];
  const int rows = m.a_registers / product.halves;  // 8 each
  for (int h = 0; h < product.halves; ++h) {
    for (int r = 0; r < 2; ++r) left[h * 2 + r] = r < rows ? w.at<uint32_t>(a[h * rows + r]) : kNoRows;
    right[h] = w.at<uint32_t>(b[h]);
  }
  alignas(64) uint32_t unwanted[kLanes];
  Fragment from[4] = {kNoRows, kNoRows, kNoRows, kNoRows};
  uint32_t* to[4] = {unwanted, unwanted, unwanted, unwanted};
  for (int r = 0; r < m.d_registers; ++r) {
    from[r] = w.at<uint32_t>(c[r]);
    if (i.operand[r] != kSink) to[r] = w.at<uint32_t>(i.operand[r]);
  }
  multiply_tile(product, left, right, from, to);
  if (__builtin_expect(w.undefined && !w.undefined->empty(), 0)) {
    const int of_rows = m.a_registers / m.exact.halves;
    multiply_undefined(w, i, {m.a_registers, of_rows, m.b_registers, m.d_registers, m.exact.d == Accumulate::f16});
  }
  return Step::next;
}

namespace {

void bind_mma(Bind& b) {
  expect_operands(b, 4);
  const int last = b.slots() - (b.slot(b.slots() - 1) == "satfinite" ? 2 : 1);
  const Shape shape = shape_of(b.slot(3));
  Mma& m = b.data<Mma>();
  m.exact.a = element_of(b, last - 2);
  m.exact.b = element_of(b, last - 1);
  m.exact.d = accumulate_of(b, last - 3);
  m.exact.halves = shape.k * bytes_of(m.exact.a) / 16;
  m.exact.saturate = b.has("satfinite");
  m.truncating = m.exact;
  if (is_fp8(m.exact.a)) {
    require_capability(b, 89);
    m.truncating.truncation = capability(b.module) == 89 ? Truncation{16, 13, 13} : Truncation{shape.k, 25, 23};
  }
  m.a_registers = m.exact.halves * shape.m / 8;
  m.b_registers = m.exact.halves;
  m.d_registers = shape.m / 4 / (m.exact.d == Accumulate::f16 ? 2 : 1);
  m.macs = static_cast<uint64_t>(shape.m) * shape.n * shape.k;
  const Type d = m.exact.d == Accumulate::f32 ? Type::f32 : Type::b32;
  for (const Operand& o : registers_of(b, 0, m.d_registers)) b.destination(o, d);
  for (const Operand& o : registers_of(b, 1, m.a_registers)) b.source(o, Type::b32);
  for (const Operand& o : registers_of(b, 2, m.b_registers)) b.source(o, Type::b32);
  for (const Operand& o : registers_of(b, 3, m.d_registers)) b.source(o, d);
  b.instruction.undefined = Undefined::product;
  b.run(&mma);
}

// f64: a register of A has 8 rows and 4 elements of K, lane by lane like the dwords of a fragment.
struct MmaF64 {
  int halves, quarters;  // of 8 rows of M; of 4 elements of K
};

Step mma_f64(Warp& w, const Instruction& i, Mask mask) {
  require_whole_warp(w, mask);
  const MmaF64& m = *static_cast<const MmaF64*>(i.data);
  const MatrixTimer timer(*w.cta, static_cast<uint64_t>(m.halves) * 8 * 8 * m.quarters * 4);
  const Offset* const a = i.operand + m.halves * 2;
  const Offset* const b = a + m.halves * m.quarters;
  const Offset* const c = b + m.quarters;
  double sums[4][kLanes];
  for (int r = 0; r < m.halves * 2; ++r) {
    const double* const start = w.at<double>(c[r]);
    for (int l = 0; l < kLanes; ++l) {
      const int row = l / 4, column = l % 4 * 2 + r % 2;
      double sum = start[l];
      for (int k = 0; k < m.quarters * 4; ++k) {
        const double x = w.at<double>(a[k / 4 * m.halves + r / 2])[row * 4 + k % 4];
        sum = std::fma(x, w.at<double>(b[k / 4])[column * 4 + k % 4], sum);
      }
      sums[r][l] = sum;
    }
  }
  for (int r = 0; r < m.halves * 2; ++r) {
    if (i.operand[r] != kSink) std::memcpy(w.at<double>(i.operand[r]), sums[r], sizeof sums[r]);
  }
  return Step::next;
}

void bind_mma_f64(Bind& b) {
  expect_operands(b, 4);
  const Shape shape = shape_of(b.slot(3));
  if (shape.m == 16) require_capability(b, 90);
  MmaF64& m = b.data<MmaF64>();
  m.halves = shape.m / 8;
  m.quarters = shape.k / 4;
  const size_t counts[] = {size_t(m.halves) * 2, size_t(m.halves) * m.quarters, size_t(m.quarters),
                           size_t(m.halves) * 2};
  for (const Operand& o : registers_of(b, 0, counts[0])) b.destination(o, Type::f64);
  for (int k = 1; k < 4; ++k)
    for (const Operand& o : registers_of(b, k, counts[k])) b.source(o, Type::f64);
  b.run(&mma_f64);
}

template <const char* const& why>
void refuse(Bind& b) {
  b.refuse(b.statement.opcode + ": " + why);
}
const char* const kVolta = "mma.m8n8k4 with f16 is for Volta and slow since; use m16n8k16";
const char* const kSubByte = "products of 4-bit and 1-bit elements are not supported by the interpreter; use s8 or u8";
constexpr char kSection[] = "9.7.14.5.14";

const Row rows[] = {
    {"mma.sync.aligned.m16n8k8|m16n8k16.row.col.f32.f16.f16.f32", kSection, bind_mma},
    {"mma.sync.aligned.m16n8k8|m16n8k16.row.col.f16.f16.f16.f16", kSection, bind_mma},
    {"mma.sync.aligned.m16n8k8|m16n8k16.row.col.f32.bf16.bf16.f32", kSection, bind_mma},
    {"mma.sync.aligned.m16n8k4|m16n8k8.row.col.f32.tf32.tf32.f32", kSection, bind_mma},
    {"mma.sync.aligned.m16n8k16|m16n8k32.row.col.f32.e4m3|e5m2.e4m3|e5m2.f32", kSection, bind_mma},
    {"mma.sync.aligned.m16n8k16|m16n8k32.row.col.f16.e4m3|e5m2.e4m3|e5m2.f16", kSection, bind_mma},
    {"mma.sync.aligned.m8n8k16|m16n8k16|m16n8k32.row.col.satfinite?.s32.s8|u8.s8|u8.s32", kSection, bind_mma},
    // not the ISA's spelling, but CUTLASS's, and ptxas takes it
    {"mma.sync.aligned.m8n8k16|m16n8k16|m16n8k32.row.col.s32.s8|u8.s8|u8.s32.satfinite", kSection, bind_mma},
    {"mma.sync.aligned.m8n8k4|m16n8k4|m16n8k8|m16n8k16.row.col.rn?.f64.f64.f64.f64", kSection, bind_mma_f64},
    {"mma.sync.aligned.m8n8k4.row|col.row|col.f16|f32.f16.f16.f16|f32", kSection, refuse<kVolta>},
    {"mma.sync.aligned.m8n8k32|m16n8k32|m16n8k64.row.col.satfinite?.s32.s4|u4.s4|u4.s32", kSection, refuse<kSubByte>},
    {"mma.sync.aligned.m8n8k128|m16n8k128|m16n8k256.row.col.s32.b1.b1.s32.xor|and.popc", kSection, refuse<kSubByte>},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
