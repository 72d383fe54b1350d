// What a replay's schedulers issue to: memory, tensor cores, mbarriers and barriers.
#include "timeline_state.h"

namespace gpuless::timeline {

// ---- Memory ----

// Sectors on their way through L2, and DRAM for those that are fresh: when they are there.
double Replay::move(double start, const TraceEvent& e, bool reads) {
  const double bytes = e.sectors * static_cast<double>(kSectorBytes);
  const double done = (reads ? l2_ : l2_writes_).take(start, bytes / c_.l2_rate);
  if (!e.fresh) return done;
  const double fresh = e.fresh * static_cast<double>(kSectorBytes) * in_.fresh_share;
  return std::max(done, dram_.take(start, fresh / c_.dram_rate));
}

// Of warps, in shared memory or L1: when it is done. It is in the queue of its scheduler until its turn comes.
double Replay::access(Warp& w, Time now, double cycles) {
  Multiprocessor& m = *w.block->multiprocessor;
  const auto start = static_cast<double>(now);
  auto& queue = m.schedulers[w.scheduler].memory;
  queue.push_back(std::max(start, m.lsu.free));
  if (static_cast<double>(queue.size()) > c_.memory_queue) queue.pop_front();
  m.port.take(start, cycles);
  return m.lsu.take(start, start < m.matrix_end ? cycles / (1 - m.matrix_share) : cycles);
}

void Replay::memory(Warp& w, const Op& op, const TraceEvent& e, Time now) {
  Multiprocessor& m = *w.block->multiprocessor;
  const bool copies = op.kind == Op::Kind::copy;
  const double bytes = e.sectors * static_cast<double>(kSectorBytes);
  const double end = access(w, now, std::max(1.0, e.wavefronts + std::ceil(bytes / c_.shared_rate)));
  if (!e.sectors) {
    // Of a cluster, as if all of it came from other multiprocessors.
    const double bytes = e.wavefronts * c_.shared_rate;
    const Time done = op.remote ? ceiling(m.from_cluster.take(end - 1, bytes / c_.cluster_rate) + c_.cluster_latency)
                                : ceiling(end - 1 + c_.shared_latency);
    set_results(w, op, done, Wait::shared);
    return;
  }
  const bool reads = copies || op.loads;
  Time done;
  if (op.cached && in_.from_l1 && !e.fresh) {
    done = ceiling(end - 1 + c_.l1_latency);
  } else {
    const double here = reads ? take_in(m, end - 1, bytes) : 0;
    done =
        static_cast<Time>(std::max(here, move(end - 1, e, reads))) + ceiling(e.fresh ? c_.dram_latency : c_.l2_latency);
  }
  if (copies) {
    w.copies = std::max(w.copies, done);
  } else if (op.loads) {
    set_results(w, op, done, Wait::memory);
  }
}

void Replay::bulk(Warp& w, const TraceEvent& e, Time now) {
  Multiprocessor& m = *w.block->multiprocessor;
  const double start = m.bulk.take(static_cast<double>(now), c_.bulk_interval);
  const bool loads = e.signals > 0;
  const Time moved = static_cast<Time>(e.sectors ? move(start, e, loads) : start);
  const double through_l2 = e.sectors * static_cast<double>(kSectorBytes) / c_.l2_rate;
  const Time latency = ceiling(c_.bulk_latency + (!e.sectors ? 0 : e.fresh ? c_.dram_latency : c_.l2_latency));
  for (uint32_t k = e.signal; k < e.signal + e.signals; ++k) {
    const Signal& signal = w.trace->signals[k];
    Block& target = *w.block->cluster->blocks[signal.rank];
    object(target, signal);
    Event arrival{};
    arrival.time = std::max(moved, static_cast<Time>(take_in(*target.multiprocessor, start, signal.bytes))) + latency;
    arrival.kind = Event::Kind::arrive;
    arrival.block = &target;
    arrival.address = signal.address;
    arrival.bytes = signal.bytes;
    push(arrival);
    write(target, arrival.time, signal.bytes, std::max(signal.bytes / c_.inward_rate, through_l2));
  }
  if (!loads) {
    m.port.take(static_cast<double>(now), e.operand / c_.shared_rate);
    w.bulk = std::max(w.bulk, moved + latency);
    w.bulk_read = std::max(w.bulk_read, moved + ceiling(c_.bulk_latency));
  }
  if (shown(w)) span(track("bulk copies"), name(loads ? "load" : "store"), now, std::max<Time>(now + 1, moved));
}

// What a bulk copy brings is written as it arrives, the last of it at `end`: so much at a time as TMA asks L2 for.
void Replay::write(Block& target, Time end, uint32_t bytes, double duration) {
  constexpr uint32_t kPart = 2048;
  for (uint32_t left = bytes; left > 0; left -= std::min(left, kPart)) {
    Event e{};
    e.time = end - std::min(end, static_cast<Time>(duration * (bytes - left) / bytes));
    e.kind = Event::Kind::write;
    e.block = &target;
    e.bytes = std::min(left, kPart);
    push(e);
  }
}

// ---- Tensor cores ----

void Replay::matrix(Warp& w, const Op& op, Time now) {
  Multiprocessor& m = *w.block->multiprocessor;
  auto& operations = w.block->matrix[static_cast<size_t>(w.id) / 4];
  const size_t number = w.matrix_issued++;
  if (operations.size() <= number) operations.resize(number + 1);
  Block::Matrix& o = operations[number];
  if (++o.issued < 4) return;
  m.matrix.push_back({w.block, static_cast<size_t>(w.id) / 4, number, static_cast<double>(now),
                      op.macs / c_.matrix_rate[op.matrix_type], 4.0 * op.matrix_bytes / c_.shared_rate});
  if (!m.multiplies) multiply(m);
}

// The next wgmma in order, on all four tensor cores.
void Replay::multiply(Multiprocessor& m) {
  m.multiplies = !m.matrix.empty();
  if (!m.multiplies) return;
  const Multiprocessor::Matrix next = m.matrix.front();
  m.matrix.pop_front();
  double start = next.since;
  for (const auto& s : m.schedulers) start = std::max(start, s.tensor);
  const double end = std::max(start + next.interval, m.port.take(start, next.reads));
  for (auto& s : m.schedulers) s.tensor = end;
  m.tensor_busy += next.interval;
  m.matrix_end = end;
  m.matrix_share = std::min(0.9, next.reads / (end - start));
  next.block->matrix[next.group][next.number].end = ceiling(end + c_.wgmma_latency);
  Event e{};
  e.time = ceiling(end);
  e.kind = Event::Kind::multiply;
  e.multiprocessor = number_of(m);
  push(e);
  if (&m == multiprocessors_.data()) {
    span(track("tensor cores"), name("wgmma"), static_cast<Time>(start), ceiling(end));
  }
  for (size_t k = next.group * 4; k < next.group * 4 + 4; ++k) {
    Warp& w = next.block->warps[k];
    if (!w.blocked || w.over) continue;
    if (op_of(w.trace->events[w.next]).kind == Op::Kind::wgmma_wait) wake(w, static_cast<Time>(start));
  }
}

// ---- Barriers ----

Block::Object& Replay::object(Block& block, const Signal& signal) {
  const auto [entry, fresh] = block.objects.emplace(signal.address, Block::Object());
  if (fresh) entry->second.expected = entry->second.pending = signal.expected;
  return entry->second;
}

void Replay::signals(Warp& w, const TraceEvent& e, Time now) {
  for (uint32_t k = e.signal; k < e.signal + e.signals; ++k) {
    const Signal& signal = w.trace->signals[k];
    Block& target = *w.block->cluster->blocks[signal.rank];
    Block::Object& o = object(target, signal);
    Event arrival{};
    arrival.kind = Event::Kind::arrive;
    arrival.block = &target;
    arrival.address = signal.address;
    arrival.count = signal.count;
    const bool remote = signal.rank != w.block->rank;
    arrival.time = now + ceiling(remote ? c_.cluster_latency : c_.signal_latency);
    if (signal.kind == Signal::Kind::copies) {
      o.pending += signal.bytes;
      arrival.time = std::max(arrival.time, w.copies);
      for (const Time t : w.copy_groups) arrival.time = std::max(arrival.time, t);
    } else {
      arrival.bytes = -static_cast<int64_t>(static_cast<int32_t>(signal.bytes));
    }
    push(arrival);
  }
}

void Replay::arrive(const Event& e) {
  Block::Object& o = e.block->objects[e.address];
  o.pending -= e.count;
  o.transactions -= e.bytes;
  if (o.pending > 0 || o.transactions) return;
  ++o.phase;
  o.pending += o.expected;
  o.since = e.time;
  std::vector<Warp*> waiting;
  waiting.swap(o.waiting);
  for (Warp* w : waiting) wake(*w, e.time);
}

void Replay::barrier(Warp& w, const Op& op, const TraceEvent& e, Time now) {
  auto& b = w.block->barriers[e.operand >> kBarrierShift & 15];
  const auto threads = static_cast<int>(e.operand & ((1u << kBarrierShift) - 1));
  b.expected = threads / kLanes;
  ++b.arrived;
  if (op.waits) {
    w.blocked = true;
    b.waiting.emplace_back(&w, now);
  } else {
    prepare(w);
  }
  settle(*w.block, b, now);
}

void Replay::settle(Block& block, Block::Barrier& b, Time now) {
  if (b.arrived < (b.expected ? b.expected : block.live)) return;
  b.arrived = 0;
  std::vector<std::pair<Warp*, Time>> waiting;
  waiting.swap(b.waiting);
  for (const auto& [w, since] : waiting) {
    const Time go = now + ceiling(c_.barrier_latency);
    account(*w, w->trace->events[w->next - 1].op, Wait::barrier, since + 1, go);
    w->free = go;
    wake(*w, now);
  }
}

void Replay::settle(Cluster& cluster, Time now) {
  if (!cluster.arrived || cluster.arrived < cluster.warps) return;
  cluster.arrived = 0;
  ++cluster.phases;
  cluster.since = now + ceiling(c_.cluster_latency);
  std::vector<Warp*> waiting;
  waiting.swap(cluster.waiting);
  for (Warp* w : waiting) wake(*w, now);
}

}  // namespace gpuless::timeline
