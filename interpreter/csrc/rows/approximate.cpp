// The approximate functions of fp32, f16 and bf16 (ISA 9.7.3, 9.7.4.9, 9.7.4.10) and the gross ones of fp64.
//
// Each is computed in fp64, to 1e-9 or better, and displaced by an error within the bound that the ISA states: a
// function of the seed, the instruction and the bits of its operands, so that the same call gives the same result.
// Written so that loops over lanes vectorise.
#include <cmath>

#include "rows/floating.h"

namespace gpuless {
namespace {

// Numbers in [-1, 1] that are a function of bits; zeros without Options::approximate.
class Noise {
 public:
  Noise(const Warp& w, uint32_t salt) {
    const Options& o = w.cta->launch->options;
    scale_ = o.approximate ? 0x1p-31 : 0;
    seed_ = (static_cast<uint32_t>(o.seed) ^ static_cast<uint32_t>(o.seed >> 32)) * 0x9e3779b1 + salt * 0x85ebca77;
  }
  double operator()(uint32_t bits) const {
    uint32_t h = (bits ^ seed_) * 0xcc9e2d51;
    h = (h ^ h >> 15) * 0x85ebca6b;
    h = (h ^ h >> 13) * 0xc2b2ae35;
    return static_cast<int32_t>(h ^ h >> 16) * scale_;
  }

 private:
  uint32_t seed_;
  double scale_;
};

// 2^x for |x| < 1000: 2^n by its exponent, 2^f, |f| <= 1/2, by its series to the eighth power. Adding 1.5 * 2^52 leaves
// n in the lowest bits.
double exp2_of(double x) {
  constexpr double kShift = 0x1.8p52;
  x = x > 1000 ? 1000 : x < -1000 ? -1000 : x;
  const double shifted = x + kShift, f = x - (shifted - kShift);
  double p = 1.32154867901443e-6;
  for (const double c : {1.52527338040598e-5, 1.54035303933816e-4, 1.33335581464284e-3, 9.61812910762848e-3,
                         5.55041086648216e-2, 2.40226506959101e-1, 6.93147180559945e-1, 1.0}) {
    p = p * f + c;
  }
  const uint64_t exponent = (bit_cast<uint64_t>(shifted) + 1023) << 52;
  return p * bit_cast<double>(exponent);
}

// log2 x: the exponent and, for a mantissa m in [1/sqrt 2, sqrt 2], the series of 2 atanh((m - 1) / (m + 1)).
double log2_of(double x) {
  constexpr uint64_t kOne = 0x3ff0000000000000, kRootOfHalf = 0x3fe6a09e667f3bcd;
  const uint64_t bits = bit_cast<uint64_t>(x), biased = (bits + (kOne - kRootOfHalf)) >> 52;
  const double m = bit_cast<double>(bits - ((biased - 1023) << 52));
  const double n = bit_cast<double>(0x4330000000000000 | biased) - (0x1p52 + 1023);
  const double s = (m - 1) / (m + 1), q = s * s;
  double p = 1.0 / 13;
  for (const double c : {1.0 / 11, 1.0 / 9, 1.0 / 7, 1.0 / 5, 1.0 / 3, 1.0}) p = p * q + c;
  const double y = n + 2.8853900817779268 * s * p;
  const double special = x == 0 ? -std::numeric_limits<double>::infinity() : x > 0 ? x : std::nan("");
  return x > 0 && x < std::numeric_limits<double>::infinity() ? y : special;
}

double tanh_of(double x) {
  const double q = x * x, e = exp2_of(2.8853900817779268 * x);
  return q < 0x1p-10 ? x - x * q * (1.0 / 3 - 2.0 / 15 * q) : 1 - 2 / (e + 1);
}

// Half a unit in the last place of T, relative: what the final rounding takes from a relative bound.
template <class T>
constexpr double kRounding = std::is_same_v<T, float>  ? 0x1p-24
                             : std::is_same_v<T, Half> ? 0x1p-11
                                                       : 0x1p-8;

template <class T>
double relatively(double y, double noise, double bound) {
  return y * (1 + noise * (bound - kRounding<T>));
}

// A function: its value in fp64, and that displaced by noise in [-1, 1], before the rounding to T.
struct Rcp {
  static constexpr uint32_t kSalt = 1;
  static double value(double x) { return 1 / x; }
  template <class T>
  static double displaced(double, double y, double noise) {
    return relatively<T>(y, noise, 0x1p-23);
  }
};
struct Sqrt {
  static constexpr uint32_t kSalt = 2;
  static double value(double x) { return __builtin_sqrt(x); }
  template <class T>
  static double displaced(double, double y, double noise) {
    return relatively<T>(y, noise, 0x1p-23);
  }
};
struct Rsqrt {
  static constexpr uint32_t kSalt = 3;
  static double value(double x) { return 1 / __builtin_sqrt(x); }
  template <class T>
  static double displaced(double, double y, double noise) {
    return relatively<T>(y, noise, 1.2785e-7);  // 2^-22.9
  }
};
struct Ex2 {
  static constexpr uint32_t kSalt = 4;
  static double value(double x) { return exp2_of(x); }
  template <class T>
  static double displaced(double, double y, double noise) {
    constexpr double kBound = std::is_same_v<T, float>  ? 1.6858e-7  // 2^-22.5
                              : std::is_same_v<T, Half> ? 1.0466e-3  // 2^-9.9
                                                        : 0x1p-7;
    return relatively<T>(y, noise, kBound);
  }
};
struct Lg2 {
  static constexpr uint32_t kSalt = 5;
  static double value(double x) { return log2_of(x); }
  template <class T>
  static double displaced(double x, double y, double noise) {  // 2^-22.6 absolute around 1, 2^-22 relative elsewhere
    return x >= 0.5 && x <= 2 ? y + noise * (1.5729e-7 - 0x1p-25) : relatively<T>(y, noise, 0x1p-22);
  }
};
struct Sine {
  static constexpr uint32_t kSalt = 6;
  static double value(double x) { return std::sin(x); }
  template <class T>
  static double displaced(double x, double y, double noise) {  // 2^-20.5 within two turns, 2^-14.7 beyond
    return y + noise * ((std::fabs(x) <= 6.283185307179586 ? 6.7435e-7 : 3.7571e-5) - 0x1p-25);
  }
};
struct Cosine : Sine {
  static constexpr uint32_t kSalt = 7;
  static double value(double x) { return std::cos(x); }
};
struct Tanh {
  static constexpr uint32_t kSalt = 8;
  static double value(double x) { return tanh_of(x); }
  template <class T>
  static double displaced(double, double y, double noise) {
    if constexpr (std::is_same_v<T, float>) return relatively<T>(y, noise, 0x1p-11);
    if constexpr (std::is_same_v<T, Half>) return y + noise * (4.9271e-4 - 0x1p-12);  // 2^-10.987 absolute
    return y + noise * (0x1p-8 - 0x1p-9);
  }
};

template <class Fn, bool Ftz>
struct Approximate {
  Noise noise;
  template <class T>
  T operator()(T a) const {
    const T in = Ftz ? flushed(a) : a;
    const double x = static_cast<float>(in), y = Fn::value(x);
    const double z = Fn::template displaced<T>(x, y, noise(bits_of(in)));
    if constexpr (is_short<T>) {
      return T(z);
    } else {
      const float d = canonical(static_cast<float>(z));
      return Ftz ? flushed(d) : d;
    }
  }
};
template <class Fn, bool Ftz, class T>
struct ApproximateBoth {
  Approximate<Fn, Ftz> half;
  explicit ApproximateBoth(Noise n) : half{n} {}
  uint32_t operator()(uint32_t a) const {
    return half(T::from_bits(a & 0xffff)).bits | static_cast<uint32_t>(half(T::from_bits(a >> 16)).bits) << 16;
  }
};

template <class Op, uint32_t Salt, class T, class... More>
[[gnu::flatten]] Step displaced(Warp& w, const Instruction& i, Mask mask) {
  lanewise_over<Op, T, T, More...>(w, i, mask, Op{Noise(w, Salt)}, std::index_sequence_for<T, More...>{});
  return Step::next;
}

template <class Fn>
void bind_f32(Bind& b) {
  bind_operands(b, Type::f32, Type::f32, 1);
  b.run(b.has("ftz") ? &displaced<Approximate<Fn, true>, Fn::kSalt, float>
                     : &displaced<Approximate<Fn, false>, Fn::kSalt, float>);
}
template <class Fn, class T, Type Pair>
void bind_short(Bind& b) {
  const bool pair = b.type(b.slots() - 1) == Pair;
  const Type register_type = pair ? Type::b32 : Type::b16;
  bind_operands(b, register_type, register_type, 1);
  b.run(pair ? &displaced<ApproximateBoth<Fn, false, T>, Fn::kSalt, uint32_t>
             : &displaced<Approximate<Fn, false>, Fn::kSalt, T>);
}

// Two units in the last place. div.approx multiplies by a reciprocal, which beyond 2^126 is 0.
template <bool Full, bool Ftz>
struct Divide {
  Noise noise;
  float operator()(float a, float b) const {
    if (Ftz) a = flush(a), b = flush(b);
    const double reciprocal = std::fabs(b) > 0x1p126f ? std::copysign(0.0, b) : 1 / double{b};
    const double y = Full ? double{a} / b : a * reciprocal;
    const uint32_t bits = bit_cast<uint32_t>(a) * 0x9e3779b1 + bit_cast<uint32_t>(b);
    const float d = canonical(static_cast<float>(relatively<float>(y, noise(bits), 0x1p-23)));
    return Ftz ? flush(d) : d;
  }
};
template <bool Full>
void bind_divide(Bind& b) {
  bind_operands(b, Type::f32, Type::f32, 2);
  b.run(b.has("ftz") ? &displaced<Divide<Full, true>, 9, float, float>
                     : &displaced<Divide<Full, false>, 9, float, float>);
}

// fp64: on the upper half of the operand, into the upper half of the result.
template <class Fn>
struct Gross {
  static double upper(double x) {
    const uint64_t bits = bit_cast<uint64_t>(x) & 0xffffffff00000000;
    return bit_cast<double>(bits & 0x7ff0000000000000 ? bits : bits & 0x8000000000000000);
  }
  double operator()(double a) const { return upper(Fn::value(upper(a))); }
};
template <class Fn>
void bind_gross(Bind& b) {
  bind_operands(b, Type::f64, Type::f64, 1);
  b.run(&lanewise<Gross<Fn>, double, double>);
}
struct PlainRsqrt {
  double operator()(double a) const { return 1 / __builtin_sqrt(a); }
};

const Row rows[] = {
    {"div.full.ftz?.f32", "9.7.3.8", bind_divide<true>},
    {"div.approx.ftz?.f32", "9.7.3.8", bind_divide<false>},
    {"rcp.approx.ftz?.f32", "9.7.3.13", bind_f32<Rcp>},
    {"rcp.approx.ftz.f64", "9.7.3.14", bind_gross<Rcp>},
    {"sqrt.approx.ftz?.f32", "9.7.3.15", bind_f32<Sqrt>},
    {"rsqrt.approx.ftz?.f32", "9.7.3.16", bind_f32<Rsqrt>},
    {"rsqrt.approx.f64", "9.7.3.16",
     [](Bind& b) {
       bind_operands(b, Type::f64, Type::f64, 1);
       b.run(&lanewise<PlainRsqrt, double, double>);
     }},
    {"rsqrt.approx.ftz.f64", "9.7.3.17", bind_gross<Rsqrt>},
    {"sin.approx.ftz?.f32", "9.7.3.18", bind_f32<Sine>},
    {"cos.approx.ftz?.f32", "9.7.3.19", bind_f32<Cosine>},
    {"lg2.approx.ftz?.f32", "9.7.3.20", bind_f32<Lg2>},
    {"ex2.approx.ftz?.f32", "9.7.3.21", bind_f32<Ex2>},
    {"tanh.approx.f32", "9.7.3.22", bind_f32<Tanh>},
    {"tanh.approx.f16|f16x2", "9.7.4.9", bind_short<Tanh, Half, Type::f16x2>},
    {"tanh.approx.bf16|bf16x2", "9.7.4.9", bind_short<Tanh, BFloat16, Type::bf16x2>},
    {"ex2.approx.f16|f16x2", "9.7.4.10", bind_short<Ex2, Half, Type::f16x2>},
    {"ex2.approx.ftz.bf16|bf16x2", "9.7.4.10", bind_short<Ex2, BFloat16, Type::bf16x2>},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
