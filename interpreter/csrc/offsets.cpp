#include "offsets.h"

#include <string_view>

#include "blocks.h"
#include "lanes.h"
#include "undefined.h"

namespace gpuless {
namespace {

bool fits(int64_t n) { return n == static_cast<int32_t>(n); }
uint64_t magnitude(int64_t n) { return n < 0 ? -static_cast<uint64_t>(n) : static_cast<uint64_t>(n); }

// Of numbers that need not be 32-bit ones any more; the largest stands for what does not fit 64.
int64_t product(int64_t a, int64_t b) {
  int64_t p;
  return __builtin_mul_overflow(a, b, &p) ? INT64_MAX : p;
}
int64_t sum(int64_t a, int64_t b) {
  int64_t s;
  return __builtin_add_overflow(a, b, &s) ? INT64_MAX : s;
}
int64_t shifted(int64_t a, uint32_t by) { return by < 32 ? product(a, int64_t{1} << by) : 0; }

// ---- What the decoder finds ----

// What an instruction does to an offset, by its opcode.
OffsetRole role_of(std::string_view opcode) {
  std::string_view parts[6];
  int n = 0;
  for (std::string_view rest = opcode; n < 6;) {
    const size_t end = rest.find('.');
    parts[n++] = rest.substr(0, end);
    if (end == std::string_view::npos) break;
    rest.remove_prefix(end + 1);
  }
  const std::string_view head = parts[0], second = parts[1], type = parts[n - 1];
  const auto bits = [](std::string_view t, std::string_view width) { return t.size() == 3 && t.substr(1) == width; };
  const bool narrow = bits(type, "32") && type[0] != 'f', wide = bits(type, "64") && type[0] != 'f';
  if (head == "cvt" && n == 3 && narrow && second[0] != 'f') {
    if (bits(second, "32")) return OffsetRole::copy;
    if (bits(second, "64")) return type == "s32" ? OffsetRole::widen_signed : OffsetRole::widen_unsigned;
    return OffsetRole::none;
  }
  if ((head == "mul" || head == "mad") && second == "wide" && narrow) {
    return type == "s32" ? OffsetRole::widen_signed : OffsetRole::widen_unsigned;
  }
  if (!narrow && !wide) return OffsetRole::none;
  if (head == "cvta") return OffsetRole::follow;
  const bool low = second == "lo" && n == 3;
  if (head == "mul" && low) return narrow ? OffsetRole::multiply : OffsetRole::follow;
  if (head == "mad" && low) return narrow ? OffsetRole::multiply_add : OffsetRole::follow;
  if (n != 2) return OffsetRole::none;
  if (head == "mov") return OffsetRole::copy;
  if (head == "selp") return OffsetRole::select;
  if (head == "add") return narrow ? OffsetRole::add : OffsetRole::follow;
  if (head == "sub") return narrow ? OffsetRole::subtract : OffsetRole::follow;
  if (head == "shl") return narrow ? OffsetRole::shift : OffsetRole::follow;
  if (head == "or") return narrow ? OffsetRole::join : OffsetRole::follow;
  return OffsetRole::none;
}

bool computes(OffsetRole r) {
  return r == OffsetRole::add || r == OffsetRole::subtract || r == OffsetRole::shift || r == OffsetRole::multiply ||
         r == OffsetRole::multiply_add;
}

template <OffsetRole R>
Step checked(Warp& w, const Instruction& i, Mask mask) {
  const auto *a = w.operand<int32_t>(i, 1), *b = w.operand<int32_t>(i, 2);
  const auto* c = R == OffsetRole::multiply_add ? w.operand<int32_t>(i, 3) : nullptr;
  alignas(32) int64_t exact[kLanes];
  uint64_t high = 0;
  for (int l = 0; l < kLanes; ++l) {
    const int64_t x = a[l], y = b[l];
    if constexpr (R == OffsetRole::add) exact[l] = x + y;
    if constexpr (R == OffsetRole::subtract) exact[l] = x - y;
    if constexpr (R == OffsetRole::multiply) exact[l] = x * y;
    if constexpr (R == OffsetRole::multiply_add) exact[l] = x * y + c[l];
    if constexpr (R == OffsetRole::shift)
      exact[l] = static_cast<uint32_t>(b[l]) < 32 ? static_cast<int64_t>(static_cast<uint64_t>(x) << y) : 0;
    high |= static_cast<uint64_t>(exact[l] - INT32_MIN) >> 32;
  }
  if (__builtin_expect(high || w.cta->launch->growth > 1, 0)) {
    if (!w.offsets) w.offsets = std::make_shared<WrappedOffsets>();
    w.offsets->computed(w, i, mask, exact);
    update_watched(w);
  }
  auto* d = w.operand<int32_t>(i, 0);
  each_lane(mask, [&](int l) { d[l] = static_cast<int32_t>(exact[l]); });
  return Step::next;
}

Handler checked_handler(OffsetRole r) {
  switch (r) {
    case OffsetRole::add:
      return &checked<OffsetRole::add>;
    case OffsetRole::subtract:
      return &checked<OffsetRole::subtract>;
    case OffsetRole::shift:
      return &checked<OffsetRole::shift>;
    case OffsetRole::multiply:
      return &checked<OffsetRole::multiply>;
    default:
      return &checked<OffsetRole::multiply_add>;
  }
}

// Backwards from addresses, whatever the order of the instructions: registers of PTX rarely have two definitions.
class OffsetUses {
 public:
  explicit OffsetUses(Code& code) : code_(code), registers_(code), definitions_(code.offset_of.size()) {
    for (const Instruction& i : code.instructions)
      for (int k = 0; k < i.destinations; ++k)
        if (const int id = registers_.id(i.operand[k]); id >= 0) definitions_[id].push_back(i.index);
    uses_.resize(code.instructions.size());
    reached_.resize(definitions_.size());
  }

  void find() {
    for (const Instruction& i : code_.instructions) add_address(i);
    while (!open_.empty()) {
      const int id = open_.back();
      open_.pop_back();
      for (const uint32_t k : definitions_[id]) define(code_.instructions[k]);
    }
    if (!computes_) return;
    code_.offset_uses = std::move(uses_);
    for (Instruction& i : code_.instructions)
      if (const OffsetRole r = code_.offset_uses[i.index].role; computes(r)) i.run = checked_handler(r);
  }

 private:
  int size_of(Offset o) const {
    const int id = registers_.id(o);
    if (id < 0) return 0;
    const Type t = code_.source->registers[id];
    return t == Type::pred ? 0 : ptx::size_of(t);
  }
  void reach(Offset o) {
    const int id = registers_.id(o);
    if (id < 0 || reached_[id]) return;
    reached_[id] = 1;
    open_.push_back(id);
  }
  void add_address(const Instruction& i) {
    for (const Operand& o : code_.statements[i.index]->operands) {
      if (o.kind != Operand::Kind::address || o.parts[0].kind != Operand::Kind::reg) continue;
      const Offset base = code_.offset_of[o.parts[0].id];
      for (int k = i.destinations; k < i.destinations + i.sources; ++k) {
        if (i.operand[k] != base || size_of(base) != 8) continue;
        uses_[i.index] = {OffsetRole::address, static_cast<uint8_t>(k), 0};
        reach(base);
        return;
      }
    }
  }
  void define(const Instruction& i) {
    OffsetUse& use = uses_[i.index];
    if (use.role != OffsetRole::none || i.destinations != 1) return;
    use.role = role_of(code_.statements[i.index]->opcode);
    if (use.role == OffsetRole::none) return;
    computes_ |= computes(use.role);
    for (int k = 0; k < i.sources; ++k) {
      const Offset o = i.operand[1 + k];
      if (size_of(o) >= 4) reach(o);
      if (registers_.id(o) < 0) use.constants |= static_cast<uint8_t>(1 << k);
    }
  }
  Code& code_;
  const Registers registers_;
  std::vector<std::vector<uint32_t>> definitions_;  // by register
  std::vector<OffsetUse> uses_;
  std::vector<char> reached_;
  std::vector<int> open_;
  bool computes_ = false;
};

}  // namespace

void find_offset_uses(Code& code) { OffsetUses(code).find(); }

// ---- Values ----

void WrappedOffsets::Entry::add(int lane, Value v, const Entry& origin) {
  if (!lanes) {
    line = origin.line;
    zero_extended = origin.zero_extended;
  }
  lanes |= Mask{1} << lane;
  values[lane] = v;
}

const WrappedOffsets::Entry* WrappedOffsets::find(const Warp& w, Offset o) const {
  const auto entry = entries_.find(static_cast<uint64_t>(w.frame->depth) << 32 | o);
  return entry == entries_.end() ? nullptr : &entry->second;
}

void WrappedOffsets::set(const Warp& w, Offset o, Mask mask, const Entry& value) {
  if (o == kSink) return;
  const uint64_t key = static_cast<uint64_t>(w.frame->depth) << 32 | o;
  const auto entry = entries_.find(key);
  if (entry == entries_.end()) {
    if (value.lanes) entries_.emplace(key, value);
    return;
  }
  Entry& e = entry->second;
  e.lanes &= ~mask;
  if (!e.lanes) e = Entry();
  for (Mask rest = value.lanes; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    e.add(l, value.values[l], value);
  }
  if (!e.lanes) entries_.erase(entry);
}

WrappedOffsets::Value WrappedOffsets::narrow(const Warp& w, const Instruction& i, int source, int lane) const {
  const Entry* const e = find(w, i.operand[source]);
  if (e && (e->lanes >> lane & 1)) return e->values[lane];
  const int64_t n = w.operand<int32_t>(i, source)[lane];
  const bool constant = w.frame->code->offset_uses[i.index].constants >> (source - 1) & 1;  // -1 is not 2^32 - 1
  return {n, constant ? n : static_cast<uint32_t>(n)};
}

void WrappedOffsets::follow_narrow(const Warp& w, const Instruction& i, int lane, Entry& to) const {
  const OffsetRole role = w.frame->code->offset_uses[i.index].role;
  const Value a = narrow(w, i, 1, lane), b = narrow(w, i, 2, lane);
  const auto by = w.operand<uint32_t>(i, 2)[lane];
  const auto combine = [&](int64_t x, int64_t y, int64_t z) {
    switch (role) {
      case OffsetRole::subtract:
        return sum(x, -y);
      case OffsetRole::shift:
        return shifted(x, by);
      case OffsetRole::multiply:
        return product(x, y);
      case OffsetRole::multiply_add:
        return sum(product(x, y), z);
      default:  // what is joined has no bit in common
        return sum(x, y);
    }
  };
  if (role == OffsetRole::join && (w.operand<uint32_t>(i, 1)[lane] & by)) return;
  const Value c = role == OffsetRole::multiply_add ? narrow(w, i, 3, lane) : Value{0, 0};
  const Value v{combine(a.exact, b.exact, c.exact), combine(a.otherwise, b.otherwise, c.otherwise)};
  if (fits(v.exact) && w.cta->launch->growth <= 1) return;  // what wrapped has come back
  Entry origin;
  origin.line = w.line();
  for (int k = 1; k <= i.sources && !fits(v.exact); ++k)
    if (const Entry* const e = find(w, i.operand[k]); e && (e->lanes >> lane & 1) && !fits(e->values[lane].exact))
      origin.line = e->line;
  to.add(lane, v, origin);
}

void WrappedOffsets::follow_widening(const Warp& w, const Instruction& i, int sources, int lane, Entry& to) const {
  const bool zero = w.frame->code->offset_uses[i.index].role == OffsetRole::widen_unsigned;
  for (int k = 1; k <= sources; ++k) {
    const Entry* const e = find(w, i.operand[k]);
    if (!e || !(e->lanes >> lane & 1)) continue;
    const auto bits = w.operand<uint32_t>(i, k)[lane];
    const int64_t widened = zero ? bits : static_cast<int64_t>(static_cast<int32_t>(bits));
    const Value v = e->values[lane];
    const bool right = v.exact == widened || v.otherwise == widened;
    if (right && w.cta->launch->growth <= 1) continue;
    Entry origin = {0, e->line, zero, {}};
    to.add(lane, {right ? widened : zero && v.exact < 0 ? v.otherwise : v.exact, widened}, origin);
    if (!right) return;
  }
}

// Of 64-bit sources the one that is wrong, or that is largest.
void WrappedOffsets::follow_wide(const Warp& w, const Instruction& i, int first, int lane, Entry& to) const {
  const auto wrong = [](const Value& v) { return v.exact != v.otherwise; };
  for (int k = first; k <= i.sources; ++k) {
    const Entry* const e = find(w, i.operand[k]);
    if (!e || !(e->lanes >> lane & 1)) continue;
    const Value v = e->values[lane], before = to.values[lane];
    if (to.lanes >> lane & 1) {
      if (wrong(before) || (!wrong(v) && magnitude(v.exact) <= magnitude(before.exact))) continue;
    }
    to.add(lane, v, *e);
  }
}

WrappedOffsets::Entry WrappedOffsets::follow(const Warp& w, const Instruction& i, Mask mask) const {
  const OffsetRole role = w.frame->code->offset_uses[i.index].role;
  Entry to;
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    switch (role) {
      case OffsetRole::copy:
      case OffsetRole::select: {
        const int source = role == OffsetRole::copy || (w.predicate(i.operand[3]) >> l & 1) ? 1 : 2;
        if (const Entry* const e = find(w, i.operand[source]); e && (e->lanes >> l & 1)) to.add(l, e->values[l], *e);
        break;
      }
      case OffsetRole::widen_signed:
      case OffsetRole::widen_unsigned:
        follow_widening(w, i, std::min<int>(i.sources, 2), l, to);
        follow_wide(w, i, 3, l, to);  // the addend of mad.wide
        break;
      case OffsetRole::follow:
        follow_wide(w, i, 1, l, to);
        break;
      default:
        follow_narrow(w, i, l, to);
    }
  }
  return to;
}

void WrappedOffsets::before(Warp& w, const Instruction& i, Mask mask) {
  followed_ = 0;
  if (entries_.empty()) return;
  const Code& code = *w.frame->code;
  const OffsetUse use = code.offset_uses.empty() ? OffsetUse() : code.offset_uses[i.index];
  Entry to;
  if (use.role == OffsetRole::address) {
    check(w, i.operand[use.operand], mask);
  } else if (use.role != OffsetRole::none) {
    for (int k = 1; k <= i.sources; ++k)
      if (const Entry* const e = find(w, i.operand[k])) followed_ |= e->lanes & mask;
    to = follow(w, i, followed_);
  }
  for (int k = 0; k < i.destinations; ++k) set(w, i.operand[k], mask, to);
}

void WrappedOffsets::computed(const Warp& w, const Instruction& i, Mask mask, const int64_t exact[kLanes]) {
  if (w.watched) mask &= ~followed_;
  Entry to;
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    if (fits(exact[l]) && w.cta->launch->growth <= 1) continue;
    follow_narrow(w, i, l, to);
  }
  set(w, i.operand[0], mask, to);
}

// ---- Findings ----

void WrappedOffsets::check(Warp& w, Offset address, Mask mask) const {
  const Entry* const e = find(w, address);
  if (!e) return;
  const double growth = w.cta->launch->growth, most = e->zero_extended ? 0x1p32 : 0x1p31;
  for (Mask rest = e->lanes & mask; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    const Value& v = e->values[l];
    if (v.exact == v.otherwise && static_cast<double>(magnitude(v.exact)) * growth < most) continue;
    return report(w, *e, l, w.at<uint64_t>(address)[l]);
  }
}

void WrappedOffsets::report(Warp& w, const Entry& e, int lane, uint64_t address) const {
  Cluster& cluster = *w.cta->cluster;
  if (cluster.again(Kind::overflow, e.line)) return;
  const Value& v = e.values[lane];
  const Module& module = *w.cta->launch->module;
  const std::string where = "the 32 bits of " + source_place(module, e.line);
  Finding f = finding_at(Kind::overflow, "", address);
  f.message = v.exact != v.otherwise
                  ? "the offset of this address is " + std::to_string(v.exact) + " and does not fit " + where +
                        ", which make " + std::to_string(v.otherwise) + " of it"
                  : "the offset of this address is " + std::to_string(v.exact) + ", and in tensors that are " +
                        std::to_string(static_cast<int64_t>(w.cta->launch->growth)) + " times larger it does not fit " +
                        where;
  f.message += ": widen an operand before it is computed";
  f.lane = lane;
  w.cta->place_other(f, e.line);
  cluster.report(std::move(f));
}

}  // namespace gpuless
