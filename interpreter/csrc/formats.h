#pragma once
// The floating point formats of PTX below fp32 and their roundings (ISA 5.2.2, 9.7.9.21), and the C++ type of every
// type.
//
// encode() and decode() have no branches, so that loops over them vectorise; both are exact for every input and mode.
#include <cfenv>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "ptx.h"

namespace gpuless {

// rna: nearest, ties away from zero. rm and rp: towards minus and plus infinity.
enum class Rounding : uint8_t { rn, rna, rz, rm, rp };

// What is no number: infinities and NaNs as in IEEE 754, one code for NaN (e4m3), or nothing: of the formats of 4 and 6
// bits every code is a number, and what NaN becomes is the largest.
enum class Special : uint8_t { ieee, nan, none };

// Sign, E bits of exponent, M of mantissa.
template <int E, int M, Special S>
struct Layout {
  static constexpr int kExponent = E, kMantissa = M, kBias = (1 << (E - 1)) - 1;
  static constexpr Special kSpecial = S;
  static constexpr uint32_t kSign = 1u << (E + M);
  // What is above the largest number: infinity, NaN, or no code, so that to convert must saturate.
  static constexpr uint32_t kOverflow = S == Special::ieee  ? ((1u << E) - 1) << M
                                        : S == Special::nan ? kSign - 1
                                                            : kSign;
  static constexpr uint32_t kLargest = kOverflow - 1, kNan = kSign - 1;
};
using F16 = Layout<5, 10, Special::ieee>;
using Bf16 = Layout<8, 7, Special::ieee>;
using Tf32 = Layout<8, 10, Special::ieee>;  // in the upper 19 bits of a 32-bit register
using E4m3 = Layout<4, 3, Special::nan>;
using E5m2 = Layout<5, 2, Special::ieee>;
using E2m1 = Layout<2, 1, Special::none>;
using E2m3 = Layout<2, 3, Special::none>;
using E3m2 = Layout<3, 2, Special::none>;

template <class To, class From>
inline To bit_cast(From from) {
  return __builtin_bit_cast(To, from);
}

constexpr uint32_t kNanF32 = 0x7fffffff;  // what fp32 instructions return for NaN

template <class S>
using Bits = std::conditional_t<sizeof(S) == 8, uint64_t, uint32_t>;

// The code of x, a float or a double. saturate (.satfinite): beyond the largest number, infinity included, is that
// number. The arithmetic is of one width, selects are few and shifts have a variable on their left: g++ 12 vectorises
// this, and not what reads better.
template <class F, class S>
inline uint32_t encode(S x, Rounding mode = Rounding::rn, bool saturate = false, bool relu = false) {
  using U = Bits<S>;
  constexpr int kMantissa = std::numeric_limits<S>::digits - 1, kWidth = sizeof(U) * 8;
  constexpr U kOne = U{1} << kMantissa;  // of the exponent field, which stays where it is
  constexpr U kInfinity = ((U{1} << (kWidth - 1 - kMantissa)) - 1) * kOne;
  constexpr U kLeast = (std::numeric_limits<S>::max_exponent - F::kBias) * kOne;  // exponent of the least normal number
  constexpr int kDrop = kMantissa - F::kMantissa;
  constexpr U kMost = (kWidth - 2 - kDrop) * kOne;

  const U bits = bit_cast<U>(x), magnitude = bits & ~(U{1} << (kWidth - 1)), negative = bits >> (kWidth - 1);
  // With `base` subtracted, dropping kDrop bits leaves the code. A subnormal result drops as many more as its exponent
  // falls short, which beyond kMost makes no difference.
  const U exponent = magnitude & ~(kOne - 1), above = exponent > kOne ? exponent : kOne;
  const U base = above < kLeast ? above : kLeast, significand = magnitude - (base - kOne), shortfall = kLeast - base;
  const U room = kMost - shortfall, beyond = U{0} - (room >> (kWidth - 1));
  const U drop = (shortfall + (room & beyond) + (kDrop - 1) * kOne) >> kMantissa;
  const U halves = significand >> drop, truncated = halves >> 1, half = halves & 1;
  const U rest = significand != halves << drop ? 1 : 0;
  U up = 0;
  if (mode == Rounding::rn) up = half & (rest | truncated);
  if (mode == Rounding::rna) up = half;
  if (mode == Rounding::rm) up = (half | rest) & negative;
  if (mode == Rounding::rp) up = (half | rest) & ~negative;
  const U rounded = truncated + up;
  // What a directed mode does not round outwards stops at the largest number; an infinite x stays infinite.
  const U inwards = mode == Rounding::rz   ? 1
                    : mode == Rounding::rm ? negative ^ 1
                    : mode == Rounding::rp ? negative
                                           : 0;
  const U finite = magnitude < kInfinity ? 1 : 0;
  const U limit = saturate ? F::kLargest : U{F::kOverflow} - (inwards & finite);
  U code = rounded > F::kLargest ? limit : rounded;
  code |= negative << (F::kExponent + F::kMantissa);
  if (relu) code &= negative - 1;
  return static_cast<uint32_t>(magnitude > kInfinity ? U{F::kNan} : code);
}

// The number behind a code; NaN is kNanF32.
template <class F>
inline float decode(uint32_t code) {
  constexpr int kDrop = 23 - F::kMantissa;
  const uint32_t magnitude = code & (F::kSign - 1), sign = code & F::kSign ? 0x80000000 : 0;
  uint32_t bits = magnitude << kDrop;
  if constexpr (F::kExponent < 8) {  // the multiplication moves the exponent and normalises subnormals
    bits = bit_cast<uint32_t>(bit_cast<float>(bits) * bit_cast<float>(static_cast<uint32_t>(254 - F::kBias) << 23));
    if constexpr (F::kSpecial == Special::ieee) bits = magnitude >= F::kOverflow ? 0x7f800000 : bits;
  }
  // Of ieee the codes above infinity, of nan the overflow itself; of none there is no such code.
  const bool nan = magnitude > F::kLargest + (F::kSpecial == Special::ieee);
  return bit_cast<float>(nan ? kNanF32 : bits | sign);
}

// ue8m0, powers of two without a sign, from 2^-127; 255 is NaN. Of a number its magnitude counts, towards zero or up
// (rp); what is smaller than all becomes the smallest.
inline uint32_t to_e8m0(float x, bool up, bool saturate) {
  constexpr uint32_t kInfinity = 0x7f800000, kSmallest = 0x00400000;
  const uint32_t magnitude = bit_cast<uint32_t>(x) & 0x7fffffff;
  const uint32_t code = (magnitude + (up && magnitude > kSmallest ? 0x7fffff : 0)) >> 23;
  const uint32_t most = saturate && magnitude <= kInfinity ? 0xfe : 0xff;
  return code < most ? code : most;
}
inline float from_e8m0(uint32_t code) {
  return bit_cast<float>(code == 0xff ? kNanF32 : code ? code << 23 : 1u << 22);  // 2^-127 is subnormal
}

// tf32 as registers hold it: an fp32 number whose lower 13 bits are zero; NaN is kNanF32.
inline uint32_t to_tf32(float x, Rounding mode = Rounding::rna, bool saturate = false, bool relu = false) {
  return x != x ? kNanF32 : encode<Tf32>(x, mode, saturate, relu) << 13;
}

// A 16-bit value. Arithmetic converts first: no operators, so that every rounding is written out.
template <class F>
struct Short {
  uint16_t bits;
  Short() = default;
  explicit Short(float x, Rounding mode = Rounding::rn) : bits(static_cast<uint16_t>(encode<F>(x, mode))) {}
  explicit Short(double x, Rounding mode = Rounding::rn) : bits(static_cast<uint16_t>(encode<F>(x, mode))) {}
  static Short from_bits(uint32_t bits) {
    Short value;
    value.bits = static_cast<uint16_t>(bits);
    return value;
  }
  operator float() const { return decode<F>(bits); }
};
using Half = Short<F16>;
using BFloat16 = Short<Bf16>;
static_assert(sizeof(Half) == 2 && std::is_trivial_v<BFloat16>);

template <class T>
struct LayoutOf;
template <class F>
struct LayoutOf<Short<F>> {
  using type = F;
};
template <class T>
constexpr bool is_short = std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>;

// .ftz: subnormal numbers become zeros of their sign.
inline float flush(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return bit_cast<float>(bits & 0x7f800000 ? bits : bits & 0x80000000);
}
inline float canonical(float x) { return x == x ? x : bit_cast<float>(kNanF32); }

// a + b rounded to odd: a second rounding, to any format of at most 51 bits, is then correct in every mode. Knuth's sum
// gives the error; where it is not zero and the sum is even, the neighbour on its side is the odd one.
inline double sum_to_odd(double a, double b) {
  const double sum = a + b, part = sum - a, error = (a - (sum - part)) + (b - part);
  const uint64_t bits = bit_cast<uint64_t>(sum), odd = bits + ((error > 0) == (sum > 0) ? 1 : -1);
  const bool step = error != 0 && error == error && !(bits & 1);
  return bit_cast<double>(step ? odd : bits);
}

// fp32 and fp64 arithmetic in a rounding mode other than rn: the processor's, for as long as this lives. What lies
// between reads and writes registers of the frame, so the compiler cannot move it across the calls.
class RoundingScope {
 public:
  explicit RoundingScope(Rounding mode) : before_(std::fegetround()) {
    std::fesetround(mode == Rounding::rz   ? FE_TOWARDZERO
                    : mode == Rounding::rm ? FE_DOWNWARD
                    : mode == Rounding::rp ? FE_UPWARD
                                           : FE_TONEAREST);
  }
  ~RoundingScope() { std::fesetround(before_); }
  RoundingScope(const RoundingScope&) = delete;
  RoundingScope& operator=(const RoundingScope&) = delete;

 private:
  int before_;
};

// Rounding to nearest even and no flushing of subnormal numbers, for as long as this lives. A thread inherits the
// settings of the one that created it, where torch.set_flush_denormal may have changed them.
class PlainFloats {
 public:
  PlainFloats() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~PlainFloats() { std::fesetenv(&before_); }
  PlainFloats(const PlainFloats&) = delete;
  PlainFloats& operator=(const PlainFloats&) = delete;

 private:
  std::fenv_t before_;
};

// Calls f with a value of the C++ type of a PTX type: with(Type::s32, [&](auto t) { b.run(&add<decltype(t)>); }).
// b8 ... b64 are unsigned. Note that 8-bit values live in 16-bit registers.
template <class F>
auto with_integer(ptx::Type type, F f) {
  using ptx::Type;
  switch (type) {
    case Type::b8:
    case Type::u8:
      return f(uint8_t{});
    case Type::s8:
      return f(int8_t{});
    case Type::b16:
    case Type::u16:
      return f(uint16_t{});
    case Type::s16:
      return f(int16_t{});
    case Type::b32:
    case Type::u32:
      return f(uint32_t{});
    case Type::s32:
      return f(int32_t{});
    case Type::b64:
    case Type::u64:
      return f(uint64_t{});
    case Type::s64:
      return f(int64_t{});
    default:
      throw std::logic_error("with_integer: not an integer type");
  }
}
template <class F>
auto with_float(ptx::Type type, F f) {
  using ptx::Type;
  switch (type) {
    case Type::f16:
      return f(Half{});
    case Type::bf16:
      return f(BFloat16{});
    case Type::f32:
      return f(float{});
    case Type::f64:
      return f(double{});
    default:
      throw std::logic_error("with_float: not a floating point type");
  }
}
template <class F>
auto with(ptx::Type type, F f) {
  return ptx::is_float(type) ? with_float(type, f) : with_integer(type, f);
}

}  // namespace gpuless
