// Registers in flight, and what other instructions may do with them.
#include <algorithm>
#include <cstring>

#include "rows/async.h"
#include "rows/mov.h"
#include "rows/wgmma.h"

namespace gpuless {

Accumulator::Accumulator(const WgmmaShape& s) : shape(&s), storage_(new uint32_t[s.d_registers * kLanes + 16]) {
  const auto raw = reinterpret_cast<uintptr_t>(storage_.get());
  values = reinterpret_cast<uint32_t*>((raw + 63) / 64 * 64);
}

RegistersInFlight::Entry& RegistersInFlight::entry(Offset o) {
  if (o / 64 >= where_.size()) where_.resize(o / 64 + 1);
  uint16_t& n = where_[o / 64];
  if (!n) {
    entries_.push_back({o, nullptr, 0, false, 0, nullptr});
    n = static_cast<uint16_t>(entries_.size());
  }
  return entries_[n - 1];
}

void RegistersInFlight::reads(Offset o, uint64_t operation, const WgmmaShape* reader) {
  Entry& e = entry(o);
  e.last = operation;
  e.reader = reader;
}

std::shared_ptr<Accumulator> RegistersInFlight::make(const WgmmaShape& shape, const Offset* registers) {
  values_.push_back(std::make_shared<Accumulator>(shape));
  values_.back()->registers = registers;
  return values_.back();
}

std::shared_ptr<Accumulator> RegistersInFlight::share(const Accumulator* value) const {
  for (const auto& v : values_)
    if (v.get() == value) return v;
  return nullptr;
}

void RegistersInFlight::release(Accumulator* value) {
  value->moved = true;
  if (--value->references) return;
  const auto is_value = [value](const auto& v) { return v.get() == value; };
  values_.erase(std::find_if(values_.begin(), values_.end(), is_value));  // an operation may still have it
}

void RegistersInFlight::stands_for(Offset o, Accumulator* value, int index, bool alias) {
  ++value->references;
  value->moved |= alias;
  Entry& e = entry(o);
  if (e.value) release(e.value);
  e.value = value;
  e.index = index;
  e.alias = alias;
}

void RegistersInFlight::drop(Offset o) {
  uint16_t& n = where_[o / 64];
  Entry& e = entries_[n - 1];
  if (e.value) release(e.value);
  if (&e != &entries_.back()) {
    e = entries_.back();
    where_[e.offset / 64] = n;
  }
  n = 0;
  entries_.pop_back();
}

void RegistersInFlight::land(uint64_t operation, uint8_t* registers) {
  for (size_t k = entries_.size(); k-- > 0;) {
    const Entry& e = entries_[k];
    if ((e.value ? e.value->last : e.last) > operation) continue;
    if (e.value) std::memcpy(registers + e.offset, e.value->values + e.index * kLanes, kLanes * 4);
    drop(e.offset);
  }
}

std::string place_of(const Warp& w, const WgmmaShape& shape) {
  return shape.statement->opcode + " of " + source_place(*w.cta->launch->module, shape.statement->line);
}

namespace {

void touched(const Warp& w, const RegistersInFlight::Entry& e, bool writes) {
  const WgmmaShape& shape = e.value ? *e.value->shape : *e.reader;
  Cluster& cluster = *w.cta->cluster;
  if (cluster.again(Kind::in_flight, shape.statement->line)) return;
  Finding f;
  f.kind = Kind::in_flight;
  f.message = std::string(writes ? "writes" : "reads") + (e.value ? " an accumulator of " : " a register of A of ") +
              place_of(w, shape) + ", which is in flight until wgmma.wait_group has waited for it";
  if (!writes) {
    f.breaks = Breaks::isa;
    f.message +=
        e.value ? "; ptxas waits for it here (its C7517), which costs time" : "; the registers keep what they hold";
  }
  w.cta->place_other(f, shape.statement->line);
  cluster.report(std::move(f));
}

}  // namespace

Step run_in_flight(Warp& w, const Instruction& i, Mask mask) {
  Wgmma& state = *w.wgmma;
  if (w.frame != state.frame) return i.run(w, i, mask);
  if (i.asynchronous) return i.run(w, i, mask);  // has rules of its own
  RegistersInFlight& flight = state.flight;
  const bool checks = checked(*w.cta);
  const RegistersInFlight::Entry* moved = nullptr;
  Strand& strand = w.strand();
  for (int n = i.destinations; n < i.destinations + i.sources; ++n) {
    const auto* e = flight.find(i.operand[n]);
    if (!e) continue;
    if (is_move(i) && (mask == kAllLanes || !e->value)) {
      moved = e->value ? e : nullptr;  // A keeps its value: nothing to defer
      continue;
    }
    if (checks && !strand.ticket) touched(w, *e, false);
    if (!e->value) continue;
    const uint64_t last = e->value->last;
    strand.ticket = 1;  // it has been told
    if (!complete_until(w, last)) return Step::blocked;
    strand.ticket = 0;
    flight.land(last, w.frame->registers);
  }
  if (moved) {  // a copy of what is not there yet: it is in flight as well, and no error until somebody uses it
    if (i.operand[0] == kSink) return Step::next;
    const auto* to = flight.find(i.operand[0]);
    if (to && !to->value && checks) touched(w, *to, true);
    if (to && to->value == moved->value && to->index == moved->index) return Step::next;
    flight.stands_for(i.operand[0], moved->value, moved->index, true);
    return Step::next;
  }
  for (int n = 0; n < i.destinations; ++n) {
    const auto* e = i.operand[n] == kSink ? nullptr : flight.find(i.operand[n]);
    if (!e) continue;
    if (e->value && e->alias && mask == kAllLanes) {
      flight.drop(i.operand[n]);  // the moved value is not wanted any more
    } else if (checks) {
      touched(w, *e, true);
    }
  }
  return i.run(w, i, mask);
}

}  // namespace gpuless
