#pragma once
// The operations behind the floating point rows, for fp32, fp64, f16 and bf16 alike, and what modifiers put around
// them.
#include <cmath>

#include "rows/lanewise.h"

namespace gpuless {

// Each returns a number from which one rounding gives the result: for 16-bit types fp32 (its 24 bits are enough for
// sums) or fp64, for the others themselves.
struct Plus {
  template <class T>
  auto operator()(T a, T b) const {
    return a + b;
  }
};
struct Minus {
  template <class T>
  auto operator()(T a, T b) const {
    return a - b;
  }
};
struct Times {
  template <class T>
  auto operator()(T a, T b) const {
    if constexpr (is_short<T>) {
      return double{a} * double{b};  // exact: fp32 would round bf16 products below its normal range
    } else {
      return a * b;
    }
  }
};
struct TimesPlus {
  template <class T>
  auto operator()(T a, T b, T c) const {
    if constexpr (is_short<T>) {
      return sum_to_odd(double{a} * double{b}, double{c});
    } else if constexpr (std::is_same_v<T, float>) {
      return __builtin_fmaf(a, b, c);  // in fp64 it would round twice
    } else {
      return __builtin_fma(a, b, c);
    }
  }
};

// Numbers as registers hold them: the sign bit is the top one of the register's bits.
template <class T>
Bits<T> bits_of(T x) {
  if constexpr (is_short<T>) {
    return x.bits;
  } else {
    return bit_cast<Bits<T>>(x);
  }
}
template <class T, class U>
T from_bits(U bits) {
  if constexpr (is_short<T>) {
    return T::from_bits(bits);
  } else {
    return bit_cast<T>(static_cast<Bits<T>>(bits));
  }
}
template <class T>
auto number_of(T x) {
  if constexpr (is_short<T>) {
    return static_cast<float>(x);
  } else {
    return x;
  }
}
template <class T>
constexpr auto kSignBit = static_cast<Bits<T>>(uint64_t{1} << (8 * sizeof(T) - 1));
template <class T>
constexpr uint64_t kNanOf = sizeof(T) == 8   ? 0x7ff8000000000000
                            : sizeof(T) == 4 ? kNanF32
                                             : 0x7fff;

template <class T>
T flushed(T x) {
  if constexpr (std::is_same_v<T, float>) return flush(x);
  if constexpr (std::is_same_v<T, Half>) return T::from_bits(x.bits & 0x7c00 ? x.bits : x.bits & 0x8000);
  return x;  // .ftz exists for fp32 and f16 only
}

enum class Clamp { none, sat, relu };

// Op with .ftz on what goes in and comes out, .sat or .relu on the result, and the NaN that PTX returns.
template <class Op, bool Ftz, Clamp C>
struct Modified {
  template <class T, class... More>
  T operator()(T a, More... more) const {
    const auto x = Ftz ? Op{}(flushed(a), flushed(more)...) : Op{}(a, more...);
    T d;
    if constexpr (is_short<T>) {
      using F = typename LayoutOf<T>::type;
      d = T::from_bits(encode<F>(C == Clamp::sat ? saturated(x) : x, Rounding::rn, false, C == Clamp::relu));
    } else if constexpr (sizeof(T) == 4) {
      d = C == Clamp::sat ? saturated(canonical(x)) : canonical(x);
    } else {
      d = x;
    }
    return Ftz ? flushed(d) : d;
  }
};

// Sign operations leave NaN as it is.
struct SignOff {
  template <class T>
  T operator()(T a) const {
    return from_bits<T>(bits_of(a) & ~kSignBit<T>);
  }
};
struct SignFlip {
  template <class T>
  T operator()(T a) const {
    return from_bits<T>(bits_of(a) ^ kSignBit<T>);
  }
};
template <class Op>
struct Flushing {
  template <class T>
  T operator()(T a) const {
    return Op{}(flushed(a));
  }
};

// The lesser or greater; +0 is above -0. One NaN loses, unless .NaN; .xorsign.abs compares magnitudes and gives the
// result the product's sign.
template <bool Greatest, bool Ftz, bool Nan, bool XorSign>
struct Extreme {
  template <class T>
  T operator()(T a, T b) const {
    if (Ftz) a = flushed(a), b = flushed(b);
    const auto sign = (bits_of(a) ^ bits_of(b)) & kSignBit<T>;
    if (XorSign) a = SignOff{}(a), b = SignOff{}(b);
    const auto x = number_of(a), y = number_of(b);
    const auto p = bits_of(a), q = bits_of(b);
    // Selects one after the other, which vectorise where conditions with || do not.
    auto d = (Greatest ? x > y : x < y) ? p : q;
    d = x == y ? (Greatest ? p & q : p | q) : d;
    d = x != x ? (Nan ? p : q) : d;
    d = y != y ? (Nan ? q : p) : d;
    const auto z = number_of(from_bits<T>(d));
    if (XorSign) d |= sign;
    return from_bits<T>(z != z ? static_cast<decltype(d)>(kNanOf<T>) : d);
  }
  template <class T>
  T operator()(T a, T b, T c) const {
    return (*this)((*this)(a, b), c);
  }
};

}  // namespace gpuless
