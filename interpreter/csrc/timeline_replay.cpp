#include "timeline_replay.h"

#include "finding.h"
#include "timeline_state.h"

namespace gpuless {

const char* const kWaitNames[kWaits] = {"dependency",   "memory",       "shared memory", "special function",
                                        "tensor cores", "copy",         "mbarrier",      "barrier",
                                        "pipe busy",    "not selected", "other"};

namespace timeline {
namespace {

constexpr uint64_t kMostReplayed = 40'000'000;  // events; what is left is extrapolated
constexpr size_t kMostSpans = 1 << 18;
constexpr Time kShortestSpan = 16;  // of a wait, to have a span of its own

}  // namespace

// ---- Blocks ----

void Replay::begin_cluster(size_t slot, Time now) {
  if (started_ == in_.turns.size()) return;
  const size_t recorded = in_.turns[started_++].recorded;
  auto cluster = std::make_unique<Cluster>();
  cluster->slot = slot;
  cluster->live = static_cast<int>(in_.cluster_size);
  for (size_t rank = 0; rank < in_.cluster_size; ++rank) {
    const CtaTrace& trace = *in_.ctas[recorded * in_.cluster_size + rank];
    auto block = std::make_unique<Block>();
    block->cluster = cluster.get();
    block->multiprocessor = &multiprocessors_[rank];
    block->rank = static_cast<int>(rank);
    block->live = static_cast<int>(trace.warps.size());
    block->warps.resize(trace.warps.size());
    block->matrix.resize((trace.warps.size() + 3) / 4);
    cluster->warps += block->live;
    for (size_t k = 0; k < trace.warps.size(); ++k) {
      Warp& w = block->warps[k];
      w.trace = &trace.warps[k];
      w.block = block.get();
      w.id = static_cast<int>(k);
      w.scheduler = static_cast<int>((k + slot) % kSchedulers);
      if (trace.warps.size() % kSchedulers == 0) w.scheduler = static_cast<int>(k % kSchedulers);
      w.free = now;
      w.ready.assign(ops_.register_count, 0);
      w.makers.assign(ops_.register_count, Wait::dependency);
      if (!rank) w.track = track("block " + std::to_string(slot) + ", warp " + std::to_string(k));
      multiprocessors_[rank].schedulers[w.scheduler].warps.push_back(&w);
    }
    cluster->blocks.push_back(std::move(block));
  }
  Cluster& c = *cluster;
  clusters_.push_back(std::move(cluster));
  for (auto& block : c.blocks)
    for (Warp& w : block->warps) wake(w, now);
}

void Replay::finish(Warp& w, Time now) {
  w.over = true;
  if (shown(w) && w.span_begin != kNever) span(w.track, w.span_name, w.span_begin, w.span_end);
  Block& block = *w.block;
  auto& warps = block.multiprocessor->schedulers[w.scheduler];
  warps.warps.erase(std::find(warps.warps.begin(), warps.warps.end(), &w));
  if (warps.last == &w) warps.last = nullptr;
  --block.live;
  --block.cluster->warps;
  if (w.cluster_phases > block.cluster->phases) --block.cluster->arrived;
  w.ready = {};
  w.makers = {};
  for (auto& b : block.barriers)
    if (b.arrived) settle(block, b, now);
  settle(*block.cluster, now);
  if (block.live || --block.cluster->live) return;
  ends_.push_back(now);
  if (issued_ < kMostReplayed) {
    Event e{};
    e.time = now + ceiling(c_.block_latency);
    e.kind = Event::Kind::begin;
    e.slot = block.cluster->slot;
    push(e);
  }
}

// ---- The next instruction of a warp ----

void Replay::set_results(Warp& w, const Op& op, Time ready, Wait why) {
  for (uint32_t k = op.first; k < op.first + op.destinations; ++k) {
    w.ready[ops_.registers[k]] = ready;
    w.makers[ops_.registers[k]] = why;
  }
}

void Replay::prepare(Warp& w) {
  const auto& events = w.trace->events;
  for (; w.next < events.size(); ++w.next) {
    const TraceEvent& e = events[w.next];
    const Op& op = op_of(e);
    Time ready = 0;
    Wait why = Wait::dependency;
    const uint32_t sources = op.first + op.destinations, last = sources + op.sources;
    for (uint32_t k = e.idle ? last : sources; k < last + op.guarded; ++k) {
      const uint32_t r = ops_.registers[k];
      if (w.ready[r] <= ready) continue;
      ready = w.ready[r];
      why = w.makers[r];
    }
    if (op.kind == Op::Kind::free) {
      if (!e.idle) set_results(w, op, ready, why);
      continue;
    }
    w.earliest = w.free;
    w.reason = Wait::other;
    later(w, ready, why);
    if (e.idle) return;
    if (op.kind == Op::Kind::copy_wait && w.copy_groups.size() > op.groups) {
      for (size_t g = 0; g + op.groups < w.copy_groups.size(); ++g) later(w, w.copy_groups[g], Wait::copy);
    } else if (op.kind == Op::Kind::bulk_wait) {
      const auto& groups = op.reads_only ? w.bulk_read_groups : w.bulk_groups;
      for (size_t g = 0; g + op.groups < groups.size(); ++g) later(w, groups[g], Wait::copy);
    } else if (op.kind == Op::Kind::wgmma_wait && w.matrix_groups.size() > op.groups) {
      const size_t needed = w.matrix_groups[w.matrix_groups.size() - op.groups - 1];
      const auto& done = w.block->matrix[static_cast<size_t>(w.id) / 4];
      if (needed) {
        if (done.size() < needed || !done[needed - 1].end) {
          w.blocked = true;  // until it has begun
          return;
        }
        later(w, done[needed - 1].end, Wait::tensor);
      }
    } else if (op.kind == Op::Kind::signal_wait) {
      for (uint32_t s = e.signal; s < e.signal + e.signals; ++s) {
        const Signal& signal = w.trace->signals[s];
        Block& target = *w.block->cluster->blocks[signal.rank];
        Block::Object& o = object(target, signal);
        if (o.phase < signal.phase) {
          o.waiting.push_back(&w);
          w.blocked = true;
          return;
        }
        if (signal.phase) later(w, o.since, Wait::mbarrier);
      }
    } else if (op.kind == Op::Kind::cluster_wait) {
      Cluster& cluster = *w.block->cluster;
      if (cluster.phases < w.cluster_phases) {
        cluster.waiting.push_back(&w);
        w.blocked = true;
        return;
      }
      later(w, cluster.since, Wait::barrier);
    }
    return;
  }
  finish(w, w.free);  // its last results are not waited for
}

// The first cycle in which the pipe takes the warp's next instruction. A pipe that is free within a cycle takes one in
// it, so that intervals need not be whole.
Time Replay::pipe_free(const Warp& w) const {
  const Op& op = op_of(w.trace->events[w.next]);
  const Multiprocessor& m = *w.block->multiprocessor;
  const auto& s = m.schedulers[w.scheduler];
  double free = 0;
  if (op.kind == Op::Kind::memory || op.kind == Op::Kind::copy ||
      (op.kind == Op::Kind::alu && op.pipe == Pipe::shuffle)) {
    if (static_cast<double>(s.memory.size()) >= c_.memory_queue) free = s.memory.front();
  } else if (op.kind == Op::Kind::alu) {
    free = s.pipes[static_cast<int>(op.pipe)];
  } else if (op.kind == Op::Kind::mma) {
    free = s.tensor;
  }
  return static_cast<Time>(std::max(0.0, free));
}

// ---- Schedulers: the same warp as long as it can go on, else the youngest; at a tensor core, in turns ----

// Of the warps whose next instruction is an mma that their tensor core can take, the one that has waited longest. If
// one warp always went first, the mma of one CTA would hide all loads of the other: a kernel with one stage then comes
// out ahead of the same with two, which is measured to be 16 % faster (docs/interpreter.md, learn-cuda's v4 and v6b).
Warp* Replay::next_at_tensor_core(Multiprocessor::Scheduler& s, Warp* preferred, Time now) const {
  for (Warp* w : s.warps) {
    if (w->blocked || op_of(w->trace->events[w->next]).kind != Op::Kind::mma) continue;
    if (std::max(w->earliest, pipe_free(*w)) <= now && w->multiplied < preferred->multiplied) preferred = w;
  }
  preferred->multiplied = now;
  return preferred;
}

void Replay::take_turn(Multiprocessor& m, int number, Time now) {
  auto& s = m.schedulers[number];
  if (s.turn != now) return;
  s.turn = kNever;
  Warp* next_warp = nullptr;
  Time soonest = kNever;
  const auto try_one = [&](Warp* w) {
    if (w->blocked || next_warp) return;
    const Time t = std::max(w->earliest, pipe_free(*w));
    if (t <= now) {
      next_warp = w;
    } else {
      soonest = std::min(soonest, t);
    }
  };
  if (s.last) try_one(s.last);
  for (size_t k = s.warps.size(); k-- && !next_warp;) try_one(s.warps[k]);
  if (!next_warp) {
    if (soonest != kNever) turn(*s.warps[0], soonest);
    return;
  }
  if (op_of(next_warp->trace->events[next_warp->next]).kind == Op::Kind::mma)
    next_warp = next_at_tensor_core(s, next_warp, now);
  s.last = next_warp;
  const Op& op = op_of(next_warp->trace->events[next_warp->next]);
  s.issued += op.slots;
  const Time after = now + op.slots;
  issue(*next_warp, now);
  if (!s.warps.empty()) turn(*s.warps[0], after);
}

void Replay::account(Warp& w, uint32_t op, Wait why, Time from, Time to) {
  if (to <= from) return;
  result_.ops[op].waited[static_cast<int>(why)] += to - from;
  if (!shown(w) || to - from < kShortestSpan) return;
  if (w.span_begin != kNever) span(w.track, w.span_name, w.span_begin, w.span_end);
  w.span_begin = kNever;
  span(w.track, name(std::string("wait: ") + kWaitNames[static_cast<int>(why)]), from, to);
}

void Replay::issue(Warp& w, Time now) {
  const TraceEvent& e = w.trace->events[w.next];
  const Op& op = op_of(e);
  Multiprocessor& m = *w.block->multiprocessor;
  auto& s = m.schedulers[w.scheduler];
  ++issued_;
  ++result_.ops[e.op].issued;
  account(w, e.op, w.reason, w.free, w.earliest);
  const Time pipe = std::min(now, pipe_free(w));
  account(w, e.op, Wait::pipe, w.earliest, std::max(pipe, w.earliest));
  account(w, e.op, Wait::selected, std::max(pipe, w.earliest), now);
  if (shown(w)) {
    const Line& line = ops_.lines[e.op];
    const bool same = w.span_begin != kNever && ops_.lines[w.span_name & ~kOfOp].line == line.line &&
                      ops_.lines[w.span_name & ~kOfOp].file == line.file && !line.file.empty();
    if (!same) {
      if (w.span_begin != kNever) span(w.track, w.span_name, w.span_begin, w.span_end);
      w.span_begin = now;
      w.span_name = e.op | kOfOp;
    }
    w.span_end = now + op.slots;
  }
  w.free = now + op.slots;
  bool is_blocked = false;  // blocked behind this instruction
  if (!e.idle) {
    switch (op.kind) {
      case Op::Kind::alu: {
        const int p = static_cast<int>(op.pipe);
        const double extra = op.slots - 1;
        if (op.pipe == Pipe::shuffle) {
          set_results(w, op, ceiling(access(w, now, 1) - 1 + c_.latency[p]), Wait::special);
          break;
        }
        s.pipes[p] = std::max(s.pipes[p], static_cast<double>(now)) + c_.interval[p];
        const bool fixed = op.pipe != Pipe::special && op.pipe != Pipe::conversion;
        set_results(w, op, ceiling(static_cast<double>(now) + extra + c_.latency[p]),
                    fixed ? Wait::dependency : Wait::special);
        break;
      }
      case Op::Kind::memory:
      case Op::Kind::copy:
        memory(w, op, e, now);
        break;
      case Op::Kind::mma: {
        const double interval = op.macs / c_.matrix_rate[op.matrix_type];
        s.tensor = std::max(s.tensor, static_cast<double>(now)) + interval;
        m.tensor_busy += interval / kSchedulers;
        set_results(w, op, ceiling(static_cast<double>(now) + c_.mma_latency + c_.mma_intervals * interval),
                    Wait::tensor);
        break;
      }
      case Op::Kind::wgmma:
        matrix(w, op, now);
        break;
      case Op::Kind::wgmma_commit:
        w.matrix_groups.push_back(w.matrix_issued);
        break;
      case Op::Kind::copy_commit:
        w.copy_groups.push_back(w.copies);
        w.copies = 0;
        break;
      case Op::Kind::copy_wait:
        while (w.copy_groups.size() > op.groups) w.copy_groups.pop_front();
        break;
      case Op::Kind::bulk:
        bulk(w, e, now);
        break;
      case Op::Kind::bulk_commit:
        w.bulk_groups.push_back(w.bulk);
        w.bulk_read_groups.push_back(w.bulk_read);
        w.bulk = w.bulk_read = 0;
        break;
      case Op::Kind::wgmma_wait:
        while (w.matrix_groups.size() > op.groups) w.matrix_groups.pop_front();
        break;
      case Op::Kind::signal:
        signals(w, e, now);
        set_results(w, op, now + ceiling(c_.signal_latency), Wait::shared);
        break;
      case Op::Kind::signal_wait:
        set_results(w, op, now + ceiling(c_.signal_latency), Wait::shared);
        break;
      case Op::Kind::barrier:
        ++w.next;
        barrier(w, op, e, now);
        is_blocked = true;
        break;
      case Op::Kind::cluster_arrive: {
        Cluster& cluster = *w.block->cluster;
        w.cluster_phases = cluster.phases + 1;
        ++cluster.arrived;
        settle(cluster, now);
        break;
      }
      case Op::Kind::dependency_wait:
        if (!result_.dependency) result_.dependency = now;
        w.free = std::max(w.free, static_cast<Time>(in_.head_start));
        break;
      case Op::Kind::trigger:
        if (std::exchange(w.block->triggered, true)) break;
        ++triggers_;
        last_trigger_ = now;
        break;
      case Op::Kind::fence:
        w.free = now + ceiling(op.everywhere ? c_.l2_latency : c_.fence_latency);
        break;
      case Op::Kind::branch:
        if (e.jumps) w.free = now + ceiling(c_.branch_latency);
        break;
      case Op::Kind::free:
      case Op::Kind::bulk_wait:
      case Op::Kind::cluster_wait:
        break;
    }
  }
  if (is_blocked) return;
  ++w.next;
  prepare(w);
}

// ---- What is shown ----

void Replay::span(uint32_t track, uint32_t what, Time begin, Time end) {
  if (result_.spans.size() >= kMostSpans) {
    result_.spans_cut = true;
    return;
  }
  result_.spans.push_back({track, what, begin, end});
}

uint32_t Replay::track(const std::string& text) {
  const auto [entry, fresh] = tracks_.emplace(text, static_cast<uint32_t>(result_.tracks.size()));
  if (fresh) result_.tracks.push_back(text);
  return entry->second;
}

uint32_t Replay::name(const std::string& text) {
  const auto [entry, fresh] = names_.emplace(text, static_cast<uint32_t>(result_.names.size()));
  if (fresh) result_.names.push_back(text);
  return entry->second;
}

ReplayResult Replay::run() {
  track("tensor cores");
  track("bulk copies");
  const auto first = std::min<uint64_t>(in_.resident, in_.turns.size());
  for (uint64_t slot = 0; slot < first; ++slot) begin_cluster(slot, ceiling(c_.block_latency));
  Time now = 0;
  while (!events_.empty()) {
    const Event e = events_.top();
    events_.pop();
    now = e.time;
    if (e.kind == Event::Kind::turn) {
      take_turn(multiprocessors_[e.multiprocessor], static_cast<int>(e.scheduler), now);
    } else if (e.kind == Event::Kind::arrive) {
      arrive(e);
    } else if (e.kind == Event::Kind::write) {
      e.block->multiprocessor->port.take(static_cast<double>(now), static_cast<double>(e.bytes) / c_.shared_rate);
    } else if (e.kind == Event::Kind::multiply) {
      multiply(multiprocessors_[e.multiprocessor]);
    } else {
      begin_cluster(e.slot, now);
    }
  }
  if (ends_.size() != started_) {
    Finding f;
    f.kind = Kind::deadlock;
    f.message = "the timeline's replay has come to a stop: what the warps wait for does not happen in it";
    throw f;
  }
  Time end = *std::max_element(ends_.begin(), ends_.end());
  const Multiprocessor& m = multiprocessors_[0];
  end = std::max({end, ceiling(l2_.free), ceiling(l2_writes_.free), ceiling(dram_.free)});
  result_.replayed = started_;
  result_.span_cycles = end;
  if (started_ == in_.turns.size() && triggers_ == started_ * in_.cluster_size) result_.tail = end - last_trigger_;
  // Clusters that are longer or shorter than those that stand for them take so much longer or shorter.
  const auto lengths = [&](uint64_t from, uint64_t to, uint64_t ReplayInput::Turn::* length) {
    double sum = 0;
    for (uint64_t k = from; k < to; ++k) sum += static_cast<double>(in_.turns[k].*length);
    return sum;
  };
  constexpr auto kOwn = &ReplayInput::Turn::length, kReplayed = &ReplayInput::Turn::recorded_length;
  const Time late = std::min(end, in_.head_start);
  result_.cycles =
      late + ceiling(static_cast<double>(end - late) * lengths(0, started_, kOwn) / lengths(0, started_, kReplayed));
  if (started_ < in_.turns.size()) {
    std::sort(ends_.begin(), ends_.end());
    const auto warm = started_ > first ? first : 0;  // without the first wave, if it is over
    const double each =
        static_cast<double>(ends_.back() - (warm ? ends_[warm - 1] : late)) / lengths(warm, started_, kReplayed);
    result_.cycles += ceiling(each * lengths(started_, in_.turns.size(), kOwn));
  }
  result_.tensor = m.tensor_busy;
  for (const auto& s : m.schedulers) result_.issue += s.issued / kSchedulers;
  result_.shared = m.port.busy;
  result_.l2 = l2_.busy;
  result_.l2_writes = l2_writes_.busy;
  result_.dram = dram_.busy;
  return std::move(result_);
}

}  // namespace timeline

ReplayResult replay(const ReplayInput& in, const Machine& m) { return timeline::Replay(in, m).run(); }

}  // namespace gpuless
