#include "explore/trace.h"

#include <algorithm>

#include "machine.h"

namespace gpuless {
namespace {

uint64_t hash_of(const Thread& thread) {
  uint64_t name = 0;
  for (const uint32_t part : thread) name = mix(name + part + 1);
  return name;
}

}  // namespace

uint32_t Trace::number_of(const Thread& thread) {
  const auto [entry, fresh] = numbers_.try_emplace(thread, static_cast<uint32_t>(threads.size()));
  if (fresh) {
    threads.push_back(thread);
    last_.push_back(kNone);
  }
  return entry->second;
}

bool Trace::after(uint32_t early, const Clock& late) const {
  const Event& e = events[early];
  return e.chain >= 0 && static_cast<size_t>(e.chain) < late.size() && late[e.chain] >= e.place;
}

void Trace::begin(uint32_t thread, uint32_t issued_by) {
  if (std::exchange(open_, true)) return;
  events.emplace_back();
  touched_.emplace_back();
  events.back().thread = thread;
  keys_ = 0;
  const uint32_t before = last_[thread] == kNone ? issued_by : last_[thread];
  if (before != kNone) follow(before);
}

void Trace::follow(uint32_t early) {
  if (early == self()) return;
  Event& late = events.back();
  if (std::find(late.before.begin(), late.before.end(), early) != late.before.end()) return;
  late.before.push_back(early);
  const Clock& clock = events[early].clock;
  if (late.clock.size() < clock.size()) late.clock.resize(clock.size());
  for (size_t k = 0; k < clock.size(); ++k) late.clock[k] = std::max(late.clock[k], clock[k]);
}

void Trace::reverse(uint32_t early, const Clock& before) {
  if (early != self() && !after(early, before)) reversals.insert({early, events.back().thread});
}

void Trace::follow_phases(const Object& object, uint64_t number, Touch touch) {
  const Phase *last = nullptr, *second = nullptr;
  for (auto p = object.phases.rbegin(); p != object.phases.rend() && p->number + 2 >= number; ++p) {
    if (p->number + 1 == number) last = &*p;
    if (p->number + 2 == number) second = &*p;
  }
  const Clock before = events.back().clock;
  // A parity cannot tell a phase from the one two before it: the wait may be over before the phase has begun.
  if (touch == Touch::wait && second) {
    const auto& all = second->arrivals;
    const auto later = std::find_if(all.begin(), all.end(), [&](uint32_t a) { return !after(a, before); });
    if (later != all.end()) reverse(*later, before);
  }
  if (!last) return;
  const bool reversible = touch == Touch::arrive || touch == Touch::expect || touch == Touch::poll;
  for (const auto* some : {&last->arrivals, &last->expects, &last->waits}) {
    for (const uint32_t e : *some) {
      if (reversible && some != &last->waits) reverse(e, before);
      follow(e);
    }
  }
}

void Trace::phase(uint32_t thread, uint32_t issued_by, uint64_t key, uint64_t number, Touch touch) {
  begin(thread, issued_by);
  Object& object = objects_[key];
  touched_.back().push_back(key);
  keys_ += mix(key + static_cast<uint64_t>(touch));
  follow_phases(object, number, touch);
  if (object.phases.empty() || object.phases.back().number != number) object.phases.push_back({number, {}, {}, {}});
  if (touch == Touch::pass) return;
  Phase& here = object.phases.back();
  // Bytes that are expected too late find the phase over.
  if (touch == Touch::expect || touch == Touch::arrive) {
    const Clock before = events.back().clock;
    for (const uint32_t e : touch == Touch::expect ? here.arrivals : here.expects) {
      reverse(e, before);
      follow(e);
    }
  }
  auto& some = touch == Touch::arrive ? here.arrivals : touch == Touch::expect ? here.expects : here.waits;
  if (some.empty() || some.back() != self()) some.push_back(self());
}

// Whoever has waited for the phase before, and does not come before an arrival of this one, might come too late.
void Trace::completed(uint64_t key, uint64_t number) {
  const Object& object = objects_[key];
  if (object.phases.empty() || object.phases.back().number != number) return;
  const Phase& here = object.phases.back();
  for (const uint32_t wait : here.waits) {
    const bool before = std::any_of(here.arrivals.begin(), here.arrivals.end(),
                                    [&](uint32_t a) { return a == wait || after(wait, events[a].clock); });
    if (!before) reversals.insert({wait, events[wait].thread});
  }
}

void Trace::word(uint32_t thread, uint32_t issued_by, uint64_t key, uint64_t commutes) {
  begin(thread, issued_by);
  auto& groups = objects_[key].groups;
  touched_.back().push_back(key);
  keys_ += mix(key + commutes);
  if (groups.empty() || !commutes || groups.back().commutes != commutes) groups.push_back({commutes, {}});
  if (groups.size() > 1) {
    const Clock before = events.back().clock;
    for (const uint32_t e : groups[groups.size() - 2].events) {
      reverse(e, before);
      follow(e);
    }
  }
  auto& here = groups.back().events;
  if (here.empty() || here.back() != self()) here.push_back(self());
}

void Trace::close() {
  if (!std::exchange(open_, false)) return;
  Event& e = events.back();
  if (e.thread < warps_) {
    e.chain = static_cast<int>(e.thread);
  } else {  // the first chain of such whose end it comes after
    size_t c = warps_;
    while (c < chains_.size() && !after(chains_[c], e.clock)) ++c;
    if (c == chains_.size()) chains_.push_back(kNone);
    e.chain = static_cast<int>(c);
  }
  uint32_t& end = chains_[e.chain];
  e.place = end == kNone ? 1 : events[end].place + 1;
  end = self();
  if (e.clock.size() <= static_cast<size_t>(e.chain)) e.clock.resize(e.chain + 1);
  e.clock[e.chain] = e.place;
  uint64_t sum = keys_;
  for (const uint32_t b : e.before) sum += mix(events[b].hash + 1);
  e.hash = mix(sum ^ hash_of(threads[e.thread]));
  last_[e.thread] = self();
}

void Trace::drop(size_t from) {
  while (events.size() > from) {
    const uint32_t self = this->self();
    const Event& e = events.back();
    for (const uint64_t key : touched_.back()) {
      Object& object = objects_[key];
      for (Phase& p : object.phases)
        for (auto* some : {&p.arrivals, &p.expects, &p.waits}) std::erase(*some, self);
      for (Group& g : object.groups) std::erase(g.events, self);
      std::erase_if(object.groups, [](const Group& g) { return g.events.empty(); });
    }
    std::erase_if(reversals, [&](const Reversal& r) { return r.early == self; });
    uint32_t before = kNone;
    for (const uint32_t b : e.before)
      if (events[b].thread == e.thread) before = b;
    last_[e.thread] = chains_[e.chain] = before;
    events.pop_back();
    touched_.pop_back();
  }
}

std::vector<uint64_t> Trace::touched_since(size_t event) const {
  std::vector<uint64_t> all;
  for (; event < events.size(); ++event) all.insert(all.end(), touched_[event].begin(), touched_[event].end());
  return all;
}

uint64_t Trace::hash() const {
  uint64_t sum = 0;
  for (const Event& e : events) sum += mix(e.hash);
  return sum;
}

uint64_t Trace::hash(const Reversal& r) const {
  uint64_t sum = mix(hash_of(threads[r.thread]) + 2);
  for (const Event& e : events)
    if (!after(r.early, e.clock)) sum += mix(e.hash);
  return sum;
}

std::vector<uint32_t> Trace::beginning(const Reversal& r) const {
  std::vector<uint32_t> all;
  for (const Event& e : events)
    if (!after(r.early, e.clock)) all.push_back(e.thread);
  all.push_back(r.thread);
  return all;
}

}  // namespace gpuless
