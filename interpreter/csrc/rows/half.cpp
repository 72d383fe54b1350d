// f16 and bf16, one or two to a register (ISA 9.7.4), without the approximate functions (approximate.cpp).
#include <array>

#include "rows/floating.h"

namespace gpuless {
namespace {

// Op on the values of T in a register, Instruction::option of them: the shorts of 32 registers lie in a row.
template <class Op, class T, size_t... N>
inline void over_shorts(Warp& w, const Instruction& i, Mask mask, std::index_sequence<N...>) {
  const std::array<const uint16_t*, sizeof...(N)> s{w.operand<uint16_t>(i, 1 + N)...};
  const auto op = [=](int k) { return Op{}(T::from_bits(s[N][k])...).bits; };
  keep_lanes<2>(mask, w.operand<uint16_t>(i, 0), op, static_cast<int>(i.option));
}
template <class Op, class T, int N>
[[gnu::flatten]] Step short_lanewise(Warp& w, const Instruction& i, Mask mask) {
  over_shorts<Op, T>(w, i, mask, std::make_index_sequence<N>{});
  return Step::next;
}

// One or two values, by the type in the last slot.
template <class T, class Op, int N>
void bind_short(Bind& b) {
  const Type type = b.type(b.slots() - 1);
  const bool pair = type == Type::f16x2 || type == Type::bf16x2;
  bind_operands(b, pair ? Type::b32 : Type::b16, pair ? Type::b32 : Type::b16, N);
  b.instruction.option = pair ? 2 : 1;
  b.run(&short_lanewise<Op, T, N>);
}

// f16 has .ftz and .sat, where bf16 has neither.
template <class Op>
void bind_half(Bind& b) {
  choose(b.has("ftz"), [&](auto ftz) {
    constexpr bool kFtz = decltype(ftz)::value;
    b.has("sat") ? bind_short<Half, Modified<Op, kFtz, Clamp::sat>, 2>(b)
                 : bind_short<Half, Modified<Op, kFtz, Clamp::none>, 2>(b);
  });
}
template <class Op>
void bind_brain(Bind& b) {
  bind_short<BFloat16, Modified<Op, false, Clamp::none>, 2>(b);
}

void bind_half_fma(Bind& b) {
  choose(b.has("ftz"), [&](auto ftz) {
    constexpr bool kFtz = decltype(ftz)::value;
    b.has("sat")    ? bind_short<Half, Modified<TimesPlus, kFtz, Clamp::sat>, 3>(b)
    : b.has("relu") ? bind_short<Half, Modified<TimesPlus, kFtz, Clamp::relu>, 3>(b)
                    : bind_short<Half, Modified<TimesPlus, kFtz, Clamp::none>, 3>(b);
  });
}
void bind_brain_fma(Bind& b) {
  b.has("relu") ? bind_short<BFloat16, Modified<TimesPlus, false, Clamp::relu>, 3>(b)
                : bind_short<BFloat16, Modified<TimesPlus, false, Clamp::none>, 3>(b);
}

// .oob: a product with an operand of the pattern that stands for out of bounds, a NaN of its own, is 0.
template <class Op>
struct OutOfBounds {
  template <class T>
  T operator()(T a, T b, T c) const {
    constexpr uint16_t kOutOfBounds = 0xffff;
    const bool out = a.bits == kOutOfBounds || b.bits == kOutOfBounds;
    const T d = Op{}(a, b, c);
    return T::from_bits(out ? 0 : d.bits);
  }
};
template <Clamp C>
void bind_oob_clamped(Bind& b) {
  using Op = OutOfBounds<Modified<TimesPlus, false, C>>;
  const Type type = b.type(b.slots() - 1);
  type == Type::bf16 || type == Type::bf16x2 ? bind_short<BFloat16, Op, 3>(b) : bind_short<Half, Op, 3>(b);
}
void bind_oob(Bind& b) { b.has("relu") ? bind_oob_clamped<Clamp::relu>(b) : bind_oob_clamped<Clamp::none>(b); }

template <class Op>
void bind_half_sign(Bind& b) {
  b.has("ftz") ? bind_short<Half, Flushing<Op>, 1>(b) : bind_short<Half, Op, 1>(b);
}

template <class T, bool Greatest, bool Ftz>
void bind_extreme(Bind& b) {
  choose(b.has("NaN"), [&](auto nan) {
    choose(b.has("xorsign"), [&](auto sign) {
      bind_short<T, Extreme<Greatest, Ftz, decltype(nan)::value, decltype(sign)::value>, 2>(b);
    });
  });
}
template <bool Greatest>
void bind_half_extreme(Bind& b) {
  b.has("ftz") ? bind_extreme<Half, Greatest, true>(b) : bind_extreme<Half, Greatest, false>(b);
}

const Row rows[] = {
    {"add.rn?.ftz?.sat?.f16|f16x2", "9.7.4.1", bind_half<Plus>},
    {"add.rn?.bf16|bf16x2", "9.7.4.1", bind_brain<Plus>},
    {"sub.rn?.ftz?.sat?.f16|f16x2", "9.7.4.2", bind_half<Minus>},
    {"sub.rn?.bf16|bf16x2", "9.7.4.2", bind_brain<Minus>},
    {"mul.rn?.ftz?.sat?.f16|f16x2", "9.7.4.3", bind_half<Times>},
    {"mul.rn?.bf16|bf16x2", "9.7.4.3", bind_brain<Times>},
    {"fma.rn.ftz?.sat?.f16|f16x2", "9.7.4.4", bind_half_fma},
    {"fma.rn.ftz?.relu.f16|f16x2", "9.7.4.4", bind_half_fma},
    {"fma.rn.relu?.bf16|bf16x2", "9.7.4.4", bind_brain_fma},
    {"fma.rn.oob.relu?.f16|f16x2|bf16|bf16x2", "9.7.4.4", bind_oob},
    {"neg.ftz?.f16|f16x2", "9.7.4.5", bind_half_sign<SignFlip>},
    {"neg.bf16|bf16x2", "9.7.4.5", bind_short<BFloat16, SignFlip, 1>},
    {"abs.ftz?.f16|f16x2", "9.7.4.6", bind_half_sign<SignOff>},
    {"abs.bf16|bf16x2", "9.7.4.6", bind_short<BFloat16, SignOff, 1>},
    {"min.ftz?.NaN?.f16|f16x2", "9.7.4.7", bind_half_extreme<false>},
    {"min.ftz?.NaN?.xorsign.abs.f16|f16x2", "9.7.4.7", bind_half_extreme<false>},
    {"min.NaN?.bf16|bf16x2", "9.7.4.7", bind_extreme<BFloat16, false, false>},
    {"min.NaN?.xorsign.abs.bf16|bf16x2", "9.7.4.7", bind_extreme<BFloat16, false, false>},
    {"max.ftz?.NaN?.f16|f16x2", "9.7.4.8", bind_half_extreme<true>},
    {"max.ftz?.NaN?.xorsign.abs.f16|f16x2", "9.7.4.8", bind_half_extreme<true>},
    {"max.NaN?.bf16|bf16x2", "9.7.4.8", bind_extreme<BFloat16, true, false>},
    {"max.NaN?.xorsign.abs.bf16|bf16x2", "9.7.4.8", bind_extreme<BFloat16, true, false>},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
