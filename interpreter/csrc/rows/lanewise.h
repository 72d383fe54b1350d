#pragma once
// What the arithmetic rows share: one handler for "d = Op(a, b, ...) in every lane", and binding by type.
#include <tuple>
#include <utility>

#include "formats.h"
#include "lanes.h"
#include "table.h"

namespace gpuless {

// 16-bit numbers are loaded and stored as integers: a loop that copies structures does not vectorise.
template <class T>
using Stored = std::conditional_t<is_short<T>, uint16_t, T>;
template <class T>
inline T loaded(Stored<T> x) {
  if constexpr (is_short<T>) {
    return T::from_bits(x);
  } else {
    return x;
  }
}
template <class T>
inline Stored<T> stored(T x) {
  if constexpr (is_short<T>) {
    return x.bits;
  } else {
    return x;
  }
}

template <class Op, class D, class... S, size_t... N>
inline void lanewise_over(Warp& w, const Instruction& i, Mask mask, Op op, std::index_sequence<N...>) {
  auto* d = w.operand<Stored<D>>(i, 0);
  const std::tuple<const Stored<S>*...> s{w.operand<Stored<S>>(i, 1 + N)...};
  each_lane(mask, [=](int l) { d[l] = stored<D>(op(loaded<S>(std::get<N>(s)[l])...)); });
}
// Operand 0 is the destination; Op is a function object without state. flatten: what is called within the loop must be
// inlined for it to vectorise, and left alone the compiler stops at the larger ones.
template <class Op, class D, class... S>
[[gnu::flatten]] Step lanewise(Warp& w, const Instruction& i, Mask mask) {
  lanewise_over<Op, D, S...>(w, i, mask, Op{}, std::index_sequence_for<S...>{});
  return Step::next;
}

// The same in the rounding mode of Instruction::option.
template <class Op, class D, class... S>
Step lanewise_rounded(Warp& w, const Instruction& i, Mask mask) {
  const RoundingScope scope(static_cast<Rounding>(i.option));
  return lanewise<Op, D, S...>(w, i, mask);
}

inline void expect_operands(const Bind& b, int n) {
  if (b.operands() != n)
    b.refuse("it takes " + std::to_string(n) + " operands, and has " + std::to_string(b.operands()));
}
// A destination that has to be a register: `_` is for the few instructions that may drop a result.
inline void destination(Bind& b, const Operand& o, Type type) {
  if (o.kind == Operand::Kind::sink) b.refuse("its destination must be a register, not _");
  b.destination(o, type);
}
// Destination 0 and sources 1 to n.
inline void bind_operands(Bind& b, Type d, Type s, int n) {
  expect_operands(b, n + 1);
  destination(b, b.operand(0), d);
  for (int i = 1; i <= n; ++i) b.source(i, s);
}

template <class Op, class D, int N, class S>
Handler handler_of(S) {
  if constexpr (N == 1) return &lanewise<Op, D, S>;
  if constexpr (N == 2) return &lanewise<Op, D, S, S>;
  if constexpr (N == 3) return &lanewise<Op, D, S, S, S>;
  if constexpr (N == 4) return &lanewise<Op, D, S, S, S, S>;
}

// d = Op(a, ...) with N sources, all of the type in the last slot, an integer one.
template <class Op, int N>
void bind_integer(Bind& b) {
  const Type type = b.type(b.slots() - 1);
  bind_operands(b, type, type, N);
  with_integer(type, [&](auto t) { b.run(handler_of<Op, decltype(t), N>(t)); });
}
// The same on 32-bit registers whatever the type is called: packed ones, and those that have one width only.
template <class Op, int N, class T = uint32_t>
void bind_32(Bind& b) {
  bind_operands(b, Type::b32, Type::b32, N);
  b.run(handler_of<Op, T, N>(T{}));
}

// Turns a condition known at bind time into a constant: choose(b.has("ftz"), [&](auto ftz) { ... ftz.value ... }).
template <class F>
void choose(bool condition, F f) {
  condition ? f(std::true_type{}) : f(std::false_type{});
}

inline Rounding rounding_of(const Bind& b) {
  return b.has("rz") ? Rounding::rz : b.has("rm") ? Rounding::rm : b.has("rp") ? Rounding::rp : Rounding::rn;
}

template <class T>
T saturated(T x) {  // .sat: into [0, 1], NaN to 0
  return x > 0 ? (x < 1 ? x : T{1}) : T{0};
}

// Of logic instructions and of reductions.
struct And {
  template <class T>
  T operator()(T a, T b) const {
    return a & b;
  }
};
struct Or {
  template <class T>
  T operator()(T a, T b) const {
    return a | b;
  }
};
struct Xor {
  template <class T>
  T operator()(T a, T b) const {
    return a ^ b;
  }
};

}  // namespace gpuless
