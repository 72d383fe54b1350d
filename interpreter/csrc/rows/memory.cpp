// Loads, stores and what goes with addresses (ISA 9.7.9): all state spaces, eviction and prefetch hints without effect.
#include <cstring>

#include "rows/addresses.h"
#include "rows/lanewise.h"
#include "undefined.h"

#define LEVEL1 "L1::evict_normal|L1::evict_unchanged|L1::evict_first|L1::evict_last|L1::no_allocate"
#define PREFETCH "L2::64B|L2::128B|L2::256B"
#define HINTS LEVEL1 "?.L2::cache_hint?." PREFETCH "?.v2|v4?."
#define STORE_HINTS LEVEL1 "?.L2::cache_hint?.v2|v4?."
#define LOAD_ORDER "weak|volatile|relaxed|acquire"
#define STORE_ORDER "weak|volatile|relaxed|release"
#define TYPES "b8|b16|b32|b64|b128|u8|u16|u32|u64|s8|s16|s32|s64|f32|f64"
#define LOADED STATE_SPACE "|const|local|param|param::entry|param::func"
#define PRIMARY "L2::evict_last|L2::evict_normal|L2::evict_first|L2::evict_unchanged"
#define SECONDARY "L2::evict_first|L2::evict_unchanged"
#define STORED STATE_SPACE "|local|param|param::func"

namespace gpuless {
namespace {

// ---- ld and st ----

struct Transfer : AddressOperand {
  Use use;
  int count;  // of the vector; b128 is two of 64 bits
};

// M: in memory, R: in the register, which may be wider; signed types extend their sign (ISA 9.4.1).
template <class M, class R>
Step load(Warp& w, const Instruction& i, Mask mask) {
  const auto& t = *static_cast<const Transfer*>(i.data);
  uint8_t* host[kLanes];
  t.access(w, i, t.count * static_cast<int>(sizeof(M)), t.use, mask, host);
  for (int k = 0; k < i.destinations; ++k) {
    if (i.operand[k] == kSink) continue;
    R* d = w.operand<R>(i, k);
    each_lane(mask, [&](int l) {
      M value;
      std::memcpy(&value, host[l] + k * sizeof(M), sizeof(M));
      d[l] = static_cast<R>(value);
    });
  }
  const Step step = acquired(w);
  loaded(w, i);
  return step;
}

template <class M, class R>
Step store(Warp& w, const Instruction& i, Mask mask) {
  const auto& t = *static_cast<const Transfer*>(i.data);
  uint8_t* host[kLanes];
  t.access(w, i, t.count * static_cast<int>(sizeof(M)), t.use, mask, host);
  for (int k = 0; k < t.count; ++k) {
    const R* s = w.operand<R>(i, 1 + k);
    each_lane(mask, [&](int l) {
      const M value = static_cast<M>(s[l]);
      std::memcpy(host[l] + k * sizeof(M), &value, sizeof(M));
    });
    stored(w, i, 1 + k, mask, host, k * sizeof(M), sizeof(M));
  }
  w.cta->shadow.settle();
  return Step::next;
}

// A 128-bit register is two halves, one after the other, of 32 lanes each.
Step load128(Warp& w, const Instruction& i, Mask mask) {
  const auto& t = *static_cast<const Transfer*>(i.data);
  uint8_t* host[kLanes];
  t.access(w, i, 16, t.use, mask, host);
  if (i.operand[0] != kSink) {
    auto* d = w.operand<uint64_t>(i, 0);
    for (int half = 0; half < 2; ++half)
      each_lane(mask, [&](int l) { std::memcpy(d + half * kLanes + l, host[l] + half * 8, 8); });
  }
  const Step step = acquired(w);
  loaded(w, i);
  return step;
}

Step store128(Warp& w, const Instruction& i, Mask mask) {
  const auto& t = *static_cast<const Transfer*>(i.data);
  uint8_t* host[kLanes];
  t.access(w, i, 16, t.use, mask, host);
  const auto* s = w.operand<uint64_t>(i, 1);
  for (int half = 0; half < 2; ++half)
    each_lane(mask, [&](int l) { std::memcpy(host[l] + half * 8, s + half * kLanes + l, 8); });
  stored(w, i, 1, mask, host, 0, 16);
  w.cta->shadow.settle();
  return Step::next;
}

// f(a value of the type in memory, a value of the register's).
template <class F>
void with_widths(Bind& b, Type type, int register_bytes, F f) {
  const auto of_memory = [&](auto m) {
    if constexpr (sizeof m <= 2)
      if (register_bytes <= 2) return f(m, uint16_t{});
    if constexpr (sizeof m <= 4)
      if (register_bytes == 4) return f(m, uint32_t{});
    if (register_bytes == 8) return f(m, uint64_t{});
    b.refuse("a register's size does not fit the instruction's type");
  };
  if (type == Type::f32) return of_memory(uint32_t{});
  if (type == Type::f64) return of_memory(uint64_t{});
  with_integer(type, of_memory);
}

// The registers of a vector, or the one of a scalar; f binds one and returns its bytes, 0 for `_`.
template <class F>
int bind_values(Bind& b, const Operand& o, Type type, int count, F f) {
  if (count * ptx::size_of(type) > 16) b.refuse("vectors of more than 16 bytes need sm_100");
  const bool vector = o.kind == Operand::Kind::vector;
  if (vector ? static_cast<int>(o.parts.size()) != count : count != 1) {
    b.refuse("the vector must have " + std::to_string(count) + " registers");
  }
  int bytes = 0;
  for (int k = 0; k < count; ++k) {
    const int n = f(vector ? o.parts[k] : o);
    if (n && bytes && n != bytes) b.refuse("the registers of the vector must have one size");
    bytes = n ? n : bytes;
  }
  return bytes ? bytes : std::max(2, ptx::size_of(type));
}

// Of a load or store: hints that exclude each other.
void check_hints(const Bind& b) {
  bool cached = false, prioritised = false;
  for (int i = 1; i < b.slots(); ++i) {
    for (const auto cop : {"ca", "cg", "cs", "lu", "cv", "wb", "wt"}) cached |= b.slot(i) == cop;
    prioritised |= b.slot(i).substr(0, 4) == "L1::";
  }
  if (cached && prioritised) b.refuse("a cache operator and an eviction priority exclude each other");
  if (cached && order(b) != Order::weak) b.refuse("a cache operator is for weak accesses");
}

int vector_count(const Bind& b) { return b.has("v4") ? 4 : b.has("v2") ? 2 : 1; }
Type value_type(const Bind& b) { return b.type(b.slots() - 1); }

void bind_load(Bind& b) {
  expect_operands(b, b.has("L2::cache_hint") ? 3 : 2);
  check_hints(b);
  const Type type = value_type(b);
  auto& t = b.data<Transfer>();
  t.count = vector_count(b);
  t.use = b.has("nc") ? Use::constant : order(b) == Order::weak ? Use::load : Use::strong_read;
  const bool fresh = (b.has("cg") || b.has("cv")) && t.count * ptx::size_of(type) <= 8;
  if (t.use == Use::load && fresh && space_of(b) == ptx::Space::global) t.use = Use::fresh;
  const int bytes =
      bind_values(b, b.operand(0), type, t.count, [&](const Operand& o) { return b.destination_relaxed(o, type); });
  t.bind(b, b.operand(1));
  if (b.has("L2::cache_hint")) b.source(2, Type::b64);
  if (type == Type::b128) return b.run(load128);
  with_widths(b, type, bytes, [&](auto m, auto r) { b.run(load<decltype(m), decltype(r)>); });
}

void bind_store(Bind& b) {
  expect_operands(b, b.has("L2::cache_hint") ? 3 : 2);
  check_hints(b);
  const Type type = value_type(b);
  auto& t = b.data<Transfer>();
  t.count = vector_count(b);
  t.use = order(b) == Order::weak ? Use::write : Use::strong_write;
  t.bind(b, b.operand(0));
  const int bytes =
      bind_values(b, b.operand(1), type, t.count, [&](const Operand& o) { return b.source_relaxed(o, type); });
  if (b.has("L2::cache_hint")) b.source(2, Type::b64);
  b.instruction.undefined = Undefined::store;
  if (type == Type::b128) return b.run(store128);
  with_widths(b, type, bytes, [&](auto m, auto r) { b.run(store<std::make_unsigned_t<decltype(m)>, decltype(r)>); });
}

// ---- Addresses ----

// A generic address is that of its window, or the host's; parameters of an entry lie in the launch.
template <bool kTo>
Step convert_address(Warp& w, const Instruction& i, Mask mask) {
  const auto space = static_cast<ptx::Space>(i.option);
  uint64_t window = 0;
  if (space == ptx::Space::shared || space == ptx::Space::shared_cluster) window = kSharedWindow;
  if (space == ptx::Space::local) window = kLocalWindow;
  if (space == ptx::Space::param) {
    if (w.frame->caller) {
      w.fail(Kind::unsupported, "generic addresses of a function's parameters are not supported; a kernel's are");
    }
    window = reinterpret_cast<uint64_t>(w.cta->launch->parameters.data());
  }
  uint64_t* d = w.operand<uint64_t>(i, 0);
  const uint64_t* a = w.operand<uint64_t>(i, 1);
  each_lane(mask, [&](int l) { d[l] = kTo ? a[l] - window : a[l] + window; });
  return Step::next;
}

template <bool kTo>
void bind_cvta(Bind& b) {
  expect_operands(b, 2);
  if (value_type(b) != Type::u64) b.refuse("32-bit generic addresses are not supported; compile for 64 bits");
  destination(b, b.operand(0), Type::u64);
  b.source(1, Type::u64);
  b.instruction.option = static_cast<uint32_t>(space_of(b));
  b.run(convert_address<kTo>);
}

Step is_space(Warp& w, const Instruction& i, Mask mask) {
  const auto space = static_cast<ptx::Space>(i.option);
  const auto within = [](uint64_t a, const void* begin, uint64_t bytes) {
    return a - reinterpret_cast<uint64_t>(begin) < bytes;
  };
  const auto& parameters = w.cta->launch->parameters;
  const auto space_of_address = [&](uint64_t a) {
    if ((a & kWindowMask) == kSharedWindow) {
      const bool same_cta = shared_cta(*w.cta, a & ~kSharedWindow) == w.cta;  // its window lies within the cluster's
      return same_cta && space != ptx::Space::shared_cluster ? ptx::Space::shared : ptx::Space::shared_cluster;
    }
    if ((a & kWindowMask) == kLocalWindow) return ptx::Space::local;
    if (within(a, parameters.data(), parameters.size())) return ptx::Space::param;
    for (const auto& [name, g] : w.cta->launch->module->globals)
      if (g.constant && within(a, g.address, g.bytes)) return ptx::Space::constant;
    return ptx::Space::global;
  };
  Mask* p = w.operand<Mask>(i, 0);
  const uint64_t* a = w.operand<uint64_t>(i, 1);
  Mask yes = 0;
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    yes |= Mask{space_of_address(a[l]) == space} << l;
  }
  *p = (*p & ~mask) | yes;
  return Step::next;
}

// Without .shared::cluster an address is generic.
void require_shared(const Warp& w, const Instruction& i, uint64_t address, int lane) {
  if (i.option || (address & kWindowMask) == kSharedWindow) return;
  w.fail_at(Kind::illegal, "mapa and getctarank take addresses of shared memory; this generic address is elsewhere",
            lane, address);
}

// The address of the same variable in another CTA, and whose an address is; generic addresses have the window's bit.
template <class T>
Step map_address(Warp& w, const Instruction& i, Mask mask) {
  T* d = w.operand<T>(i, 0);
  const T* a = w.operand<T>(i, 1);
  const auto* rank = w.operand<uint32_t>(i, 2);
  const size_t ctas = w.cta->cluster->ctas.size();
  each_lane(mask, [&](int l) {
    if (rank[l] >= ctas) {
      w.fail(Kind::illegal,
             "mapa of rank " + std::to_string(rank[l]) + " in a cluster of " + std::to_string(ctas) +
                 (ctas == 1 ? " CTA" : " CTAs"),
             l);
    }
    const uint64_t window = a[l] & kWindowMask;
    require_shared(w, i, a[l], l);
    d[l] = static_cast<T>(window | cluster_address(static_cast<int>(rank[l]), shared_offset_of(a[l])));
  });
  return Step::next;
}

template <class T>
Step cta_rank(Warp& w, const Instruction& i, Mask mask) {
  auto* d = w.operand<uint32_t>(i, 0);
  const T* a = w.operand<T>(i, 1);
  each_lane(mask, [&](int l) {
    require_shared(w, i, a[l], l);
    const Cta* const cta = shared_cta(*w.cta, a[l] & ~kWindowMask);
    if (!cta) w.fail_at(Kind::illegal, "getctarank of an address that no CTA of the cluster has", l, a[l]);
    d[l] = static_cast<uint32_t>(cta->rank);
  });
  return Step::next;
}

void bind_mapa(Bind& b) {
  expect_operands(b, 3);
  destination(b, b.operand(0), value_type(b));
  b.source(1, value_type(b));
  b.source(2, Type::u32);
  b.instruction.option = b.has("shared::cluster");
  b.run(value_type(b) == Type::u32 ? map_address<uint32_t> : map_address<uint64_t>);
}

void bind_ctarank(Bind& b) {
  expect_operands(b, 2);
  destination(b, b.operand(0), Type::u32);
  b.source(1, value_type(b));
  b.instruction.option = b.has("shared::cluster");
  b.run(value_type(b) == Type::u32 ? cta_rank<uint32_t> : cta_rank<uint64_t>);
}

// ---- Hints to caches ----

// A prefetch of an address that does not exist is no error: programs prefetch past the end.
void bind_prefetch(Bind& b) {
  expect_operands(b, 1);
  bool wide;
  b.address(b.operand(0), &wide);
  b.run([](Warp&, const Instruction&, Mask) { return Step::next; });
}

// Any value will do, as nothing here reads it.
void bind_policy(Bind& b) {
  destination(b, b.operand(0), Type::b64);
  b.run([](Warp& w, const Instruction& i, Mask mask) {
    auto* d = w.operand<uint64_t>(i, 0);
    each_lane(mask, [&](int l) { d[l] = 0; });
    return Step::next;
  });
}

// 128 bytes whose content no longer matters (discard), or matters less (applypriority).
Step touch_line(Warp& w, const Instruction& i, Mask mask) {
  const auto& t = *static_cast<const Transfer*>(i.data);
  uint64_t address[kLanes];
  t.addresses(w, i, address);
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    if (address[l] % 128) w.fail_at(Kind::misaligned, "the line must be aligned to 128 bytes", l, address[l]);
    uint8_t* line = access_global(w, address[l], 128, t.use, l);
    if (t.use == Use::write) std::memset(line, 0xff, 128);
  }
  return Step::next;
}

void bind_touch_line(Bind& b, Use use) {
  expect_operands(b, 2);
  auto& t = b.data<Transfer>();
  t.use = use;
  t.bind(b, b.operand(0));
  if (b.constant(b.operand(1)) != 128) b.refuse("its size must be 128");
  b.run(touch_line);
}

const Row rows[] = {
    {"ld." LOAD_ORDER "?." SCOPE "?." LOADED "?." LOAD_ORDER "?." SCOPE "?.ca|cg|cs|lu|cv?." HINTS TYPES, "9.7.9.8",
     bind_load},
    {"ld.mmio.relaxed.sys.global?." TYPES, "9.7.9.8", bind_load},
    {"ld.global.ca|cg|cs?.nc." HINTS TYPES, "9.7.9.9", bind_load},
    {"ldu.global?.v2|v4?." TYPES, "9.7.9.10", bind_load},
    {"st." STORE_ORDER "?." SCOPE "?." STORED "?." STORE_ORDER "?." SCOPE "?.wb|cg|cs|wt?." STORE_HINTS TYPES,
     "9.7.9.11", bind_store},
    {"st.mmio.relaxed.sys.global?." TYPES, "9.7.9.11", bind_store},

    {"cvta." STATE_SPACE "|local|const|param|param::entry.u32|u64", "9.7.9.20", bind_cvta<false>},
    {"cvta.to." STATE_SPACE "|local|const|param|param::entry.u32|u64", "9.7.9.20", bind_cvta<true>},
    {"isspacep." STATE_SPACE "|local|const|param|param::entry", "9.7.9.19",
     [](Bind& b) {
       expect_operands(b, 2);
       destination(b, b.operand(0), Type::pred);
       b.source(1, Type::u64);
       b.instruction.option = static_cast<uint32_t>(space_of(b));
       b.run(is_space);
     }},
    {"mapa.shared::cluster?.u32|u64", "9.7.9.23", bind_mapa},
    {"getctarank.shared::cluster?.u32|u64", "9.7.9.24", bind_ctarank},

    {"prefetch.global|local?.L1|L2|L2::evict_last|L2::evict_normal", "9.7.9.15", bind_prefetch},
    {"prefetch.const|param?.tensormap", "9.7.9.15", bind_prefetch},
    {"prefetchu.L1", "9.7.9.15", bind_prefetch},
    {"applypriority.global?.L2::evict_normal", "9.7.9.16", [](Bind& b) { bind_touch_line(b, Use::read); }},
    {"discard.global?.L2", "9.7.9.17", [](Bind& b) { bind_touch_line(b, Use::write); }},
    {"createpolicy.fractional." PRIMARY "." SECONDARY "?.b64", "9.7.9.18", bind_policy},
    {"createpolicy.range.global?." PRIMARY "." SECONDARY "?.b64", "9.7.9.18", bind_policy},
    {"createpolicy.cvt.L2.b64", "9.7.9.18", bind_policy},
};
const Register registered(rows);

}  // namespace

void mark_compared_loads(const Bind& b, const Operand& address, const Operand& value) {
  const auto& body = b.code.source->body;
  const auto same_register = [](const Operand& x, const Operand& y) {
    return x.kind == Operand::Kind::reg && y.kind == Operand::Kind::reg && x.id == y.id;
  };
  // Triton loads one register as a vector of one.
  const auto loaded = [](const Operand& o) -> const Operand& {
    return o.kind == Operand::Kind::vector && o.parts.size() == 1 ? o.parts[0] : o;
  };
  for (uint32_t k = 0; k < b.instruction.index; ++k) {
    if (body[k].opcode.compare(0, 3, "ld.") != 0 || !same_register(loaded(body[k].operands[0]), value)) continue;
    const Operand& from = body[k].operands[1];
    if (from.offset != address.offset || !same_register(from.parts[0], address.parts[0])) continue;
    auto& t = *static_cast<Transfer*>(const_cast<void*>(b.code.instructions[k].data));
    if (t.use == Use::load && t.space == ptx::Space::global) t.use = Use::compared;
  }
}
}  // namespace gpuless
