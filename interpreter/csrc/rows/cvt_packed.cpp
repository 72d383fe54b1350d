// Conversions to and from the formats of 19 bits and fewer, one or two at a time (ISA 9.7.9.21), and cvt.pack
// (9.7.9.22).
#include <algorithm>
#include <charconv>

#include "rows/matrix_rows.h"

namespace gpuless {
namespace {

// One number in format F, as everything that follows wants it.
template <class F, Rounding R, bool Saturate, bool Relu>
struct Encode {
  static constexpr int kBits = (1 + F::kExponent + F::kMantissa + 3) / 4 * 4;  // 6 bits take a byte
  static_assert(F::kSpecial != Special::none || Saturate);
  uint32_t operator()(float x) const { return encode<F>(x, R, Saturate, Relu); }
};
template <Rounding R, bool Saturate, bool Relu>
struct EncodeTf32 {
  uint32_t operator()(float x) const { return to_tf32(x, R, Saturate, Relu); }
};
// Two: a in the upper half.
template <class One>
struct EncodeTwo {
  uint32_t operator()(float a, float b) const { return One{}(a) << One::kBits | One{}(b); }
};
template <class From, class One>
struct EncodeHalves {
  uint16_t operator()(uint32_t a) const {
    return static_cast<uint16_t>(EncodeTwo<One>{}(decode<From>(a >> 16), decode<From>(a & 0xffff)));
  }
};
template <class To, class F, bool Saturate, bool Relu>  // exact: f16 and bf16 have every number of these formats
struct DecodeTwo {
  static constexpr int kBits = Encode<F, Rounding::rn, true, false>::kBits;
  static uint32_t half(uint32_t code) { return encode<To>(decode<F>(code), Rounding::rn, Saturate, Relu); }
  uint32_t operator()(uint16_t a) const { return half(a >> kBits) << 16 | half(a); }
};
template <bool Up, bool Saturate>
struct EncodeE8m0 {
  static constexpr int kBits = 8;
  uint32_t operator()(float x) const { return to_e8m0(x, Up, Saturate); }
};
struct DecodeTwoE8m0 {
  static uint32_t half(uint32_t code) { return encode<Bf16>(from_e8m0(code)); }
  uint32_t operator()(uint16_t a) const { return half(a >> 8) << 16 | half(a & 0xff); }
};

// Calls f with an Encode for format F and the modifiers of the opcode: to the narrow ones .rn.satfinite alone exists.
template <class F, class G>
void with_encode(Bind& b, G f) {
  choose(b.has("relu"), [&](auto relu) {
    constexpr bool kRelu = decltype(relu)::value;
    if constexpr (std::is_same_v<F, F16> || std::is_same_v<F, Bf16>) {
      choose(b.has("satfinite"), [&](auto sat) {
        constexpr bool kSaturate = decltype(sat)::value;
        b.has("rz") ? f(Encode<F, Rounding::rz, kSaturate, kRelu>{}) : f(Encode<F, Rounding::rn, kSaturate, kRelu>{});
      });
    } else {
      f(Encode<F, Rounding::rn, true, kRelu>{});
    }
  });
}
template <class F>
void bind_one(Bind& b) {
  bind_operands(b, Type::b16, Type::f32, 1);
  with_encode<F>(b, [&](auto one) { b.run(&lanewise<decltype(one), uint16_t, float>); });
}
// Formats of 4 and 6 bits and ue8m0 are for these targets alone, and so are conversions to bf16x2 (PTX ISA 9.2).
void require_narrow(const Bind& b) { require_targets(b, {100, 120}); }
template <class F, Type Held>
void bind_two(Bind& b) {
  if (F::kSpecial == Special::none) require_narrow(b);
  bind_operands(b, Held, Type::f32, 2);
  using D = std::conditional_t<Held == Type::b32, uint32_t, uint16_t>;
  with_encode<F>(b, [&](auto one) { b.run(&lanewise<EncodeTwo<decltype(one)>, D, float, float>); });
}
template <class F, Type Held>
void bind_from_halves(Bind& b) {
  if (F::kSpecial == Special::none) require_narrow(b);
  bind_operands(b, Held, Type::b32, 1);
  with_encode<F>(b, [&](auto one) { b.run(&lanewise<EncodeHalves<F16, decltype(one)>, uint16_t, uint32_t>); });
}
template <class To, class F, Type Held>
void bind_to_halves(Bind& b) {
  if (F::kSpecial == Special::none || std::is_same_v<To, Bf16>) require_narrow(b);
  bind_operands(b, Type::b32, Held, 1);
  choose(b.has("relu"), [&](auto relu) {
    constexpr bool kRelu = decltype(relu)::value;
    if constexpr (std::is_same_v<To, Bf16>) {
      choose(b.has("satfinite"),
             [&](auto sat) { b.run(&lanewise<DecodeTwo<To, F, decltype(sat)::value, kRelu>, uint32_t, uint16_t>); });
    } else {
      b.run(&lanewise<DecodeTwo<To, F, false, kRelu>, uint32_t, uint16_t>);
    }
  });
}
template <class F>
void with_encode_e8m0(Bind& b, F f) {
  choose(b.has("rp"), [&](auto up) {
    choose(b.has("satfinite"), [&](auto sat) { f(EncodeE8m0<decltype(up)::value, decltype(sat)::value>{}); });
  });
}
void bind_two_to_e8m0(Bind& b) {
  require_narrow(b);
  bind_operands(b, Type::b16, Type::f32, 2);
  with_encode_e8m0(b, [&](auto one) { b.run(&lanewise<EncodeTwo<decltype(one)>, uint16_t, float, float>); });
}
void bind_halves_to_e8m0(Bind& b) {
  require_narrow(b);
  bind_operands(b, Type::b16, Type::b32, 1);
  with_encode_e8m0(b, [&](auto one) { b.run(&lanewise<EncodeHalves<Bf16, decltype(one)>, uint16_t, uint32_t>); });
}
void bind_e8m0_to_halves(Bind& b) {
  require_narrow(b);
  bind_operands(b, Type::b32, Type::b16, 1);
  b.run(&lanewise<DecodeTwoE8m0, uint32_t, uint16_t>);
}
template <Rounding R>
void bind_tf32(Bind& b) {
  bind_operands(b, Type::b32, Type::f32, 1);
  choose(b.has("satfinite"), [&](auto sat) {
    choose(b.has("relu"), [&](auto relu) {
      b.run(&lanewise<EncodeTf32<R, decltype(sat)::value, decltype(relu)::value>, uint32_t, float>);
    });
  });
}

// cvt.pack: two s32 clamped to Bits each; the form with c shifts them in below it.
template <int Bits, bool Signed>
struct Pack {
  static uint32_t clamp(int32_t x) {
    const int32_t low = Signed ? -(1 << (Bits - 1)) : 0, high = (1 << (Signed ? Bits - 1 : Bits)) - 1;
    return static_cast<uint32_t>(std::clamp(x, low, high)) & ((1u << Bits) - 1);
  }
  uint32_t operator()(int32_t a, int32_t b) const { return clamp(a) << Bits | clamp(b); }
  uint32_t operator()(int32_t a, int32_t b, int32_t c) const {
    return static_cast<uint32_t>(c) << (2 * Bits) | (*this)(a, b);
  }
};
void bind_pack(Bind& b) {
  const auto to = b.slot(3);
  const bool is_signed = to.front() == 's', chained = b.slots() == 6;
  const auto digits = to.substr(1);
  int bits = 0;  // not stoi: it binds the library to glibc 2.38
  std::from_chars(digits.data(), digits.data() + digits.size(), bits);
  bind_operands(b, Type::b32, Type::b32, chained ? 3 : 2);
  choose(is_signed, [&](auto s) {
    constexpr bool kSigned = decltype(s)::value;
    const auto run = [&](auto pack) { b.run(handler_of<decltype(pack), uint32_t, 3>(int32_t{})); };
    bits == 16  ? b.run(handler_of<Pack<16, kSigned>, uint32_t, 2>(int32_t{}))
    : bits == 8 ? run(Pack<8, kSigned>{})
    : bits == 4 ? run(Pack<4, kSigned>{})
                : run(Pack<2, kSigned>{});
  });
}

const Row rows[] = {
    {"cvt.rn|rz.relu?.satfinite?.f16.f32", "9.7.9.21", bind_one<F16>},
    {"cvt.rn|rz.satfinite.relu.f16.f32", "9.7.9.21", bind_one<F16>},
    {"cvt.rn|rz.relu?.satfinite?.bf16.f32", "9.7.9.21", bind_one<Bf16>},
    {"cvt.rn|rz.satfinite.relu.bf16.f32", "9.7.9.21", bind_one<Bf16>},
    {"cvt.rn|rz.relu?.satfinite?.f16x2.f32", "9.7.9.21", bind_two<F16, Type::b32>},
    {"cvt.rn|rz.satfinite.relu.f16x2.f32", "9.7.9.21", bind_two<F16, Type::b32>},
    {"cvt.rn|rz.relu?.satfinite?.bf16x2.f32", "9.7.9.21", bind_two<Bf16, Type::b32>},
    {"cvt.rn|rz.satfinite.relu.bf16x2.f32", "9.7.9.21", bind_two<Bf16, Type::b32>},
    {"cvt.rna.satfinite?.tf32.f32", "9.7.9.21", bind_tf32<Rounding::rna>},
    {"cvt.rn.relu?.tf32.f32", "9.7.9.21", bind_tf32<Rounding::rn>},
    {"cvt.rz.relu?.tf32.f32", "9.7.9.21", bind_tf32<Rounding::rz>},
    {"cvt.rn.satfinite.relu?.e4m3x2.f32", "9.7.9.21", bind_two<E4m3, Type::b16>},
    {"cvt.rn.satfinite.relu?.e5m2x2.f32", "9.7.9.21", bind_two<E5m2, Type::b16>},
    {"cvt.rn.satfinite.relu?.e4m3x2.f16x2", "9.7.9.21", bind_from_halves<E4m3, Type::b16>},
    {"cvt.rn.satfinite.relu?.e5m2x2.f16x2", "9.7.9.21", bind_from_halves<E5m2, Type::b16>},
    {"cvt.rn.relu?.f16x2.e4m3x2", "9.7.9.21", bind_to_halves<F16, E4m3, Type::b16>},
    {"cvt.rn.relu?.f16x2.e5m2x2", "9.7.9.21", bind_to_halves<F16, E5m2, Type::b16>},
    {"cvt.rn.satfinite.relu?.e2m1x2.f32", "9.7.9.21", bind_two<E2m1, Type::b8>},
    {"cvt.rn.satfinite.relu?.e2m3x2.f32", "9.7.9.21", bind_two<E2m3, Type::b16>},
    {"cvt.rn.satfinite.relu?.e3m2x2.f32", "9.7.9.21", bind_two<E3m2, Type::b16>},
    {"cvt.rn.satfinite.relu?.e2m1x2.f16x2", "9.7.9.21", bind_from_halves<E2m1, Type::b8>},
    {"cvt.rn.relu?.f16x2.e2m1x2", "9.7.9.21", bind_to_halves<F16, E2m1, Type::b8>},
    {"cvt.rn.relu?.f16x2.e2m3x2", "9.7.9.21", bind_to_halves<F16, E2m3, Type::b16>},
    {"cvt.rn.relu?.f16x2.e3m2x2", "9.7.9.21", bind_to_halves<F16, E3m2, Type::b16>},
    {"cvt.rn.relu?.satfinite?.bf16x2.e4m3x2", "9.7.9.21", bind_to_halves<Bf16, E4m3, Type::b16>},
    {"cvt.rn.relu?.satfinite?.bf16x2.e5m2x2", "9.7.9.21", bind_to_halves<Bf16, E5m2, Type::b16>},
    {"cvt.rn.relu?.satfinite?.bf16x2.e2m1x2", "9.7.9.21", bind_to_halves<Bf16, E2m1, Type::b8>},
    {"cvt.rn.relu?.satfinite?.bf16x2.e2m3x2", "9.7.9.21", bind_to_halves<Bf16, E2m3, Type::b16>},
    {"cvt.rn.relu?.satfinite?.bf16x2.e3m2x2", "9.7.9.21", bind_to_halves<Bf16, E3m2, Type::b16>},
    {"cvt.rz|rp.satfinite?.ue8m0x2.f32", "9.7.9.21", bind_two_to_e8m0},
    {"cvt.rz|rp.satfinite?.ue8m0x2.bf16x2", "9.7.9.21", bind_halves_to_e8m0},
    {"cvt.rn.bf16x2.ue8m0x2", "9.7.9.21", bind_e8m0_to_halves},
    {"cvt.pack.sat.u16|s16.s32", "9.7.9.22", bind_pack},
    {"cvt.pack.sat.u8|s8|u4|s4|u2|s2.s32.b32", "9.7.9.22", bind_pack},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
