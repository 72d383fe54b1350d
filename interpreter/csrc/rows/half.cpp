// f16 and bf16, one or two to a register (ISA 9.7.4), without the approximate functions (approximate.cpp).
#include "rows/floating.h"

namespace gpuless {
namespace {

// Op on both halves of a register, of type T.
template <class Op, class T>
struct Both {
  template <class... U>
  uint32_t operator()(U... x) const {
    const uint32_t low = Op{}(T::from_bits(x & 0xffff)...).bits, high = Op{}(T::from_bits(x >> 16)...).bits;
    return low | high << 16;
  }
};

bool is_pair(Type t) { return t == Type::f16x2 || t == Type::bf16x2; }

// One or two values of f16 or bf16, by the type in the last slot.
template <class Op, int N>
void bind_short(Bind& b) {
  const Type type = b.type(b.slots() - 1);
  const Type register_type = is_pair(type) ? Type::b32 : Type::b16;
  bind_operands(b, register_type, register_type, N);
  choose(type == Type::bf16 || type == Type::bf16x2, [&](auto brain) {
    using T = std::conditional_t<decltype(brain)::value, BFloat16, Half>;
    b.run(is_pair(type) ? handler_of<Both<Op, T>, uint32_t, N>(uint32_t{}) : handler_of<Op, T, N>(T{}));
  });
}
template <class Op, int N>
void bind_modified(Bind& b) {
  choose(b.has("ftz"), [&](auto ftz) {
    constexpr bool kFtz = decltype(ftz)::value;
    b.has("sat")    ? bind_short<Modified<Op, kFtz, Clamp::sat>, N>(b)
    : b.has("relu") ? bind_short<Modified<Op, kFtz, Clamp::relu>, N>(b)
                    : bind_short<Modified<Op, kFtz, Clamp::none>, N>(b);
  });
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
void bind_oob(Bind& b) {
  b.has("relu") ? bind_short<OutOfBounds<Modified<TimesPlus, false, Clamp::relu>>, 3>(b)
                : bind_short<OutOfBounds<Modified<TimesPlus, false, Clamp::none>>, 3>(b);
}

template <class Op>
void bind_sign(Bind& b) {
  b.has("ftz") ? bind_short<Flushing<Op>, 1>(b) : bind_short<Op, 1>(b);
}
template <bool Greatest>
void bind_extreme(Bind& b) {
  choose(b.has("ftz"), [&](auto ftz) {
    choose(b.has("NaN"), [&](auto nan) {
      choose(b.has("xorsign"), [&](auto sign) {
        bind_short<Extreme<Greatest, decltype(ftz)::value, decltype(nan)::value, decltype(sign)::value>, 2>(b);
      });
    });
  });
}

const Row rows[] = {
    {"add.rn?.ftz?.sat?.f16|f16x2", "9.7.4.1", bind_modified<Plus, 2>},
    {"add.rn?.bf16|bf16x2", "9.7.4.1", bind_modified<Plus, 2>},
    {"sub.rn?.ftz?.sat?.f16|f16x2", "9.7.4.2", bind_modified<Minus, 2>},
    {"sub.rn?.bf16|bf16x2", "9.7.4.2", bind_modified<Minus, 2>},
    {"mul.rn?.ftz?.sat?.f16|f16x2", "9.7.4.3", bind_modified<Times, 2>},
    {"mul.rn?.bf16|bf16x2", "9.7.4.3", bind_modified<Times, 2>},
    {"fma.rn.ftz?.sat?.f16|f16x2", "9.7.4.4", bind_modified<TimesPlus, 3>},
    {"fma.rn.ftz?.relu.f16|f16x2", "9.7.4.4", bind_modified<TimesPlus, 3>},
    {"fma.rn.relu?.bf16|bf16x2", "9.7.4.4", bind_modified<TimesPlus, 3>},
    {"fma.rn.oob.relu?.f16|f16x2|bf16|bf16x2", "9.7.4.4", bind_oob},
    {"neg.ftz?.f16|f16x2", "9.7.4.5", bind_sign<SignFlip>},
    {"neg.bf16|bf16x2", "9.7.4.5", bind_sign<SignFlip>},
    {"abs.ftz?.f16|f16x2", "9.7.4.6", bind_sign<SignOff>},
    {"abs.bf16|bf16x2", "9.7.4.6", bind_sign<SignOff>},
    {"min.ftz?.NaN?.f16|f16x2", "9.7.4.7", bind_extreme<false>},
    {"min.ftz?.NaN?.xorsign.abs.f16|f16x2", "9.7.4.7", bind_extreme<false>},
    {"min.NaN?.bf16|bf16x2", "9.7.4.7", bind_extreme<false>},
    {"min.NaN?.xorsign.abs.bf16|bf16x2", "9.7.4.7", bind_extreme<false>},
    {"max.ftz?.NaN?.f16|f16x2", "9.7.4.8", bind_extreme<true>},
    {"max.ftz?.NaN?.xorsign.abs.f16|f16x2", "9.7.4.8", bind_extreme<true>},
    {"max.NaN?.bf16|bf16x2", "9.7.4.8", bind_extreme<true>},
    {"max.NaN?.xorsign.abs.bf16|bf16x2", "9.7.4.8", bind_extreme<true>},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
