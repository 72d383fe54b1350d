// wmma, PTX ISA 9.7.14.4: loads, stores and products of whole matrices.
//
// Which element a register of a lane holds is up to the hardware, and programs may not rely on it. Here registers are
// the fragments of mma.sync, tile by tile, as they are on compute capability 8.0 and later: a product is mma.sync on
// parts of the registers. A and B of f16 have eight registers whatever the shape; those that are left hold the first
// ones again.
#include <cstring>

#include "rows/addresses.h"
#include "rows/matrix_rows.h"
#include "rows/mma.h"
#include "undefined.h"

namespace gpuless {
namespace {

// How mma.sync divides a shape: tiles of 16 rows of A, or of all 8, and of 8 columns of B; K is in halves of 16 bytes.
struct Tiles {
  Tiles(const Shape& s, int element_bytes)
      : m(std::max(1, s.m / 16)), n(s.n / 8), rows(s.m < 16 ? 1 : 2), halves(s.k * element_bytes / 16) {}
  int m, n;
  int rows;  // of 8, in a tile
  int halves;
};

// The first element of a lane in a register: of A, or of B transposed, a row and an index along K; of C a row and a
// column. The others of the register follow in the second index.
constexpr int kQuad = 4;  // lanes have a row of a fragment
struct Place {
  int row, along;
};
Place operand_place(int reg, int lane, int rows, int halves, int per_register) {
  const int eighth = reg % rows, part = reg / rows;
  return {(part / halves * rows + eighth) * 8 + lane / kQuad, (part % halves * 4 + lane % kQuad) * per_register};
}
Place accumulator_place(int reg, int lane, const Tiles& t, int per_register) {
  const int each = 2 / per_register, part = reg / each, tile = part / t.rows;
  return {(tile / t.n * t.rows + part % t.rows) * 8 + lane / kQuad, tile % t.n * 8 + lane % kQuad * 2 + reg % each};
}

struct Transfer {
  AddressOperand address;
  int registers, distinct;
  int bytes;                  // of an element
  bool contiguous;            // the elements of a register lie next to each other, and not a stride apart
  int stride;                 // elements, where no operand says it
  int stride_operand;         // or -1
  std::vector<Place> places;  // [register][lane]
};

// f(register, offset within it, host pointers, bytes) for everything that each lane has of the matrix.
template <class F>
void transfer(Warp& w, const Instruction& i, Use use, F f) {
  const auto& t = *static_cast<const Transfer*>(i.data);
  uint64_t base[kLanes], address[kLanes];
  t.address.addresses(w, i, base);
  const int bytes = t.contiguous ? 4 : t.bytes;
  for (int r = 0; r < t.distinct; ++r) {
    for (int offset = 0; offset < 4; offset += bytes) {
      for (int l = 0; l < kLanes; ++l) {
        const uint64_t stride =
            t.stride_operand < 0 ? static_cast<uint64_t>(t.stride) : w.operand<uint32_t>(i, t.stride_operand)[l];
        const Place& p = t.places[r * kLanes + l];
        const auto row = static_cast<uint64_t>(p.row), along = static_cast<uint64_t>(p.along + offset / t.bytes);
        address[l] = base[l] + (t.contiguous ? row * stride + along : along * stride + row) * t.bytes;
      }
      uint8_t* host[kLanes];
      access(w, t.address.space, address, bytes, use, kAllLanes, host, t.address.ordering);
      f(r, offset, host, bytes);
    }
  }
}

Step wmma_load(Warp& w, const Instruction& i, Mask mask) {
  require_whole_warp(w, mask);
  const auto& t = *static_cast<const Transfer*>(i.data);
  Mask unwritten = 0;
  transfer(w, i, Use::load, [&](int r, int offset, uint8_t* const host[kLanes], int bytes) {
    if (!offset) unwritten = 0;
    unwritten |= std::exchange(w.unwritten, 0);
    for (int k = r; k < t.registers; k += t.distinct) {
      if (i.operand[k] == kSink) continue;
      auto* const d = reinterpret_cast<uint8_t*>(w.operand<uint32_t>(i, k));
      for (int l = 0; l < kLanes; ++l) std::memcpy(d + l * 4 + offset, host[l], bytes);
      if (unwritten) set_undefined(w, i.operand[k], kAllLanes, unwritten);
    }
  });
  return Step::next;
}

Step wmma_store(Warp& w, const Instruction& i, Mask mask) {
  require_whole_warp(w, mask);
  transfer(w, i, Use::write, [&](int r, int offset, uint8_t* const host[kLanes], int bytes) {
    const auto* const s = reinterpret_cast<const uint8_t*>(w.operand<uint32_t>(i, 1 + r));
    for (int l = 0; l < kLanes; ++l) std::memcpy(host[l], s + l * 4 + offset, bytes);
    stored(w, i, 1 + r, kAllLanes, host, 0, bytes);
    w.cta->shadow.settle();
  });
  return Step::next;
}

int bytes_of(const Bind& b, int slot) {
  if (b.has("f64") || b.has("s4") || b.has("u4") || b.has("b1")) {
    b.refuse(b.statement.opcode +
             ": wmma of f64 and of elements of 4 and 1 bits is not supported by the interpreter; "
             "use mma.sync");
  }
  const Type t = b.type(slot);
  return t == Type::tf32 ? 4 : ptx::size_of(t);
}

void require_shape(const Bind& b, const Shape& s, int bytes, bool accumulator) {
  const bool tf32 = s.m == 16 && s.n == 16 && s.k == 8, narrow = s.k == 16;
  if (!tf32 && !narrow) b.refuse(b.statement.opcode + ": no such shape of these types is supported");
  if (!accumulator && tf32 != (bytes == 4))
    b.refuse(b.statement.opcode + ": .m16n16k8 is the shape of .tf32, and its only one");
}

// A load or a store: slot 2 is which matrix, 5 its layout, 6 the shape.
void bind_transfer(Bind& b, int registers_operand, int address_operand, Handler handler) {
  if (b.operands() != 2) expect_operands(b, 3);
  const bool accumulator = b.has("c") || b.has("d"), by_rows = b.has("row");
  const Shape shape = shape_of(b.slot(6));
  auto& t = b.data<Transfer>();
  t.bytes = bytes_of(b, b.slots() - 1);
  require_shape(b, shape, t.bytes, accumulator);
  const Tiles tiles(shape, t.bytes);
  const int per_register = 4 / t.bytes, rows = b.has("a") ? tiles.rows : 1;
  if (accumulator) {
    t.distinct = tiles.m * tiles.n * tiles.rows * 2 / per_register;
  } else {
    t.distinct = (b.has("a") ? tiles.m * tiles.rows : tiles.n) * tiles.halves;
  }
  t.registers = !accumulator && b.has("f16") ? 8 : t.distinct;
  t.contiguous = b.has("b") != by_rows;
  // What a row of the matrix in memory has, or a column.
  t.stride = b.has("a")   ? (by_rows ? shape.k : shape.m)
             : b.has("b") ? (by_rows ? shape.n : shape.k)
             : by_rows    ? shape.n
                          : shape.m;
  for (int r = 0; r < t.distinct; ++r)
    for (int l = 0; l < kLanes; ++l)
      t.places.push_back(accumulator ? accumulator_place(r, l, tiles, per_register)
                                     : operand_place(r, l, rows, tiles.halves, per_register));
  const bool load = registers_operand == 0;
  const Type type = accumulator && t.bytes == 4 && b.has("f32") ? Type::f32 : Type::b32;
  const auto registers = registers_of(b, registers_operand, static_cast<size_t>(t.registers));
  if (load)
    for (const Operand& o : registers) b.destination(o, type);
  t.address.bind(b, b.operand(address_operand));
  if (!load)
    for (const Operand& o : registers) b.source(o, type);
  t.stride_operand = b.operands() == 3 ? b.instruction.destinations + b.instruction.sources : -1;
  if (b.operands() == 3) b.source(2, Type::b32);
  if (!load) b.instruction.undefined = Undefined::store;
  b.run(handler);
}

struct Products {
  Mma mma;
  std::vector<Instruction> tiles;
};

Step wmma_mma(Warp& w, const Instruction& i, Mask mask) {
  for (const Instruction& tile : static_cast<const Products*>(i.data)->tiles) mma(w, tile, mask);
  return Step::next;
}

// Slot 9 is the shape; behind it D and C, where A and B are f16, or D, A, B and C.
bool of_halves(const Bind& b) { return b.slot(12).empty(); }

Product product_of(const Bind& b, const Shape& shape) {
  const bool halves = of_halves(b);
  for (int slot = 10; slot < 14; ++slot)
    if (!b.slot(slot).empty()) bytes_of(b, slot);
  if (!b.slot(2).empty() || !b.slot(3).empty() || !b.slot(8).empty() || (!halves && b.slot(13).empty()))
    b.refuse(b.statement.opcode + ": its modifiers do not fit its types");
  Product product{};
  product.a = halves ? Element::f16 : element_of(b, 11);
  product.b = halves ? Element::f16 : element_of(b, 12);
  product.d = accumulate_of(b, 10);
  product.saturate = b.has("satfinite");
  const int bytes = gpuless::bytes_of(product.a);
  require_shape(b, shape, bytes, false);
  product.halves = Tiles(shape, bytes).halves;
  if (b.slot(halves ? 11 : 13) != b.slot(10)) b.refuse(b.statement.opcode + ": C and D of two types are not supported");
  if (product.a != product.b) b.refuse(b.statement.opcode + ": A and B are of one type");
  if ((product.d == Accumulate::s32) != (bytes == 1) || (product.d == Accumulate::f16 && !halves))
    b.refuse(b.statement.opcode + ": sums of this type are not those of such products");
  if (product.saturate && product.d != Accumulate::s32)
    b.refuse(b.statement.opcode + ": .satfinite of f16 is not supported by the interpreter");
  return product;
}

void bind_products(Bind& b) {
  expect_operands(b, 4);
  const Shape shape = shape_of(b.slot(9));
  auto& p = b.data<Products>();
  const Product product = p.mma.exact = p.mma.truncating = product_of(b, shape);
  const Tiles t(shape, gpuless::bytes_of(product.a));
  p.mma.a_registers = t.rows * t.halves;
  p.mma.b_registers = t.halves;
  p.mma.d_registers = t.rows * (product.d == Accumulate::f16 ? 1 : 2);
  p.mma.macs = static_cast<uint64_t>(8 * t.rows) * 8 * shape.k;

  const int d = t.m * t.n * p.mma.d_registers;
  const int counts[] = {d, of_halves(b) ? 8 : t.m * p.mma.a_registers, of_halves(b) ? 8 : t.n * p.mma.b_registers, d};
  const Type type = product.d == Accumulate::f32 ? Type::f32 : Type::b32;
  std::vector<Offset> operands[4];
  for (int k = 0; k < 4; ++k) {
    for (const Operand& o : registers_of(b, k, static_cast<size_t>(counts[k]))) {
      const Type each = k == 0 || k == 3 ? type : Type::b32;
      k ? b.source(o, each) : destination(b, o, each);
      operands[k].push_back(b.instruction.operand[b.instruction.destinations + b.instruction.sources - 1]);
      const bool overwritten =
          (k == 1 || k == 2) && std::count(operands[0].begin(), operands[0].end(), operands[k].back());
      if (overwritten) b.refuse(b.statement.opcode + ": D in registers of A or B is not supported by the interpreter");
    }
  }
  for (int tile = 0; tile < t.m * t.n; ++tile) {
    auto& list = b.code.operand_lists.emplace_back();
    const auto some = [&](int k, int n, int count) {
      list.insert(list.end(), operands[k].begin() + n * count, operands[k].begin() + (n + 1) * count);
    };
    some(0, tile, p.mma.d_registers);
    some(1, tile / t.n, p.mma.a_registers);
    some(2, tile % t.n, p.mma.b_registers);
    some(3, tile, p.mma.d_registers);
    Instruction& i = p.tiles.emplace_back();
    i.operand = list.data();
    i.data = &p.mma;
  }
  b.instruction.undefined = Undefined::product;
  b.run(wmma_mma);
}

#define GPULESS_WMMA_SHAPES "m16n16k16|m32n8k16|m8n32k16|m16n16k8|m8n8k4|m8n8k32|m8n8k128"
#define GPULESS_WMMA_TYPES "f16|bf16|tf32|f32|f64|s32|s8|u8|s4|u4|b1"

const Row rows[] = {
    {"wmma.load.a|b|c.sync.aligned.row|col." GPULESS_WMMA_SHAPES ".global|shared|shared::cta?." GPULESS_WMMA_TYPES,
     "9.7.14.4.3", [](Bind& b) { bind_transfer(b, 0, 1, wmma_load); }},
    {"wmma.store.d.sync.aligned.row|col." GPULESS_WMMA_SHAPES ".global|shared|shared::cta?." GPULESS_WMMA_TYPES,
     "9.7.14.4.4", [](Bind& b) { bind_transfer(b, 1, 0, wmma_store); }},
    {"wmma.mma.xor|and?.popc?.sync.aligned.row|col.row|col.rn|rz|rm|rp?." GPULESS_WMMA_SHAPES "." GPULESS_WMMA_TYPES
     "." GPULESS_WMMA_TYPES "." GPULESS_WMMA_TYPES "?." GPULESS_WMMA_TYPES "?.satfinite?",
     "9.7.14.4.5", bind_products},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
