#include "truncating.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "formats.h"

namespace forwardpass::interpreter {
namespace {

// value = significand * 2^(exponent - fraction bits of the format); NaN and infinity have an exponent of their own.
struct Part {
  int16_t significand, exponent;
};
static_assert(sizeof(Part) == sizeof(uint32_t));
constexpr int kSpecial = 1000;
constexpr int kZero = -126;  // the exponent of zero: that of the least normal fp32 number, as MMA-Sim has it

constexpr int fraction_bits(Element e) { return e == Element::e4m3 ? 3 : 2; }

template <class F>
Part split(uint32_t code, bool negate) {
  const float x = decode<F>(code);
  if (!std::isfinite(x)) return {static_cast<int16_t>(std::isnan(x) ? 0 : (x < 0) != negate ? -1 : 1), kSpecial};
  if (x == 0) return {0, kZero};
  const int exponent = std::max(std::ilogb(x), 1 - F::kBias);
  const auto significand = static_cast<int16_t>(std::ldexp(x, F::kMantissa - exponent));
  return {static_cast<int16_t>(negate ? -significand : significand), static_cast<int16_t>(exponent)};
}
uint32_t split(Element e, uint32_t code, bool negate) {
  return bit_cast<uint32_t>(e == Element::e4m3 ? split<E4m3>(code, negate) : split<E5m2>(code, negate));
}

// An addend in units of 2^(largest - fraction), cut towards zero. It has `own` bits of fraction.
int64_t align(int64_t significand, int exponent, int own, int largest, int fraction) {
  const int shift = fraction - own + exponent - largest;
  if (shift >= 0) return significand << shift;
  return shift < -62 ? 0 : significand < 0 ? -(-significand >> -shift) : significand >> -shift;
}

struct Sum {  // of one group, on top of an accumulator
  const Truncation& how;
  bool f16;
  int own;  // fraction bits of a product

  float add(float c, const Part* a, int a_stride, const Part* b, int b_stride) const {
    int largest = kZero, c_exponent = kZero;
    bool special = !std::isfinite(c);
    if (c != 0 && !special) c_exponent = std::max(std::ilogb(c), f16 ? -14 : -126);
    largest = c_exponent;
    for (int k = 0; k < how.group; ++k) {
      const Part x = a[k * a_stride], y = b[k * b_stride];
      special |= x.exponent == kSpecial || y.exponent == kSpecial;
      largest = std::max(largest, x.exponent + y.exponent);
    }
    if (special) return add_special(c, a, a_stride, b, b_stride);
    const auto significand = static_cast<int64_t>(std::ldexp(c, 23 - c_exponent));
    int64_t sum = align(significand, c_exponent, 23, largest, how.fraction);
    for (int k = 0; k < how.group; ++k) {
      const Part x = a[k * a_stride], y = b[k * b_stride];
      sum += align(int64_t{x.significand} * y.significand, x.exponent + y.exponent, own, largest, how.fraction);
    }
    if (!sum) return 0;
    const double exact = std::ldexp(static_cast<double>(sum), largest - how.fraction);
    if (f16) return static_cast<float>(Half(exact));
    const int exponent = std::max(std::ilogb(exact), -126);
    return static_cast<float>(
        std::ldexp(std::trunc(std::ldexp(exact, how.mantissa - exponent)), exponent - how.mantissa));
  }

  // What IEEE arithmetic makes of NaN and infinity.
  float add_special(float c, const Part* a, int a_stride, const Part* b, int b_stride) const {
    const auto value = [](Part p) {
      if (p.exponent != kSpecial) return static_cast<float>(p.significand);
      return p.significand ? p.significand * INFINITY : NAN;
    };
    float sum = c;
    for (int k = 0; k < how.group; ++k) sum += value(a[k * a_stride]) * value(b[k * b_stride]);
    return canonical(sum);
  }
};

}  // namespace

void truncating_expand_a(const Product& p, const Fragment* fragments, PanelA& panel) {
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < p.halves * 16; ++k) {
      const uint32_t dword = fragments[k / 16 * 2 + row / 8][row % 8 * 4 + k % 16 / 4];
      panel.at[k][row] = split(p.a, dword >> k % 4 * 8 & 0xff, p.negate);
    }
  }
}

void truncating_expand_b(const Product& p, const Fragment* fragments, int tiles, PanelB& panel) {
  for (int t = 0; t < tiles; ++t) {
    for (int column = 0; column < 8; ++column) {
      for (int k = 0; k < p.halves * 16; ++k) {
        const uint32_t dword = fragments[t * p.halves + k / 16][column * 4 + k % 16 / 4];
        panel.at[(t * p.halves * 16 + k) * 8 + column] = split(p.b, dword >> k % 4 * 8 & 0xff, false);
      }
    }
  }
}

void truncating_multiply(const Product& p, const PanelA& a, const PanelB& b, int tiles, uint32_t* sums) {
  const int elements = p.halves * 16;
  const Sum sum{p.truncation, p.d == Accumulate::f16, fraction_bits(p.a) + fraction_bits(p.b)};
  const Part* const left = reinterpret_cast<const Part*>(a.at);
  for (int t = 0; t < tiles; ++t) {
    const Part* const right = reinterpret_cast<const Part*>(b.at) + t * elements * 8;
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        uint32_t& c = sums[(t * 4 + row / 8 * 2 + column % 2) * 32 + row % 8 * 4 + column / 2];
        float value = bit_cast<float>(c);
        for (int k = 0; k < elements; k += p.truncation.group) {
          value = sum.add(value, left + k * 64 + row, 64, right + k * 8 + column, 8);
        }
        c = bit_cast<uint32_t>(value);
      }
    }
  }
}

}  // namespace forwardpass::interpreter
