#include "undefined.h"

#include <algorithm>

#include "offsets.h"
#include "rows/tcgen05.h"
#include "rows/wgmma.h"

namespace gpuless {

namespace {
Shadow& shadow_at(const Warp& w, uint64_t address) { return shared_cta(*w.cta, address)->shadow; }
}  // namespace

bool is_lanewise(std::string_view opcode) {
  static constexpr std::string_view heads[] = {
      "abs",  "add",   "and",  "bfe", "bfi", "bfind", "bmsk", "brev", "clz",   "cnot",  "copysign", "cos",  "cvt",
      "div",  "dp2a",  "dp4a", "ex2", "fma", "fns",   "lg2",  "lop3", "mad",   "mad24", "max",      "min",  "mov",
      "mul",  "mul24", "neg",  "not", "or",  "popc",  "prmt", "rcp",  "rem",   "rsqrt", "sad",      "selp", "set",
      "setp", "shf",   "shl",  "shr", "sin", "slct",  "sqrt", "sub",  "szext", "tanh",  "testp",    "xor",
  };
  const std::string_view head = opcode.substr(0, opcode.find('.'));
  if (std::find(std::begin(heads), std::end(heads), head) == std::end(heads)) return false;
  return opcode.find(".cc") == std::string_view::npos;  // the carry flag
}

const UndefinedRegisters::Entry* UndefinedRegisters::find(const Warp& w, Offset o) const {
  const size_t depth = w.frame->depth;
  if (o == kSink || depth >= entries_.size() || o / 64 >= entries_[depth].size()) return nullptr;
  return &entries_[depth][o / 64];
}

Mask UndefinedRegisters::lanes(const Warp& w, Offset o) const {
  const Entry* e = find(w, o);
  return e ? e->lanes : 0;
}

void UndefinedRegisters::set(const Warp& w, Offset o, Mask mask, Mask undefined, uint32_t origin) {
  if (o == kSink) return;
  const size_t depth = w.frame->depth;
  undefined &= mask;
  if (!undefined && !(lanes(w, o) & mask)) return;
  if (depth >= entries_.size()) entries_.resize(depth + 1);
  if (o / 64 >= entries_[depth].size()) entries_[depth].resize(o / 64 + 1);
  Entry& e = entries_[depth][o / 64];
  count_ -= e.lanes != 0;
  e.lanes = (e.lanes & ~mask) | undefined;
  count_ += e.lanes != 0;
  if (undefined) e.origin = origin;
}

uint32_t UndefinedRegisters::origin_of(const Warp& w, Offset o) const { return find(w, o)->origin; }

void UndefinedRegisters::depends(const Warp& w, const Instruction& i, Offset o) const {
  Finding f = origins_[origin_of(w, o)].second;
  f.other_ptx_line = static_cast<int>(w.line());
  Cluster& cluster = *w.cta->cluster;
  if (cluster.findings.again({w.cta->launch->code->name, f.kind, f.ptx_line, f.other_ptx_line, false})) return;
  w.cta->place_other(f, w.line());
  f.message += ", and " + w.frame->code->statements[i.index]->opcode + " of " +
               source_place(*w.cta->launch->module, w.line()) + " depends on it";
  cluster.report(std::move(f));
}

void UndefinedRegisters::before(const Warp& w, const Instruction& i, Mask mask) {
  const int first = i.destinations, last = first + i.sources;
  const auto must_be_defined = [&](Offset o) {
    if (lanes(w, o) & mask) depends(w, i, o);
  };
  Mask undefined = 0;
  uint32_t origin = 0;
  switch (i.undefined) {
    case Undefined::product:
      return;
    case Undefined::store:
      return must_be_defined(i.operand[0]);
    case Undefined::finding:
      for (int n = first; n < last; ++n) must_be_defined(i.operand[n]);
      break;
    case Undefined::lanewise:
      for (int n = first; n < last; ++n) {
        if (!(lanes(w, i.operand[n]) & mask)) continue;
        if (!undefined) origin = origin_of(w, i.operand[n]);
        undefined |= lanes(w, i.operand[n]);
      }
      break;
  }
  for (int n = 0; n < first; ++n) set(w, i.operand[n], mask, undefined, origin);
}

uint32_t UndefinedRegisters::origin(const Warp& w, const uint64_t a[kLanes], int bytes, int lane) {
  const uint32_t line = w.line();
  for (size_t k = 0; k < origins_.size(); ++k)
    if (origins_[k].first == line) return static_cast<uint32_t>(k);
  Finding f = shadow_at(w, a[lane]).unwritten(w.actor(), static_cast<uint32_t>(shared_offset_of(a[lane])), bytes);
  f.lane = lane;
  w.cta->place(f, w);
  origins_.emplace_back(line, std::move(f));
  return static_cast<uint32_t>(origins_.size() - 1);
}

void note_unwritten(Warp& w, const uint64_t a[kLanes], int bytes, Mask mask) {
  Mask lanes = 0;
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    const auto begin = static_cast<uint32_t>(shared_offset_of(a[l]));
    if (!shadow_at(w, a[l]).written(begin, bytes)) lanes |= Mask{1} << l;
  }
  if (!lanes) return;
  if (!w.undefined) w.undefined = std::make_shared<UndefinedRegisters>();
  w.undefined->loaded = w.undefined->origin(w, a, bytes, __builtin_ctz(lanes));
  w.unwritten |= lanes;
}

void set_undefined(Warp& w, Offset o, Mask mask, Mask undefined) {
  w.undefined->set(w, o, mask, undefined, w.undefined->loaded);
  update_watched(w);
}

void store_undefined(Warp& w, const Instruction& i, int n, Mask mask, uint8_t* const host[kLanes], int offset,
                     int bytes) {
  for (Mask rest = w.undefined->lanes(w, i.operand[n]) & mask; rest; rest &= rest - 1) {
    const uint8_t* const target = host[__builtin_ctz(rest)] + offset;
    const auto& ctas = w.cta->cluster->ctas;
    const auto holds = [target](const auto& c) {
      return static_cast<size_t>(target - c->shared.data()) < c->shared.size();
    };
    const auto cta = std::find_if(ctas.begin(), ctas.end(), holds);
    if (cta == ctas.end()) return w.undefined->depends(w, i, i.operand[n]);
    (*cta)->shadow.store_undefined(static_cast<uint32_t>(target - (*cta)->shared.data()), bytes);
  }
}

void update_watched(Warp& w) {
  w.watched = (w.wgmma && !w.wgmma->flight.empty()) || (w.tcgen05 && !w.tcgen05->loads.empty()) ||
              (w.undefined && !w.undefined->empty()) || (w.offsets && !w.offsets->empty());
}

Step run_watched(Warp& w, const Instruction& i, Mask here, Mask mask) {
  if (w.undefined && !w.undefined->empty()) {
    if (w.undefined->lanes(w, i.guard) & here) w.undefined->depends(w, i, i.guard);
    w.undefined->before(w, i, mask);
  }
  if (!mask) return Step::next;
  if (w.offsets) w.offsets->before(w, i, mask);
  if (w.tcgen05 && !w.tcgen05->loads.empty()) w.tcgen05->loads.before(w, i);
  const bool in_flight = w.wgmma && !w.wgmma->flight.empty();
  const Step step = in_flight ? run_in_flight(w, i, mask) : i.run(w, i, mask);
  update_watched(w);
  return step;
}

}  // namespace gpuless
