#include "machine.h"

#include <cstring>

namespace forwardpass::interpreter {
namespace {

uint64_t mix(uint64_t x) {  // splitmix64's finaliser (Steele, Lea and Flood 2014)
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}
uint32_t next(uint64_t& state) { return static_cast<uint32_t>(mix(state += 0x9e3779b97f4a7c15u) >> 32); }

// A divergent strand gives way to the others after so many instructions, so that one that spins cannot starve them.
constexpr int kTurn = 512;
// A warp that runs ahead still stops after so many, as it might spin on another CTA.
constexpr uint64_t kLongSlice = 4096;

}  // namespace

// ---- Warp ----

uint32_t Warp::random() { return next(random_state); }

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
  Finding f;
  f.kind = kind;
  f.message = std::move(message);
  f.lane = lane;
  f.address = address;
  f.has_address = true;
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
  std::memcpy(f->registers, code.image.data(), code.image.size());
  for (const Preset& p : code.presets) {
    for (int l = 0; l < kLanes; ++l) {
      const uint64_t v = (p.special ? p.special(*this, l) : f->local_base) + p.bits;
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
    cta->happened();
    if (!live) --cta->live_warps;
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
                  from->parameters.get() + lane * from->code->param_bytes + from->code->returns[k].offset, to.bytes);
    }
  }
}

void Warp::branch(Mask taken, uint32_t target) {
  Strand& s = strand();
  if (taken == s.mask) {
    s.pc = target;
    return;
  }
  Strand rest{s.frame, s.pc + 1, s.mask & ~taken};
  s.mask = taken;
  s.pc = target;
  strands.push_back(rest);
}

namespace {

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
  const auto before = [&](int a, int b) {  // the deepest frame, then the lowest program counter
    const Strand &x = all[a], &y = all[b];
    return b < 0 || x.frame->depth > y.frame->depth || (x.frame->depth == y.frame->depth && x.pc < y.pc);
  };
  bool any_blocked = false;
  for (int k = 0; k < static_cast<int>(all.size()); ++k) {
    if (blocked & all[k].mask) {
      any_blocked = true;
      continue;
    }
    if (!all[k].waiting && before(k, best)) best = k;
  }
  if (best >= 0 && w.turn > kTurn) {  // another one's turn, if there is one
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

// Runs a warp for about `slice` instructions, or until it blocks, yields or ends.
void run_warp(Warp& w, uint64_t slice) {
  const uint64_t end = w.steps + slice;
  while (w.live) {
    bool forced = false;
    Mask blocked = 0, refused = 0;  // lanes of strands that found themselves blocked in this slice
    if (w.strands.size() > 1) choose_strand(w, 0, 0, &forced);
    // One strand at a time; a warp with a single one stays in this loop.
    for (;;) {
      Strand& s = w.strands[w.running];
      w.frame = s.frame;
      const Instruction& i = s.frame->code->instructions[s.pc];
      const Mask mask = s.mask & (w.predicate(i.guard) ^ i.guard_flip);
      const bool divided = w.strands.size() > 1;
      if (i.collective && divided && !forced && s.mask != w.live) {
        s.waiting = true;
      } else {
        ++w.steps;
        Step step = Step::next;
        if (__builtin_expect(w.watched, 0)) {
          step = run_watched(w, i, s.mask, mask);
        } else if (mask) {
          step = i.run(w, i, mask);
        }
        if (step == Step::next || step == Step::yielded) {
          Strand& now = w.strands[w.running];
          ++now.pc;
          now.waiting = false;
          if (step == Step::yielded) return;
        } else if (step == Step::blocked) {
          (forced ? refused : blocked) |= w.strands[w.running].mask;
          if (w.strands.size() == 1) {
            w.blocked_at = w.cta->events;
            return;
          }
        } else if (!w.live) {
          return;
        }
        ++w.turn;
      }
      if (w.strands.size() > 1 || divided) {
        if (!choose_strand(w, blocked, refused, &forced)) {
          w.blocked_at = w.cta->events;
          return;
        }
      }
      if (w.steps >= end) return;
    }
  }
}

}  // namespace

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

uint32_t Cta::random() { return next(random_state_); }

void Cta::begin(Launch& l, const unsigned at[3], uint64_t number) {
  launch = &l;
  std::copy(at, at + 3, index);
  random_state_ = mix(l.options.seed * 0x9e3779b97f4a7c15u + mix(l.number + 1) + mix(number * 2 + 1));
  completion_ = static_cast<Completion>(random() % 3);
  order_ = static_cast<Order>(random() % 3);
  const unsigned n = threads(), count = (n + kLanes - 1) / kLanes;
  favourite_ = static_cast<int>(random() % count);
  shared.assign(l.code->shared_bytes + l.dynamic_shared, 0xff);
  shadow.reset(static_cast<int64_t>(shared.size()), static_cast<int>(count), l.module);
  sync_points.reset();
  serial = l.first_serial + static_cast<uint32_t>(number);
  acquired = false;
  pending.clear();
  mbarriers.clear();
  cluster_barrier.reset();
  std::fill(std::begin(barriers), std::end(barriers), NamedBarrier());
  const Clock base = shadow.base();
  Knowledge start;
  std::fill(std::begin(start.seen.at), std::end(start.seen.at), base - 1);
  start.proxied = start.seen;
  start.seen.at[kGridAgent] = l.programmatic ? 0 : 1;
  for (auto& a : async) a = start;
  for (int a = 0; a < kAsyncAgents; ++a) async[a].seen.at[kMaxWarps + a] = base;
  live_warps = static_cast<int>(count);
  matrix_ticks = matrix_macs = 0;
  for (Warp& w : warps)
    for (auto& f : w.frames) spare_frames.push_back(std::move(f));
  warps.clear();
  warps.resize(count);
  for (unsigned k = 0; k < count; ++k) {
    Warp& w = warps[k];
    w.cta = this;
    w.id = static_cast<int>(k);
    w.exists = n - k * kLanes >= kLanes ? kAllLanes : (Mask{1} << (n - k * kLanes)) - 1;
    w.live = w.exists;
    w.knowledge = start;
    w.knowledge.seen.at[k] = base;
    w.random_state = mix(random_state_ + k);
    w.strands.push_back({w.enter(*l.code, nullptr, nullptr, w.exists), 0, w.exists});
    w.frame = w.strands[0].frame;
  }
}

int Cta::async_agent(const Warp& issuer) {
  const int k = next_async++ % kAsyncAgents;
  Knowledge& mine = async[k];
  const Clock now = mine.seen.at[kMaxWarps + k] + 1;
  // Only what the issuer knows: an agent that is handed out again is another operation.
  mine = issuer.knowledge;
  mine.seen.at[kMaxWarps + k] = now;
  async_line[k] = issuer.line();
  return kMaxWarps + k;
}
Clock Cta::async_now(int agent) const { return async[agent - kMaxWarps].seen.at[agent]; }
Actor Cta::async_actor(int agent, Proxy p) const {
  return {agent, async_now(agent), &async[agent - kMaxWarps], p, async_line[agent - kMaxWarps]};
}

void Cta::add(std::shared_ptr<Pending> p) { pending.push_back(std::move(p)); }

void Cta::complete(Pending& p) {
  if (p.done) return;
  p.done = true;
  try {
    p.complete(*this);
  } catch (Finding& f) {  // its place is the instruction that issued it
    if (!f.ptx_line && p.code) place(f, *p.code, p.instruction->index);
    if (f.warp < 0) f.warp = p.warp;
    throw;
  }
  happened();
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
  happened();
}

Warp* Cta::pick() {
  const int count = static_cast<int>(warps.size());
  const auto runnable = [&](int k) { return warps[k].live && warps[k].blocked_at != events; };
  if (order_ == Order::ahead && random() % 64 == 0) favourite_ = static_cast<int>(random() % count);
  if (order_ == Order::ahead && runnable(favourite_)) return &warps[favourite_];
  const int start = static_cast<int>(random() % count);
  Warp* last = nullptr;
  for (int k = 0; k < count; ++k) {
    const int n = (start + k) % count;
    if (!runnable(n)) continue;
    if (order_ != Order::behind || n != favourite_) return &warps[n];
    last = &warps[n];
  }
  return last;
}

bool Cta::run(uint64_t budget) {
  uint64_t used = 0;
  const auto complete_one = [&] {
    for (size_t tries = pending.size(), k = random() % pending.size(); tries; --tries, k = (k + 1) % pending.size()) {
      const auto p = pending[k];
      if (p->done) continue;
      if (!p->ready(*this)) continue;
      complete(*p);
      return true;
    }
    return false;
  };
  const auto sweep = [&] {
    pending.erase(std::remove_if(pending.begin(), pending.end(), [](const auto& p) { return p->done; }), pending.end());
  };
  static constexpr uint64_t slices[] = {1, 8, 32, 64, 128, 256};
  running_ = nullptr;
  while (live_warps) {
    if (!pending.empty()) {
      sweep();
      const bool now = completion_ == Completion::early   ? random() % 2
                       : completion_ == Completion::mixed ? random() % 8 == 0
                                                          : false;
      if (now && !pending.empty()) complete_one();
    }
    Warp* w = pick();
    if (!w) {
      sweep();
      if (!pending.empty() && complete_one()) continue;
      deadlock();
    }
    const bool far = order_ == Order::ahead && w->id == favourite_;
    const uint64_t steps = w->steps;
    running_ = w;
    run_warp(*w, far ? kLongSlice : slices[random() % 6]);
    running_ = nullptr;
    used += w->steps - steps;
    if (w->steps == steps) ++used;  // a slice that found itself blocked costs too
    if (used > budget) return false;
  }
  sweep();
  while (!pending.empty() && complete_one()) sweep();
  Clock highest = 0;
  for (const Warp& w : warps) highest = std::max(highest, w.knowledge.seen.at[w.id]);
  for (int a = 0; a < kAsyncAgents; ++a) highest = std::max(highest, async_now(kMaxWarps + a));
  shadow.advance_base(highest);
  return true;
}

void Cta::deadlock() {
  Finding f;
  f.kind = Kind::deadlock;
  f.message = "every warp waits and nothing is under way:";
  const Warp* first = nullptr;
  int named = 0;
  for (const Warp& w : warps) {
    if (!w.live) continue;
    if (!first) first = &w;
    for (const Strand& s : w.strands) {
      if (++named > 8) break;
      Finding there;
      place(there, *s.frame->code, s.pc);
      f.message += " warp " + std::to_string(w.id) + " at line " +
                   std::to_string(there.line ? there.line : there.ptx_line) + " (" +
                   s.frame->code->statements[s.pc]->opcode + ");";
    }
  }
  if (named > 8) f.message += " and more";
  f.warp = first->id;
  place(f, *first);
  throw f;
}

void Cta::place(Finding& f, const Warp& w) const {
  const Strand& s = w.strands[w.running];
  place(f, *s.frame->code, s.pc);
  f.warp = w.id;
}

void Cta::place(Finding& f, const Code& code, uint32_t pc) const {
  const Statement& at = *code.statements[pc];
  const ptx::Module& source = launch->module->source;
  const ptx::Location& l = source.outermost(at.location);
  if (l.file) f.file = source.files[l.file];
  f.line = l.line;
  f.ptx_line = at.line;
  f.instruction = launch->module->line(at.line);
}

}  // namespace forwardpass::interpreter
