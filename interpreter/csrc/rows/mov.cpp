// mov: registers, packing and unpacking, the clocks (ISA 9.7.9.3, 9.7.9.4).
#include "rows/mov.h"

#include "rows/lanewise.h"

namespace gpuless {
namespace {

struct Same {
  template <class T>
  T operator()(T a) const {
    return a;
  }
};

Step move_predicate(Warp& w, const Instruction& i, Mask mask) {
  Mask& d = *w.operand<Mask>(i, 0);
  d = (d & ~mask) | (w.predicate(i.operand[1]) & mask);
  return Step::next;
}
Step move_b128(Warp& w, const Instruction& i, Mask mask) {  // [2][32] words
  auto* d = w.operand<uint64_t>(i, 0);
  const auto* a = w.operand<uint64_t>(i, 1);
  each_lane(mask, [=](int l) {
    d[l] = a[l];
    d[kLanes + l] = a[kLanes + l];
  });
  return Step::next;
}

// Time is what the warp has done: one tick an instruction, so that runs repeat. `option` is the shift of _hi.
template <class T>
Step read_clock(Warp& w, const Instruction& i, Mask mask) {
  each_lane(mask, [d = w.operand<T>(i, 0), now = static_cast<T>(w.steps >> i.option)](int l) { d[l] = now; });
  return Step::next;
}
bool is_clock(const Operand& o) {
  if (o.kind != Operand::Kind::special) return false;
  for (const char* name : {"%clock", "%clock_hi", "%clock64", "%globaltimer", "%globaltimer_lo", "%globaltimer_hi"})
    if (o.name == name) return true;
  return false;
}

// A vector of N elements and a register of Bytes; 128 bits are two words, 8-bit elements live in 16-bit registers.
template <int Bytes, int N>
struct Vector {
  static constexpr int kWords = Bytes == 16 ? 2 : 1, kPerWord = N / kWords, kBits = 8 * Bytes / N;
  using Word = std::conditional_t<Bytes == 2, uint16_t, std::conditional_t<Bytes == 4, uint32_t, uint64_t>>;
  using Element = std::conditional_t<kBits <= 16, uint16_t, std::conditional_t<kBits == 32, uint32_t, uint64_t>>;
  static constexpr Element kOnes = kBits == 8 ? 0xff : static_cast<Element>(~Element{0});

  static Step pack(Warp& w, const Instruction& i, Mask mask) {
    Word* d = w.operand<Word>(i, 0);
    for (int word = 0; word < kWords; ++word, d += kLanes) {
      const Element* part[kPerWord];
      for (int k = 0; k < kPerWord; ++k) part[k] = w.operand<Element>(i, 1 + word * kPerWord + k);
      each_lane(mask, [=](int l) {
        Word whole = 0;
        for (int k = 0; k < kPerWord; ++k)
          whole |= static_cast<Word>(Word{static_cast<Element>(part[k][l] & kOnes)} << (k * kBits));
        d[l] = whole;
      });
    }
    return Step::next;
  }
  static Step unpack(Warp& w, const Instruction& i, Mask mask) {
    const Word* a = w.operand<Word>(i, N);
    for (int k = 0; k < N; ++k) {
      if (i.operand[k] == kSink) continue;
      Element* d = w.operand<Element>(i, k);
      const Word* word = a + k / kPerWord * kLanes;
      each_lane(mask, [=](int l) { d[l] = static_cast<Element>(word[l] >> (k % kPerWord * kBits)) & kOnes; });
    }
    return Step::next;
  }
};

template <class F>
void with_vector(Bind& b, Type type, size_t parts, F f) {
  const int bytes = ptx::size_of(type);
  if (bytes == 2 && parts == 2) return f(Vector<2, 2>{}, Type::b8);
  if (bytes == 4 && parts == 2) return f(Vector<4, 2>{}, Type::b16);
  if (bytes == 4 && parts == 4) return f(Vector<4, 4>{}, Type::b8);
  if (bytes == 8 && parts == 2) return f(Vector<8, 2>{}, Type::b32);
  if (bytes == 8 && parts == 4) return f(Vector<8, 4>{}, Type::b16);
  if (bytes == 16 && parts == 2) return f(Vector<16, 2>{}, Type::b64);
  if (bytes == 16 && parts == 4) return f(Vector<16, 4>{}, Type::b32);
  b.refuse("a vector of " + std::to_string(parts) + " does not make up " + std::to_string(bytes) + " bytes");
}

void bind_mov(Bind& b) {
  const Type type = b.type(1);
  expect_operands(b, 2);
  const Operand &d = b.operand(0), &a = b.operand(1);
  const bool bit_type = b.slot(1).front() == 'b';
  if (d.kind == Operand::Kind::vector && bit_type) {
    return with_vector(b, type, d.parts.size(), [&](auto v, Type element) {
      for (const Operand& part : d.parts) b.destination(part, element);
      b.source(a, type);
      b.run(&decltype(v)::unpack);
    });
  }
  destination(b, d, type);
  if (a.kind == Operand::Kind::vector && bit_type) {
    return with_vector(b, type, a.parts.size(), [&](auto v, Type element) {
      for (const Operand& part : a.parts) b.source(part, element);
      b.run(&decltype(v)::pack);
    });
  }
  if (is_clock(a)) {
    const bool wide = ptx::size_of(type) == 8, is_wide = a.name == "%clock64" || a.name == "%globaltimer";
    if (wide != is_wide) b.refuse(a.name + " does not have the size of the instruction's type");
    b.instruction.option = a.name.back() == 'i' ? 32 : 0;
    return b.run(wide ? &read_clock<uint64_t> : &read_clock<uint32_t>);
  }
  if (type == Type::pred) {
    if (b.predicate(a)) b.refuse("its source must be a predicate without !");
    return b.run(move_predicate);
  }
  b.source(a, type);
  switch (ptx::size_of(type)) {
    case 2:
      return b.run(&lanewise<Same, uint16_t, uint16_t>);
    case 4:
      return b.run(&lanewise<Same, uint32_t, uint32_t>);
    case 8:
      return b.run(&lanewise<Same, uint64_t, uint64_t>);
    default:
      if (a.kind != Operand::Kind::reg) b.refuse("a 128-bit source must be a register");
      return b.run(move_b128);
  }
}

const Row rows[] = {
    {"mov.pred|b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64", "9.7.9.3", bind_mov},
    {"mov.b128", "9.7.9.4", bind_mov},
};
const Register registered(rows);

}  // namespace

bool is_move(const Instruction& i) {
  return i.run == &lanewise<Same, uint16_t, uint16_t> || i.run == &lanewise<Same, uint32_t, uint32_t> ||
         i.run == &lanewise<Same, uint64_t, uint64_t> || i.run == &move_b128;
}

}  // namespace gpuless
