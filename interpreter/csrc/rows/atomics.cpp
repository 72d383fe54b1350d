// atom and red (ISA 9.7.13.5 and 9.7.13.6), with the host's atomics, as CTAs run on several threads. Lanes go in an
// order that the seed decides.
#include <cstring>

#include "explore/execution.h"
#include "rows/addresses.h"
#include "rows/lanewise.h"
#include "rows/reductions.h"

// Semantics, scope and state space in any order, as ptxas takes them, before the operation or after it.
#define MODIFIER "relaxed|acquire|release|acq_rel|" SCOPE "|" STATE_SPACE "?."
#define BEFORE MODIFIER MODIFIER MODIFIER
#define AFTER "." MODIFIER MODIFIER MODIFIER "L2::cache_hint?."

namespace gpuless {
namespace {

struct Atomic : AddressOperand {
  int count = 1;        // of the vector
  bool returns = true;  // atom; red has no destination
};

// What a register of type T looks like: 128-bit ones are two halves, 32 lanes apart.
template <class T>
T from_register(const void* base, int lane) {
  T value;
  if constexpr (sizeof(T) == 16) {
    const auto* half = static_cast<const uint64_t*>(base);
    value = static_cast<T>(half[kLanes + lane]) << 64 | half[lane];
  } else {
    std::memcpy(&value, static_cast<const uint8_t*>(base) + lane * sizeof(T), sizeof(T));
  }
  return value;
}
template <class T>
void to_register(void* base, int lane, T value) {
  if constexpr (sizeof(T) == 16) {
    auto* half = static_cast<uint64_t*>(base);
    half[lane] = static_cast<uint64_t>(value);
    half[kLanes + lane] = static_cast<uint64_t>(value >> 64);
  } else {
    std::memcpy(static_cast<uint8_t*>(base) + lane * sizeof(T), &value, sizeof(T));
  }
}

// f(lane) for the lanes of a mask, in one of the orders that a step and a start give.
template <class F>
void in_seeded_order(Warp& w, Mask mask, F f) {
  const uint32_t random = w.random(), step = random | 1, start = random >> 8;
  for (int k = 0; k < kLanes; ++k) {
    const int l = static_cast<int>((start + k * step) % kLanes);
    if (mask >> l & 1) f(l);
  }
}

// Whether nobody can tell in which order two of them came: nothing looks at what they return. Otherwise 0, else which.
template <class Op>
uint64_t commutes(const Instruction& i, const Atomic& a) {
  if (std::is_same_v<Op, Exchange> || std::is_same_v<Op, CompareAndSwap>) return 0;
  for (int k = 0; a.returns && k < a.count; ++k)
    if (i.operand[k] != kSink) return 0;
  return reinterpret_cast<uint64_t>(i.run);
}

template <class Op, class T, int kSources, int kPacked = 1>
Step atomic(Warp& w, const Instruction& i, Mask mask) {
  const auto& a = *static_cast<const Atomic*>(i.data);
  uint8_t* host[kLanes];
  a.access(w, i, a.count * kPacked * static_cast<int>(sizeof(T)), Use::atomic, mask, host);
  const int values = a.operand + 1;
  Mask changed = 0;
  in_seeded_order(w, mask, [&](int l) {
    for (int k = 0; k < a.count; ++k) {
      for (int p = 0; p < kPacked; ++p) {  // a pair of 16 bits each is two atomics: ISA 9.7.13.5
        const int part = l * kPacked + p;
        const auto source = [&](int n) {
          return from_register<T>(w.operand<uint8_t>(i, values + n * a.count + k), part);
        };
        T after;
        const T before = exchange<T>(host[l] + (k * kPacked + p) * sizeof(T), [&](T old) {
          if constexpr (kSources == 2) {
            after = Op{}(old, source(0), source(1));
          } else {
            after = Op{}(old, source(0));
          }
          return after;
        });
        changed |= Mask{std::memcmp(&before, &after, sizeof(T)) != 0} << l;
        if (a.returns && i.operand[k] != kSink) to_register(w.operand<uint8_t>(i, k), part, before);
      }
    }
  });
  if (changed) ++w.effects;
  if (w.cta->launch->execution) w.cta->launch->execution->atomic(changed, commutes<Op>(i, a));
  return acquired(w);
}

// Operands, for any type: atom has destinations, a vector has several of each.
void bind_operands(Bind& b, Type type, int sources) {
  auto& a = b.data<Atomic>();
  a.returns = b.slot(0) == "atom";
  a.count = b.has("v8") ? 8 : b.has("v4") ? 4 : b.has("v2") ? 2 : 1;
  const Order semantics = order(b);
  if (!a.returns && (semantics == Order::acquire || semantics == Order::acq_rel)) {
    b.refuse("red is .relaxed or .release: it reads nothing");
  }
  const int first = a.returns ? 1 : 0;
  expect_operands(b, first + 1 + sources + (b.has("L2::cache_hint") ? 1 : 0));
  const auto each = [&](const Operand& o, auto bind) {
    if (a.count == 1) return bind(o);
    if (o.kind != Operand::Kind::vector || static_cast<int>(o.parts.size()) != a.count) {
      b.refuse("the vector must have " + std::to_string(a.count) + " registers");
    }
    for (const Operand& part : o.parts) bind(part);
  };
  if (a.count * ptx::size_of(type) > 16) b.refuse("vectors of more than 16 bytes do not exist");
  if (a.returns) each(b.operand(0), [&](const Operand& o) { b.destination(o, type); });
  a.bind(b, b.operand(first));
  if (a.count > 1 && a.space != ptx::Space::global && a.space != ptx::Space::none)
    b.refuse("vectors are for global memory");
  for (int s = 0; s < sources; ++s) each(b.operand(first + 1 + s), [&](const Operand& o) { b.source(o, type); });
  if (b.has("L2::cache_hint")) b.source(b.operands() - 1, Type::b64);
}

Type value_type(const Bind& b) { return b.type(b.slots() - 1); }

template <class Op>
void bind_bits(Bind& b) {
  bind_operands(b, value_type(b), 1);
  if (value_type(b) == Type::b128) return b.run(atomic<Op, unsigned __int128, 1>);
  with_integer(value_type(b), [&](auto t) { b.run(atomic<Op, decltype(t), 1>); });
}

void bind_cas(Bind& b) {
  bind_operands(b, value_type(b), 2);
  mark_compared_loads(b, b.operand(1), b.operand(2));
  if (value_type(b) == Type::b128) return b.run(atomic<CompareAndSwap, unsigned __int128, 2>);
  with_integer(value_type(b), [&](auto t) { b.run(atomic<CompareAndSwap, decltype(t), 2>); });
}

template <class Op>
void bind_halves(Bind& b) {
  const Type type = value_type(b);
  bind_operands(b, type, 1);
  if (type == Type::f16) b.run(atomic<Op, Half, 1>);
  if (type == Type::bf16) b.run(atomic<Op, BFloat16, 1>);
  if (type == Type::f16x2) b.run(atomic<Op, Half, 1, 2>);
  if (type == Type::bf16x2) b.run(atomic<Op, BFloat16, 1, 2>);
}

void bind_add(Bind& b) {
  const Type type = value_type(b);
  bind_operands(b, type, 1);
  if (type == Type::f64) return b.run(atomic<Add, double, 1>);
  if (type == Type::f32) {
    const ptx::Space space = static_cast<const Atomic*>(b.instruction.data)->space;
    const bool shared = space == ptx::Space::shared || space == ptx::Space::shared_cluster;
    return b.run(shared ? atomic<Add, float, 1> : atomic<AddFlushed, float, 1>);
  }
  // Wrapping, whatever the sign.
  b.run(ptx::size_of(type) == 8 ? atomic<Add, uint64_t, 1> : atomic<Add, uint32_t, 1>);
}

const Row rows[] = {
    {"atom." BEFORE "exch" AFTER "b32|b64|b128", "9.7.13.5", bind_bits<Exchange>},
    {"atom." BEFORE "cas" AFTER "b16|b32|b64|b128", "9.7.13.5", bind_cas},
    {"atom|red." BEFORE "and" AFTER "b32|b64", "9.7.13.5", bind_bits<And>},
    {"atom|red." BEFORE "or" AFTER "b32|b64", "9.7.13.5", bind_bits<Or>},
    {"atom|red." BEFORE "xor" AFTER "b32|b64", "9.7.13.5", bind_bits<Xor>},
    {"atom|red." BEFORE "inc" AFTER "u32", "9.7.13.5", bind_bits<Increment>},
    {"atom|red." BEFORE "dec" AFTER "u32", "9.7.13.5", bind_bits<Decrement>},
    {"atom|red." BEFORE "min" AFTER "u32|s32|u64|s64", "9.7.13.5", bind_bits<Extreme<false>>},
    {"atom|red." BEFORE "max" AFTER "u32|s32|u64|s64", "9.7.13.5", bind_bits<Extreme<true>>},
    {"atom|red." BEFORE "add" AFTER "u32|s32|u64|f32|f64", "9.7.13.5", bind_add},
    {"atom|red." BEFORE "add" AFTER "v2|v4.f32", "9.7.13.5", bind_add},
    {"atom|red." BEFORE "add.noftz" AFTER "v2|v4|v8?.f16|bf16|f16x2|bf16x2", "9.7.13.5", bind_halves<Add>},
    {"atom|red." BEFORE "min.noftz" AFTER "v2|v4|v8.f16|bf16", "9.7.13.5", bind_halves<Extreme<false>>},
    {"atom|red." BEFORE "min.noftz" AFTER "v2|v4.f16x2|bf16x2", "9.7.13.5", bind_halves<Extreme<false>>},
    {"atom|red." BEFORE "max.noftz" AFTER "v2|v4|v8.f16|bf16", "9.7.13.5", bind_halves<Extreme<true>>},
    {"atom|red." BEFORE "max.noftz" AFTER "v2|v4.f16x2|bf16x2", "9.7.13.5", bind_halves<Extreme<true>>},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
