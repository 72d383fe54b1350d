#include "truncating.h"

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "formats.h"

namespace gpuless {
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
Part split(uint32_t code) {
  const float x = decode<F>(code);
  if (!std::isfinite(x)) return {static_cast<int16_t>(std::isnan(x) ? 0 : x < 0 ? -1 : 1), kSpecial};
  if (x == 0) return {0, kZero};
  const int exponent = std::max(std::ilogb(x), 1 - F::kBias);
  return {static_cast<int16_t>(std::ldexp(x, F::kMantissa - exponent)), static_cast<int16_t>(exponent)};
}

// Of every code: the tensor cores' operands are split once an instruction, and libm takes longer for it than the
// products.
using Parts = std::array<Part, 256>;
template <class F>
Parts split_all() {
  Parts parts;
  for (uint32_t code = 0; code < parts.size(); ++code) parts[code] = split<F>(code);
  return parts;
}
const Parts& parts_of(Element e) {
  static const Parts e4m3 = split_all<E4m3>(), e5m2 = split_all<E5m2>();
  return e == Element::e4m3 ? e4m3 : e5m2;
}

// An addend in units of 2^(largest - fraction), cut towards zero. It has `bits` of fraction.
int64_t align(int64_t significand, int exponent, int bits, int largest, int fraction) {
  const int shift = fraction - bits + exponent - largest;
  if (shift >= 0) return significand << shift;
  return shift < -62 ? 0 : significand < 0 ? -(-significand >> -shift) : significand >> -shift;
}

struct Sum {  // of one group, on top of an accumulator
  const Truncation& how;
  bool f16;
  int product_bits;  // of a product's fraction

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
      sum +=
          align(int64_t{x.significand} * y.significand, x.exponent + y.exponent, product_bits, largest, how.fraction);
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

// The same for the eight columns of a tile, where sums of a group fit 32 bits and accumulators are fp32: what wgmma and
// sm_89 have.
struct ColumnSums {
  static constexpr int kMostFraction = 13;
  const Sum& one;

  static __m256i exponents(__m256i parts) { return _mm256_srai_epi32(parts, 16); }
  // 2^n as a float, of a normal one
  static __m256 power(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
  // towards zero
  static __m256i shift_right(__m256i x, __m256i by) {
    return _mm256_sign_epi32(_mm256_srlv_epi32(_mm256_abs_epi32(x), by), x);
  }

  __m256 add(__m256 c, const Part* a, int a_stride, const Part* b) const {
    const auto left = [&](int k) { return _mm256_set1_epi32(bit_cast<int32_t>(a[k * a_stride])); };
    const auto right = [&](int k) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + k * 8)); };
    const __m256i bits = _mm256_castps_si256(c), biased = _mm256_and_si256(_mm256_srli_epi32(bits, 23), set(0xff));
    const __m256i c_exponent = _mm256_sub_epi32(_mm256_max_epi32(biased, set(1)), set(127));
    __m256i significand =
        _mm256_or_si256(_mm256_and_si256(bits, set(0x7fffff)), _mm256_slli_epi32(_mm256_min_epu32(biased, set(1)), 23));
    significand = _mm256_sign_epi32(significand, _mm256_or_si256(bits, set(1)));

    __m256i products = _mm256_slli_epi32(set(2 * kZero), 16);  // of a Part's halves the upper one counts, the exponent
    for (int k = 0; k < one.how.group; ++k) products = _mm256_max_epi16(products, _mm256_add_epi16(left(k), right(k)));
    const __m256i largest = _mm256_max_epi32(exponents(products), c_exponent);
    const __m256i special =
        _mm256_or_si256(_mm256_cmpgt_epi32(largest, set(kSpecial / 2)), _mm256_cmpeq_epi32(biased, set(0xff)));
    if (!_mm256_testz_si256(special, special)) return add_one_by_one(c, a, a_stride, b);

    const int fraction = one.how.fraction;
    __m256i sum = shift_right(significand, _mm256_sub_epi32(_mm256_add_epi32(largest, set(23 - fraction)), c_exponent));
    for (int k = 0; k < one.how.group; ++k) {
      const __m256i x = left(k), y = right(k), exponent = exponents(_mm256_add_epi16(x, y));
      const __m256i product = _mm256_madd_epi16(_mm256_and_si256(x, set(0xffff)), y);
      sum = _mm256_add_epi32(sum, shift_right(_mm256_slli_epi32(product, fraction - one.product_bits),
                                              _mm256_sub_epi32(largest, exponent)));
    }
    // Exact in fp32, cut to the mantissa, and scaled in two steps, as the power may be subnormal.
    const __m256i mantissa_mask = set(static_cast<int32_t>(~0u << (23 - one.how.mantissa)));
    const __m256 exact = _mm256_and_ps(_mm256_cvtepi32_ps(sum), _mm256_castsi256_ps(mantissa_mask));
    const __m256i scale = _mm256_sub_epi32(largest, set(fraction)), half = _mm256_srai_epi32(scale, 1);
    return _mm256_mul_ps(_mm256_mul_ps(exact, power(half)), power(_mm256_sub_epi32(scale, half)));
  }

  __m256 add_one_by_one(__m256 c, const Part* a, int a_stride, const Part* b) const {
    alignas(32) float values[8];
    _mm256_store_ps(values, c);
    for (int column = 0; column < 8; ++column) values[column] = one.add(values[column], a, a_stride, b + column, 8);
    return _mm256_load_ps(values);
  }

  static __m256i set(int32_t x) { return _mm256_set1_epi32(x); }
};

}  // namespace

void truncating_expand_a(const Product& p, const Fragment* fragments, PanelA& panel) {
  const Parts& parts = parts_of(p.a);
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < p.halves * 16; ++k) {
      const uint32_t dword = fragments[k / 16 * 2 + row / 8][row % 8 * 4 + k % 16 / 4];
      Part part = parts[dword >> k % 4 * 8 & 0xff];
      if (p.negate) part.significand = static_cast<int16_t>(-part.significand);
      panel.words[k][row] = bit_cast<uint32_t>(part);
    }
  }
}

void truncating_expand_b(const Product& p, const Fragment* fragments, int tiles, PanelB& panel) {
  const Parts& parts = parts_of(p.b);
  for (int t = 0; t < tiles; ++t) {
    for (int column = 0; column < 8; ++column) {
      for (int k = 0; k < p.halves * 16; ++k) {
        const uint32_t dword = fragments[t * p.halves + k / 16][column * 4 + k % 16 / 4];
        panel.words[(t * p.halves * 16 + k) * 8 + column % 2 * 4 + column / 2] =
            bit_cast<uint32_t>(parts[dword >> k % 4 * 8 & 0xff]);
      }
    }
  }
}

void truncating_multiply(const Product& p, const PanelA& a, const PanelB& b, int tiles, uint32_t* sums) {
  const int elements = p.halves * 16;
  const Sum one{p.truncation, p.d == Accumulate::f16, fraction_bits(p.a) + fraction_bits(p.b)};
  const ColumnSums eight{one};
  const bool narrow = !one.f16 && p.truncation.fraction <= ColumnSums::kMostFraction;
  const Part* const left = reinterpret_cast<const Part*>(a.words);
  for (int t = 0; t < tiles; ++t) {
    const Part* const right = reinterpret_cast<const Part*>(b.words) + t * elements * 8;
    for (int row = 0; row < 16; ++row) {
      float* even = reinterpret_cast<float*>(sums + (t * 4 + row / 8 * 2) * 32 + row % 8 * 4);
      __m256 c = _mm256_loadu2_m128(even + 32, even);
      for (int k = 0; k < elements; k += p.truncation.group) {
        const Part *x = left + k * 64 + row, *y = right + k * 8;
        c = narrow ? eight.add(c, x, 64, y) : eight.add_one_by_one(c, x, 64, y);
      }
      _mm256_storeu2_m128(even + 32, even, c);
    }
  }
}

}  // namespace gpuless
