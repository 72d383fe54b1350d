// fp32 and fp64 (ISA 9.7.3) without the approximate functions.
#include "rows/floating.h"
#include "rows/matrix_rows.h"

namespace gpuless {
namespace {

struct Quotient {
  template <class T>
  T operator()(T a, T b) const {
    return a / b;
  }
};
struct Reciprocal {
  template <class T>
  T operator()(T a) const {
    return 1 / a;
  }
};
struct Root {
  float operator()(float a) const { return __builtin_sqrtf(a); }
  double operator()(double a) const { return __builtin_sqrt(a); }
};
struct CopySign {  // the sign of a on b
  template <class T>
  T operator()(T a, T b) const {
    return from_bits<T>((bits_of(a) & kSignBit<T>) | (bits_of(b) & ~kSignBit<T>));
  }
};

template <class Op, class T, class... More>
Handler rounded_handler(Rounding mode) {
  return mode == Rounding::rn ? &lanewise<Op, T, T, More...> : &lanewise_rounded<Op, T, T, More...>;
}
// N operands of fp32 or fp64 in any rounding mode; .sat, where the pattern has it, and .ftz are fp32's.
template <class Op, int N>
void bind_rounded(Bind& b) {
  const Type type = b.type(b.slots() - 1);
  bind_operands(b, type, type, N);
  const Rounding mode = rounding_of(b);
  b.instruction.option = static_cast<uint32_t>(mode);
  const auto run = [&](auto op, auto t) {
    using O = decltype(op);
    using T = decltype(t);
    if constexpr (N == 1) b.run(rounded_handler<O, T>(mode));
    if constexpr (N == 2) b.run(rounded_handler<O, T, T>(mode));
    if constexpr (N == 3) b.run(rounded_handler<O, T, T, T>(mode));
  };
  if (type == Type::f64) return run(Modified<Op, false, Clamp::none>{}, double{});
  choose(b.has("ftz"), [&](auto ftz) {
    choose(b.has("sat"), [&](auto sat) {
      run(Modified<Op, decltype(ftz)::value, decltype(sat)::value ? Clamp::sat : Clamp::none>{}, float{});
    });
  });
}

// Two of fp32 in a register of 64 bits.
template <class Op>
struct InPairs {
  template <class... T>
  uint64_t operator()(T... pairs) const {
    const auto half = [&](int shift) {
      return uint64_t{bits_of(Op{}(from_bits<float>(static_cast<uint32_t>(pairs >> shift))...))} << shift;
    };
    return half(0) | half(32);
  }
};
template <class Op, int N>
void bind_pairs(Bind& b) {
  require_capability(b, 100);
  bind_operands(b, Type::b64, Type::b64, N);
  const Rounding mode = rounding_of(b);
  b.instruction.option = static_cast<uint32_t>(mode);
  choose(b.has("ftz"), [&](auto ftz) {
    using O = InPairs<Modified<Op, decltype(ftz)::value, Clamp::none>>;
    if constexpr (N == 2) b.run(rounded_handler<O, uint64_t, uint64_t>(mode));
    if constexpr (N == 3) b.run(rounded_handler<O, uint64_t, uint64_t, uint64_t>(mode));
  });
}

template <class Op, int N>
void bind_sign(Bind& b) {
  const Type type = b.type(b.slots() - 1);
  bind_operands(b, type, type, N);
  if (type == Type::f64) return b.run(handler_of<Op, double, N>(double{}));
  if constexpr (N == 1) {
    b.run(b.has("ftz") ? handler_of<Flushing<Op>, float, N>(float{}) : handler_of<Op, float, N>(float{}));
  } else {
    b.run(handler_of<Op, float, N>(float{}));
  }
}

template <bool Greatest>
void bind_extreme(Bind& b) {
  const Type type = b.type(b.slots() - 1);
  const bool three = b.operands() == 4 && type == Type::f32 && !b.has("xorsign");
  if (three) require_capability(b, 100);
  bind_operands(b, type, type, three ? 3 : 2);
  if (type == Type::f64) return b.run(handler_of<Extreme<Greatest, false, false, false>, double, 2>(double{}));
  choose(b.has("ftz"), [&](auto ftz) {
    choose(b.has("NaN"), [&](auto nan) {
      if (three)
        return b.run(
            handler_of<Extreme<Greatest, decltype(ftz)::value, decltype(nan)::value, false>, float, 3>(float{}));
      choose(b.has("xorsign"), [&](auto sign) {
        using Op = Extreme<Greatest, decltype(ftz)::value, decltype(nan)::value, decltype(sign)::value>;
        b.run(handler_of<Op, float, 2>(float{}));
      });
    });
  });
}

enum class Property { finite, infinite, number, notanumber, normal, subnormal };
template <Property P, class T>
bool has_property(T x) {
  const auto magnitude = bits_of(x) & ~kSignBit<T>;
  const auto infinity = bits_of(std::numeric_limits<T>::infinity());
  const auto least_normal = bits_of(std::numeric_limits<T>::min());
  switch (P) {
    case Property::finite:
      return magnitude < infinity;
    case Property::infinite:
      return magnitude == infinity;
    case Property::number:
      return magnitude <= infinity;
    case Property::notanumber:
      return magnitude > infinity;
    case Property::normal:  // zeros count
      return magnitude == 0 || (magnitude >= least_normal && magnitude < infinity);
    case Property::subnormal:
      return magnitude && magnitude < least_normal;
  }
}
template <Property P, class T>
Step testp(Warp& w, const Instruction& i, Mask mask) {
  const T* a = w.operand<T>(i, 1);
  Mask lanes = 0;
  for (int l = 0; l < kLanes; ++l) lanes |= static_cast<Mask>(has_property<P>(a[l])) << l;
  Mask& d = *w.operand<Mask>(i, 0);
  d = (d & ~mask) | (lanes & mask);
  return Step::next;
}
template <Property P>
void bind_testp(Bind& b) {
  expect_operands(b, 2);
  destination(b, b.operand(0), Type::pred);
  b.source(1, b.type(2));
  b.run(b.type(2) == Type::f32 ? &testp<P, float> : &testp<P, double>);
}

const Row rows[] = {
    {"testp.finite.f32|f64", "9.7.3.1", bind_testp<Property::finite>},
    {"testp.infinite.f32|f64", "9.7.3.1", bind_testp<Property::infinite>},
    {"testp.number.f32|f64", "9.7.3.1", bind_testp<Property::number>},
    {"testp.notanumber.f32|f64", "9.7.3.1", bind_testp<Property::notanumber>},
    {"testp.normal.f32|f64", "9.7.3.1", bind_testp<Property::normal>},
    {"testp.subnormal.f32|f64", "9.7.3.1", bind_testp<Property::subnormal>},
    {"copysign.f32|f64", "9.7.3.2", bind_sign<CopySign, 2>},
    {"add.rn|rz|rm|rp?.ftz?.sat?.f32", "9.7.3.3", bind_rounded<Plus, 2>},
    {"add.rn|rz|rm|rp?.f64", "9.7.3.3", bind_rounded<Plus, 2>},
    {"add.rn|rz|rm|rp?.ftz?.f32x2", "9.7.3.3", bind_pairs<Plus, 2>},
    {"sub.rn|rz|rm|rp?.ftz?.sat?.f32", "9.7.3.4", bind_rounded<Minus, 2>},
    {"sub.rn|rz|rm|rp?.f64", "9.7.3.4", bind_rounded<Minus, 2>},
    {"sub.rn|rz|rm|rp?.ftz?.f32x2", "9.7.3.4", bind_pairs<Minus, 2>},
    {"mul.rn|rz|rm|rp?.ftz?.sat?.f32", "9.7.3.5", bind_rounded<Times, 2>},
    {"mul.rn|rz|rm|rp?.f64", "9.7.3.5", bind_rounded<Times, 2>},
    {"mul.rn|rz|rm|rp?.ftz?.f32x2", "9.7.3.5", bind_pairs<Times, 2>},
    {"fma.rn|rz|rm|rp.ftz?.sat?.f32", "9.7.3.6", bind_rounded<TimesPlus, 3>},
    {"fma.rn|rz|rm|rp.f64", "9.7.3.6", bind_rounded<TimesPlus, 3>},
    {"fma.rn|rz|rm|rp.ftz?.f32x2", "9.7.3.6", bind_pairs<TimesPlus, 3>},
    {"mad.rn|rz|rm|rp.ftz?.sat?.f32", "9.7.3.7", bind_rounded<TimesPlus, 3>},  // fused too, since sm_20
    {"mad.rn|rz|rm|rp.f64", "9.7.3.7", bind_rounded<TimesPlus, 3>},
    {"div.rn|rz|rm|rp.ftz?.f32", "9.7.3.8", bind_rounded<Quotient, 2>},
    {"div.rn|rz|rm|rp.f64", "9.7.3.8", bind_rounded<Quotient, 2>},
    {"abs.ftz?.f32", "9.7.3.9", bind_sign<SignOff, 1>},
    {"abs.f64", "9.7.3.9", bind_sign<SignOff, 1>},
    {"neg.ftz?.f32", "9.7.3.10", bind_sign<SignFlip, 1>},
    {"neg.f64", "9.7.3.10", bind_sign<SignFlip, 1>},
    {"min.ftz?.NaN?.f32", "9.7.3.11", bind_extreme<false>},
    {"min.ftz?.NaN?.xorsign.abs.f32", "9.7.3.11", bind_extreme<false>},
    {"min.f64", "9.7.3.11", bind_extreme<false>},
    {"max.ftz?.NaN?.f32", "9.7.3.12", bind_extreme<true>},
    {"max.ftz?.NaN?.xorsign.abs.f32", "9.7.3.12", bind_extreme<true>},
    {"max.f64", "9.7.3.12", bind_extreme<true>},
    {"rcp.rn|rz|rm|rp.ftz?.f32", "9.7.3.13", bind_rounded<Reciprocal, 1>},
    {"rcp.rn|rz|rm|rp.f64", "9.7.3.13", bind_rounded<Reciprocal, 1>},
    {"sqrt.rn|rz|rm|rp.ftz?.f32", "9.7.3.15", bind_rounded<Root, 1>},
    {"sqrt.rn|rz|rm|rp.f64", "9.7.3.15", bind_rounded<Root, 1>},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
