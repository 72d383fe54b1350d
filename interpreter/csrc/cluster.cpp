// The scheduler: one seeded order of the warps of a cluster's CTAs, and of what completes between them.
#include <algorithm>

#include "machine.h"
#include "timeline_trace.h"

namespace gpuless {
namespace {

// A warp that runs ahead still stops after so many, as it might spin on another cluster.
constexpr uint64_t kLongSlice = 4096;
// Clocks start again from here on.
constexpr Clock kHighestBase = 0x80000000;
constexpr int kSpareAgents = 120;  // beyond what a cluster begins with

}  // namespace

uint32_t Cluster::random() { return next_random(random_state_); }

uint64_t Cluster::steps() const {
  uint64_t n = 0;
  for (const Warp* w : warps) n += w->steps;
  return n;
}

void Cluster::begin(Launch& l, uint64_t n, Sheet* sheet) {
  launch = &l;
  number = n;
  successor = n + 1;
  random_state_ = mix(l.options.seed * 0x9e3779b97f4a7c15u + mix(l.stream + 1) + mix(number * 2 + 1));
  completion_ = static_cast<Completion>(random() % 3);
  order_ = static_cast<Order>(random() % 3);
  pending.clear();
  idle_at = 0;
  sync_points.reset();
  fenced = VectorClock();
  releases = nullptr;
  barrier.reset();
  findings.clear();
  warps.clear();
  const uint64_t size = l.cluster_size();
  while (ctas.size() < size) ctas.push_back(std::make_unique<Cta>());
  for (uint64_t rank = 0; rank < size; ++rank) {
    Cta& cta = *ctas[rank];
    unsigned index[3];
    l.index_of(number * size + rank, index);
    cta.begin(*this, static_cast<int>(rank), index);
    cta.sheet = sheet;
    if (l.trace) l.trace->begin(cta);
    cta.serial = l.first_serial + static_cast<uint32_t>(number * size + rank);
    for (Warp& w : cta.warps) warps.push_back(&w);
  }
  live_warps = static_cast<int>(warps.size());
  favourite_ = static_cast<int>(random() % warps.size());
  Knowledge start;
  // The rows of a CTA's reads are compared eight columns at a time, past its last warp.
  first_series = round_up(ctas[size - 1]->first_agent + round_up(static_cast<int>(ctas[0]->warps.size())));
  series_clocks.clear();
  // Knowledge of many agents costs time: those of a former launch are not kept for ever.
  if (base >= kHighestBase || agents_ > first_series + kSpareAgents) {
    base = 1;
    agents_ = 0;
    for (auto& cta : ctas) cta->forget();
  }
  agents_ = std::max(agents_, first_series);
  complement(start);
  start.seen.clocks[kAcquireAgent] = 0;
  start.seen.clocks[kGridAgent] = l.programmatic ? 0 : 1;
  for (Warp* w : warps) {
    w->knowledge = start;
    w->knowledge.seen.clocks[w->agent] = base;
    w->lane_order.begin(base - 1);
    w->random_state = mix(random_state_ + w->agent - kFirstWarp);
    w->strands.push_back({w->enter(*l.code, nullptr, nullptr, w->exists), 0, w->exists});
    w->frame = w->strands[0].frame;
  }
}

int Cluster::new_series() {
  const int agent = first_series + static_cast<int>(series_clocks.size());
  // More than there is room for share agents: to learn of one is then to learn of the other.
  if (agent == kMaxAgents) return first_series + static_cast<int>(random() % series_clocks.size());
  series_clocks.push_back(base);
  if (agent >= agents_) {
    agents_ = round_up(agent + 1);
    for (Warp* w : warps) complement(w->knowledge);
  }
  return agent;
}

void Cluster::complement(Knowledge& k) const {
  k.seen.widen(agents_, base - 1);
  k.proxied.widen(agents_, base - 1);
}

void Cluster::complete(Pending& p) {
  if (p.done) return;
  p.done = true;
  completing_ = &p;
  p.complete(*p.cta);
  completing_ = nullptr;
  happened();
  ++progress;
}

void Cluster::place(Finding& f) const {
  if (completing_) {
    const Pending& p = *completing_;
    p.cta->place(f, *p.code, p.instruction->index);
    if (f.warp < 0) f.warp = p.warp;
    return;
  }
  const auto may_be = [&](const Warp* w) { return (running_ ? w == running_ : w->live != 0) && !w->strands.empty(); };
  const auto warp = std::find_if(warps.begin(), warps.end(), may_be);
  if (warp == warps.end()) return;
  const Warp& w = **warp;
  w.cta->place(f, w);
  if (w.accessing && f.lane < 0 && f.has_address) f.lane = w.accessing->lane_of(f.address);
}

bool Cluster::again(Kind kind, uint32_t other_line, bool within_warp) {
  if (findings.empty()) return false;
  Finding f;
  place(f);
  return findings.again({launch->code->name, kind, f.ptx_line, static_cast<int>(other_line), within_warp});
}

namespace {

// Whether a race, or data in flight, is why the other one read what nobody had written: it is about the same load, or
// the same bytes, and no access by an address that was made of what was read.
bool is_cause(const Finding& f, const Finding& unwritten) {
  const bool unordered = f.other_ptx_line && (f.kind == Kind::race || f.kind == Kind::in_flight);
  const bool same_load = f.ptx_line == unwritten.ptx_line || f.other_ptx_line == unwritten.ptx_line;
  const bool same_bytes = f.has_address && f.address / 16 == unwritten.address / 16;
  const bool follows = unwritten.other_ptx_line && f.ptx_line == unwritten.other_ptx_line;
  return unordered && !follows && std::equal(f.block, f.block + 3, unwritten.block) && (same_load || same_bytes);
}

// Says who has written the bytes after all, for those who look for the barrier that is missing.
void name_later_write(const Cluster& cluster, Finding& f) {
  if (f.kind != Kind::uninitialised || f.message.find(" of shared ") == std::string::npos) return;
  for (const auto& cta : cluster.ctas) {
    if (!std::equal(f.block, f.block + 3, cta->index)) continue;
    const std::string later = cta->shadow.writer_of(static_cast<uint32_t>(f.address));
    if (!later.empty()) f.message += "; the " + later + " comes later: is a barrier missing?";
  }
}

}  // namespace

Findings Cluster::settle(std::optional<Finding>& error) const {
  Findings others;
  for (const auto& [key, finding] : findings) {
    Finding f = finding;
    name_later_write(*this, f);
    if (!launch->options.policy.postpones(f))
      others.add(std::move(f));
    else if (!error || !is_cause(*error, f))
      error = std::move(f);
  }
  return others;
}

void Cluster::report(Finding f) {
  const FindingPolicy& policy = launch->options.policy;
  if (f.breaks == Breaks::isa && policy.isa == FindingPolicy::Isa::ignore) return;
  if (!f.ptx_line) place(f);
  launch->describe(f);
  f.cluster = number;
  if (!policy.accepts(f) && !policy.postpones(f)) throw f;
  findings.add(std::move(f));
}

Warp* Cluster::pick() {
  const int count = static_cast<int>(warps.size());
  const auto runnable = [&](int k) {
    return warps[k]->live && warps[k]->blocked_at != events && warps[k]->spins_at != progress;
  };
  if (order_ == Order::ahead && random() % 64 == 0) favourite_ = static_cast<int>(random() % count);
  if (order_ == Order::ahead && runnable(favourite_)) return warps[favourite_];
  const int start = static_cast<int>(random() % count);
  Warp* last = nullptr;
  for (int k = 0; k < count; ++k) {
    const int n = (start + k) % count;
    if (!runnable(n)) continue;
    // One that is behind gets its turn at last: the others might spin on what it does.
    if (order_ != Order::behind || n != favourite_ || random() % 64 == 0) return warps[n];
    last = warps[n];
  }
  return last;
}

bool Cluster::complete_one() {
  for (size_t tries = pending.size(), k = random() % pending.size(); tries; --tries, k = (k + 1) % pending.size()) {
    const auto p = pending[k];
    if (p->done) continue;
    if (!p->ready(*p->cta)) continue;
    complete(*p);
    return true;
  }
  return false;
}

void Cluster::sweep() {
  pending.erase(std::remove_if(pending.begin(), pending.end(), [](const auto& p) { return p->done; }), pending.end());
}

// No warp can go on. What is pending completes, then time limits expire, then warps that go round in circles look
// again, each twice: first at what is there now, and then whether it has made a difference. False: none of it helps.
bool Cluster::stir() {
  sweep();
  if (!pending.empty() && complete_one()) return true;
  if (idle_at != events) {
    idle_at = events;
    for (Warp* blocked : warps) blocked->blocked_at = ~uint64_t{0};
    return true;
  }
  if (looked_at_ != progress) rounds_ = 0;
  looked_at_ = progress;
  const auto spins = [](const Warp* w) { return w->live && w->spins_at; };
  if (rounds_ == 2 || std::none_of(warps.begin(), warps.end(), spins)) return false;
  ++rounds_;
  for (Warp* w : warps) w->spins_at = 0;
  return true;
}

// A slice of a warp. Returns what it costs.
uint64_t Cluster::run_slice(Warp& w) {
  static constexpr uint64_t slices[] = {1, 8, 32, 64, 128, 256};
  const bool far = order_ == Order::ahead && &w == warps[favourite_];
  const uint64_t steps = w.steps, before = events;
  const uint32_t effects = w.effects;
  running_ = &w;
  (w.cta->sheet ? run_warp<true> : run_warp<false>)(w, far ? kLongSlice : slices[random() % 6]);
  running_ = nullptr;
  if (w.effects != effects || events != before) ++progress;
  if (std::exchange(w.spins, false)) w.spins_at = progress;
  if (far && w.steps - steps >= kLongSlice && random() % 4 == 0) {  // it might spin on what the others do
    favourite_ = static_cast<int>(random() % warps.size());
  }
  return std::max<uint64_t>(w.steps - steps, 1);  // a slice that found itself blocked costs too
}

Cluster::Turn Cluster::run(uint64_t budget) {
  uint64_t used = 0;
  const uint64_t before = progress;
  running_ = nullptr;
  completing_ = nullptr;
  rounds_ = 0;
  for (Warp* w : warps) w->spins_at = 0;  // other clusters may have gone on
  while (live_warps) {
    if (!pending.empty()) {
      sweep();
      const bool now = completion_ == Completion::early   ? random() % 2
                       : completion_ == Completion::mixed ? random() % 8 == 0
                                                          : false;
      if (now && !pending.empty()) complete_one();
    }
    if (Warp* w = pick()) {
      used += run_slice(*w);
      if (used > budget) return {Turn::End::used_up, progress != before};
    } else if (!stir()) {
      const auto spins = [](const Warp* w) { return w->live && w->spins_at; };
      if (std::none_of(warps.begin(), warps.end(), spins)) throw deadlock();
      return {Turn::End::stuck, progress != before};
    }
  }
  sweep();
  while (!pending.empty() && complete_one()) sweep();
  end();
  return {Turn::End::over};
}

void Cluster::step(Warp& w, uint64_t slice) {
  running_ = &w;
  run_warp<false, true>(w, slice);
  running_ = nullptr;
}

void Cluster::end() {
  running_ = nullptr;
  completing_ = nullptr;
  Clock highest = 0;
  for (const Warp* w : warps) highest = std::max(highest, w->knowledge.seen.clocks[w->agent]);
  for (const Clock clock : series_clocks) highest = std::max(highest, clock);
  base = highest + 1;
}

Finding Cluster::deadlock() const {
  // A warp that goes round in a circle has stopped at its look, or behind it.
  const auto place_of = [](const Warp& w, const Strand& s) {
    const auto& code = s.frame->code->instructions;
    return w.spins_at && s.pc && code[s.pc].visible != Visible::looks ? s.pc - 1 : s.pc;
  };
  Finding f;
  f.kind = Kind::deadlock;
  f.message = "every warp waits and nothing is under way:";
  const Warp* first = nullptr;
  int named = 0;
  for (const Warp* w : warps) {
    if (!w->live) continue;
    if (!first) first = w;
    for (const Strand& s : w->strands) {
      if (++named > 8) break;
      Finding there;
      const uint32_t pc = place_of(*w, s);
      w->cta->place(there, *s.frame->code, pc);
      f.message += " " + w->cta->shadow.name_of(w->agent) + " at line " +
                   std::to_string(there.line ? there.line : there.ptx_line) + " (" +
                   s.frame->code->statements[pc]->opcode + (w->spins_at ? ", again and again" : "") + ");";
    }
  }
  if (named > 8) f.message += " and more";
  const Strand& s = first->strands[first->running];
  first->cta->place(f, *s.frame->code, place_of(*first, s));
  f.warp = first->id;
  return f;
}

}  // namespace gpuless
