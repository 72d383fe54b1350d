#include "machine.h"

#include <algorithm>
#include <cstring>

#include "explore/execution.h"
#include "ptx_limits.h"
#include "timeline_trace.h"

namespace gpuless {

uint64_t mix(uint64_t x) {  // splitmix64's finaliser (Steele, Lea and Flood 2014)
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}
uint32_t next_random(uint64_t& state) { return static_cast<uint32_t>(mix(state += 0x9e3779b97f4a7c15u) >> 32); }

// ---- Warp ----

uint32_t Warp::random() { return next_random(random_state); }

void Warp::addresses(const Instruction& i, int n, int64_t displacement, bool wide, uint64_t out[kLanes]) const {
  if (wide) {
    const auto* base = operand<uint64_t>(i, n);
    for (int l = 0; l < kLanes; ++l) out[l] = base[l] + static_cast<uint64_t>(displacement);
  } else {
    const auto* base = operand<uint32_t>(i, n);
    for (int l = 0; l < kLanes; ++l) out[l] = base[l] + static_cast<uint32_t>(displacement);
  }
}

void Warp::fail(Kind kind, std::string message, int lane) const {
  Finding f;
  f.kind = kind;
  f.message = std::move(message);
  f.lane = lane;
  throw f;
}

void Warp::fail_at(Kind kind, std::string message, int lane, uint64_t address) const {
  Finding f = finding_at(kind, std::move(message), address);
  f.lane = lane;
  throw f;
}

Frame* Warp::enter(const Code& code, Frame* caller, const Instruction* call, Mask lanes) {
  std::unique_ptr<Frame> f = cta->spare_frame(code);
  f->code = &code;
  f->caller = caller;
  f->call = call;
  f->depth = caller ? caller->depth + 1 : 0;
  f->inside = lanes;
  f->local_base = caller ? caller->local_base + caller->code->local_bytes : 0;
  if (f->depth > 1000) fail(Kind::illegal, "calls nest deeper than 1000");
  if (f->local_base + code.local_bytes > ptx::kMostLocal) {
    fail(Kind::illegal, "the calls' local memory exceeds " + std::to_string(ptx::kMostLocal) + " bytes a thread");
  }
  f->bytes = (caller ? caller->bytes : 0) + static_cast<int64_t>(code.image.size()) + code.param_bytes * kLanes;
  if (caller && f->bytes > ptx::kMostFrames) {
    fail(Kind::illegal, "the calls' registers and parameters exceed " + std::to_string(ptx::kMostFrames) + " bytes");
  }
  std::memcpy(f->registers, code.image.data(), code.image.size());
  for (const Preset& p : code.presets) {
    for (int l = 0; l < kLanes; ++l) {
      const uint64_t base = p.special ? p.special(*this, l) : p.shared < 0 ? static_cast<uint64_t>(f->local_base) : 0;
      const int64_t variable = p.shared < 0 ? 0 : cta->launch->code->shared_offset[p.shared];
      const uint64_t v = base + static_cast<uint64_t>(variable) + p.bits;
      std::memcpy(f->registers + p.offset + l * p.bytes, &v, p.bytes);
    }
  }
  if (code.local_bytes) {
    const size_t needed = f->local_base + code.local_bytes;
    for (auto& lane : local)
      if (lane.size() < needed) lane.resize(needed, 0xff);
  }
  frames.push_back(std::move(f));
  return frames.back().get();
}

void Warp::leave(Mask lanes, bool exit) {
  const bool last = (exit || !strand().frame->caller) && live == lanes;
  if (last && cta->cluster->ctas.size() > 1) cta->exits(*this);
  Frame* const frame_left = strand().frame;
  Frame* const caller = frame_left->caller;
  const uint32_t back = caller ? frame_left->call->index + 1 : 0;
  strand().mask &= ~lanes;
  const bool empty = strand().mask == 0;
  if (empty) {
    strands.erase(strands.begin() + running);
    running = 0;
  } else {
    ++strand().pc;
  }
  if (exit || !caller) {
    live &= ~lanes;
    for (Frame* f = frame_left; f; f = f->caller) f->inside &= ~lanes;
    cta->cluster->happened();
    if (last) {
      if (!--cta->live_warps) {
        check_bulk_at_end(*cta);
        check_tensor_memory_at_end(*cta);
      }
      --cta->cluster->live_warps;
    }
    cta->settle_barriers();
  } else {
    frame_left->inside &= ~lanes;
    Strand s{caller, back, lanes};
    strands.push_back(s);
  }
  for (size_t k = 0; k < frames.size();) {
    if (frames[k]->inside || frames[k]->depth == 0) {
      ++k;
    } else {
      cta->spare_frames.push_back(std::move(frames[k]));
      frames.erase(frames.begin() + k);
    }
  }
}

void Warp::return_values(Mask lanes) {
  const Frame* const from = strand().frame;
  if (!from->caller) return;
  for (size_t k = 0; k < from->results.size(); ++k) {
    const auto& to = from->results[k];
    for (Mask rest = lanes; rest; rest &= rest - 1) {
      const int lane = __builtin_ctz(rest);
      std::memcpy(from->caller->parameters.get() + lane * from->caller->code->param_bytes + to.offset,
                  from->parameters.get() + lane * from->code->param_bytes + from->code->returns[k].offset,
                  std::min(to.bytes, from->code->returns[k].bytes));
    }
  }
}

void Warp::branch(Mask lanes, uint32_t target) {
  Strand& s = strand();
  if (lanes == s.mask) {
    s.pc = target;
    return;
  }
  Strand rest{s.frame, s.pc + 1, s.mask & ~lanes};
  s.mask = lanes;
  s.pc = target;
  strands.push_back(rest);
}

namespace {

// The deepest frame, then what comes first in the order of its code.
bool goes_first(const Strand& a, const Strand& b) {
  if (a.frame->depth != b.frame->depth) return a.frame->depth > b.frame->depth;
  return a.frame->code->order[a.pc] < b.frame->code->order[b.pc];
}

// Whether an instruction has to wait for the strands that are not here: a collective one for all, an aligned one for
// those that go first and so may still come. Without any, it runs with a part of the warp, which is a finding.
bool waits_for_others(const Warp& w, const Instruction& i, const Strand& here) {
  if (here.mask == w.live) return false;
  return i.collective || (i.aligned && std::any_of(w.strands.begin(), w.strands.end(),
                                                   [&](const Strand& other) { return goes_first(other, here); }));
}

// Strands that stand in one place become one; then the one to run is chosen. `forced`: it goes through a collective
// instruction as it is, since every other waits at one too. False: each is blocked, or (`refused`) was forced in vain.
bool choose_strand(Warp& w, Mask blocked, Mask refused, bool* forced) {
  auto& all = w.strands;
  for (size_t a = 0; a < all.size(); ++a) {
    for (size_t b = a + 1; b < all.size();) {
      if (all[a].frame == all[b].frame && all[a].pc == all[b].pc && !all[a].ticket && !all[b].ticket) {
        all[a].mask |= all[b].mask;
        all[a].waiting = all[a].waiting && all[b].waiting && all[a].mask != w.live;
        all.erase(all.begin() + b);
        w.running = 0;
      } else {
        ++b;
      }
    }
  }
  *forced = false;
  if (all.size() == 1) {
    w.running = 0;
    return !((blocked | refused) & all[0].mask);
  }
  int best = -1;
  const auto before = [&](int a, int b) { return b < 0 || goes_first(all[a], all[b]); };
  bool any_blocked = false;
  for (int k = 0; k < static_cast<int>(all.size()); ++k) {
    if (blocked & all[k].mask) {
      any_blocked = true;
      continue;
    }
    if (!all[k].waiting && before(k, best)) best = k;
  }
  if (best >= 0 && w.turn > kStrandTurn) {  // another one's turn, if there is one
    w.turn = 0;
    const int count = static_cast<int>(all.size()), start = static_cast<int>(w.random() % count);
    for (int k = 0; k < count; ++k) {
      const int other = (start + k) % count;
      if (other != best && !(blocked & all[other].mask) && !all[other].waiting) {
        best = other;
        break;
      }
    }
  }
  if (best < 0 && !any_blocked) {
    for (int k = 0; k < static_cast<int>(all.size()); ++k)
      if (!(refused & all[k].mask) && before(k, best)) best = k;
    *forced = true;
  }
  if (best < 0) return false;
  if (w.running != best) w.turn = 0;
  w.running = best;
  return true;
}

}  // namespace

// Runs a warp for about `slice` instructions, or until it blocks, yields or ends.
template <bool kCounted, bool kStops>
void run_warp(Warp& w, uint64_t slice) {
  const uint64_t begin = w.steps, end = begin + slice;
  while (w.live) {
    bool forced = false;
    Mask blocked = 0, refused = 0;  // lanes of strands that found themselves blocked in this slice
    if (w.strands.size() > 1) choose_strand(w, 0, 0, &forced);
    // One strand at a time; a warp with a single one stays in this loop.
    for (;;) {
      Strand& s = w.strands[w.running];
      w.frame = s.frame;
      const Instruction& i = s.frame->code->instructions[s.pc];
      const Mask here = s.mask, mask = here & (w.predicate(i.guard) ^ i.guard_flip);
      if (kStops && w.steps != begin && mask && i.visible != Visible::no) return;
      const bool divided = w.strands.size() > 1;
      if (divided && !forced && waits_for_others(w, i, s)) {
        s.waiting = true;
      } else {
        ++w.steps;
        Step step = Step::next;
        [[maybe_unused]] Count* count = nullptr;
        if constexpr (kCounted) {
          const Code& code = *s.frame->code;
          w.count = count = w.trace ? w.trace->begin(w, code, i, mask) : w.cta->sheet->at(code, i.index);
        }
        if (__builtin_expect(w.watched, 0)) {
          step = run_watched(w, i, here, mask);
        } else if (mask) {
          step = i.run(w, i, mask);
        }
        if constexpr (kCounted) {
          count->step(step, here, mask);
          w.trace ? w.trace->end(w, i, step, mask) : w.length.step(i, step);
        }
        if (step == Step::next || step == Step::yielded) {
          Strand& now = w.strands[w.running];
          ++now.pc;
          now.waiting = false;
          if (step == Step::yielded) return;
        } else if (step == Step::blocked) {
          (forced ? refused : blocked) |= w.strands[w.running].mask;
          if (w.strands.size() == 1) {
            w.blocked_at = w.cta->cluster->events;
            return;
          }
        } else if (!w.live) {
          return;
        }
        ++w.turn;
      }
      if (w.strands.size() > 1 || divided) {
        if (!choose_strand(w, blocked, refused, &forced)) {
          w.blocked_at = w.cta->cluster->events;
          return;
        }
      }
      if (w.steps >= end) return;
    }
  }
}

template void run_warp<false>(Warp&, uint64_t);
template void run_warp<true>(Warp&, uint64_t);
template void run_warp<false, true>(Warp&, uint64_t);

// ---- Cta ----

unsigned Cta::threads() const { return launch->block[0] * launch->block[1] * launch->block[2]; }

unsigned Cta::live_threads() const {
  unsigned n = 0;
  for (const Warp& w : warps) n += __builtin_popcount(w.live);
  return n;
}

std::unique_ptr<Frame> Cta::spare_frame(const Code& code) {
  for (auto& spare : spare_frames) {
    if (spare->code != &code) continue;
    std::unique_ptr<Frame> f = std::move(spare);
    spare = std::move(spare_frames.back());
    spare_frames.pop_back();
    return f;
  }
  auto f = std::make_unique<Frame>();
  f->memory.reset(new uint8_t[code.image.size() + 64]);
  f->registers = reinterpret_cast<uint8_t*>((reinterpret_cast<uint64_t>(f->memory.get()) + 63) / 64 * 64);
  if (code.param_bytes) f->parameters.reset(new uint8_t[code.param_bytes * kLanes]);
  return f;
}

void Cta::begin(Cluster& c, int r, const unsigned coordinates[3]) {
  cluster = &c;
  launch = c.launch;
  rank = r;
  std::copy(coordinates, coordinates + 3, index);
  const Launch& l = *launch;
  const unsigned n = threads(), count = (n + kLanes - 1) / kLanes;
  first_agent = kFirstWarp + rank * static_cast<int>(count);
  shared.assign(l.code->shared_bytes + l.dynamic_shared, 0xff);
  shadow.reset(*this, shared.size());
  has_tensor_memory = false;
  mbarriers.clear();
  arrivals.clear();
  std::fill(std::begin(barriers), std::end(barriers), NamedBarrier());
  visitors = VectorClock();
  departed = Knowledge();
  live_warps = static_cast<int>(count);
  matrix_ticks = matrix_macs = small_products = 0;
  for (Warp& w : warps)
    for (auto& f : w.frames) spare_frames.push_back(std::move(f));
  warps.clear();
  warps.resize(count);
  for (unsigned k = 0; k < count; ++k) {
    Warp& w = warps[k];
    w.cta = this;
    w.id = static_cast<int>(k);
    w.agent = first_agent + w.id;
    w.exists = n - k * kLanes >= kLanes ? kAllLanes : (Mask{1} << (n - k * kLanes)) - 1;
    w.live = w.exists;
  }
}

void Cta::forget() {
  shadow.forget();
  if (tensor_memory) tensor_memory->forget();
}

void Cta::add(std::shared_ptr<Pending> p) {
  p->cta = this;
  if (p->warp >= 0) ++warps[p->warp].effects;
  if (launch->execution) launch->execution->issued(p);
  cluster->pending.push_back(std::move(p));
}

int Cta::arrivals_at(uint32_t mbarrier) {
  int& series = arrivals.try_emplace(mbarrier, -1).first->second;
  cluster->begin_series(series);
  return series;
}

void Cta::visited(const Actor& actor, bool remember) {
  if (live_warps) {
    if (remember) visitors.set(actor.agent, actor.now);
    return;
  }
  Finding f;
  f.kind = Kind::out_of_bounds;
  f.message = shadow.name_of(actor.agent) + " accesses shared memory of the CTA of rank " + std::to_string(rank) +
              ", which has exited: a barrier of the cluster must come between";
  cluster->report(std::move(f));
}

void Cta::exits(const Warp& last) {
  departed.join(last.knowledge);
  if (live_warps > 1 || !launch->options.checks) return;
  for (int a = 0; a < visitors.width; ++a) {
    if (visitors.clocks[a] <= departed.seen.clocks[a]) continue;
    Finding f;
    f.kind = Kind::race;
    f.message = "the CTA exits while its shared memory may still be in use: nothing orders this after an access by " +
                shadow.name_of(a) + "; a barrier of the cluster must come between";
    cluster->report(std::move(f));
  }
}

void Cta::settle_barriers() {
  for (auto& b : barriers) {
    if (b.arrived && !b.expected && b.arrived >= live_threads()) finish(b);
  }
}

void Cta::finish(NamedBarrier& b) {
  b.last = b.gathering;
  b.last_arrived = b.arrived;
  b.last_trues = b.trues;
  b.gathering = Knowledge();
  b.arrived = b.trues = b.expected = 0;
  ++b.generation;
  cluster->happened();
}

void Cta::place(Finding& f, const Warp& w) const {
  const Strand& s = w.strands[w.running];
  place(f, *s.frame->code, s.pc);
  f.warp = w.id;
}

void Cta::place(Finding& f, const Code& code, uint32_t pc) const {
  const Statement& statement = *code.statements[pc];
  const ptx::Module& source = launch->module->source;
  const ptx::Location& l = source.outermost(statement.location);
  if (l.file) f.file = source.files[l.file];
  f.line = l.line;
  f.ptx_line = statement.line;
  std::copy(index, index + 3, f.block);
  f.instruction = launch->module->line(statement.line);
}

void Cta::place_other(Finding& f, uint32_t ptx_line) const {
  f.other_ptx_line = static_cast<int>(ptx_line);
  if (!ptx_line) return;
  SourceLine source = source_line(*launch->module, ptx_line);
  f.other_file = std::move(source.file);
  f.other_line = source.line;
}

}  // namespace gpuless
