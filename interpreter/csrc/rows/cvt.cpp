// Conversions between integers and fp16, bf16, fp32 and fp64 (ISA 9.7.9.21). Packed and narrow formats: cvt_packed.cpp.
#include <cmath>
#include <optional>

#include "rows/floating.h"

namespace gpuless {
namespace {

enum class Integral : uint8_t { none, rni, rzi, rmi, rpi };

struct How {
  Rounding rounding = Rounding::rn;
  Integral integral = Integral::none;
  bool saturate = false, flush = false;
  int destination_bytes = 0, source_bytes = 0;  // of the registers, which may be wider than the types
};

template <class T>
constexpr bool is_real = std::is_floating_point_v<T> || is_short<T>;

template <class D, class S>
D clamp_integer(S x) {
  if (x < 0) {
    if (std::is_unsigned_v<D>) return 0;
    constexpr auto kLeast = static_cast<int64_t>(std::numeric_limits<D>::min());
    return static_cast<int64_t>(x) < kLeast ? std::numeric_limits<D>::min() : static_cast<D>(x);
  }
  constexpr auto kMost = static_cast<uint64_t>(std::numeric_limits<D>::max());
  return static_cast<uint64_t>(x) > kMost ? std::numeric_limits<D>::max() : static_cast<D>(x);
}

template <class T>
T round_integral(T x, Integral to) {
  switch (to) {
    case Integral::rni:
      return std::nearbyint(x);
    case Integral::rzi:
      return std::trunc(x);
    case Integral::rmi:
      return std::floor(x);
    case Integral::rpi:
      return std::ceil(x);
    default:
      return x;
  }
}

// An integral number to D's range. NaN is 0, but the least number of D's width where either side has 64 bits.
template <class D, class S>
D to_integer(S x, bool wide_source) {
  constexpr S kAbove = static_cast<S>(static_cast<uint64_t>(std::numeric_limits<D>::max()) / 2 + 1) * 2;
  constexpr S kBelow = static_cast<S>(std::numeric_limits<D>::min());
  constexpr auto kTop = static_cast<D>(std::make_unsigned_t<D>{1} << (8 * sizeof(D) - 1));
  if (x != x) return wide_source || sizeof(D) == 8 ? kTop : D{0};
  return x >= kAbove ? std::numeric_limits<D>::max() : x <= kBelow ? std::numeric_limits<D>::min() : static_cast<D>(x);
}

// An integer as a double from which one rounding to at most 51 bits is right in every mode: a 64-bit one in two halves.
template <class S>
double exactly(S x) {
  if constexpr (sizeof(S) < 8) {
    return static_cast<double>(x);
  } else {
    return sum_to_odd(static_cast<double>(x >> 32) * 0x1p32, static_cast<double>(static_cast<uint32_t>(x)));
  }
}

// In the rounding mode `how.rounding`, which the caller has set for what the processor rounds.
template <class D, class S>
D convert(S x, const How& how) {
  if constexpr (!is_real<D> && !is_real<S>) {
    return how.saturate ? clamp_integer<D>(x) : static_cast<D>(x);
  } else if constexpr (!is_real<D>) {
    if (std::is_same_v<S, float> && how.flush) x = flushed(x);
    if constexpr (std::is_same_v<S, double>) {
      return to_integer<D>(round_integral(x, how.integral), true);
    } else {
      return to_integer<D>(round_integral(static_cast<float>(x), how.integral), false);
    }
  } else if constexpr (is_short<D>) {
    if constexpr (!is_real<S>) {
      const double value = exactly(x);
      return D(how.saturate ? saturated(value) : value, how.rounding);
    } else {
      if (std::is_same_v<S, float> && how.flush) x = flushed(x);
      using Wide = std::conditional_t<std::is_same_v<S, double>, double, float>;
      const Wide value = round_integral(static_cast<Wide>(x), how.integral);
      return D(how.saturate ? saturated(value) : value, how.rounding);
    }
  } else {
    D d;
    if constexpr (is_real<S>) {
      if (std::is_same_v<S, float> && how.flush) x = flushed(x);
      d = static_cast<D>(round_integral(static_cast<std::conditional_t<is_short<S>, float, S>>(x), how.integral));
    } else {
      d = static_cast<D>(x);
    }
    if (how.saturate) d = saturated(d);
    if constexpr (std::is_same_v<D, float>) d = canonical(how.flush ? flush(d) : d);
    return d;
  }
}

// The low bits of registers that may be wider than the type.
template <class T, class Held>
void load(const Held* from, T to[kLanes]) {
  for (int l = 0; l < kLanes; ++l) {
    if constexpr (is_real<T>) {
      to[l] = from_bits<T>(from[l]);
    } else {
      to[l] = static_cast<T>(from[l]);
    }
  }
}
// Integers fill a wider register by their sign, as of any conversion between integers.
template <class T, class Held>
void store(const T from[kLanes], Held* to, Mask mask) {
  each_lane(mask, [=](int l) {
    if constexpr (is_real<T>) {
      to[l] = static_cast<Held>(bits_of(from[l]));
    } else {
      to[l] = static_cast<Held>(from[l]);
    }
  });
}
template <class F>
void with_held(int bytes, F f) {
  bytes == 2 ? f(uint16_t{}) : bytes == 4 ? f(uint32_t{}) : f(uint64_t{});
}

template <class D, class S>
Step cvt(Warp& w, const Instruction& i, Mask mask) {
  const How& how = *static_cast<const How*>(i.data);
  alignas(32) S in[kLanes];
  alignas(32) D out[kLanes];
  with_held(how.source_bytes, [&](auto word) { load(w.operand<decltype(word)>(i, 1), in); });
  std::optional<RoundingScope> scope;
  if (std::is_floating_point_v<D> && how.rounding != Rounding::rn) scope.emplace(how.rounding);
  for (int l = 0; l < kLanes; ++l) out[l] = convert<D>(in[l], how);
  scope.reset();
  with_held(how.destination_bytes, [&](auto word) { store(out, w.operand<decltype(word)>(i, 0), mask); });
  return Step::next;
}

// The common conversions, without modifiers and between registers of the types' sizes, in one loop that vectorises.
template <class D, class S, Integral I>
[[gnu::flatten]] Step plain(Warp& w, const Instruction& i, Mask mask) {
  constexpr How kHow = [] {
    How how;
    how.integral = I;
    return how;
  }();
  const auto* s = w.operand<Stored<S>>(i, 1);
  keep_lanes(mask, w.operand<Stored<D>>(i, 0), [=](int l) { return stored<D>(convert<D>(loaded<S>(s[l]), kHow)); });
  return Step::next;
}
template <class D, class S>
Handler plain_handler(const How& how) {
  const bool is_plain = how.rounding == Rounding::rn && !how.saturate && !how.flush &&
                        how.destination_bytes == sizeof(D) && how.source_bytes == sizeof(S);
  if (!is_plain) return nullptr;
  if constexpr (is_real<S> && (std::is_same_v<D, S> || !is_real<D>)) {
    if (how.integral == Integral::rni) return &plain<D, S, Integral::rni>;
    if (how.integral == Integral::rzi) return &plain<D, S, Integral::rzi>;
  }
  if (how.integral != Integral::none) return nullptr;
  if constexpr (!is_real<D> && !is_real<S>) return &plain<std::make_unsigned_t<D>, S, Integral::none>;
  if constexpr (is_real<D>) return &plain<D, S, Integral::none>;
  return nullptr;  // a real number becomes an integer by one of the four roundings
}

Integral integral_of(const Bind& b) {
  return b.has("rni")   ? Integral::rni
         : b.has("rzi") ? Integral::rzi
         : b.has("rmi") ? Integral::rmi
         : b.has("rpi") ? Integral::rpi
                        : Integral::none;
}

void bind_cvt(Bind& b) {
  const Type to = b.type(b.slots() - 2), from = b.type(b.slots() - 1);
  expect_operands(b, 2);
  How& how = b.data<How>();
  how.rounding = rounding_of(b);
  how.integral = integral_of(b);
  how.saturate = b.has("sat");
  how.flush = b.has("ftz");
  if (b.operand(0).kind == Operand::Kind::sink) b.refuse("its destination must be a register, not _");
  how.destination_bytes = b.destination_relaxed(b.operand(0), to);
  how.source_bytes = b.source_relaxed(b.operand(1), from);
  with(to, [&](auto d) {
    with(from, [&](auto s) {
      const Handler handler = plain_handler<decltype(d), decltype(s)>(how);
      b.run(handler ? handler : &cvt<decltype(d), decltype(s)>);
    });
  });
}
// .sat between integers: only where the source has numbers that the destination lacks.
void bind_saturating(Bind& b) {
  const Type to = b.type(b.slots() - 2), from = b.type(b.slots() - 1);
  const bool covers = with_integer(to, [&](auto d) {
    return with_integer(from, [&](auto s) {
      return std::is_signed_v<decltype(s)>
                 ? std::is_signed_v<decltype(d)> && sizeof(d) >= sizeof(s)
                 : sizeof(d) > sizeof(s) || (sizeof(d) == sizeof(s) && std::is_unsigned_v<decltype(d)>);
    });
  });
  if (covers) b.refuse(".sat has nothing to do: the destination has every number of the source");
  bind_cvt(b);
}

#define INTEGER "u8|u16|u32|u64|s8|s16|s32|s64"
#define INTEGER_16 "u16|u32|u64|s16|s32|s64"
#define TO_INTEGRAL "rni|rzi|rmi|rpi"
#define ROUNDED "rn|rz|rm|rp"

const Row rows[] = {
    {"cvt." INTEGER "." INTEGER, "9.7.9.21", bind_cvt},
    {"cvt.sat." INTEGER "." INTEGER, "9.7.9.21", bind_saturating},
    {"cvt." TO_INTEGRAL ".ftz?.sat?." INTEGER ".f32", "9.7.9.21", bind_cvt},
    {"cvt." TO_INTEGRAL ".sat?." INTEGER ".f16|f64", "9.7.9.21", bind_cvt},
    {"cvt." TO_INTEGRAL "." INTEGER_16 ".bf16", "9.7.9.21", bind_cvt},
    {"cvt." ROUNDED ".ftz?.sat?.f32." INTEGER, "9.7.9.21", bind_cvt},
    {"cvt." ROUNDED ".sat?.f16|f64." INTEGER, "9.7.9.21", bind_cvt},
    {"cvt." ROUNDED ".bf16." INTEGER_16, "9.7.9.21", bind_cvt},
    // Narrower; rn and rz without .ftz and .sat are in cvt_packed.cpp.
    {"cvt.rm|rp.ftz?.sat?.f16.f32", "9.7.9.21", bind_cvt},
    {"cvt.rn|rz.ftz.sat?.f16.f32", "9.7.9.21", bind_cvt},
    {"cvt.rn|rz.sat.f16.f32", "9.7.9.21", bind_cvt},
    {"cvt.rm|rp.ftz?.bf16.f32", "9.7.9.21", bind_cvt},
    {"cvt.rn|rz.ftz.bf16.f32", "9.7.9.21", bind_cvt},
    {"cvt." ROUNDED ".sat?.f16.f64", "9.7.9.21", bind_cvt},
    {"cvt." ROUNDED ".bf16.f64", "9.7.9.21", bind_cvt},
    // ptxas 13.0 makes the same of no rounding as of rn; Triton has it so.
    {"cvt." ROUNDED "?.bf16.f16", "9.7.9.21", bind_cvt},
    {"cvt." ROUNDED "?.f16.bf16", "9.7.9.21", bind_cvt},
    {"cvt." ROUNDED ".ftz?.sat?.f32.f64", "9.7.9.21", bind_cvt},
    // Wider.
    {"cvt.ftz?.sat?.f32.f16", "9.7.9.21", bind_cvt},
    {"cvt.ftz?.sat?.f64.f32", "9.7.9.21", bind_cvt},
    {"cvt.sat?.f64.f16", "9.7.9.21", bind_cvt},
    {"cvt.ftz?.f32.bf16", "9.7.9.21", bind_cvt},
    {"cvt.f64.bf16", "9.7.9.21", bind_cvt},
    // Of one size: to an integral number, or just .ftz and .sat.
    {"cvt." TO_INTEGRAL "?.ftz?.sat?.f32.f32", "9.7.9.21", bind_cvt},
    {"cvt." TO_INTEGRAL "?.sat?.f64.f64", "9.7.9.21", bind_cvt},
    {"cvt." TO_INTEGRAL "?.sat?.f16.f16", "9.7.9.21", bind_cvt},
    {"cvt." TO_INTEGRAL "?.bf16.bf16", "9.7.9.21", bind_cvt},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
