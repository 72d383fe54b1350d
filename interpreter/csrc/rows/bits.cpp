// Bits: counting and bit fields (ISA 9.7.1), logic and shifts (9.7.8), prmt (9.7.9).
#include <algorithm>

#include "rows/lanewise.h"

namespace gpuless {
namespace {

template <class T>
constexpr int kWidth = 8 * sizeof(T);

struct Popc {
  template <class T>
  uint32_t operator()(T a) const {
    return static_cast<uint32_t>(__builtin_popcountll(a));
  }
};
struct Clz {
  template <class T>
  uint32_t operator()(T a) const {
    return static_cast<uint32_t>(a ? __builtin_clzll(a) - (64 - kWidth<T>) : kWidth<T>);
  }
};
template <bool Shift>
struct Bfind {
  template <class T>
  uint32_t operator()(T a) const {
    using U = std::make_unsigned_t<T>;
    const uint32_t zeros = Clz{}(static_cast<U>(a < 0 ? ~a : a));
    if (zeros == kWidth<T>) return ~0u;
    return Shift ? zeros : kWidth<T> - 1 - zeros;
  }
};
// All but d are of the type in the last slot; d is 32 bits wide.
template <class Op>
void bind_count(Bind& b) {
  const Type type = b.type(b.slots() - 1);
  bind_operands(b, Type::u32, type, 1);
  with_integer(type, [&](auto t) { b.run(handler_of<Op, uint32_t, 1>(t)); });
}

struct Brev {
  template <class T>
  T operator()(T a) const {
    T d = 0;
    for (int i = 0; i < kWidth<T>; ++i) d = static_cast<T>(d << 1 | (a >> i & 1));
    return d;
  }
};
// The offset-th set bit of mask from bit base on, upwards or downwards; 0 asks about base itself.
struct Fns {
  uint32_t operator()(uint32_t mask, uint32_t base, uint32_t offset) const {
    const int32_t n = static_cast<int32_t>(offset);
    if (base > 31) return ~0u;
    if (n == 0) return mask >> base & 1 ? base : ~0u;
    int64_t count = std::abs(static_cast<int64_t>(n));
    for (int bit = static_cast<int>(base); bit >= 0 && bit < 32; bit += n > 0 ? 1 : -1)
      if (mask >> bit & 1 && --count == 0) return static_cast<uint32_t>(bit);
    return ~0u;
  }
};

template <class T>
T low_bits(uint32_t n) {  // n ones
  return n >= kWidth<T> ? static_cast<T>(~T{0}) : static_cast<T>((T{1} << n) - 1);
}
struct Bfe {
  template <class T>
  T operator()(T a, uint32_t b, uint32_t c) const {
    using U = std::make_unsigned_t<T>;
    const uint32_t position = b & 0xff, length = c & 0xff, top = kWidth<T> - 1;
    const bool sign = std::is_signed_v<T> && length && static_cast<U>(a) >> std::min(position + length - 1, top) & 1;
    const uint32_t there = position > top ? 0 : std::min(length, top + 1 - position);
    const U field = position > top ? 0 : static_cast<U>(a) >> position;
    const U ones = low_bits<U>(there);
    return static_cast<T>((field & ones) | (sign ? ~ones : U{0}));
  }
};
struct Bfi {
  template <class T>
  T operator()(T a, T b, uint32_t c, uint32_t d) const {
    const uint32_t position = c & 0xff, length = d & 0xff;
    if (position >= kWidth<T>) return b;
    const T ones = static_cast<T>(low_bits<T>(length) << position);
    return (b & ~ones) | (static_cast<T>(a << position) & ones);
  }
};
void bind_bfe(Bind& b) {
  expect_operands(b, 4);
  destination(b, b.operand(0), b.type(1));
  b.source(1, b.type(1));
  b.source(2, Type::u32);
  b.source(3, Type::u32);
  with_integer(b.type(1), [&](auto t) {
    using T = decltype(t);
    b.run(&lanewise<Bfe, T, T, uint32_t, uint32_t>);
  });
}
void bind_bfi(Bind& b) {
  expect_operands(b, 5);
  destination(b, b.operand(0), b.type(1));
  b.source(1, b.type(1));
  b.source(2, b.type(1));
  b.source(3, Type::u32);
  b.source(4, Type::u32);
  with_integer(b.type(1), [&](auto t) {
    using T = std::make_unsigned_t<decltype(t)>;
    b.run(&lanewise<Bfi, T, T, T, uint32_t, uint32_t>);
  });
}

template <bool Clamp>
struct Szext {
  template <class T>
  T operator()(T a, T b) const {
    const uint32_t n = static_cast<uint32_t>(b);
    const uint32_t width = Clamp ? std::min(n, 32u) : n & 31;
    const uint32_t ones = low_bits<uint32_t>(width);
    const bool sign = std::is_signed_v<T> && width && a >> (width - 1) & 1;
    return static_cast<T>((static_cast<uint32_t>(a) & ones) | (sign ? ~ones : 0));
  }
};
template <bool Clamp>
struct Bmsk {
  uint32_t operator()(uint32_t a, uint32_t b) const {
    const uint32_t position = Clamp ? std::min(a, 32u) : a & 31, width = Clamp ? std::min(b, 32u) : b & 31;
    return static_cast<uint32_t>(static_cast<uint64_t>(low_bits<uint32_t>(width)) << position);
  }
};

struct Not {
  template <class T>
  T operator()(T a) const {
    return static_cast<T>(~a);
  }
};
struct Cnot {
  template <class T>
  T operator()(T a) const {
    return a == 0;
  }
};

// On predicates: a mask of the warp at once.
template <class Op, class... S>
void on_masks(Warp& w, const Instruction& i, Mask mask, S... s) {
  Mask& d = *w.operand<Mask>(i, 0);
  d = (d & ~mask) | (Op{}(s...) & mask);
}
template <class Op, int N>
Step predicates(Warp& w, const Instruction& i, Mask mask) {
  const Mask a = *w.operand<Mask>(i, 1) ^ (i.option & 1 ? kAllLanes : 0);
  if constexpr (N == 1) {
    on_masks<Op>(w, i, mask, a);
  } else {
    on_masks<Op>(w, i, mask, a, *w.operand<Mask>(i, 2) ^ (i.option & 2 ? kAllLanes : 0));
  }
  return Step::next;
}
template <class Op, int N>
void bind_logic(Bind& b) {
  if (b.type(1) != Type::pred) return bind_integer<Op, N>(b);
  expect_operands(b, N + 1);
  destination(b, b.operand(0), Type::pred);
  for (int k = 1; k <= N; ++k)
    if (b.predicate(b.operand(k))) b.instruction.option |= 1u << (k - 1);
  b.run(&predicates<Op, N>);
}

// Any function of three bits, by its truth table: bit 4a + 2b + c of the table.
uint32_t lookup(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t d = 0;
  for (uint32_t k = 0; k < 8; ++k) {
    const uint32_t term = (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
    d |= table >> k & 1 ? term : 0;
  }
  return d;
}
// Operands: d, [p,] a, b, c, [q]. With a predicate: p = (d != 0) BoolOp q.
enum class Lop3 { plain, with_and, with_or };
template <Lop3 L>
Step lop3(Warp& w, const Instruction& i, Mask mask) {
  constexpr int kFirst = L == Lop3::plain ? 1 : 2;
  const uint32_t table = i.option & 0xff;
  const uint32_t *a = w.operand<uint32_t>(i, kFirst), *b = w.operand<uint32_t>(i, kFirst + 1),
                 *c = w.operand<uint32_t>(i, kFirst + 2);
  uint32_t dropped[kLanes];
  uint32_t* d = i.operand[0] == kSink ? dropped : w.operand<uint32_t>(i, 0);
  Mask nonzero = 0;
  each_lane(mask, [=](int l) { d[l] = lookup(a[l], b[l], c[l], table); });
  if (L == Lop3::plain) return Step::next;
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    nonzero |= static_cast<Mask>(d[l] != 0) << l;
  }
  const Mask q = w.predicate(i.operand[kFirst + 3]) ^ (i.option >> 8 ? kAllLanes : 0);
  Mask& p = *w.operand<Mask>(i, 1);
  p = (p & ~mask) | ((L == Lop3::with_and ? nonzero & q : nonzero | q) & mask);
  return Step::next;
}
void bind_lop3(Bind& b) {
  const bool combined = b.has("and") || b.has("or");
  expect_operands(b, combined ? 6 : 5);
  if (combined) {
    const Operand& pair = b.operand(0);
    if (pair.kind != Operand::Kind::pair) b.refuse("its destination must be d|p");
    b.destination(pair.parts[0], Type::b32);
    destination(b, pair.parts[1], Type::pred);
  } else {
    destination(b, b.operand(0), Type::b32);
  }
  for (int k = 1; k <= 3; ++k) b.source(k, Type::b32);
  const int64_t table = b.constant(b.operand(4));
  if (table < 0 || table > 255) b.refuse("immLut must be 0 to 255, and is " + std::to_string(table));
  b.instruction.option = static_cast<uint32_t>(table);
  if (combined && b.predicate(b.operand(5))) b.instruction.option |= 256;
  b.run(b.has("and") ? &lop3<Lop3::with_and> : b.has("or") ? &lop3<Lop3::with_or> : &lop3<Lop3::plain>);
}

// Shift amounts are 32 bits wide and clamp to the width.
struct Shl {
  template <class T>
  T operator()(T a, uint32_t n) const {
    return n >= kWidth<T> ? T{0} : static_cast<T>(a << n);
  }
};
struct Shr {
  template <class T>
  T operator()(T a, uint32_t n) const {
    if (std::is_signed_v<T>) return static_cast<T>(a >> std::min<uint32_t>(n, kWidth<T> - 1));
    return n >= kWidth<T> ? T{0} : static_cast<T>(a >> n);
  }
};
template <class Op>
void bind_shift(Bind& b) {
  expect_operands(b, 3);
  destination(b, b.operand(0), b.type(1));
  b.source(1, b.type(1));
  b.source(2, Type::u32);
  with_integer(b.type(1), [&](auto t) { b.run(&lanewise<Op, decltype(t), decltype(t), uint32_t>); });
}
// The funnel shift of {b, a}: left gives the upper half, right the lower one.
template <bool Left, bool Clamp>
struct Shf {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t c) const {
    const uint32_t n = Clamp ? std::min(c, 32u) : c & 31;
    const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
    return static_cast<uint32_t>(Left ? both << n >> 32 : both >> n);
  }
};

// prmt: which of the eight bytes of {b, a} goes where. The modes are permutations chosen by the two lowest bits of c.
uint32_t byte_of(uint32_t a, uint32_t b, uint32_t n) { return (n & 4 ? b : a) >> (8 * (n & 3)) & 0xff; }
struct Prmt {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t c) const {
    uint32_t d = 0;
    for (int k = 0; k < 4; ++k) {
      const uint32_t control = c >> (4 * k) & 15, byte = byte_of(a, b, control), sign = byte & 0x80 ? 0xff : 0;
      d |= (control & 8 ? sign : byte) << (8 * k);
    }
    return d;
  }
};
enum class Mode { f4e, b4e, rc8, ecl, ecr, rc16 };
template <Mode M>
struct PrmtMode {
  static uint32_t source(uint32_t c, uint32_t k) {
    switch (M) {
      case Mode::f4e:  // four bytes forwards from c
        return c + k;
      case Mode::b4e:  // backwards
        return c - k;
      case Mode::rc8:  // byte c four times
        return c;
      case Mode::ecl:  // bytes below c are clamped to it
        return std::max(c, k);
      case Mode::ecr:
        return std::min(c, k);
      case Mode::rc16:  // half c & 1 twice
        return (c & 1) * 2 + (k & 1);
    }
  }
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t c) const {
    uint32_t d = 0;
    for (uint32_t k = 0; k < 4; ++k) d |= byte_of(a, b, source(c & 3, k)) << (8 * k);
    return d;
  }
};

const Row rows[] = {
    {"popc.b32|b64", "9.7.1.14", bind_count<Popc>},
    {"clz.b32|b64", "9.7.1.15", bind_count<Clz>},
    {"bfind.u32|u64|s32|s64", "9.7.1.16", bind_count<Bfind<false>>},
    {"bfind.shiftamt.u32|u64|s32|s64", "9.7.1.16", bind_count<Bfind<true>>},
    {"fns.b32", "9.7.1.17", bind_32<Fns, 3>},
    {"brev.b32|b64", "9.7.1.18", bind_integer<Brev, 1>},
    {"bfe.u32|u64|s32|s64", "9.7.1.19", bind_bfe},
    {"bfi.b32|b64", "9.7.1.20", bind_bfi},
    {"szext.clamp.u32|s32", "9.7.1.21", bind_integer<Szext<true>, 2>},
    {"szext.wrap.u32|s32", "9.7.1.21", bind_integer<Szext<false>, 2>},
    {"bmsk.clamp.b32", "9.7.1.22", bind_32<Bmsk<true>, 2>},
    {"bmsk.wrap.b32", "9.7.1.22", bind_32<Bmsk<false>, 2>},
    {"and.pred|b16|b32|b64", "9.7.8.1", bind_logic<And, 2>},
    {"or.pred|b16|b32|b64", "9.7.8.2", bind_logic<Or, 2>},
    {"xor.pred|b16|b32|b64", "9.7.8.3", bind_logic<Xor, 2>},
    {"not.pred|b16|b32|b64", "9.7.8.4", bind_logic<Not, 1>},
    {"cnot.b16|b32|b64", "9.7.8.5", bind_integer<Cnot, 1>},
    {"lop3.b32", "9.7.8.6", bind_lop3},
    {"lop3.and|or.b32", "9.7.8.6", bind_lop3},
    {"shf.l.clamp.b32", "9.7.8.7", bind_32<Shf<true, true>, 3>},
    {"shf.l.wrap.b32", "9.7.8.7", bind_32<Shf<true, false>, 3>},
    {"shf.r.clamp.b32", "9.7.8.7", bind_32<Shf<false, true>, 3>},
    {"shf.r.wrap.b32", "9.7.8.7", bind_32<Shf<false, false>, 3>},
    {"shl.b16|b32|b64", "9.7.8.8", bind_shift<Shl>},
    {"shr.b16|b32|b64|u16|u32|u64|s16|s32|s64", "9.7.8.9", bind_shift<Shr>},
    {"prmt.b32", "9.7.9.7", bind_32<Prmt, 3>},
    {"prmt.b32.f4e", "9.7.9.7", bind_32<PrmtMode<Mode::f4e>, 3>},
    {"prmt.b32.b4e", "9.7.9.7", bind_32<PrmtMode<Mode::b4e>, 3>},
    {"prmt.b32.rc8", "9.7.9.7", bind_32<PrmtMode<Mode::rc8>, 3>},
    {"prmt.b32.ecl", "9.7.9.7", bind_32<PrmtMode<Mode::ecl>, 3>},
    {"prmt.b32.ecr", "9.7.9.7", bind_32<PrmtMode<Mode::ecr>, 3>},
    {"prmt.b32.rc16", "9.7.9.7", bind_32<PrmtMode<Mode::rc16>, 3>},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
