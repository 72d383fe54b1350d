// tcgen05.ld and tcgen05.st, ISA 9.7.16.8: between tensor memory and the registers of a warp, which reaches the 32
// lanes of its number modulo 4.
#include "rows/async.h"
#include "rows/matrix_rows.h"
#include "rows/tcgen05.h"
#include "undefined.h"

namespace gpuless {
namespace {

enum class Lanes : uint8_t { x32b, x64b, x128b, x256b, x32bx2 };  // bits of a lane in one repetition

struct Transfer {
  Lanes shape;
  int registers;
  bool packed = false;       // two columns of 16 bits a register
  uint32_t split = 0;        // x32bx2: columns from the first half to the second
  int64_t displacement = 0;  // of the address
  int address = 0;           // operand

  uint32_t rows() const { return shape == Lanes::x32b ? 32 : 16; }
  // That a lane of tensor memory has, one after the other; of x32bx2 in each half.
  uint32_t words() const { return shape == Lanes::x32b || shape == Lanes::x32bx2 ? registers : registers * 2; }
  // Which lane of tensor memory and which word of it a thread's register has: ISA 9.7.16.2.3.1.
  std::pair<uint32_t, uint32_t> word(int thread, int r) const {
    const uint32_t t = thread, j = r;
    switch (shape) {
      case Lanes::x32b:
        return {t, j};
      case Lanes::x64b:
        return {t / 4 + t % 2 * 8, j * 2 + t / 2 % 2};
      case Lanes::x128b:
        return {t / 4 + j % 2 * 8, j / 2 * 4 + t % 4};
      case Lanes::x256b:
        return {t / 4 + j / 2 % 2 * 8, j / 4 * 8 + t % 4 * 2 + j % 2};
      case Lanes::x32bx2:
        return {t % 16, j};
    }
    return {};
  }
};

// f(cell, thread, register, half of it) for each cell. A register that is not packed has the whole cell.
template <class F>
void each_cell(const Transfer& form, TensorMemory& memory, TensorAddress first, F f) {
  for (int r = 0; r < form.registers; ++r) {
    for (int t = 0; t < kLanes; ++t) {
      const auto [lane, word] = form.word(t, r);
      const uint32_t split = form.shape == Lanes::x32bx2 && t >= 16 ? form.split : 0;
      for (int half = 0; half <= form.packed; ++half) {
        const uint32_t column = first.column + split + (form.packed ? word * 2 + half : word);
        f(memory.cell(first.lane + lane, column), t, r, half);
      }
    }
  }
}

// The place in tensor memory, after all checks of the access.
TensorAddress begin(Warp& w, const Instruction& i, const Transfer& form, Use use, const Actor& actor) {
  const char* const what = use == Use::read ? "tcgen05.ld" : "tcgen05.st";
  const uint32_t* addresses = w.operand<uint32_t>(i, form.address);
  for (int l = 1; l < kLanes; ++l) {
    if (addresses[l] != addresses[0]) {
      w.fail(Kind::illegal, std::string(what) + ": the address differs between the lanes of a warp", l);
    }
  }
  const TensorAddress first(addresses[0] + static_cast<uint32_t>(form.displacement));
  const uint32_t reach = w.id % 4 * 32;
  if (first.lane % form.rows() || first.lane / 32 * 32 != reach) {
    w.fail(Kind::illegal, std::string(what) + " of lanes " + std::to_string(first.lane) + " to " +
                              std::to_string(first.lane + form.rows() - 1) + " by warp " + std::to_string(w.id) +
                              ", which reaches lanes " + std::to_string(reach) + " to " + std::to_string(reach + 31) +
                              " and must begin at a multiple of " + std::to_string(form.rows()));
  }
  TensorMemory& memory = tensor_memory(*w.cta);
  const uint32_t columns = form.words() * (form.packed ? 2 : 1);
  for (int part = 0; part <= (form.shape == Lanes::x32bx2); ++part) {
    const uint32_t column = first.column + part * form.split;
    memory.require(column, columns, what);
    if (checked(*w.cta)) memory.access(actor, first.lane, form.rows(), column, columns, use);
  }
  return first;
}

Step load(Warp& w, const Instruction& i, Mask mask) {
  require_whole_warp(w, mask);
  const auto& form = *static_cast<const Transfer*>(i.data);
  const Actor actor = tcgen05_of(w).loads.begin(w, i.operand, form.registers);
  const TensorAddress first = begin(w, i, form, Use::read, actor);
  each_cell(form, *w.cta->tensor_memory, first, [&](uint32_t cell, int t, int r, int half) {
    if (i.operand[r] == kSink) return;
    uint32_t& d = w.operand<uint32_t>(i, r)[t];
    d = !form.packed ? cell : half ? d | cell << 16 : cell & 0xffff;
  });
  update_watched(w);
  return Step::next;
}

Step store(Warp& w, const Instruction& i, Mask mask) {
  require_whole_warp(w, mask);
  const auto& form = *static_cast<const Transfer*>(i.data);
  Tcgen05& state = tcgen05_of(w);
  w.cta->cluster->begin_series(state.stores);
  const Actor actor = w.cta->cluster->issued(w, state.stores, Proxy::generic);
  state.stored = actor.now;
  const TensorAddress first = begin(w, i, form, Use::write, actor);
  const int registers = form.address + 1;
  each_cell(form, *w.cta->tensor_memory, first, [&](uint32_t& cell, int t, int r, int half) {
    const uint32_t s = w.operand<uint32_t>(i, registers + r)[t];
    cell = form.packed ? s >> half * 16 & 0xffff : s;
  });
  return Step::next;
}

// {r}, [taddr] {, split}, or [taddr] {, split}, {r}
void bind(Bind& b) {
  require_targets(b, {100});
  const bool loads = b.has("ld");
  auto& form = b.data<Transfer>();
  constexpr std::pair<std::string_view, Lanes> kShapes[] = {{"32x32b", Lanes::x32b},
                                                            {"16x64b", Lanes::x64b},
                                                            {"16x128b", Lanes::x128b},
                                                            {"16x256b", Lanes::x256b},
                                                            {"16x32bx2", Lanes::x32bx2}};
  for (const auto& [name, shape] : kShapes)
    if (b.has(name)) form.shape = shape;
  const bool split = form.shape == Lanes::x32bx2;
  if (b.operands() != 2 + split) {
    b.refuse(loads ? "expected {registers}, [taddr], with .16x32bx2 the columns between the halves"
                   : "expected [taddr], with .16x32bx2 the columns between the halves, {registers}");
  }
  constexpr int kRegisters[] = {1, 1, 2, 4, 1};  // of one repetition
  int repetitions = 0;
  for (const char c : b.slot(5).substr(1)) repetitions = repetitions * 10 + (c - '0');
  form.registers = repetitions * kRegisters[static_cast<int>(form.shape)];
  if (form.registers > 128) b.refuse(b.statement.opcode + " would have more than 128 registers");
  form.packed = b.has("pack::16b") || b.has("unpack::16b");
  const auto bind_address = [&](int operand) {
    bool wide;
    form.address = b.instruction.destinations + b.instruction.sources;
    form.displacement = b.address(b.operand(operand), &wide);
    if (wide) b.refuse("an address of tensor memory has 32 bits");
    if (split) form.split = static_cast<uint32_t>(b.constant(b.operand(operand + 1)));
  };
  if (loads) {
    for (const Operand& o : registers_of(b, 0, form.registers)) b.destination(o, Type::b32);
    bind_address(1);
    b.instruction.asynchronous = true;
    b.run(&load);
  } else {
    bind_address(0);
    for (const Operand& o : registers_of(b, 1 + split, form.registers)) b.source(o, Type::b32);
    b.run(&store);
  }
}

#define SHAPES "32x32b|16x64b|16x128b|16x256b|16x32bx2"
#define NUMBER "x1|x2|x4|x8|x16|x32|x64|x128"
const Row rows[] = {
    {"tcgen05.ld.sync.aligned." SHAPES "." NUMBER ".pack::16b?.b32", "9.7.16.8", bind},
    {"tcgen05.st.sync.aligned." SHAPES "." NUMBER ".unpack::16b?.b32", "9.7.16.8", bind},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
