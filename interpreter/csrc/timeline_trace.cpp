#include "timeline_trace.h"

#include <algorithm>

#include "device.h"
#include "machine.h"
#include "mbarrier.h"

namespace gpuless {
namespace {

bool is_barrier(const std::string& opcode) {
  return opcode.rfind("bar.", 0) == 0 ? opcode.rfind("bar.warp", 0) != 0
                                      : opcode.rfind("barrier.", 0) == 0 && opcode.rfind("barrier.cluster", 0) != 0;
}

// Registers of a thread: what the launch bounds say, else what is alive at once, by linear scan (allocate.cpp), of
// which ptxas needs more or less.
int expected_registers(const Device& device, const Code& code, int threads) {
  if (code.source->max_registers || code.source->min_ctas) return assumed_registers(device, *code.source);
  std::map<Offset, int> places;
  for (size_t id = 0; id < code.offset_of.size(); ++id) {
    const Type type = code.source->registers[id];
    if (type != Type::pred) places[code.offset_of[id]] = std::max(1, ptx::size_of(type) / 4);
  }
  places.erase(kAlwaysTrue);  // of registers that nothing uses
  int count = 0;
  for (const auto& [place, registers] : places) count += registers;
  const int bound = code.source->max_threads[0] ? static_cast<int>(max_threads(*code.source)) : threads;
  const int most = device.registers_per_block / ((bound + kLanes - 1) / kLanes * kLanes);
  return std::clamp(count, 16, std::min(most, 255));
}

}  // namespace

// ---- A warp ----

Count* WarpTrace::begin(Warp& w, const Code& code, const Instruction& i, Mask mask) {
  if (&code != code_) {
    code_ = &code;
    base_ = launch_->number(code);
  }
  delta_ = Count();
  touched_ = w.cta->sheet->footprint.touched();
  operand_ = 0;
  signals_ = signals.size();
  if (const Statement& s = *code.statements[i.index]; mask && is_barrier(s.opcode)) {
    const int first = __builtin_ctz(mask), lane_count = static_cast<int>(s.operands.size());
    const bool reduces = s.opcode.find(".red") != std::string::npos;
    operand_ = w.operand<uint32_t>(i, i.destinations)[first] << kBarrierShift;
    if (lane_count > (reduces ? 3 : 1)) operand_ |= w.operand<uint32_t>(i, i.destinations + 1)[first];
  }
  return &delta_;
}

void WarpTrace::end(Warp& w, const Instruction& i, Step step, Mask mask) {
  w.cta->sheet->at(*code_, i.index)->add(delta_);
  if (step == Step::blocked) {  // it comes again
    signals.resize(signals_);
    return;
  }
  w.length.step(i, step, signals.size() > signals_ && signals.back().kind == Signal::Kind::wait);
  const size_t keep = w.length.count() - 1;
  if (keep < events.size()) {  // since a test that has failed
    const size_t first = events[keep].signal;
    signals.erase(signals.begin() + static_cast<std::ptrdiff_t>(first),
                  signals.begin() + static_cast<std::ptrdiff_t>(signals_));
    signals_ = first;
    events.resize(keep);
  }
  if (events.size() >= most_) {
    const size_t more = launch_->share();
    if (!more) {
      cut = true;
      return;
    }
    most_ += more;
  }
  TraceEvent e{};
  e.op = base_ + i.index;
  e.signal = static_cast<uint32_t>(signals_);
  e.signals = static_cast<uint16_t>(signals.size() - signals_);
  e.idle = !mask;
  e.wavefronts = static_cast<uint16_t>(std::min<uint64_t>(delta_.wavefronts, UINT16_MAX));
  const uint64_t local = (delta_.local_read + delta_.local_written) / kSectorBytes;
  const uint64_t bulk = (delta_.bulk_read + delta_.bulk_written + kSectorBytes - 1) / kSectorBytes;
  e.sectors = static_cast<uint32_t>(delta_.sectors + local + bulk);
  e.fresh = static_cast<uint32_t>(w.cta->sheet->footprint.touched() - touched_);
  e.operand = delta_.bulk_shared ? static_cast<uint32_t>(delta_.bulk_shared) : operand_;
  events.push_back(e);
}

void WarpTrace::signal(Signal::Kind kind, const Cta& target, const MBarrier& b, uint32_t count, uint32_t bytes) {
  // The lanes of an instruction most often name one mbarrier.
  if (signals.size() > signals_) {
    Signal& last = signals.back();
    if (last.kind == kind && last.rank == target.rank && last.address == b.address) {
      last.count += count;
      last.bytes += bytes;
      return;
    }
  }
  signals.push_back(
      {kind, static_cast<uint16_t>(target.rank), b.address, count, bytes, static_cast<uint32_t>(b.phase), b.expected});
}

// ---- A launch ----

LaunchTrace::LaunchTrace(const Launch& l) : size_(l.cluster_size()) {
  const Device& device = *current_device();
  const auto threads = static_cast<int>(l.block[0] * l.block[1] * l.block[2]);
  registers = expected_registers(device, *l.code, threads);
  blocks = std::max(1, resident_blocks(device, registers, threads, l.code->shared_bytes + l.dynamic_shared));
  const auto size = static_cast<int>(size_);
  groups = static_cast<uint64_t>(std::max(1, size == 1 ? device.multiprocessors : resident_clusters(device, 1, size)));
  const uint64_t clusters = l.grid_size() / size_, used = std::min(groups, clusters);
  lengths.resize(clusters);
  for (uint64_t k = 0; k < kRecordedGroups; ++k) {
    const uint64_t group = k * (used - 1) / (kRecordedGroups - 1);
    if (!recorded_groups.empty() && recorded_groups.back() == group) continue;
    recorded_groups.push_back(group);
    // The first, the last, and others between them.
    const uint64_t last = (clusters - 1 - group) / groups;
    const uint64_t most = std::min(last, std::max<uint64_t>(2 * static_cast<uint64_t>(blocks), 4) - 1);
    for (uint64_t n = 0; n <= most; ++n)
      recorded_clusters.push_back(group + groups * (n * last / std::max<uint64_t>(most, 1)));
  }
  std::sort(recorded_clusters.begin(), recorded_clusters.end());
}

void LaunchTrace::begin(Cta& cta) {
  const uint64_t cluster = cta.cluster->number;
  if (!std::binary_search(recorded_clusters.begin(), recorded_clusters.end(), cluster)) return;
  auto trace = std::make_unique<CtaTrace>();
  trace->number = cluster * size_ + static_cast<uint64_t>(cta.rank);
  trace->warps.resize(cta.warps.size());
  cta.sheet = &trace->sheet;
  for (size_t k = 0; k < cta.warps.size(); ++k) {
    WarpTrace& w = trace->warps[k];
    w.launch_ = this;
    cta.warps[k].trace = &w;
  }
  const std::lock_guard lock(mutex_);
  ctas_[trace->number] = std::move(trace);
}

void LaunchTrace::end(const Cluster& c) {
  for (const Warp* w : c.warps) lengths[c.number] += w->length.count();
}

size_t LaunchTrace::share() { return shares_.fetch_add(kShare) + kShare <= kMostEvents ? kShare : 0; }

uint32_t LaunchTrace::number(const Code& code) {
  const std::lock_guard lock(mutex_);
  const auto [entry, fresh] = codes_.emplace(&code, next_);
  if (fresh) next_ += static_cast<uint32_t>(code.instructions.size());
  return entry->second;
}

std::vector<CtaTrace*> LaunchTrace::ctas() const {
  std::vector<CtaTrace*> all;
  for (const auto& [number, trace] : ctas_) all.push_back(trace.get());
  return all;
}

void LaunchTrace::add_to(Sheet& sheet) const {
  for (const auto& [number, trace] : ctas_) sheet.add(trace->sheet);
}

}  // namespace gpuless
