// Comparison and selection (ISA 9.7.6, 9.7.7): setp, set, selp, slct.
#include <immintrin.h>

#include "rows/floating.h"

namespace gpuless {
namespace {

// Ordered comparisons: false with NaN. The others are their complements, or swap the operands.
enum class Compare { eq, ne, lt, le, num };

template <Compare C, class T>
bool holds(T a, T b) {
  switch (C) {
    case Compare::eq:
      return a == b;
    case Compare::ne:
      return a < b || a > b;
    case Compare::lt:
      return a < b;
    case Compare::le:
      return a <= b;
    case Compare::num:
      return a == a && b == b;
  }
}

// One bit a lane, of all of them: what the mask leaves out is dropped later.
template <class F>
Mask collect(F f) {
  alignas(32) int32_t flags[kLanes];
  for (int l = 0; l < kLanes; ++l) flags[l] = -static_cast<int32_t>(f(l));
  Mask lanes = 0;
  for (int l = 0; l < kLanes; l += 8)
    lanes |= static_cast<Mask>(_mm256_movemask_ps(_mm256_load_ps(reinterpret_cast<const float*>(flags + l)))) << l;
  return lanes;
}

// Of two registers. `shift`: where packed ones have their value.
using Comparing = Mask (*)(const uint8_t* a, const uint8_t* b, int shift);
template <Compare C, class T, bool Ftz, class Held>
Mask compare(const uint8_t* a, const uint8_t* b, int shift) {
  const auto value = [=](const uint8_t* operand, int l) {
    const Held bits = reinterpret_cast<const Held*>(operand)[l];
    if constexpr (is_short<T>) {
      const T x = T::from_bits(sizeof(Held) == 4 ? bits >> shift : bits);
      return static_cast<float>(Ftz ? flushed(x) : x);
    } else {
      return Ftz ? flushed(bits) : bits;
    }
  };
  return collect([&](int l) { return holds<C>(value(a, l), value(b, l)); });
}

template <Compare C>
Comparing comparing(Type type, bool ftz) {
  switch (type) {
    case Type::f16:
      return ftz ? &compare<C, Half, true, uint16_t> : &compare<C, Half, false, uint16_t>;
    case Type::f16x2:
      return ftz ? &compare<C, Half, true, uint32_t> : &compare<C, Half, false, uint32_t>;
    case Type::bf16:
      return &compare<C, BFloat16, false, uint16_t>;
    case Type::bf16x2:
      return &compare<C, BFloat16, false, uint32_t>;
    case Type::f32:
      return ftz ? &compare<C, float, true, float> : &compare<C, float, false, float>;
    case Type::f64:
      return &compare<C, double, false, double>;
    default:
      return with_integer(type, [](auto t) -> Comparing {
        using T = decltype(t);
        if constexpr (sizeof(T) > 1 && C != Compare::num) return &compare<C, T, false, T>;
        return nullptr;
      });
  }
}

struct Comparison {
  Comparing compare;
  bool swapped, complement;

  Mask operator()(const uint8_t* a, const uint8_t* b, int shift = 0) const {
    const Mask outcome = swapped ? compare(b, a, shift) : compare(a, b, shift);
    return complement ? ~outcome : outcome;
  }
};
Comparison find_comparison(const Bind& b, Type type) {
  struct Name {
    const char* name;
    Comparing (*select)(Type, bool);
    bool swapped = false, complement = false;
  };
  constexpr bool kSwapped = true, kComplement = true;
  constexpr Name names[] = {
      {"eq", comparing<Compare::eq>},
      {"ne", comparing<Compare::ne>},
      {"lt", comparing<Compare::lt>},
      {"le", comparing<Compare::le>},
      {"gt", comparing<Compare::lt>, kSwapped},
      {"ge", comparing<Compare::le>, kSwapped},
      {"lo", comparing<Compare::lt>},
      {"ls", comparing<Compare::le>},
      {"hi", comparing<Compare::lt>, kSwapped},
      {"hs", comparing<Compare::le>, kSwapped},
      {"equ", comparing<Compare::ne>, false, kComplement},
      {"neu", comparing<Compare::eq>, false, kComplement},
      {"ltu", comparing<Compare::le>, kSwapped, kComplement},
      {"leu", comparing<Compare::lt>, kSwapped, kComplement},
      {"gtu", comparing<Compare::le>, false, kComplement},
      {"geu", comparing<Compare::lt>, false, kComplement},
      {"num", comparing<Compare::num>},
      {"nan", comparing<Compare::num>, false, kComplement},
  };
  for (const Name& n : names)
    if (n.name == b.slot(1)) return {n.select(type, b.has("ftz")), n.swapped, n.complement};
  b.refuse("comparison ." + std::string(b.slot(1)) + " is not known");
}

// What setp and set do with the comparison's outcome.
enum class Combine { none, and_, or_, xor_ };
struct Test {
  Comparison comparison;
  bool packed;  // it is made of the lower and of the upper halves
  Combine combine;
  bool negated;  // !c

  Mask with(Mask t, Mask c) const {
    if (negated) c = ~c;
    return combine == Combine::and_ ? t & c : combine == Combine::or_ ? t | c : combine == Combine::xor_ ? t ^ c : t;
  }
};
bool is_packed(Type t) { return t == Type::f16x2 || t == Type::bf16x2; }
Type held_as(Type t) { return is_packed(t) ? Type::b32 : t == Type::f16 || t == Type::bf16 ? Type::b16 : t; }

// Sources a, b and, with a Boolean operator, c.
Test& bind_test(Bind& b, Type type) {
  Test& t = b.data<Test>();
  t.combine = b.has("and") ? Combine::and_ : b.has("or") ? Combine::or_ : b.has("xor") ? Combine::xor_ : Combine::none;
  expect_operands(b, t.combine == Combine::none ? 3 : 4);
  t.comparison = find_comparison(b, type);
  t.packed = is_packed(type);
  b.source(1, held_as(type));
  b.source(2, held_as(type));
  t.negated = t.combine != Combine::none && b.predicate(b.operand(3));
  return t;
}
Mask third(const Warp& w, const Instruction& i, const Test& t) {
  return t.combine == Combine::none ? 0 : w.predicate(i.operand[i.destinations + 2]);
}

void put(Warp& w, Offset offset, Mask value, Mask mask) {
  if (offset == kSink) return;
  Mask& d = *w.at<Mask>(offset);
  d = (d & ~mask) | (value & mask);
}
// p[|q]: the outcome and its complement; of packed types, the outcomes of the lower and the upper halves.
Step setp(Warp& w, const Instruction& i, Mask mask) {
  const Test& t = *static_cast<const Test*>(i.data);
  const auto *a = w.operand<uint8_t>(i, i.destinations), *b = w.operand<uint8_t>(i, i.destinations + 1);
  const Mask c = third(w, i, t), outcome = t.comparison(a, b), other = t.packed ? t.comparison(a, b, 16) : ~outcome;
  put(w, i.operand[0], t.with(outcome, c), mask);
  if (i.destinations == 2) put(w, i.operand[1], t.with(other, c), mask);
  return Step::next;
}
void bind_setp(Bind& b) {
  const Type type = b.type(b.slots() - 1);
  const Operand& d = b.operand(0);
  if (d.kind == Operand::Kind::pair) {
    if (type == Type::f16 || type == Type::bf16) b.refuse("16-bit types have one outcome: its destination must be p");
    b.destination(d.parts[0], Type::pred);
    b.destination(d.parts[1], Type::pred);
  } else {
    if (is_packed(type)) b.refuse("packed types have two outcomes: its destination must be p|q");
    destination(b, d, Type::pred);
  }
  bind_test(b, type);
  b.run(setp);
}

// All ones, or 1 in the destination's format; packed ones in halves. immediate: the bits of true.
template <class D>
Step set(Warp& w, const Instruction& i, Mask mask) {
  const Test& t = *static_cast<const Test*>(i.data);
  const auto *a = w.operand<uint8_t>(i, 1), *b = w.operand<uint8_t>(i, 2);
  const Mask c = third(w, i, t), low = t.with(t.comparison(a, b), c),
             high = t.packed ? t.with(t.comparison(a, b, 16), c) : 0;
  const auto yes = static_cast<D>(i.immediate);
  const bool packed = t.packed;
  D* d = w.operand<D>(i, 0);
  each_lane(mask, [=](int l) {
    const D ones = low >> l & 1 ? yes : 0;
    d[l] = packed ? static_cast<D>(ones | (high >> l & 1 ? yes << 16 : 0)) : ones;
  });
  return Step::next;
}
void bind_set(Bind& b) {
  const Type to = b.type(b.slots() - 2), from = b.type(b.slots() - 1);
  destination(b, b.operand(0), held_as(to));
  bind_test(b, from);
  b.instruction.immediate = to == Type::f32                            ? 0x3f800000
                            : to == Type::f16 || to == Type::f16x2     ? 0x3c00
                            : to == Type::bf16 || to == Type::bf16x2   ? 0x3f80
                            : is_packed(from) || ptx::size_of(to) == 2 ? 0xffff
                                                                       : 0xffffffff;
  b.run(ptx::size_of(held_as(to)) == 2 ? &set<uint16_t> : &set<uint32_t>);
}

template <class T>
Step selp(Warp& w, const Instruction& i, Mask mask) {
  const Mask p = w.predicate(i.operand[3]) ^ i.option;
  const T *a = w.operand<T>(i, 1), *b = w.operand<T>(i, 2);
  T* d = w.operand<T>(i, 0);
  each_lane(mask, [=](int l) { d[l] = p >> l & 1 ? a[l] : b[l]; });
  return Step::next;
}
template <class T, class C, bool Ftz>
Step slct(Warp& w, const Instruction& i, Mask mask) {
  const T *a = w.operand<T>(i, 1), *b = w.operand<T>(i, 2);
  const C* c = w.operand<C>(i, 3);
  T* d = w.operand<T>(i, 0);
  each_lane(mask, [=](int l) { d[l] = (Ftz ? flushed(c[l]) : c[l]) >= 0 ? a[l] : b[l]; });
  return Step::next;
}
template <class F>
void by_width(int bytes, F f) {
  bytes == 2 ? f(uint16_t{}) : bytes == 4 ? f(uint32_t{}) : f(uint64_t{});
}
void bind_selp(Bind& b) {
  const Type type = b.type(1);
  expect_operands(b, 4);
  destination(b, b.operand(0), type);
  b.source(1, type);
  b.source(2, type);
  b.instruction.option = b.predicate(b.operand(3)) ? kAllLanes : 0;
  by_width(ptx::size_of(type), [&](auto t) { b.run(&selp<decltype(t)>); });
}
template <class C>
void bind_slct(Bind& b) {
  const Type type = b.type(b.slots() - 2);
  expect_operands(b, 4);
  destination(b, b.operand(0), type);
  b.source(1, type);
  b.source(2, type);
  b.source(3, b.type(b.slots() - 1));
  by_width(ptx::size_of(type), [&](auto t) {
    using T = decltype(t);
    b.run(b.has("ftz") ? &slct<T, C, true> : &slct<T, C, false>);
  });
}

#define ANY_TYPE "b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64"
#define ORDERED "eq|ne|lt|le|gt|ge"
#define FLOATING ORDERED "|equ|neu|ltu|leu|gtu|geu|num|nan"
#define COMBINED ".and|or|xor?"

const Row rows[] = {
    {"set.eq|ne" COMBINED ".u32|s32|f32|f16|bf16.b16|b32|b64", "9.7.6.1", bind_set},
    {"set." ORDERED COMBINED ".u32|s32|f32|f16|bf16.u16|u32|u64|s16|s32|s64", "9.7.6.1", bind_set},
    {"set.lo|ls|hi|hs" COMBINED ".u32|s32|f32|f16|bf16.u16|u32|u64", "9.7.6.1", bind_set},
    {"set." FLOATING COMBINED ".ftz?.u32|s32|f32|f16.f32", "9.7.6.1", bind_set},
    {"set." FLOATING COMBINED ".bf16.f32", "9.7.6.1", bind_set},
    {"set." FLOATING COMBINED ".u32|s32|f32|f16|bf16.f64", "9.7.6.1", bind_set},
    {"setp.eq|ne" COMBINED ".b16|b32|b64", "9.7.6.2", bind_setp},
    {"setp." ORDERED COMBINED ".u16|u32|u64|s16|s32|s64", "9.7.6.2", bind_setp},
    {"setp.lo|ls|hi|hs" COMBINED ".u16|u32|u64", "9.7.6.2", bind_setp},
    {"setp." FLOATING COMBINED ".ftz?.f32", "9.7.6.2", bind_setp},
    {"setp." FLOATING COMBINED ".f64", "9.7.6.2", bind_setp},
    {"selp." ANY_TYPE, "9.7.6.3", bind_selp},
    {"slct." ANY_TYPE ".s32", "9.7.6.4", bind_slct<int32_t>},
    {"slct.ftz?." ANY_TYPE ".f32", "9.7.6.4", bind_slct<float>},
    {"set." FLOATING COMBINED ".ftz?.u16|s16|u32|s32|f16.f16", "9.7.7.1", bind_set},
    {"set." FLOATING COMBINED ".u16|s16|u32|s32|bf16.bf16", "9.7.7.1", bind_set},
    {"set." FLOATING COMBINED ".ftz?.u32|s32|f16x2.f16x2", "9.7.7.1", bind_set},
    {"set." FLOATING COMBINED ".u32|s32|bf16x2.bf16x2", "9.7.7.1", bind_set},
    {"setp." FLOATING COMBINED ".ftz?.f16|f16x2", "9.7.7.2", bind_setp},
    {"setp." FLOATING COMBINED ".bf16|bf16x2", "9.7.7.2", bind_setp},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
