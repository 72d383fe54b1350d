// Conversions that random bits round, cvt.rs (ISA 9.7.9.21).
#include <algorithm>
#include <cmath>

#include "rows/matrix_rows.h"

namespace gpuless {
namespace {

// x in format F. `random` has Bits bits. They are added to the first Bits bits of the mantissa that F drops, and the
// carry rounds away from zero. A double holds the sum: whatever of x is below these bits is too small for a carry.
template <class F, int Bits, bool Saturate, bool Relu>
uint32_t encode_random(float x, uint32_t random) {
  const int field = static_cast<int>(bit_cast<uint32_t>(x) >> 23 & 0xff);
  const int exponent = std::max(field - 127, 1 - F::kBias);  // a subnormal result drops more bits
  const double unit = bit_cast<double>(static_cast<uint64_t>(1023 + exponent - F::kMantissa - Bits) << 52);
  double magnitude = std::fabs(static_cast<double>(x)) + random * unit;
  if constexpr (F::kSpecial == Special::ieee) {  // encode() rounds towards zero, and stops at the largest number
    if (magnitude >= bit_cast<double>(static_cast<uint64_t>(1024 + F::kBias) << 52)) magnitude = HUGE_VAL;
  }
  return encode<F>(std::copysign(magnitude, static_cast<double>(x)), Rounding::rz, Saturate, Relu);
}

// f16x2 and bf16x2: a has the lower bits of the upper half of `random`, b those of the lower half.
template <class F, int Bits, bool Saturate, bool Relu>
struct EncodeTwoRandom {
  uint32_t operator()(float a, float b, uint32_t random) const {
    constexpr uint32_t kMask = (1u << Bits) - 1;
    return encode_random<F, Bits, Saturate, Relu>(a, random >> 16 & kMask) << 16 |
           encode_random<F, Bits, Saturate, Relu>(b, random & kMask);
  }
};

uint32_t reversed(uint32_t bits16) {
  uint32_t result = 0;
  for (int k = 0; k < 16; ++k) result |= (bits16 >> k & 1) << (15 - k);
  return result;
}
// Four numbers: a and b share 16 of the random bits, and c and d the others. The ISA's text does not say how a pair
// shares them. Here the first gets them in reverse order, so that the two do not round alike.
template <class F, bool Relu>
struct EncodeFourRandom {
  static constexpr int kWidth = F::kExponent + F::kMantissa == 3 ? 4 : 8;
  static uint32_t two(float a, float b, uint32_t random) {
    return encode_random<F, 16, true, Relu>(a, reversed(random)) << kWidth |
           encode_random<F, 16, true, Relu>(b, random);
  }
  uint32_t operator()(float a, float b, float c, float d, uint32_t random) const {
    uint32_t upper = random >> 16, lower = random & 0xffff;
    if constexpr (kWidth == 4) {  // a pair has one byte of each half
      const uint32_t bytes = upper;
      upper = (bytes & 0xff00) | lower >> 8;
      lower = (bytes & 0xff) << 8 | (lower & 0xff);
    }
    return two(a, b, upper) << 2 * kWidth | two(c, d, lower);
  }
};

void require_random(const Bind& b) { require_targets(b, {100, 103}); }
template <class F, int Bits>
void bind_two_random(Bind& b) {
  require_random(b);
  expect_operands(b, 4);
  destination(b, b.operand(0), Type::b32);
  b.source(1, Type::f32);
  b.source(2, Type::f32);
  b.source(3, Type::b32);
  choose(b.has("satfinite"), [&](auto sat) {
    choose(b.has("relu"), [&](auto relu) {
      using Op = EncodeTwoRandom<F, Bits, decltype(sat)::value, decltype(relu)::value>;
      b.run(&lanewise<Op, uint32_t, float, float, uint32_t>);
    });
  });
}
template <class F>
void bind_four_random(Bind& b) {
  using D = std::conditional_t<EncodeFourRandom<F, false>::kWidth == 4, uint16_t, uint32_t>;
  require_random(b);
  expect_operands(b, 3);
  destination(b, b.operand(0), sizeof(D) == 2 ? Type::b16 : Type::b32);
  for (const Operand& part : registers_of(b, 1, 4)) b.source(part, Type::f32);
  b.source(2, Type::b32);
  choose(b.has("relu"), [&](auto relu) {
    using Op = EncodeFourRandom<F, decltype(relu)::value>;
    b.run(&lanewise<Op, D, float, float, float, float, uint32_t>);
  });
}

const Row rows[] = {
    {"cvt.rs.relu?.satfinite?.f16x2.f32", "9.7.9.21", bind_two_random<F16, 13>},
    {"cvt.rs.relu?.satfinite?.bf16x2.f32", "9.7.9.21", bind_two_random<Bf16, 16>},
    {"cvt.rs.relu?.satfinite.e4m3x4.f32", "9.7.9.21", bind_four_random<E4m3>},
    {"cvt.rs.relu?.satfinite.e5m2x4.f32", "9.7.9.21", bind_four_random<E5m2>},
    {"cvt.rs.relu?.satfinite.e2m3x4.f32", "9.7.9.21", bind_four_random<E2m3>},
    {"cvt.rs.relu?.satfinite.e3m2x4.f32", "9.7.9.21", bind_four_random<E3m2>},
    {"cvt.rs.relu?.satfinite.e2m1x4.f32", "9.7.9.21", bind_four_random<E2m1>},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
