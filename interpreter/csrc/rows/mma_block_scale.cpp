// mma.sync on elements of 4 and 6 bits, and with scales of blocks along K, PTX ISA 9.7.14.5.14: what sm_120a adds.
#include <cstring>

#include "rows/block_scale.h"
#include "rows/matrix_rows.h"

namespace gpuless {
namespace {

struct Mma {
  Product product;  // of one block
  Narrow narrow[2];
  Packing packing;
  int blocks;  // along K; 0: no scales
  ScaleType scale_type;
  uint64_t macs;
  int scales;  // operand: scale-a, byte-id-a, thread-id-a, then b's
};
constexpr int kRegisters[] = {4, 4, 2, 4};  // of D, A, B, C
constexpr int kMostParts = 4;

// Fragments of e4m3 (or as they are) from a register: one, or two of elements that lie close together.
void widen_register(const Mma& m, int x, Fragment from, uint32_t (*to)[kLanes]) {
  if (m.narrow[x] == Narrow::none) {
    std::memcpy(to[0], from, sizeof to[0]);
  } else {
    widen(m.narrow[x], m.packing, from, to);
  }
}

Step mma(Warp& w, const Instruction& i, Mask mask) {
  require_whole_warp(w, mask);
  const Mma& m = *static_cast<const Mma*>(i.data);
  const MatrixTimer timer(*w.cta, m.macs, true);
  static thread_local PanelA panel_a;
  static thread_local PanelB panel_b;
  const Offset *const a = i.operand + 4, *const b = a + 4, *const c = b + 2;
  alignas(64) uint32_t left[2][kMostParts][kLanes], right[kMostParts][kLanes], sums[4][kLanes];  // left: [rows][part]
  const int of_register = m.packing == Packing::close ? 2 : 1, halves = m.product.halves;
  for (int h = 0; h < 2; ++h) {
    for (int r = 0; r < 2; ++r) widen_register(m, 0, w.at<uint32_t>(a[h * 2 + r]), &left[r][h * of_register]);
    widen_register(m, 1, w.at<uint32_t>(b[h]), &right[h * of_register]);
  }
  for (int r = 0; r < 4; ++r) std::memcpy(sums[r], w.at<uint32_t>(c[r]), sizeof sums[r]);
  const int blocks = m.blocks ? m.blocks : 1;
  for (int k = 0; k < blocks; ++k) {
    Fragment of_a[4], of_b[2];
    for (int h = 0; h < halves; ++h) {
      for (int r = 0; r < 2; ++r) of_a[h * 2 + r] = left[r][k * halves + h];
      of_b[h] = right[k * halves + h];
    }
    expand_a(m.product, of_a, panel_a);
    expand_b(m.product, of_b, 1, panel_b);
    if (!m.blocks) {
      multiply(m.product, panel_a, panel_b, 1, sums[0]);
      continue;
    }
    // Which byte of which thread of four: two threads have a row of A each, one has the column of B.
    const auto scale = [&](int x, int lane) {
      const int n = m.scales + x * 3;
      const uint32_t byte = w.operand<uint16_t>(i, n + 1)[0] + k;
      return scale_of(m.scale_type, w.operand<uint32_t>(i, n)[lane] >> 8 * byte);
    };
    const int thread_a = w.operand<uint16_t>(i, m.scales + 2)[0], thread_b = w.operand<uint16_t>(i, m.scales + 5)[0];
    float rows[16], columns[8];
    for (int g = 0; g < 8; ++g) {
      rows[g] = scale(0, g * 4 + thread_a * 2);
      rows[g + 8] = scale(0, g * 4 + thread_a * 2 + 1);
      columns[g] = scale(1, g * 4 + thread_b);
    }
    multiply_scaled(m.product, panel_a, panel_b, 1, rows, columns, sums[0]);
  }
  for (int r = 0; r < 4; ++r)
    if (i.operand[r] != kSink) std::memcpy(w.at<uint32_t>(i.operand[r]), sums[r], sizeof sums[r]);
  return Step::next;
}

// The bytes and the threads that hold scales are told by numbers within limits.
template <int blocks>
Step checked_mma(Warp& w, const Instruction& i, Mask mask) {
  const int n = static_cast<const Mma*>(i.data)->scales;
  for (int x = 0; x < 2; ++x) {
    const uint16_t *byte = w.operand<uint16_t>(i, n + x * 3 + 1), *thread = w.operand<uint16_t>(i, n + x * 3 + 2);
    for (int l = 1; l < kLanes; ++l)
      if (byte[l] != byte[0] || thread[l] != thread[0])
        w.fail(Kind::illegal, "a byte-id or thread-id differs between lanes", l);
    if (byte[0] > 4 - blocks || byte[0] % blocks || thread[0] > (x ? 3 : 1)) {
      w.fail(Kind::illegal, "byte-id " + std::to_string(byte[0]) + " and thread-id " + std::to_string(thread[0]) +
                                " of " + (x ? "B" : "A") +
                                "'s scales: byte-id is a multiple of their number, thread-id 0 or 1 for "
                                "A and 0 to 3 for B");
    }
  }
  return mma(w, i, mask);
}

void bind(Bind& b) {
  require_targets(b, {120});
  const bool scaled = b.has("block_scale"), close = !b.has("kind::f8f6f4") && !b.has("kind::mxf8f6f4");
  const bool sixteen = b.has("scale_vec::4X");
  expect_operands(b, scaled ? 8 : 4);
  Mma& m = b.data<Mma>();
  std::string_view types[2];
  int n = 0;
  for (int s = 0; s < b.slots() && n < 2; ++s) {
    if (narrow_of(b.slot(s)) != Narrow::none || b.slot(s) == "e4m3" || b.slot(s) == "e5m2") types[n++] = b.slot(s);
  }
  for (int x = 0; x < 2; ++x) m.narrow[x] = narrow_of(types[x]);
  m.product.a = types[0] == "e5m2" ? Element::e5m2 : Element::e4m3;
  m.product.b = types[1] == "e5m2" ? Element::e5m2 : Element::e4m3;
  m.product.d = Accumulate::f32;
  m.product.halves = sixteen ? 1 : 2;
  m.packing = close ? Packing::close : Packing::bytes;
  m.blocks = !scaled ? 0 : sixteen ? 4 : close ? 2 : 1;
  m.scale_type = b.has("ue4m3") ? ScaleType::ue4m3 : ScaleType::ue8m0;
  m.macs = uint64_t{16} * 8 * (close ? 64 : 32);
  for (int o = 0; o < 4; ++o) {
    for (const Operand& r : registers_of(b, o, kRegisters[o])) {
      o ? b.source(r, o == 3 ? Type::f32 : Type::b32) : b.destination(r, Type::f32);
    }
  }
  m.scales = b.instruction.destinations + b.instruction.sources;
  for (int x = 0; scaled && x < 2; ++x) {
    for (const Operand& r : registers_of(b, 4 + x * 2, 1)) b.source(r, Type::b32);
    for (const Operand& r : registers_of(b, 5 + x * 2, 2)) b.source(r, Type::b16);
  }
  b.run(!scaled ? &mma : m.blocks == 4 ? &checked_mma<4> : m.blocks == 2 ? &checked_mma<2> : &checked_mma<1>);
}

#define ELEMENTS "e4m3|e5m2|e2m3|e3m2|e2m1"
#define CLOSE "e2m1.e2m1.f32."
constexpr char kSection[] = "9.7.14.5.14";
// The kind comes behind the layouts in the ISA, before the shape in CUTLASS; ptxas takes both.
const Row rows[] = {
    {"mma.sync.aligned.m16n8k32.row.col.kind::f8f6f4.f32." ELEMENTS "." ELEMENTS ".f32", kSection, bind},
    {"mma.sync.aligned.kind::f8f6f4.m16n8k32.row.col.f32." ELEMENTS "." ELEMENTS ".f32", kSection, bind},
    {"mma.sync.aligned.m16n8k32.row.col.kind::mxf8f6f4.block_scale.scale_vec::1X?.f32." ELEMENTS "." ELEMENTS
     ".f32.ue8m0",
     kSection, bind},
    {"mma.sync.aligned.kind::mxf8f6f4.block_scale.scale_vec::1X?.m16n8k32.row.col.f32." ELEMENTS "." ELEMENTS
     ".f32.ue8m0",
     kSection, bind},
    {"mma.sync.aligned.m16n8k64.row.col.kind::mxf4.block_scale.scale_vec::2X?.f32." CLOSE "ue8m0", kSection, bind},
    {"mma.sync.aligned.kind::mxf4.block_scale.scale_vec::2X?.m16n8k64.row.col.f32." CLOSE "ue8m0", kSection, bind},
    {"mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::2X.f32." CLOSE "ue8m0", kSection, bind},
    {"mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::2X.m16n8k64.row.col.f32." CLOSE "ue8m0", kSection, bind},
    {"mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32." CLOSE "ue4m3|ue8m0", kSection,
     bind},
    {"mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X.m16n8k64.row.col.f32." CLOSE "ue4m3|ue8m0", kSection,
     bind},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
