// tcgen05.mma, ISA 9.7.16.10: D in tensor memory, B in shared memory, A in either. One thread issues a product, of its
// CTA or of a pair, and the tensor cores take them in order (tcgen05.h).
#include "rows/async.h"
#include "rows/block_scale.h"
#include "rows/matrix_descriptor.h"
#include "rows/matrix_rows.h"
#include "rows/tcgen05.h"

namespace gpuless {
namespace {

enum class MmaKind : uint8_t { f16, tf32, f8f6f4, i8, mxf8f6f4, mxf4, mxf4nvf4 };
bool is_scaled(MmaKind k) { return k >= MmaKind::mxf8f6f4; }

struct Form {
  MmaKind kind = MmaKind::f16;
  bool pair = false, a_in_tensor = false, enable_negated = false;
  int64_t d_displacement = 0, a_displacement = 0;
  int64_t scale_displacements[2] = {};  // of A's and B's scales
  int d, a, b, descriptor, enable;      // operands
  int scales[2] = {};
  int scale_block = 0;           // elements of K that share one; 0: none
  int disabled = -1, masks = 0;  // the first of the lanes that are not written, and how many
  bool stationary = false;       // .ws
  int zero_columns = -1;         // operand, of .ws
};

// The instruction descriptor (ISA 9.7.16.4.2).
struct MmaShape {
  int m, n;
  bool a_transposed, b_transposed;
  bool half;                // D is of f16
  bool stationary = false;  // .ws
  Product product;
  Narrow narrow[2] = {};  // A's and B's elements
  Packing packing = Packing::padded;
  int scale_block = 0;
  ScaleType scale_type = ScaleType::ue8m0;
  uint32_t first_byte[2] = {};  // of A's and B's scales in their columns

  // 16 bytes along K once all elements are bytes (or more), and how many share a scale.
  int parts() const { return packing == Packing::close ? 4 : 2; }
  int blocks() const { return scale_block ? parts() * 16 / scale_block : 1; }
  uint64_t macs() const { return static_cast<uint64_t>(m) * n * (parts() * 16 / bytes_of(product.a)); }
};
constexpr int kMostParts = 4;

// What a product reads and writes; its issuer may be gone when it runs.
struct MmaOperation final : TensorOperation {
  CtaGroup group;
  MmaShape shape;
  bool a_in_tensor = false, accumulates = false;
  uint64_t a_descriptor = 0, b_descriptor = 0;
  TensorAddress a{0}, d{0}, scales[2] = {TensorAddress(0), TensorAddress(0)};

  int rows() const { return shape.m / group.count; }  // in each CTA
  // How many parts of D's columns lie one below the other in lanes: each has as many as a CTA has rows.
  uint32_t parts() const {
    return shape.stationary ? TensorMemory::kRows / shape.m : group.count == 2 && shape.m == 128 ? 2 : 1;
  }
  uint32_t columns() const { return shape.n / parts(); }
  // Where 16 rows of D begin, and which columns: ISA 9.7.16.10.5. Of 64 rows each 16 have 32 lanes for themselves,
  // unless there is another part of the columns below.
  bool spread() const { return rows() == 64 && parts() == 1; }
  uint32_t lane_of(int block) const { return d.lane + block * (spread() ? 32 : 16); }

  void perform(Cta&) override;

 private:
  void multiply_rows(TensorMemory&, int block, const PanelA*, const PanelB*) const;
  MatrixDescriptor operand(int x, uint64_t descriptor) const;
  void fetch_a(Cta&, int block, uint32_t (*fragments)[2][kLanes]) const;
  void read_scales(Cta&) const;
};

// An accumulator in a cell as fp32 (or s32), and back.
uint32_t widened(uint32_t cell, bool half) {
  return half ? bit_cast<uint32_t>(static_cast<float>(Half::from_bits(cell & 0xffff))) : cell;
}
uint32_t narrowed(uint32_t sum, bool half) { return half ? Half(bit_cast<float>(sum)).bits : sum; }

// f(cell, its place among the accumulators of a tile) for 16 rows and 8 columns.
template <class F>
void each_of_tile(TensorMemory& memory, uint32_t lane, uint32_t column, F f) {
  if (column % 8 == 0) {  // they lie as accumulators do
    uint32_t* const cells = memory.tiles(lane, column);
    for (int k = 0; k < 128; ++k) f(cells[k], k);
    return;
  }
  for (uint32_t k = 0; k < 128; ++k) {
    const uint32_t row = k / 64 * 8 + k % 32 / 4, n = k % 4 * 2 + k / 32 % 2;
    f(memory.cell(lane + row, column + n), k);
  }
}

// The scales of A have a column for 32 rows and those of B one for 32 of its columns, each 32 lanes a copy of them, and
// a byte for each block along K: ISA 9.7.16.10.7.
void MmaOperation::read_scales(Cta& cta) const {
  if (!shape.scale_block || !checked(cta)) return;
  for (int x = 0; x < 2; ++x) {
    const uint32_t columns = (x ? shape.n : rows()) / 32;
    cta.tensor_memory->access(actor(Proxy::generic), 0, TensorMemory::kRows, scales[x].column, columns, Use::read);
  }
}

void MmaOperation::multiply_rows(TensorMemory& memory, int block, const PanelA* a, const PanelB* b) const {
  alignas(64) static thread_local uint32_t sums[kMaxTiles * 128];
  const int tiles = shape.n / 8, in_a_row = static_cast<int>(columns()) / 8;
  const auto each = [&](auto f) {
    for (int t = 0; t < tiles; ++t) {
      const uint32_t lane = lane_of(block) + t / in_a_row * rows(), column = d.column + t % in_a_row * 8;
      each_of_tile(memory, lane, column, [&](uint32_t& cell, int k) { f(cell, sums[t * 128 + k]); });
    }
  };
  if (accumulates) {
    each([&](uint32_t cell, uint32_t& sum) { sum = widened(cell, shape.half); });
  } else {
    std::fill_n(sums, tiles * 128, 0);
  }
  if (!shape.scale_block) multiply(shape.product, *a, *b, tiles, sums);
  for (int k = 0; shape.scale_block && k < shape.blocks(); ++k) {
    const auto scale = [&](int x, uint32_t lane, uint32_t column) {
      return scale_of(shape.scale_type, memory.cell(lane, scales[x].column + column) >> 8 * (shape.first_byte[x] + k));
    };
    const uint32_t first = block * 16, copy = first / 32 * 32;
    float of_rows[16], of_columns[kMaxTiles * 8];
    for (uint32_t row = 0; row < 16; ++row) of_rows[row] = scale(0, first + row, first / 32);
    for (int n = 0; n < shape.n; ++n) of_columns[n] = scale(1, copy + n % 32, n / 32);
    multiply_scaled(shape.product, a[k], b[k], tiles, of_rows, of_columns, sums);
  }
  each([&](uint32_t& cell, uint32_t sum) { cell = narrowed(sum, shape.half); });
}

MatrixDescriptor MmaOperation::operand(int x, uint64_t descriptor) const {
  MatrixDescriptor d(descriptor);
  if (shape.packing == Packing::padded && shape.narrow[x] != Narrow::none) {
    d.used = shape.narrow[x] == Narrow::e2m1 ? 8 : 12;
  }
  return d;
}

// 16 rows of A by 32 bytes of K: fragments [rows 0-7, 8-15][half].
void MmaOperation::fetch_a(Cta& cta, int block, uint32_t (*fragments)[2][kLanes]) const {
  if (!a_in_tensor) {
    return gather(cta, operand(0, a_descriptor), shape.a_transposed, block * 2, 2, actor(Proxy::async), fragments,
                  bytes_of(shape.product.a));
  }
  TensorMemory& memory = *cta.tensor_memory;
  const uint32_t lane = a.lane + block * (spread() ? 32 : 16);
  if (checked(cta)) memory.access(actor(Proxy::generic), lane, 16, a.column, 8, Use::read);
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 8; ++k) {
      fragments[row / 8][k / 4][row % 8 * 4 + k % 4] = memory.cell(lane + row, a.column + k);
    }
  }
}

void MmaOperation::perform(Cta& issuer) {
  static thread_local PanelA panels_a[kMostParts];
  static thread_local PanelB panels_b[kMostParts];
  alignas(64) static thread_local uint32_t raw[kMaxTiles][2][kLanes], bytes[kMaxTiles][kMostParts][kLanes];
  const int tiles = shape.n / 8, halves = shape.product.halves;
  const auto widen_all = [&](int x, int count) {
    for (int t = 0; t < count; ++t) {
      for (int h = 0; h < 2; ++h) {
        if (shape.narrow[x] == Narrow::none) {
          std::memcpy(bytes[t][h], raw[t][h], sizeof raw[t][h]);
        } else {
          widen(shape.narrow[x], shape.packing, raw[t][h], &bytes[t][h * shape.parts() / 2]);
        }
      }
    }
  };
  for (int p = 0; p < group.count; ++p) {  // each CTA of a pair has half of B's columns
    const int part = tiles / group.count;
    if (group.ctas[p] != &issuer) group.ctas[p]->visited(actor(Proxy::async));
    gather(*group.ctas[p], operand(1, b_descriptor), shape.b_transposed, 0, part, actor(Proxy::async), raw + p * part,
           bytes_of(shape.product.b));
  }
  widen_all(1, tiles);
  {
    const MatrixTimer timer(issuer, shape.macs());
    for (int k = 0; k < shape.blocks(); ++k) {
      Fragment b[kMaxTiles * 2];
      for (int t = 0; t < tiles * halves; ++t) b[t] = bytes[t / halves][k * halves + t % halves];
      expand_b(shape.product, b, tiles, panels_b[k]);
    }
  }
  for (int p = 0; p < group.count; ++p) {
    TensorMemory& memory = *group.ctas[p]->tensor_memory;
    read_scales(*group.ctas[p]);
    for (int block = 0; block < rows() / 16; ++block) {
      fetch_a(*group.ctas[p], block, raw);
      widen_all(0, 2);
      if (checked(issuer)) {
        for (uint32_t part = 0; part < parts(); ++part) {
          memory.write(actor(Proxy::generic), lane_of(block) + part * rows(), 16, d.column, columns(), accumulates);
        }
      }
      const MatrixTimer timer(issuer, 0);
      for (int k = 0; k < shape.blocks(); ++k) {
        Fragment a[4];
        for (int r = 0; r < halves * 2; ++r) a[r] = bytes[r % 2][k * halves + r / 2];
        expand_a(shape.product, a, panels_a[k]);
      }
      multiply_rows(memory, block, panels_a, panels_b);
    }
  }
}

// ---- Issue ----

class Decoder {
 public:
  Decoder(const Warp& w, const Form& form, uint32_t bits, int lane) : w_(w), form_(form), bits_(bits), lane_(lane) {}

  MmaShape shape() const {
    if (bits_ & 4) unsupported("a sparse product: the interpreter has dense ones alone");
    MmaShape s;
    s.m = static_cast<int>(bits_ >> 24 & 31) * 16;
    s.n = static_cast<int>(bits_ >> 17 & 63) * 8;
    s.a_transposed = bits_ >> 15 & 1;
    s.b_transposed = bits_ >> 16 & 1;
    s.product.negate = (bits_ >> 13 ^ bits_ >> 14) & 1;
    s.product.a = element(bits_ >> 7 & 7, s.narrow[0]);
    s.product.b = element(bits_ >> 10 & 7, s.narrow[1]);
    if ((s.a_transposed && s.narrow[0] != Narrow::none) || (s.b_transposed && s.narrow[1] != Narrow::none)) {
      illegal("elements of 4 and 6 bits cannot be transposed");
    }
    s.stationary = form_.stationary;
    is_scaled(form_.kind) ? scales(s) : accumulator(s);
    s.product.halves = s.scale_block ? s.scale_block / 16 : 2;
    extents(s);
    return s;
  }

 private:
  [[noreturn]] void illegal(const std::string& why) const {
    w_.fail(Kind::illegal, "the instruction descriptor " + hexadecimal(bits_) + " is illegal: " + why, lane_);
  }
  [[noreturn]] void unsupported(const std::string& why) const {
    w_.fail(Kind::unsupported, "the instruction descriptor " + hexadecimal(bits_) + " asks for " + why, lane_);
  }

  Element element(uint32_t format, Narrow& narrow) const {
    switch (form_.kind) {
      case MmaKind::f16:
        if (format > 1) illegal("A and B are f16 (0) or bf16 (1)");
        return format ? Element::bf16 : Element::f16;
      case MmaKind::tf32:
        if (format != 2) illegal("A and B are tf32 (2)");
        return Element::tf32;
      case MmaKind::i8:
        if (format > 1) illegal("A and B are u8 (0) or s8 (1)");
        return format ? Element::s8 : Element::u8;
      case MmaKind::mxf4:
      case MmaKind::mxf4nvf4:
        if (format != 1) illegal("A and B are e2m1 (1)");
        narrow = Narrow::e2m1;
        return Element::e4m3;
      default:
        if (format == 2 || format > 5) illegal("A and B are e4m3 (0), e5m2 (1), e2m3 (3), e3m2 (4) or e2m1 (5)");
        if (format > 2) narrow = format == 3 ? Narrow::e2m3 : format == 4 ? Narrow::e3m2 : Narrow::e2m1;
        return format == 1 ? Element::e5m2 : Element::e4m3;
    }
  }

  void accumulator(MmaShape& s) const {
    const uint32_t d = bits_ >> 4 & 3;
    const bool integer = form_.kind == MmaKind::i8,
               may_be_half = form_.kind == MmaKind::f16 || form_.kind == MmaKind::f8f6f4;
    if (d != (integer ? 2 : 1) && !(d == 0 && may_be_half)) {
      illegal("bits 4 and 5 are no type of D that goes with its kind");
    }
    s.half = d == 0;
    s.product.d = integer ? Accumulate::s32 : Accumulate::f32;
    s.product.saturate = bits_ >> 3 & 1;
  }

  void scales(MmaShape& s) const {
    s.half = false;
    s.product.d = Accumulate::f32;
    s.scale_block = form_.scale_block;
    if (form_.kind != MmaKind::mxf8f6f4) s.packing = Packing::close;
    s.scale_type = bits_ >> 23 & 1 ? ScaleType::ue8m0 : ScaleType::ue4m3;
    if (s.scale_type == ScaleType::ue4m3 && form_.kind != MmaKind::mxf4nvf4) illegal("its scales are ue8m0");
    if (bits_ >> 31 && s.packing == Packing::close) unsupported("K = 96, which sm_100a has not");
    s.first_byte[0] = bits_ >> 29 & 3;
    s.first_byte[1] = bits_ >> 4 & 3;
    for (const uint32_t first : s.first_byte) {
      if (first % s.blocks()) illegal("the scales of an operand begin at a multiple of their number");
    }
  }

  void extents(const MmaShape& s) const {
    if (s.stationary) {
      if (bits_ >> 30) unsupported("a shift of B, which the interpreter does not know: bits 30 and 31");
      if (s.m != 32 && s.m != 64 && s.m != 128) illegal("M is 32, 64 or 128 with .ws, not " + std::to_string(s.m));
      if (s.n != 64 && s.n != 128 && s.n != 256) illegal("N is 64, 128 or 256 with .ws, not " + std::to_string(s.n));
      return;
    }
    const bool whole = s.m == (form_.pair ? 256 : 128);
    if (!whole && s.m != (form_.pair ? 128 : 64)) {
      illegal("M is " + std::string(form_.pair ? "128 or 256" : "64 or 128") + ", not " + std::to_string(s.m));
    }
    if (!whole && s.scale_block) unsupported("scales with half of the lanes, which the interpreter does not know");
    const int step = form_.pair ? 32 : whole ? 16 : 8, least = s.scale_block ? 32 : step;
    if (s.n < step || s.n > 256 || s.n % step) {
      illegal("N is a multiple of " + std::to_string(step) + " up to 256 for M " + std::to_string(s.m) + ", not " +
              std::to_string(s.n));
    }
    if (s.n % least) unsupported("scales with N " + std::to_string(s.n) + ", which is no multiple of 32");
  }

  const Warp& w_;
  const Form& form_;
  const uint32_t bits_;
  const int lane_;
};

Step mma(Warp& w, const Instruction& i, Mask mask) {
  const auto& form = *static_cast<const Form*>(i.data);
  const Mask enabled = w.predicate(i.operand[form.enable]) ^ (form.enable_negated ? kAllLanes : 0);
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    for (int k = 0; k < form.masks; ++k) {
      if (w.operand<uint32_t>(i, form.disabled + k)[l]) {
        w.fail(Kind::unsupported, "disable-output-lane names lanes: the interpreter writes all of them", l);
      }
    }
    if (form.zero_columns >= 0 && w.operand<uint64_t>(i, form.zero_columns)[l]) {
      w.fail(Kind::unsupported, "zero-column-mask-desc names columns: the interpreter multiplies all of them", l);
    }
    auto operation = std::make_shared<MmaOperation>();
    operation->group = group_of(w, form.pair);
    operation->shape = Decoder(w, form, w.operand<uint32_t>(i, form.descriptor)[l], l).shape();
    operation->accumulates = enabled >> l & 1;
    operation->d = TensorAddress(w.operand<uint32_t>(i, form.d)[l] + static_cast<uint32_t>(form.d_displacement));
    operation->b_descriptor = w.operand<uint64_t>(i, form.b)[l];
    require_descriptor(w, operation->b_descriptor, "b-desc", l);
    operation->a_in_tensor = form.a_in_tensor;
    if (form.a_in_tensor) {
      operation->a = TensorAddress(w.operand<uint32_t>(i, form.a)[l] + static_cast<uint32_t>(form.a_displacement));
      if (operation->shape.a_transposed) w.fail(Kind::illegal, "A in tensor memory cannot be transposed", l);
      const MmaShape& s = operation->shape;
      if (s.packing == Packing::padded && s.narrow[0] != Narrow::none) {
        w.fail(Kind::unsupported, "A of 4 or 6 bits in tensor memory: the interpreter does not know it", l);
      }
      if (operation->parts() > 1) {
        w.fail(Kind::unsupported,
               "A in tensor memory with " + std::to_string(operation->rows()) +
                   " rows whose columns of D lie one part below the other: the interpreter does not know it",
               l);
      }
    } else {
      operation->a_descriptor = w.operand<uint64_t>(i, form.a)[l];
      require_descriptor(w, operation->a_descriptor, "a-desc", l);
    }
    const int lanes = operation->spread() ? 16 : 0;
    if (operation->d.lane != 0 && operation->d.lane != static_cast<uint32_t>(lanes)) {
      w.fail(Kind::illegal, "D begins in lane " + std::to_string(operation->d.lane) + " of tensor memory, not in 0", l);
    }
    for (int p = 0; p < operation->group.count; ++p) {
      const TensorMemory& memory = tensor_memory(*operation->group.ctas[p]);
      memory.require(operation->d.column, operation->columns(), "D of tcgen05.mma");
      if (form.a_in_tensor) memory.require(operation->a.column, 8, "A of tcgen05.mma");
      for (int x = 0; x < 2 && form.scale_block; ++x) {
        // The upper two bits of such an address are the first byte, which the instruction descriptor has.
        const uint32_t bits = w.operand<uint32_t>(i, form.scales[x])[l];
        operation->scales[x] = TensorAddress((bits + static_cast<uint32_t>(form.scale_displacements[x])) & 0x3fffffff);
        if (operation->scales[x].lane) w.fail(Kind::illegal, "scales begin in lane 0 of tensor memory", l);
        memory.require(operation->scales[x].column, (x ? operation->shape.n : operation->rows()) / 32,
                       "a scale of tcgen05.mma");
      }
    }
    if (w.count) {
      const MmaShape& s = operation->shape;
      w.count->macs += s.macs();
      w.count->matrix_shared += static_cast<uint64_t>((form.a_in_tensor ? 0 : s.m) + s.n) * 32;  // bytes of K
    }
    issue(w, i, std::move(operation));
  }
  return Step::next;
}

// ---- Binding ----

int tensor_address(Bind& b, int operand, int64_t* displacement) {
  const int place = b.instruction.sources;
  bool wide;
  *displacement = b.address(b.operand(operand), &wide);
  if (wide) b.refuse("an address of tensor memory has 32 bits");
  return place;
}

int source(Bind& b, int operand, Type type) {
  const int place = b.instruction.sources;
  b.source(operand, type);
  return place;
}

// A scale is for 32 elements, of mxf4nvf4 for 16 where .scale_vec::4X or .block16 says so.
int scale_block_of(const Bind& b, MmaKind kind) {
  const bool sixteen = b.has("scale_vec::4X") || b.has("block16"), two = b.has("scale_vec::2X") || b.has("block32");
  const bool one = b.has("scale_vec::1X") || b.has("block32"), none = !sixteen && !two && !one;
  const bool fits = kind == MmaKind::mxf8f6f4 ? one || none : kind == MmaKind::mxf4 ? two || none : two || sixteen;
  if (!fits) {
    b.refuse(b.statement.opcode + ": kind::mxf8f6f4 goes with .scale_vec::1X, mxf4 with 2X, mxf4nvf4 with 2X or 4X");
  }
  return sixteen ? 16 : 32;
}

// [d], a-desc or [a], b-desc, idesc {, disable-output-lane}, enable-input-d; with scales [scale-a], [scale-b] before
// it; with .ws {, zero-column-mask-desc} behind it. What a collector keeps is read again here.
void bind_mma(Bind& b) {
  require_targets(b, {100});
  auto& form = b.data<Form>();
  form.pair = b.has("cta_group::2");
  form.stationary = b.has("ws");
  form.kind = b.has("kind::f16")        ? MmaKind::f16
              : b.has("kind::tf32")     ? MmaKind::tf32
              : b.has("kind::i8")       ? MmaKind::i8
              : b.has("kind::f8f6f4")   ? MmaKind::f8f6f4
              : b.has("kind::mxf8f6f4") ? MmaKind::mxf8f6f4
              : b.has("kind::mxf4")     ? MmaKind::mxf4
                                        : MmaKind::mxf4nvf4;
  form.d = tensor_address(b, 0, &form.d_displacement);
  form.a_in_tensor = b.operand(1).kind == Operand::Kind::address;
  form.a = form.a_in_tensor ? tensor_address(b, 1, &form.a_displacement) : source(b, 1, Type::b64);
  form.b = source(b, 2, Type::b64);
  form.descriptor = source(b, 3, Type::b32);
  int next = 4;
  if (is_scaled(form.kind)) {
    form.scale_block = scale_block_of(b, form.kind);
    for (int x = 0; x < 2; ++x) form.scales[x] = tensor_address(b, next++, &form.scale_displacements[x]);
  } else if (!form.stationary && b.operand(next).kind == Operand::Kind::vector) {
    form.masks = form.pair ? 8 : 4;
    form.disabled = b.instruction.sources;
    for (const Operand& o : registers_of(b, next, form.masks)) b.source(o, Type::b32);
    ++next;
  }
  form.enable = b.instruction.sources;
  form.enable_negated = b.predicate(b.operand(next++));
  if (form.stationary && next < b.operands()) form.zero_columns = source(b, next++, Type::b64);
  if (b.operands() != next) b.refuse("scale-input-d is not supported: leave it out");
  b.run(&mma);
}

void refuse_sparse(Bind& b) { b.refuse(b.statement.opcode + ": sparse products are not supported; use tcgen05.mma"); }

#define GROUP "cta_group::1|cta_group::2"
#define KIND "kind::f16|kind::tf32|kind::f8f6f4|kind::i8"
#define SCALED "kind::mxf8f6f4|kind::mxf4|kind::mxf4nvf4"
#define SCALES "scale_vec::1X|scale_vec::2X|scale_vec::4X|block16|block32"
#define COLLECTOR "collector::a::fill|collector::a::use|collector::a::lastuse|collector::a::discard"
#define COLLECTOR_B                                                                       \
  "collector::b0::fill|collector::b0::use|collector::b0::lastuse|collector::b0::discard|" \
  "collector::b1::fill|collector::b1::use|collector::b1::lastuse|collector::b1::discard|" \
  "collector::b2::fill|collector::b2::use|collector::b2::lastuse|collector::b2::discard|" \
  "collector::b3::fill|collector::b3::use|collector::b3::lastuse|collector::b3::discard"
const Row rows[] = {
    {"tcgen05.mma." GROUP "." KIND "." COLLECTOR "?", "9.7.16.10.9", bind_mma},
    {"tcgen05.mma." GROUP "." SCALED ".block_scale." SCALES "?." COLLECTOR "?", "9.7.16.10.9", bind_mma},
    {"tcgen05.mma.sp." GROUP "." KIND "|" SCALED ".block_scale?"
     "." SCALES "?." COLLECTOR "?",
     "9.7.16.10.9", refuse_sparse},
    {"tcgen05.mma.ws.cta_group::1." KIND "." COLLECTOR_B "?", "9.7.16.10.9", bind_mma},
    {"tcgen05.mma.ws.sp.cta_group::1." KIND "." COLLECTOR_B "?", "9.7.16.10.9", refuse_sparse},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
