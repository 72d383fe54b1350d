// Integer arithmetic (ISA 9.7.1) and extended precision (9.7.2), the bit field instructions excepted (bits.cpp).
#include <algorithm>
#include <cstdlib>

#include "rows/lanewise.h"

namespace gpuless {
namespace {

template <class T>
using Unsigned = std::make_unsigned_t<T>;
template <class T>
using Wide = std::conditional_t<sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
                                std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;

int32_t clamp_s32(int64_t x) { return static_cast<int32_t>(std::clamp<int64_t>(x, INT32_MIN, INT32_MAX)); }

// Wrapping arithmetic goes through 64 unsigned bits: two's complement, and no 16-bit product that overflows an int.
template <class T>
uint64_t u64(T x) {
  return static_cast<uint64_t>(x);
}
struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(static_cast<Unsigned<T>>(a) + static_cast<Unsigned<T>>(b));
  }
};
struct Sub {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(static_cast<Unsigned<T>>(a) - static_cast<Unsigned<T>>(b));
  }
};
struct AddSat {
  int32_t operator()(int32_t a, int32_t b) const { return clamp_s32(int64_t{a} + b); }
};
struct SubSat {
  int32_t operator()(int32_t a, int32_t b) const { return clamp_s32(int64_t{a} - b); }
};
struct MulLo {
  template <class T>
  T operator()(T a, T b) const {
    using U = std::common_type_t<Unsigned<T>, uint32_t>;
    return static_cast<T>(static_cast<U>(a) * static_cast<U>(b));
  }
};
struct MulHi {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>((static_cast<Wide<T>>(a) * b) >> (8 * sizeof(T)));
  }
};
struct MadLo {
  template <class T>
  T operator()(T a, T b, T c) const {
    return Add{}(MulLo{}(a, b), c);
  }
};
struct MadHi {
  template <class T>
  T operator()(T a, T b, T c) const {
    return Add{}(MulHi{}(a, b), c);
  }
};
struct MadHiSat {
  int32_t operator()(int32_t a, int32_t b, int32_t c) const { return clamp_s32(int64_t{MulHi{}(a, b)} + c); }
};
template <class D>
struct MulWide {
  template <class T>
  D operator()(T a, T b) const {
    return static_cast<D>(a) * static_cast<D>(b);
  }
};
template <class D>
struct MadWide {
  template <class T>
  D operator()(T a, T b, D c) const {
    return Add{}(MulWide<D>{}(a, b), c);
  }
};

// The low 24 bits of a register, as a number of its type.
template <class T>
T low24(T x) {
  return static_cast<T>(static_cast<uint32_t>(x) << 8) >> 8;
}
template <int Shift>  // 16: the upper 32 bits of the product's 48
struct Mul24 {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>((static_cast<Wide<T>>(low24(a)) * low24(b)) >> Shift);
  }
};
template <int Shift>
struct Mad24 {
  template <class T>
  T operator()(T a, T b, T c) const {
    return Add{}(Mul24<Shift>{}(a, b), c);
  }
};
struct Mad24HiSat {
  int32_t operator()(int32_t a, int32_t b, int32_t c) const { return clamp_s32(int64_t{Mul24<16>{}(a, b)} + c); }
};

struct Sad {
  template <class T>
  T operator()(T a, T b, T c) const {
    return Add{}(c, a < b ? Sub{}(b, a) : Sub{}(a, b));
  }
};
// By zero the ISA leaves the result open: all ones here, and the dividend as the remainder.
struct Div {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0) return static_cast<T>(~T{0});
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return Sub{}(T{0}, a);  // the least number has no opposite
    return static_cast<T>(a / b);
  }
};
struct Rem {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
    return static_cast<T>(a % b);
  }
};
struct Abs {
  template <class T>
  T operator()(T a) const {
    return a < 0 ? Sub{}(T{0}, a) : a;
  }
};
struct Neg {
  template <class T>
  T operator()(T a) const {
    return Sub{}(T{0}, a);
  }
};
struct Min {
  template <class T>
  T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};
struct Max {
  template <class T>
  T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};
template <class Op>
struct Relu {
  template <class T>
  T operator()(T a, T b) const {
    return Max{}(Op{}(a, b), T{0});
  }
};
template <class Op, class Half>  // Op on both halves of a register
struct InHalves {
  uint32_t operator()(uint32_t a, uint32_t b) const {
    const auto low = Op{}(static_cast<Half>(a), static_cast<Half>(b));
    const auto high = Op{}(static_cast<Half>(a >> 16), static_cast<Half>(b >> 16));
    return static_cast<uint16_t>(low) | static_cast<uint32_t>(static_cast<uint16_t>(high)) << 16;
  }
};

template <class Op>
void bind_minmax_x2(Bind& b) {
  if (b.has("u16x2")) return bind_32<InHalves<Op, uint16_t>, 2>(b);
  b.has("relu") ? bind_32<InHalves<Relu<Op>, int16_t>, 2>(b) : bind_32<InHalves<Op, int16_t>, 2>(b);
}

Type doubled(Type t) {
  switch (t) {
    case Type::u16:
      return Type::u32;
    case Type::s16:
      return Type::s32;
    case Type::u32:
      return Type::u64;
    default:
      return Type::s64;
  }
}
// mul.wide and mad.wide: d, and c, are twice as wide as a and b.
template <bool Add>
void bind_wide(Bind& b) {
  const Type narrow = b.type(2), wide = doubled(narrow);
  expect_operands(b, Add ? 4 : 3);
  destination(b, b.operand(0), wide);
  b.source(1, narrow);
  b.source(2, narrow);
  if (Add) b.source(3, wide);
  with_integer(narrow, [&](auto t) {
    using S = decltype(t);
    if constexpr (sizeof(S) == 2 || sizeof(S) == 4) {
      using D = std::conditional_t<sizeof(S) == 2, std::conditional_t<std::is_signed_v<S>, int32_t, uint32_t>, Wide<S>>;
      b.run(Add ? &lanewise<MadWide<D>, D, S, S, D> : &lanewise<MulWide<D>, D, S, S>);
    }
  });
}

// Dot products of bytes: the sign of each side is its own. `wide` holds the 16-bit elements of dp2a's a.
template <bool Signed>
int32_t element(uint32_t x, int n, int bits) {
  const uint32_t top = x << (32 - bits * (n + 1));
  return Signed ? static_cast<int32_t>(top) >> (32 - bits) : static_cast<int32_t>(top >> (32 - bits));
}
template <bool SignedA, bool SignedB>
struct Dp4a {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t c) const {
    for (int n = 0; n < 4; ++n) c += static_cast<uint32_t>(element<SignedA>(a, n, 8) * element<SignedB>(b, n, 8));
    return c;
  }
};
template <bool SignedA, bool SignedB, int First>
struct Dp2a {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t c) const {
    for (int n = 0; n < 2; ++n)
      c += static_cast<uint32_t>(element<SignedA>(a, n, 16) * element<SignedB>(b, First + n, 8));
    return c;
  }
};
template <class F>
void with_signs(Bind& b, int first, F f) {
  choose(b.type(first) == Type::s32, [&](auto a) { choose(b.type(first + 1) == Type::s32, [&](auto c) { f(a, c); }); });
}

// Extended precision: a carry per lane, kept as a mask by the warp.
enum class Extended { add, sub, mad_lo, mad_hi };
template <Extended E, class T, bool In, bool Out>
Step extended(Warp& w, const Instruction& i, Mask mask) {
  T* d = w.operand<T>(i, 0);
  const T *a = w.operand<T>(i, 1), *b = w.operand<T>(i, 2);
  constexpr bool kMad = E == Extended::mad_lo || E == Extended::mad_hi;
  const T* c = kMad ? w.operand<T>(i, 3) : nullptr;
  using Signed = std::make_signed_t<T>;
  Mask carries = 0;
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    const T carry = In ? w.carry >> l & 1 : 0;
    T x = a[l], y = b[l], sum;
    if (E == Extended::mad_lo) x = MulLo{}(a[l], b[l]), y = c[l];
    if (E == Extended::mad_hi)
      x = i.option ? static_cast<T>(MulHi{}(static_cast<Signed>(a[l]), static_cast<Signed>(b[l])))
                   : MulHi{}(a[l], b[l]),
      y = c[l];
    const bool over = E == Extended::sub
                          ? __builtin_sub_overflow(x, y, &sum) | __builtin_sub_overflow(sum, carry, &sum)
                          : __builtin_add_overflow(x, y, &sum) | __builtin_add_overflow(sum, carry, &sum);
    d[l] = sum;
    carries |= static_cast<Mask>(over) << l;
  }
  if (Out) w.carry = (w.carry & ~mask) | carries;
  return Step::next;
}
template <Extended E>
void bind_extended(Bind& b, bool in) {
  const Type type = b.type(b.slots() - 1);
  bind_operands(b, type, type, E == Extended::mad_lo || E == Extended::mad_hi ? 3 : 2);
  b.instruction.option = ptx::is_signed(type);
  choose(ptx::size_of(type) == 8, [&](auto wide) {
    using T = std::conditional_t<decltype(wide)::value, uint64_t, uint32_t>;
    choose(in, [&](auto i) {
      choose(b.has("cc"), [&](auto out) { b.run(&extended<E, T, decltype(i)::value, decltype(out)::value>); });
    });
  });
}

const Row rows[] = {
    {"add.u16|u32|u64|s16|s32|s64", "9.7.1.1", bind_integer<Add, 2>},
    {"add.sat.s32", "9.7.1.1", bind_32<AddSat, 2, int32_t>},
    {"add.u16x2|s16x2", "9.7.1.1", bind_32<InHalves<Add, uint16_t>, 2>},
    {"sub.u16|u32|u64|s16|s32|s64", "9.7.1.2", bind_integer<Sub, 2>},
    {"sub.sat.s32", "9.7.1.2", bind_32<SubSat, 2, int32_t>},
    {"mul.lo.u16|u32|u64|s16|s32|s64", "9.7.1.3", bind_integer<MulLo, 2>},
    {"mul.hi.u16|u32|u64|s16|s32|s64", "9.7.1.3", bind_integer<MulHi, 2>},
    {"mul.wide.u16|u32|s16|s32", "9.7.1.3", bind_wide<false>},
    {"mad.lo.u16|u32|u64|s16|s32|s64", "9.7.1.4", bind_integer<MadLo, 3>},
    {"mad.hi.u16|u32|u64|s16|s32|s64", "9.7.1.4", bind_integer<MadHi, 3>},
    {"mad.hi.sat.s32", "9.7.1.4", bind_32<MadHiSat, 3, int32_t>},
    {"mad.wide.u16|u32|s16|s32", "9.7.1.4", bind_wide<true>},
    {"mul24.lo.u32|s32", "9.7.1.5", bind_integer<Mul24<0>, 2>},
    {"mul24.hi.u32|s32", "9.7.1.5", bind_integer<Mul24<16>, 2>},
    {"mad24.lo.u32|s32", "9.7.1.6", bind_integer<Mad24<0>, 3>},
    {"mad24.hi.u32|s32", "9.7.1.6", bind_integer<Mad24<16>, 3>},
    {"mad24.hi.sat.s32", "9.7.1.6", bind_32<Mad24HiSat, 3, int32_t>},
    {"sad.u16|u32|u64|s16|s32|s64", "9.7.1.7", bind_integer<Sad, 3>},
    {"div.u16|u32|u64|s16|s32|s64", "9.7.1.8", bind_integer<Div, 2>},
    {"rem.u16|u32|u64|s16|s32|s64", "9.7.1.9", bind_integer<Rem, 2>},
    {"abs.s16|s32|s64", "9.7.1.10", bind_integer<Abs, 1>},
    {"neg.s16|s32|s64", "9.7.1.11", bind_integer<Neg, 1>},
    {"min.u16|u32|u64|s16|s32|s64", "9.7.1.12", bind_integer<Min, 2>},
    {"min.relu.s32", "9.7.1.12", bind_32<Relu<Min>, 2, int32_t>},
    {"min.u16x2", "9.7.1.12", bind_minmax_x2<Min>},
    {"min.relu?.s16x2", "9.7.1.12", bind_minmax_x2<Min>},
    {"max.u16|u32|u64|s16|s32|s64", "9.7.1.13", bind_integer<Max, 2>},
    {"max.relu.s32", "9.7.1.13", bind_32<Relu<Max>, 2, int32_t>},
    {"max.u16x2", "9.7.1.13", bind_minmax_x2<Max>},
    {"max.relu?.s16x2", "9.7.1.13", bind_minmax_x2<Max>},
    {"dp4a.u32|s32.u32|s32", "9.7.1.23",
     [](Bind& b) {
       with_signs(b, 1, [&](auto x, auto y) { bind_32<Dp4a<decltype(x)::value, decltype(y)::value>, 3>(b); });
     }},
    {"dp2a.lo|hi.u32|s32.u32|s32", "9.7.1.24",
     [](Bind& b) {
       with_signs(b, 2, [&](auto x, auto y) {
         constexpr bool kA = decltype(x)::value, kB = decltype(y)::value;
         b.has("lo") ? bind_32<Dp2a<kA, kB, 0>, 3>(b) : bind_32<Dp2a<kA, kB, 2>, 3>(b);
       });
     }},
    {"add.cc.u32|s32|u64|s64", "9.7.2.1", [](Bind& b) { bind_extended<Extended::add>(b, false); }},
    {"addc.cc?.u32|s32|u64|s64", "9.7.2.2", [](Bind& b) { bind_extended<Extended::add>(b, true); }},
    {"sub.cc.u32|s32|u64|s64", "9.7.2.3", [](Bind& b) { bind_extended<Extended::sub>(b, false); }},
    {"subc.cc?.u32|s32|u64|s64", "9.7.2.4", [](Bind& b) { bind_extended<Extended::sub>(b, true); }},
    {"mad.lo.cc.u32|s32|u64|s64", "9.7.2.5", [](Bind& b) { bind_extended<Extended::mad_lo>(b, false); }},
    {"mad.hi.cc.u32|s32|u64|s64", "9.7.2.5", [](Bind& b) { bind_extended<Extended::mad_hi>(b, false); }},
    {"madc.lo.cc?.u32|s32|u64|s64", "9.7.2.6", [](Bind& b) { bind_extended<Extended::mad_lo>(b, true); }},
    {"madc.hi.cc?.u32|s32|u64|s64", "9.7.2.6", [](Bind& b) { bind_extended<Extended::mad_hi>(b, true); }},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
